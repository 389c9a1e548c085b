"""What is compiled early is compiled once, and with what torch asks for."""

from __future__ import annotations

from pathlib import Path
from subprocess import run
from threading import current_thread, main_thread
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import codecache, cpp_builder
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.exc import CppCompileError, InductorError

from vggt_compile.artifact import behind, early, halves, headers
from vggt_compile.artifact.headers import Headers
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
        seen.append(command if current_thread() is not main_thread() else f"main: {command}")
        run(command, cwd)

    def determine_aoti_mmap_flags(size: int) -> Any:
        seen.append("weights")
        return flags(size)

    monkeypatch.setattr(cpp_builder, "_run_compile_cmd", _run_compile_cmd)
    monkeypatch.setattr(codecache, "determine_aoti_mmap_flags", determine_aoti_mmap_flags)
    return seen


@pytest.fixture(autouse=True)
def headers_begin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and so only where a test is about them."""
    if "headers" not in request.node.name:
        monkeypatch.setattr(Headers, "_begin", lambda *_: None)


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


def test_headers_are_compiled_meanwhile(commands: list[str], tmp_path: Path) -> None:
    """And g++ takes them: it marks such with `!` in its list of what it reads."""
    read: list[str] = []
    build = CppBuilder.build

    def built(builder: CppBuilder) -> None:
        build(builder)
        if ".half" in builder.get_command_line():
            command = [*builder.get_command_line().split(), "-H", "-fsyntax-only", "-Winvalid-pch"]
            read.append(run(command, check=True, capture_output=True, text=True).stderr)

    read_by = Headers.read_by

    def waited(made: Headers, options: CppTorchDeviceOptions) -> CppTorchDeviceOptions:
        assert made._made is not None
        made._made.result()
        return read_by(made, options)

    with mock.patch.object(CppBuilder, "build", built), mock.patch.object(Headers, "read_by", waited):
        compiled(tmp_path, PLAIN)
    (made,) = (command for command in commands if "-x c++-header" in command)
    assert commands.index(made) == 0
    assert len(read) == 2
    assert all(one.startswith("! ") and "headers.h.gch" in one.splitlines()[0] for one in read)


def test_headers_that_are_not_there_are_read_as_they_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = headers.asked(True, "cpu", (False, False), min_optimize=True, compile_only=True)
    monkeypatch.setattr(headers, "READ", ("no such header",))
    with caplog.at_level("INFO"), Headers(torch.fx.symbolic_trace(Model()), "cpu", PLAIN) as made:
        assert made._made is not None
        assert isinstance(made._made.exception(), CppCompileError)
        assert made.read_by(options).precompiled_header is None
    assert "headers are not compiled ahead" in caplog.text


def _of(commands: list[str], name: str) -> list[int]:
    return [index for index, command in enumerate(commands) if name in command and " -c " in command]


def test_what_is_written_is_compiled_before_weights_are_there(commands: list[str], tmp_path: Path) -> None:
    compiled(tmp_path, PLAIN, commands)
    calls, kernels, weights = _of(commands, ".wrapper"), _of(commands, ".kernel"), commands.index("weights")
    assert [".half0.cpp" in commands[index] for index in calls].count(True) == 1
    assert [".half1.cpp" in commands[index] for index in calls].count(True) == 1
    assert (len(calls), len(kernels)) == (2, 1)
    assert not any(commands[index].startswith("main: ") for index in calls + kernels)
    assert commands.index("meanwhile") < weights
    assert commands.count("meanwhile") == 1


def test_another_command_is_run_as_ever(commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "determine_aoti_mmap_flags", lambda size: (True, False))
    monkeypatch.setattr(halves, "halves", lambda code: None)
    compiled(tmp_path, PLAIN)
    *early_ones, late = _of(commands, ".wrapper")
    assert len(early_ones) == 1
    assert commands.index("weights") < late
    assert [commands[index].startswith("main: ") for index in (*early_ones, late)] == [False, True]
    assert all("USE_MMAP_EXTERNAL" in commands[index] for index in early_ones)
    assert "USE_MMAP_EXTERNAL" not in commands[late]


def test_halves_are_one_library(commands: list[str], tmp_path: Path) -> None:
    """Each has what the other lacks, and both have the class of kernels, as one that no other library sees.

    Where they are no C++, all of the code is compiled in one.
    """
    seen: list[str] = []

    def no_code(code: str) -> tuple[str, str]:
        seen.append(code)
        return "int", "int x;"

    with mock.patch.object(halves, "halves", no_code):
        compiled(tmp_path, PLAIN)
    first, second, whole = (commands[index] for index in _of(commands, ".wrapper"))
    assert all(sum(f".half{index}.cpp" in one for one in (first, second)) == 1 for index in (0, 1))
    assert ".wrapper.cpp" in whole
    assert not list(tmp_path.rglob("*half*"))
    (code,) = seen
    calls, around = halves.halves(code) or pytest.fail("torch writes otherwise")
    for mark, half in (
        ("void AOTInductorModel::run_impl(", calls),
        ("AOTInductorModel::_const_run_impl(", calls),
        ("AOTInductorModel::AOTInductorModel(", around),
        ("AOTInductorModelContainerRun(", around),
    ):
        assert [mark in one for one in (calls, around)] == [half is calls, half is around]
        assert code.count(mark) == half.count(mark)
    assert all(half.count(halves.SHARED) == 1 for half in (calls, around))


def test_a_program_of_other_code_has_no_halves() -> None:
    whole = halves.FACE + halves.FACE_ENDS + halves.ALONE + halves.HELD + halves.HELD_ENDS
    assert halves.halves(whole) is not None
    for mark in (halves.FACE, halves.FACE_ENDS, halves.ALONE, halves.HELD, halves.HELD_ENDS):
        assert halves.halves(whole.replace(mark, "")) is None
        assert halves.halves(whole.replace(mark, "") + mark) is None or mark == halves.HELD_ENDS


def test_what_the_compiler_says_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = codecache.write

    def broken(content: Any, extension: str, *given: Any, **named: Any) -> Any:
        return write(content + "\nnonsense" if extension == early.CALLS else content, extension, *given, **named)

    monkeypatch.setattr(codecache, "write", broken)
    with pytest.raises(InductorError, match="nonsense"):
        compiled(tmp_path, PLAIN)
