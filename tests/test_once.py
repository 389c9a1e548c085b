"""What a file of graphs spares and what it does not: tracing and compiling, but no condition under which they hold."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_run
import modelutils
import pytest
import torch
from cache_run import Trunk
from lookalikes import TableRotary
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vggt_compile import collect_reports, compile_once
from vggt_compile.errors import PlanError
from vggt_compile.families import trace
from vggt_compile.families.frame_loop import over_frames
from vggt_compile.models import vggt

FRAME: dict[str, Any] = {"plan": {"layers": {"0": {"scope": "frame"}}}}
DENSE: dict[str, Any] = {"plan": {}}


class OfImages(Trunk):
    """Takes [batch, frames, 6, 4, 8], of which the last two stand for what a patch is made of."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flatten(3))


def trunk(seed: int = 0) -> OfImages:
    model = OfImages(2).eval().requires_grad_(False)
    model.load_state_dict(cache_run.trunk(2, seed).state_dict())
    return model


def images(frames: int = 3) -> Tensor:
    return cache_run.images(frames).unflatten(3, (4, 8))


@pytest.fixture(autouse=True)
def _inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with torch.inference_mode():
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graphs"


def anew(path: Path, options: dict[str, Any] = FRAME, model: nn.Module | None = None) -> Callable[..., Any]:
    """As in a new process, as far as one process can show it."""
    torch._dynamo.reset()
    counters.clear()
    return compile_once(model or trunk(), path, options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the graphs of three frames."""
    folder = tmp_path_factory.mktemp("made")
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        anew(folder / "graphs")(images())
    return folder / "graphs"


@pytest.fixture
def kept(made: Path, path: Path) -> Path:
    """The same file for a test of its own."""
    return Path(shutil.copy(made, path))


def traces() -> int:
    return counters["stats"]["unique_graphs"]


def eager(images: Tensor, framed: bool = True, model: Any = None) -> Tensor:
    """The trunk with its first attention over frames inside of them, or as it is."""
    model = model or trunk()
    batch, frames, patches, channels = (x := images.flatten(3)).shape
    for i, (inside, over) in enumerate(zip(model.frame_blocks, model.global_blocks, strict=True)):
        x = inside(x.reshape(batch * frames, patches, channels))
        shape = (batch * frames, patches) if framed and i == 0 else (batch, frames * patches)
        x = over(x.reshape(*shape, channels)).reshape(batch, frames, patches, channels)
    return x


def test_a_file_serves_every_number_of_frames_without_a_trace(path: Path) -> None:
    run = anew(path)
    torch.testing.assert_close(run(images()), eager(images()))
    assert traces() == 1
    run = anew(path)
    with collect_reports() as reports:
        for frames in (3, 8, 17):
            torch.testing.assert_close(run(images(frames)), eager(images(frames)))
    assert traces() == 0
    assert not reports


def test_marks_on_images_make_no_difference(path: Path) -> None:
    marked = images()
    torch._dynamo.mark_dynamic(marked, 1)
    for _ in range(2):
        run = anew(path)
        for x in (images(), marked, images(8)):
            torch.testing.assert_close(run(x), eager(x))
    assert traces() == 0


def test_a_process_with_empty_caches_needs_no_trace(path: Path, tmp_path: Path) -> None:
    expected = anew(path)(images())
    code = (
        "import sys, torch; from test_once import images, trunk; from vggt_compile import compile_once\n"
        "def traced(*_, **__): raise AssertionError\n"
        "torch._dynamo.convert_frame.fullgraph_capture = traced\n"
        "with torch.inference_mode():\n"
        f"    out = compile_once(trunk(), {str(path)!r}, {FRAME!r})(images())\n"
        f"torch.save(out, {str(tmp_path / 'out')!r})\n"
    )
    there = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    settings = "torch._inductor.config.cpp.simdlen = 1\n"  # as conftest.py sets them
    code = f"import torch._inductor.config; {settings}{code}"
    found = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "other"), "PYTHONPATH": os.pathsep.join(there)}
    subprocess.run([sys.executable, "-c", code], env=found, check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "out"), expected)


def test_weights_are_those_of_the_model_at_hand(kept: Path) -> None:
    other = trunk(seed=1)
    torch.testing.assert_close(anew(kept, model=other)(images()), eager(images(), model=other))
    assert traces() == 0


def test_what_no_graph_serves_is_added(kept: Path) -> None:
    """Another autocast, and a batch of another size."""
    run = anew(kept)
    two = images().repeat(2, 1, 1, 1, 1)
    plain, both = run(images()), run(two)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(images())
    assert traces() == 2
    assert rounded.dtype == torch.bfloat16
    run = anew(kept)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(images()), rounded)
    assert torch.equal(run(two), both)
    assert torch.equal(run(images()), plain)
    assert traces() == 0


def test_another_plan_is_compiled_anew(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.testing.assert_close(anew(kept, DENSE)(images()), eager(images(), framed=False))
    assert traces() == 1
    assert "plan was" in caplog.text
    torch.testing.assert_close(anew(kept)(images()), eager(images()))
    assert traces() == 1


def test_another_setting_or_an_edit_of_ours_is_compiled_anew(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch._inductor.config.patch(max_fusion_size=2):
        anew(kept)(images())
        assert traces() == 1
        anew(kept)(images())
        assert traces() == 0
        monkeypatch.setattr("vggt_compile.once.source_hash", lambda: "edited")
        anew(kept)(images())
        assert traces() == 1


def test_edited_code_of_the_model_is_compiled_anew(
    kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = inspect.getsource
    edited = "vggt_compile.kept.inspect.getsource"
    monkeypatch.setattr(edited, lambda module: read(module) + "\n" * (module is cache_run))
    anew(kept)(images())
    assert traces() == 1
    assert "the code of cache_run is another" in caplog.text


@pytest.mark.parametrize("spoil", [lambda x: x[:-1], lambda x: x[:-1] + b"x", lambda x: b"{}\n", lambda x: b""])
def test_a_spoilt_file_is_written_anew(kept: Path, spoil: Callable[[bytes], bytes]) -> None:
    kept.write_bytes(spoil(kept.read_bytes()))
    torch.testing.assert_close(anew(kept)(images()), eager(images()))
    assert traces() == 1
    anew(kept)(images())
    assert traces() == 0


def test_a_changed_model_is_not_served(kept: Path) -> None:
    """Its guards ask for what the trace read of it."""
    model = trunk()
    model.global_blocks[1].attn.proj.register_forward_hook(lambda module, given, out: 2 * out)
    run = anew(kept, model=model)
    torch.testing.assert_close(run(images()), eager(images(), model=model))
    assert traces() == 1


def test_what_measures_is_refused(path: Path) -> None:
    with pytest.raises(PlanError, match="nothing that measures"):
        compile_once(trunk(), path, {"densities": True})


class Looping(OfImages):
    """Its other outputs are made a few frames at a time, by loops of the graph that share the code of one layer."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, n)) for n in (2, 3))

    def forward(self, images: Tensor) -> Any:
        def made(head: nn.Module) -> dict[str, Tensor]:
            def some(rows: Tensor) -> dict[str, Tensor]:
                return {"map": head(images.index_select(1, rows).relu())}

            maps: dict[str, Tensor] = over_frames(some, images.shape[1], 2, images.device)
            return maps

        return super().forward(images), *(made(head)["map"] for head in self.heads)


def test_a_graph_with_a_loop_is_read_back(path: Path) -> None:
    """Torch notes what it knows as trees as it traces one, and notes it again as it reads the graph."""
    model = Looping(2).eval().requires_grad_(False)
    options = {**FRAME, "outline_heads": True}
    want = anew(path, options, model)(images(5))
    again = anew(path, options, model)(images(5))
    assert counters["stats"]["unique_graphs"] == 0
    assert all(torch.equal(one, other) for one, other in zip(again, want, strict=True))
    for made, head in zip(want[1:], model.heads, strict=True):
        torch.testing.assert_close(made, head(images(5).relu()))


class Turning(OfImages):
    """Turns its patches by a table, for which a trace takes another form of the method."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.turn = TableRotary()

    def forward(self, images: Tensor) -> Tensor:
        places = torch.ones(1, 6, 2, dtype=torch.long)
        turned = self.turn(images.flatten(0, 1).flatten(2)[:, None], places)
        return super().forward(turned.view_as(images))


def unreadable(*_: Any, **__: Any) -> None:
    raise TypeError


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_class_that_was_imported_after_the_package_is_served(
    path: Path, spoilt: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing has compiled it in the second process, so nobody has given it its traceable form."""
    model = Turning(2).eval().requires_grad_(False)
    with trace.prepared(model):  # classes are behind it as they were before
        want = anew(path, FRAME, model)(images())
    if spoilt:
        monkeypatch.setattr(torch.compiler, "load_compiled_function", unreadable)
    with trace.prepared(model):
        trace.unprepare(model)
        torch.testing.assert_close(anew(path, FRAME, model)(images()), want)
        assert traces() == spoilt
    assert ("a graph cannot be used and is compiled anew: TypeError" in caplog.text) == spoilt


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are compiled for a CUDA device")
@pytest.mark.parametrize("plan", ["dense", "turbo"])
def test_kernels_for_a_gpu_come_from_the_file(path: Path, plan: str) -> None:
    model, x = modelutils.tiny(vggt).cuda(), modelutils.images(1, 8, 3, 112, 112).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        expected = modelutils.tensors(anew(path, {"plan": plan}, model)(x))
        assert traces() == 1
        found = modelutils.tensors(anew(path, {"plan": plan}, model)(x))
    assert traces() == 0
    assert all(torch.equal(found[name], value) for name, value in expected.items())
