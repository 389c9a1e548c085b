"""What is compiled early is compiled once, and with what torch asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import codecache, cpp_builder
from torch._inductor.exc import InductorError

from vggt_compile.artifact import early
from vggt_compile.artifact.later import Later
from vggt_compile.artifact.library import library
from vggt_compile.artifact.program import Program
from vggt_compile.artifact.request import Span
from vggt_compile.artifact.stages import Stages
from vggt_compile.report import Report

PLAIN = {"aot_inductor.precompile_headers": False}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.linear(x).sin(),)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What g++ and the serialization of weights do, in the order in which they begin."""
    seen: list[str] = []
    run, flags = cpp_builder._run_compile_cmd, codecache.determine_aoti_mmap_flags

    def _run_compile_cmd(command: str, cwd: str) -> None:
        seen.append(command)
        run(command, cwd)

    def determine_aoti_mmap_flags(size: int) -> Any:
        seen.append("weights")
        return flags(size)

    monkeypatch.setattr(cpp_builder, "_run_compile_cmd", _run_compile_cmd)
    monkeypatch.setattr(codecache, "determine_aoti_mmap_flags", determine_aoti_mmap_flags)
    return seen


def compiled(folder: Path, inductor: dict[str, Any], said: list[str] | None = None) -> None:
    """A library that gives what its model gives; what may go on meanwhile says so."""
    later = Later(lambda: None if said is None else said.append("meanwhile"))
    x, model = torch.rand(3, 64), Model().eval()
    with torch.no_grad():
        gm = torch.export.export(model, (x,)).module(check_guards=False)
        made = Program(Span((1, 1), (1, 1), (1, 1)), gm, x, Report(plan="none"), Stages(Span((1, 1), (1, 1), (1, 1))))
        path = library(made, "model", folder, [], inductor, meanwhile=[later]).path
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
        torch.testing.assert_close(runner.run([x])[0], model(x)[0])


def _of(commands: list[str], name: str) -> list[int]:
    return [index for index, command in enumerate(commands) if f"{name}.cpp" in command and " -c " in command]


def test_what_is_written_is_compiled_before_weights_are_there(commands: list[str], tmp_path: Path) -> None:
    mapped = {"aot_inductor.force_mmap_weights": True}  # as of a model with more than 2 GB
    compiled(tmp_path, PLAIN | mapped, commands)
    calls, kernels, weights = _of(commands, ".wrapper"), _of(commands, ".kernel"), commands.index("weights")
    assert len(calls) == len(kernels) == 1
    assert max(calls + kernels) < weights
    assert commands.index("meanwhile") < weights
    assert commands.count("meanwhile") == 1


def test_another_command_is_run_as_ever(commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "determine_aoti_mmap_flags", lambda size: (False, True))
    compiled(tmp_path, PLAIN)
    calls = _of(commands, ".wrapper")
    assert len(calls) == 2
    assert calls[0] < commands.index("weights") < calls[1]
    assert "USE_MMAP_SELF" in commands[calls[0]]
    assert "USE_MMAP_SELF" not in commands[calls[1]]


def test_what_the_compiler_says_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = codecache.write

    def broken(content: Any, extension: str, *given: Any, **named: Any) -> Any:
        return write(content + "\nnonsense" if extension == early.CALLS else content, extension, *given, **named)

    monkeypatch.setattr(codecache, "write", broken)
    with pytest.raises(InductorError, match="nonsense"):
        compiled(tmp_path, PLAIN)
