"""Caches, switches and logs: a second compile is warm and never stale, and a compile leaves no setting changed."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_run import images, trunk
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vggt_compile import collect_reports, registry, vggt_sparse
from vggt_compile.errors import NotRewritten
from vggt_compile.report import Report
from vggt_compile.sources import _package_hash, source_hash

ROOT = Path(__file__).parents[1]
DENSE: dict[str, Any] = {}
FRAME: dict[str, Any] = {"layers": {"0": {"scope": "frame"}}}
FRAME_BOTH: dict[str, Any] = {"layers": {"0-1": {"scope": "frame"}}}


@pytest.fixture(autouse=True)
def _fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled in this process; entries on disk are shared by this module's tests that run here."""
    folder = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compiled(model: nn.Module, plan: object = None, **inductor: Any) -> Callable[[Tensor], Tensor]:
    options = {} if plan is None else {"plan": plan}
    options |= {"inductor": inductor} if inductor else {}
    return torch.compile(model, backend=vggt_sparse, options=options)


def by_hand(model: nn.Module, x: Tensor, framed: set[int]) -> Tensor:
    """The trunk with some of its attentions over frames done inside frames, eager."""
    batch, frames, patches, channels = x.shape
    for i, (inside, over) in enumerate(zip(model.frame_blocks, model.global_blocks, strict=True)):
        x = inside(x.reshape(batch * frames, patches, channels))
        shape = (batch * frames, patches) if i in framed else (batch, frames * patches)
        x = over(x.reshape(*shape, channels)).reshape(batch, frames, patches, channels)
    return x


def assert_is(y: Tensor, model: nn.Module, framed: set[int], x: Tensor | None = None) -> None:
    """`y` is what the plan says and differs from what another plan would give."""
    x = images() if x is None else x
    torch.testing.assert_close(y, by_hand(model, x, framed))
    other = by_hand(model, x, set(range(len(model.global_blocks))) - framed)
    assert not torch.allclose(y, other, rtol=1e-3, atol=1e-4)


def hits() -> tuple[int, int]:
    """(hits, misses) of the outermost cache, AOTAutograd's."""
    seen = counters["aot_autograd"]
    return seen["autograd_cache_hit"], seen["autograd_cache_miss"]


# One process


def test_two_plans_on_one_model_give_two_results() -> None:
    model = trunk(2)
    for plan, framed in ((FRAME, {0}), (FRAME_BOTH, {0, 1}), (DENSE, set()), (FRAME, {0})):
        assert_is(compiled(model, plan)(images()), model, framed)


def test_two_models_with_two_plans_do_not_touch_each_other() -> None:
    one, two = trunk(2, seed=1), trunk(2, seed=2)
    run_one, run_two = compiled(one, FRAME), compiled(two, FRAME_BOTH)
    for _ in range(2):
        assert_is(run_one(images()), one, {0})
        assert_is(run_two(images()), two, {0, 1})


def test_equal_options_share_compiled_code() -> None:
    model = trunk()
    with collect_reports() as reports:
        for _ in range(3):
            compiled(model, json.loads(json.dumps(FRAME)), epilogue_fusion=True)(images())
    assert len(reports) == 1


def test_frames_may_change_between_calls() -> None:
    model = trunk()
    run = compiled(model, FRAME)
    with collect_reports() as reports:
        for frames in (2, 3, 4, 5):
            assert_is(run(images(frames)), model, {0}, images(frames))
    assert len(reports) == 2  # the first shape, then all shapes


def test_compiling_again_after_a_reset() -> None:
    model = trunk()
    run = compiled(model, FRAME)
    first = run(images())
    for reset in (torch.compiler.reset, torch._dynamo.reset):
        reset()
        with collect_reports() as reports:
            assert torch.equal(run(images()), first)
        assert len(reports) == 1


def test_the_compile_that_fills_dynamos_cache_says_so(recwarn: pytest.WarningsRecorder) -> None:
    def warned() -> int:
        return sum("recompile_limit" in str(entry.message) for entry in recwarn)

    model = trunk()
    with torch._dynamo.config.patch(recompile_limit=3), collect_reports() as reports:
        for tokens in (1, 2):
            compiled(model, FRAME | {"min_tokens": tokens})(images())
        assert warned() == 0
        assert_is(compiled(model, FRAME | {"min_tokens": 3})(images()), model, {0})
        assert warned() == 1
        assert "Trunk.forward" in reports[-1].notes[-1]
        # What the warning is about: torch runs the fourth plan eager and tells nobody but its log.
        assert_is(compiled(model, FRAME | {"min_tokens": 4})(images()), model, set())
        assert len(reports) == 3
        torch.compiler.reset()
        assert_is(compiled(model, FRAME | {"min_tokens": 4})(images()), model, {0})


# Caches on disk, seen from one process


def test_cache_key_holds_the_hash_of_our_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trunk()
    first = compiled(model, FRAME)(images())
    counters.clear()
    torch._dynamo.reset()
    assert torch.equal(compiled(model, FRAME)(images()), first)
    assert hits() == (1, 0)
    counters.clear()
    torch._dynamo.reset()
    monkeypatch.setattr("vggt_compile.caches.source_hash", lambda: "edited")
    assert torch.equal(compiled(model, FRAME)(images()), first)
    assert hits() == (0, 1)


def test_cache_key_tag_of_the_user_is_kept() -> None:
    model, seen = trunk(), []

    def inner(gm: Any, *_: Any, **__: Any) -> Any:
        seen.append(torch.compiler.config.cache_key_tag)
        return gm.forward

    with pytest.MonkeyPatch.context() as patch, torch.compiler.config.patch(cache_key_tag="theirs-"):
        patch.setattr("torch._inductor.compile_fx.compile_fx", inner)
        compiled(model, FRAME)(images())
        assert torch.compiler.config.cache_key_tag == "theirs-"
    assert seen == ["theirs-"]


@pytest.mark.filterwarnings("ignore:vggt_compile. the plan names layer")
def test_no_configuration_is_left_changed() -> None:
    def settings() -> list[dict[str, Any]]:
        return [c.get_config_copy() for c in (torch._inductor.config, torch._dynamo.config, torch.compiler.config)]

    before = settings()
    compiled(trunk(), FRAME, **{"max-autotune": True, "max_autotune_gemm_backends": "ATEN"})(images())
    assert settings() == before
    torch.compile(trunk(), backend=vggt_sparse, mode="max-autotune-no-cudagraphs")(images())
    assert settings() == before
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        compiled(trunk(), FRAME, max_autotun=True)(images())
    assert settings() == before


def test_inductor_settings_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def inner(gm: Any, _: Any, *, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", inner)
    compiled(trunk(), FRAME, **{"max-autotune": True})(images())
    assert seen == [{"max_autotune": True}]


# The hash


def test_hash_changes_with_an_edit_and_not_with_the_place(tmp_path: Path) -> None:
    code = """
        from vggt_compile.sources import _package_hash
        print(_package_hash("vggt_compile").hex())
        with open("passes/scope_to_frame.py", "a") as file:
            file.write("# edited")
        print(_package_hash("vggt_compile").hex())
        _package_hash.cache_clear()
        print(_package_hash("vggt_compile").hex())
    """
    tree = _copy_package(tmp_path / "elsewhere")
    first, again, edited = _python(["-c", textwrap.dedent(code)], tree).stdout.split()
    assert first == _package_hash("vggt_compile").hex()
    assert again == first, "what is imported did not change"
    assert edited != first


def test_hash_covers_packages_that_register_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_extension"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "operators.py").write_text("factor = 2\ndef run(site, state, edit): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = importlib.import_module("their_extension.operators").run
    before = source_hash()
    monkeypatch.setitem(registry._methods, ("keys", "theirs"), registry.Method("keys", "theirs", run))
    extended = source_hash()
    assert extended != before
    (package / "operators.py").write_text("factor = 3\n")
    assert source_hash() == extended, "what is imported did not change"
    _package_hash.cache_clear()
    assert source_hash() not in (before, extended)


# Several processes


def _copy_package(target: Path) -> Path:
    for name in ("vggt_compile", "passes"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def _python(arguments: list[str], tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **env}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def _process(folder: Path, *plans: object, tree: Path = ROOT, **env: str) -> tuple[list[Any], str]:
    """Results of cache_run.py in a fresh process with the cache in `folder`, and what it logged."""
    folder.mkdir(exist_ok=True)
    arguments = [str(ROOT / "tests" / "cache_run.py"), str(folder / "out.pt"), *map(json.dumps, plans)]
    done = _python(arguments, tree, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"), **env)
    return torch.load(folder / "out.pt"), done.stderr


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """The first process: one plan, an empty cache, logs and trace on."""
    folder = tmp_path_factory.mktemp("processes")
    results, log = _process(folder, FRAME, TORCH_LOGS="+vggt_compile", TORCH_TRACE=str(folder / "trace"))
    return folder, results[0], log


def test_new_process_with_the_same_plan_is_warm_and_with_another_plan_is_right(cold: tuple[Path, Any, str]) -> None:
    folder, first, _ = cold
    assert first["counters"]["aot_autograd"]["autograd_cache_miss"] == 1
    (same, other), _ = _process(folder, FRAME, DENSE)
    assert same["counters"]["aot_autograd"].get("autograd_cache_hit") == 1
    assert same["counters"]["inductor"].get("fxgraph_cache_hit") == 1
    assert torch.equal(same["output"], first["output"])
    assert other["counters"]["aot_autograd"].get("autograd_cache_hit") is None
    assert_is(first["output"], trunk(), {0})
    assert_is(other["output"], trunk(), set())


def test_log_shows_the_report_and_every_pass(cold: tuple[Path, Any, str]) -> None:
    _, _, log = cold
    lines = [line for line in log.splitlines() if "vggt_compile" in line]
    assert any(line.startswith("I") and "plan 'custom', family 'vggt'" in line for line in lines)
    assert "1 of 2 attentions rewritten" in log
    assert any(line.startswith("V") and "global_blocks.0.attn: scope applied: frame" in line for line in lines)
    assert all("[0/0]" in line for line in lines if "/rewrite.py" in line), "the compile id is missing"


def test_trace_holds_plan_report_and_both_graphs(cold: tuple[Path, Any, str]) -> None:
    folder, _, _ = cold
    text = "".join(path.read_text() for path in (folder / "trace").glob("*.log"))
    heads = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"artifact"' in line]
    names = [head["artifact"]["name"] for head in heads if head["artifact"]["name"].startswith("vggt_compile")]
    assert sorted(names) == [f"vggt_compile_{part}" for part in ("graph_after", "graph_before", "plan", "report")]


OPERATOR = """
    from dataclasses import replace

    import torch
    from torch import Tensor
    from vggt_compile.registry import method

    @torch.library.triton_op("vggt_compile_test::ordered", mutates_args=())
    def ordered(x: Tensor) -> Tensor:
        return torch.sort(x, dim=-2, descending=DESCENDING).values

    @method("keys", "ordered")
    def order_values(site, state, edit):
        v = edit.call(torch.ops.vggt_compile_test.ordered.default, state.v)
        return replace(state, v=v, axes={**state.axes, "keys": "ordered"})
"""


def test_edited_operator_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    """The body of a traceable operator is traced away below the cache's key: only our hash tells an edit."""
    tree = _copy_package(tmp_path / "tree")
    outputs = []
    for descending in ("False", "True"):
        text = textwrap.dedent(OPERATOR).replace("DESCENDING", descending)
        (tree / "passes" / "order_values.py").write_text(text)
        (result,), _ = _process(tmp_path / "runs", {"layers": {"0": {"keys": "ordered"}}}, tree=tree)
        outputs.append(result["output"])
    for output, descending in zip(outputs, (False, True), strict=True):
        torch.testing.assert_close(output, _with_ordered_values(descending))
    assert not torch.allclose(*outputs, rtol=1e-3, atol=1e-4)


def _with_ordered_values(descending: bool) -> Tensor:
    model, x = trunk(), images()
    over = model.global_blocks[0].attn
    x = model.frame_blocks[0](x.flatten(0, 1)).reshape(1, -1, x.shape[-1])
    q, k, v = over.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    v = torch.sort(v, dim=-2, descending=descending).values
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return over.proj(out.transpose(1, 2).flatten(2)).reshape(images().shape)


# Switches


@pytest.mark.parametrize("name", ["scope", "SCOPE_TO_FRAME", "other,frame"])
def test_disabled_method_is_not_run_and_the_report_says_so(name: str) -> None:
    model = trunk()
    with torch._inductor.config.patch(disabled_passes=name), collect_reports() as reports:
        assert_is(compiled(model, FRAME)(images()), model, set())
    assert _reason(reports[0]) == "scope disabled by torch._inductor.config.disabled_passes"


def test_disabled_passes_of_one_compile() -> None:
    model = trunk()
    with collect_reports() as reports:
        assert_is(compiled(model, FRAME, disabled_passes="scope")(images()), model, set())
        assert_is(compiled(model, FRAME)(images()), model, {0})
    assert [_reason(report) is None for report in reports] == [False, True]


@pytest.mark.parametrize("name", ["", "scop", "cope_to_frame", "keys", "scope_to_frame_and_more"])
def test_disabling_something_else_changes_nothing(name: str) -> None:
    model = trunk()
    with torch._inductor.config.patch(disabled_passes=name), collect_reports() as reports:
        assert_is(compiled(model, FRAME)(images()), model, {0})
    assert _reason(reports[0]) is None


def test_strict_does_not_pass_over_a_disabled_method() -> None:
    run = torch.compile(trunk(), backend=vggt_sparse, options={"plan": FRAME, "strict": True})
    failure = pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="disabled_passes")
    with torch._inductor.config.patch(disabled_passes="scope"), failure as caught:
        run(images())
    assert isinstance(caught.value.inner_exception, NotRewritten)


def _reason(report: Report) -> str | None:
    return report.global_rows[0].reason


def test_stance_force_eager_runs_the_model_as_it_is() -> None:
    model = trunk()
    run = compiled(model, FRAME)
    with collect_reports() as reports:
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(run(images()), model(images()))
        assert reports == []
        assert_is(run(images()), model, {0})
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_is(run(images()), model, {0})
    assert len(reports) == 1


def test_reports_reach_plain_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "vggt_compile"):
        compiled(trunk(), FRAME)(images())
    ours = [record for record in caplog.records if record.name.startswith("vggt_compile")]
    levels = {record.name: record.levelname for record in ours}
    assert levels == {"vggt_compile.backend": "INFO", "vggt_compile.rewrite": "DEBUG"}
