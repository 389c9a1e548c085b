"""What of the benchmark of probes runs without a GPU: its trunks, its page, and how it looks for the longest run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vggt_compile import explain, registry
from vggt_compile.bench import probes
from vggt_compile.bench.length import CARDS, RESERVE
from vggt_compile.bench.probes_page import page
from vggt_compile.bench.trunks import SIZE, TRUNKS
from vggt_compile.models.encoder import ViTConfig

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
GIB = {100: 8.0, 200: 12.0, 300: 16.0}


@pytest.mark.parametrize("record", sorted(BENCHMARKS.glob("probes*.json")), ids=lambda path: path.stem)
def test_the_committed_page_is_made_from_the_committed_record(record: Path) -> None:
    assert record.with_suffix(".md").read_text() == page(json.loads(record.read_text()))


@pytest.mark.parametrize(("name", "layers"), [("vggt", 24), ("pi3", 18)])
def test_a_trunk_has_the_layers_of_the_model(name: str, layers: int) -> None:
    with torch.device("meta"):
        model: Any = TRUNKS[name].build()
    over_frames = model.aggregator.global_blocks if name == "vggt" else model.decoder[1::2]
    assert TRUNKS[name].layers == len(over_frames) == layers


@pytest.mark.parametrize(("name", "depth"), [("vggt", 2), ("pi3", 4)])
def test_operands_are_those_of_the_attentions_that_the_model_has(name: str, depth: int) -> None:
    """Of one of published width that is not as deep: all layers have the same sizes."""
    trunk = TRUNKS[name]
    given = trunk.operands(2, "cpu", torch.bfloat16)
    with torch.device("meta"):
        model = trunk.build(depth=depth, encoder=ViTConfig(depth=1)).eval()
        images = torch.empty(1, 2, 3, *SIZE)
    with torch.inference_mode():
        report = explain(model, images, plan={"probe": ["mass"]})
    assert len(report.global_rows) == 2
    for row in report.global_rows:
        assert (row.heads, row.head_dim, row.special) == (trunk.heads, trunk.width // trunk.heads, trunk.special)
        assert (row.frames, row.per_frame) == (2, trunk.per_frame)
    assert given["q"].shape == (1, trunk.heads, 2 * trunk.per_frame, 64)
    assert given["x"].shape == given["update"].shape == (1, 2 * trunk.per_frame, trunk.width)
    assert {name for entry in registry.measures() for name in entry.reads} <= set(given)


@pytest.mark.parametrize("name", TRUNKS)
def test_the_benchmark_has_operands_for_every_measure(name: str) -> None:
    given = TRUNKS[name].operands(1, "cpu", torch.bfloat16)
    for entry in registry.measures():
        found = entry.operator(*(given[name] for name in entry.reads))
        assert found.shape[1] == (16 if "q" in entry.reads else 1)
        assert found[..., 0].isfinite().all() or entry.name == "mass"


def row(frames: int, probes: int = 0, **more: Any) -> dict[str, Any]:
    return {"frames": frames, "probes": probes, "seconds": frames / 10, "peak_gib": GIB[frames]} | more


def record(**more: Any) -> dict[str, Any]:
    return {"machine": {"gpu": "none"}, "compiled": False, "models": [], "longest": [], "measures": []} | more


def test_a_page_says_of_which_model_it_is() -> None:
    assert "VGGT-1B" in page(record())
    assert "π³" in page(record(model="pi3"))
    assert "one of the 18 layers" in page(record(model="pi3"))


def test_a_page_compares_with_the_same_number_of_frames() -> None:
    rows = [row(100), row(300), row(300, 15, seconds=75.0), {"frames": 200, "probes": 15, "out_of_memory": True}]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page(record(models=rows)).splitlines()]
    assert ["300", "15 measures", "75.00", "2.50", "16.0"] in cells
    assert ["200", "15 measures", "out of memory", "", ""] in cells


def test_a_page_has_times_dense_and_each_measure() -> None:
    record = {
        "machine": {"gpu": "one"},
        "compiled": False,
        "models": [
            {"frames": 100, "probes": 0, "seconds": 4.0, "peak_gib": 9.0},
            {"frames": 100, "probes": 13, "seconds": 6.0, "peak_gib": 9.5},
            {"frames": 300, "probes": 13, "out_of_memory": True},
        ],
        "measures": [{"frames": 100, "measure": "cosine", "ms": 2.0, "peak_gib": 0.1}],
    }
    text = page(record)
    assert "| 1.50" in text
    assert "out of memory" in text
    assert "2.0 ms, 0.10 GiB" in text


def test_a_page_tells_what_ran_from_what_the_line_says() -> None:
    models = [row(frames, probes) for probes in (0, 15) for frames in (100, 300)]
    more = [{"frames": 200, "probes": 15, "plan": "dense", "peak_gib": 12.0}]
    more += [{"frames": 900, "probes": 15, "plan": "dense", "out_of_memory": True}]
    text = page(record(models=models, longest=more))
    assert "- none: 100, 300\n- 15 measures: 100, 200, 300, not 900 (out of memory)\n" in text
    fits = str(int((CARDS[80] - RESERVE - 4) / 0.04))
    assert [line.split("|")[1].strip() for line in text.splitlines() if fits in line] == ["15 measures"]
    assert "How many frames fit" not in page(record(models=models))


def test_a_plan_of_the_longest_run_is_written_out() -> None:
    more = [{"frames": n, "probes": 15, "plan": "inside", "peak_gib": GIB[n]} for n in GIB]
    text = page(record(longest=more, longest_plan={"layers": {"*": {"scope": "frame"}}, "min_tokens": 0}))
    assert "- 15 measures, `inside`: 100, 200, 300\n" in text
    assert 'The plan `inside` is `{"layers": {"*": {"scope": "frame"}}}`' in text


def found(monkeypatch: pytest.MonkeyPatch, counts: list[int], error: Exception | None) -> Iterator[dict[str, Any]]:
    """What `longest` says where counts beyond 200 do not run, or end in an error."""

    def whole_model(run: Any, frames: int, probes: int, repeats: int) -> dict[str, Any]:
        assert repeats == 0
        if frames > 200 and error:
            raise error
        return {"frames": frames} | ({"out_of_memory": True} if frames > 200 else {"peak_gib": 1.0})

    monkeypatch.setattr(probes, "whole_model", whole_model)
    return probes.longest(lambda images: images, counts, 15)


def test_the_longest_run_is_looked_for_until_one_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(found(monkeypatch, [400, 100, 300, 200], None))
    assert [row["frames"] for row in rows] == [100, 200, 300]
    assert rows[-1]["out_of_memory"]


def test_an_error_of_a_library_ends_the_search_and_not_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(found(monkeypatch, [100, 300, 400], RuntimeError("CUBLAS_STATUS_ALLOC_FAILED\nmore")))
    assert rows[-1] == {"frames": 300, "probes": 15, "failed": "CUBLAS_STATUS_ALLOC_FAILED"}
    with pytest.raises(KeyError):  # a mistake of our own is not hidden
        list(found(monkeypatch, [300], KeyError("x")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vggt_compile.bench.probes", "--out", str(tmp_path), "--model", "pi3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "the benchmark of probes needs a CUDA device" in done.stderr
