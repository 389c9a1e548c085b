"""Weights behind the code of a library are where torch would put them."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config

from vggt_compile.artifact.behind import Weights, put_behind
from vggt_compile.artifact.library import library
from vggt_compile.artifact.program import Program
from vggt_compile.artifact.request import Span
from vggt_compile.artifact.stages import Stages
from vggt_compile.report import Report

MAPPED = {"aot_inductor.force_mmap_weights": True}  # as of a model with more than 2 GB
SIZE = {"cpu": 960, "cuda": 840}
"""Of weights in bytes: a map of 64·3 numbers and a view of 18, of which a CPU keeps what it is a view of, 35, up to a
multiple of 64. The bias is in the code."""
CPU, GPU = pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)


class Model(nn.Module):
    """With weights that are no multiple of anything, and one that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.table = nn.Linear(64, 3), nn.Parameter(torch.rand(7, 5)[1:, :3])
        self.register_buffer("none", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.cat((self.linear(x).sin() @ self.table.t(), self.none @ self.table.t())),)


def compiled(folder: Path, device: str, inductor: dict[str, object]) -> bytes:
    """The end of a library that gives what its model gives: its weights, as many bytes as it says."""
    x, model, span = torch.rand(3, 64, device=device), Model().eval().to(device), Span((1, 1), (1, 1), (1, 1))
    folder.mkdir()
    with torch.no_grad():
        gm = torch.export.export(model, (x,)).module(check_guards=False)
        made = Program(span, gm, x, Report(plan="none"), Stages(span))
        path = library(made, "model", folder, [], inductor).path
        runners = {"cpu": torch._C._aoti.AOTIModelContainerRunnerCpu}
        if device == "cuda":
            runners["cuda"] = torch._C._aoti.AOTIModelContainerRunnerCuda
        torch.testing.assert_close(runners[device](str(path), 1).run([x])[0], model(x)[0])
    assert config.aot_inductor.package_constants_in_so
    content = path.read_bytes()
    place = content.find(content[-8:]) - 8
    (size,) = struct.unpack("q", content[place : place + 8])
    return content[-size:-8]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_they_are_what_torch_writes(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compiled(tmp_path / "ours", device, MAPPED)
    taken = []
    monkeypatch.setattr(Weights, "take", lambda self, graph: taken.append(graph))
    assert seen == compiled(tmp_path / "torch", device, MAPPED)
    assert len(taken) == 1
    assert len(seen) == SIZE[device]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, (False, False)),
        (MAPPED, (False, True)),
        (MAPPED | {"aot_inductor.package_constants_in_so": False}, (False, True)),
    ],
    ids=["few", "mapped", "given later"],
)
def test_only_mapped_ones_are_taken_from_torch(settings: dict[str, object], flags: tuple[bool, bool]) -> None:
    x = torch.arange(5.0)
    graph = SimpleNamespace(constants={"x": x}, folded_constants=[], get_original_value_of_constant=lambda _: x)
    with config.patch(settings):
        inside = config.aot_inductor.package_constants_in_so
        with Weights() as weights:
            weights.take(graph)
            assert weights.flags == flags
            taken = settings is MAPPED
            assert (weights._taken is not None) == taken
            assert config.aot_inductor.package_constants_in_so == (inside and not taken)
        assert config.aot_inductor.package_constants_in_so == inside


def test_a_file_that_is_no_such_library_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "no.so"
    path.write_bytes(bytes(range(64)))
    with pytest.raises(AssertionError, match="the size of its weights"):
        put_behind(path, torch.zeros(8, dtype=torch.uint8))
    assert path.read_bytes() == bytes(range(64))
