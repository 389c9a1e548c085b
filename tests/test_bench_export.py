"""The benchmark of artifacts: what its stages find is in one file, also if one of them fails or comes too late."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import upstream
from modelutils import images

import vggt_compile
from vggt_compile.bench import kinds
from vggt_compile.bench.export import AFTER, BESIDE, main, over_jit, read, together
from vggt_compile.bench.parts import Kernel
from vggt_compile.models import vggt


def found(tmp_path: Path, *argv: str) -> dict[str, Any]:
    out = tmp_path / "export.json"
    main(["--quick", *argv, "--work", str(tmp_path / "work"), "--out", str(out)])
    return json.loads(out.read_text())


def test_what_is_given_goes_before_what_quick_means(tmp_path: Path) -> None:
    args = read(["--quick", "--device", "cuda", "--work", str(tmp_path)])
    assert (args.device, args.preset, args.frames) == ("cuda", "tiny", [3, 5])
    assert (read(["--work", str(tmp_path)]).preset, read([]).work.is_dir()) == ("1b", True)


def test_artifacts_that_are_called_in_turn_are_told_apart_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.stem for path in read(["--also", "old/a.pt2", "b.pt2"]).also] == ["a", "b"]
    for also in (["old/a.pt2", "new/a.pt2"], ["compile.pt2"]):
        with pytest.raises(SystemExit):
            read(["--also", *also])
        assert "two are alike" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused_add_convolution_mul_106", kinds.TRITON),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<float>(int)", kinds.ORDER),
        ("void foldedNhwcToNhwcKernel<float>(int)", kinds.ORDER),
        ("void cudnn::engines_precompiled::convertTensor_kernel<float>(float)", kinds.ORDER),
        ("sm90_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc", kinds.CONVOLUTIONS),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688dgrad_optimized_tf32>", kinds.CONVOLUTIONS),
        ("void precomputed_convolve_sgemm<__nv_bfloat16, 128>", kinds.CONVOLUTIONS),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", kinds.OTHER),
        ("nvjet_sm90_tst_128x288_64x4_2x1_v_bz_coopA_bias_TNT", kinds.OTHER),
    ],
)
def test_kernels_are_of_a_kind(name: str, kind: str) -> None:
    """Names as they are on an H200."""
    assert kinds.kind_of(name) == kind
    assert kinds.by_kind([Kernel(name, 1.5), Kernel(name, 0.25)]) == {kind: {"kernels": 2, "ms": 1.75}}


def test_a_stage_that_fails_says_why_and_takes_no_other_along(tmp_path: Path) -> None:
    """There is no artifact to load, and no such checkout."""
    skipped = {*BESIDE, *AFTER} - {"jit", "artifact"}
    results = found(tmp_path, "--upstream", str(tmp_path), "--skip", *skipped)
    assert "ModuleNotFoundError" in results["jit"]["failed"]
    assert "NotAnArtifact: model.pt2: cannot be read" in results["artifact"]["failed"]  # no folder of this machine
    assert (tmp_path / "work" / "artifact.log").read_text().count("NotAnArtifact")


def test_a_stage_that_comes_too_late_is_ended(tmp_path: Path) -> None:
    results = found(tmp_path, "--limit", "0.1", "--skip", *(name for name in (*BESIDE, *AFTER) if name != "jit"))
    assert results["jit"] == {"failed": "no time left of 0 s"}


def test_stages_compile_beside_each_other_or_in_turn() -> None:
    assert together(["export", "jit"], in_turn=False) == [["export", "jit"]]
    assert together(["export", "jit"], in_turn=True) == [["export"], ["jit"]]


def test_the_ratio_is_of_counts_that_both_have() -> None:
    stages = {"jit": {"steady_s": {"3": 2.0}}, "artifact": {"steady_s": {"3": 1.0, "5": 1.0}}}
    assert over_jit(stages) == {"3": 0.5}
    assert over_jit({"jit": {"failed": ""}}) == {}


@pytest.mark.slow
@pytest.mark.skipif(upstream.VARIABLE not in os.environ, reason=f"minutes; set {upstream.VARIABLE}")
def test_all_stages_of_a_tiny_model(tmp_path: Path) -> None:
    another = tmp_path / "another.pt2"
    vggt_compile.export(vggt("tiny", outputs=("camera",)).eval(), images(1, 4, 3, 28, 42), frames=(3, 8), path=another)
    results = found(tmp_path, "--also", str(another))
    assert not [name for name in (*BESIDE, *AFTER) if "failed" in results[name]]
    assert results["export"]["bytes"] == (tmp_path / "work" / "model.pt2").stat().st_size
    assert set(results["over_jit"]) == {"3", "5"}
    called = {"artifact", "compile", "another"}
    assert {n: set(seconds) for n, seconds in results["both"]["steady_s"].items()} == {"3": called, "5": called}
    for name in ("jit", "outline"):
        assert results[name]["caches"]["autograd_cache_miss"] == 1
        assert results[f"{name}-again"]["caches"]["autograd_cache_hit"] == 1
    for name in ("jit", "outline", "heads", "once"):
        assert results[f"{name}-again"]["first_answer_s"] < results[name]["first_answer_s"]
