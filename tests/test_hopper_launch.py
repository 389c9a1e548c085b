"""The kernel for Hopper in an artifact: its machine code, and a launch that is Triton's own, byte for byte."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vggt_compile.ops.hopper  # noqa: F401  registers the operator
from vggt_compile.ops.hopper_variant import Variant

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
ROOT = Path(__file__).parents[1]
LISTS = Variant(torch.bfloat16, 64, 128, 64, lists=True, own=True)
KINDS = [
    *((torch.bfloat16, 64, lists, own) for lists in (True, False) for own in (True, False)),
    *((torch.bfloat16, head_dim, one, one) for head_dim in (32, 128) for one in (True, False)),
    *((torch.float16, head_dim, True, True) for head_dim in (32, 64, 128)),
]
"""All of the width of published heads; of others, and of the other dtype, those that need most registers or least."""
VARIANTS = {
    f"{'lists' if lists else 'no lists'}{', own keys' if own else ''}, {dtype}, heads of {head_dim}": Variant(
        dtype, head_dim, 128, 64, lists, own
    )
    for dtype, head_dim, lists, own in KINDS
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_made_ahead_of_time_it_spills_nothing_and_is_launched_as_known(name: str, tmp_path: Path) -> None:
    from vggt_compile.ops.hopper_code_kernel import PARAMETERS, SCRATCH, code, parameters

    made = code(VARIANTS[name])
    assert made.image.startswith(b"\x7fELF")
    assert len(made.image) < 150_000
    found = parameters(made.ptx)
    assert found[: len(PARAMETERS)] == PARAMETERS
    assert len(found) <= len(PARAMETERS) + SCRATCH
    assert f".reqntid {32 * made.warps}" in made.ptx
    assert f".entry {made.name}(" in made.ptx
    source = tmp_path / "kernel.ptx"
    source.write_text(made.ptx)
    assembler = max((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"))  # the newest one
    command = [assembler, "-v", "-arch=sm_90a", source, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "serialized" not in said


def test_parameters_are_read_from_assembly() -> None:
    from vggt_compile.ops.hopper_code_kernel import parameters

    text = """.visible .entry name(
        .param .align 64 .b8 name_param_0[128],
        .param .u32 name_param_1,
        .param .u64 .ptr .global .align 1 name_param_2,
        .param .f32 name_param_3
    )"""
    assert parameters(text) == ("map", "u32", "u64", "f32")


def test_another_way_to_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vggt_compile.ops import hopper_code_kernel

    monkeypatch.setattr(hopper_code_kernel, "PARAMETERS", hopper_code_kernel.PARAMETERS[1:])
    hopper_code_kernel.code.cache_clear()
    with pytest.raises(RuntimeError, match="in a way that an artifact does not know yet: export with Triton"):
        hopper_code_kernel.code(LISTS)


def test_machine_code_survives_being_text(tmp_path: Path) -> None:
    from vggt_compile.ops.hopper_launch import _literal

    image = bytes(range(256)) * 3 + b"0x7?" + b"\0\x01" + b"1" + b'??="\\\n'
    main = "int main() { fwrite(x, 1, sizeof x - 1, stdout); }"
    program = f"#include <stdio.h>\nconst char x[] =\n{_literal(image)};\n{main}"
    (tmp_path / "x.cpp").write_text(program)
    subprocess.run(["g++", "-std=c++20", tmp_path / "x.cpp", "-o", tmp_path / "x"], check=True)
    assert subprocess.run([tmp_path / "x"], capture_output=True, check=True).stdout == image


def test_the_function_is_declared_as_the_operator_is() -> None:
    from vggt_compile.ops.hopper_launch import c_function

    types = {"Tensor": "AtenTensorHandle", "Optional[Tensor]": "AtenTensorHandle*", "int": "int64_t", "float": "double"}
    schema = torch.ops.vggt_compile.attention_hopper.default._schema
    wanted = [f"{types[str(argument.type)]} {argument.name}" for argument in schema.arguments]
    declared = re.match(r"AOTITorchError aoti_torch_cuda_attention_hopper\(([^)]*)\) __attr", c_function([]))
    assert declared is not None
    assert re.split(r",\s+", declared[1].strip()) == [*wanted, "AtenTensorHandle* out"]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What tests/hopper_launches.py prints, by case, and what it says."""
    if torch.cuda.is_available():
        pytest.skip("the driver of a GPU is there; tests/test_hopper_artifact.py asks it")
    if not (shutil.which("gcc") and shutil.which("g++")):
        pytest.skip("needs gcc and g++")
    folder = tmp_path_factory.mktemp("launches")
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    places = {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": paths}
    places |= {"MACHINE_CODE_DIR": triton.knobs.cache.dir}  # of the test above; what knows the fake driver stays apart
    command = [sys.executable, ROOT / "tests/hopper_launches.py", folder]
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {line["case"]: line for line in lines}, done.stderr


@pytest.mark.slow
def test_it_is_launched_as_triton_launches_it(launches: tuple[dict[str, Any], str]) -> None:
    """Tensor maps as the driver was asked to encode them, pointers, numbers, programs, threads, memory, stream."""
    from hopper_launches import CASES

    cases, _ = launches
    for name in CASES:
        by_triton, in_artifact = cases[name]["triton"], cases[name]["artifact"]
        count = len(in_artifact["arguments"])
        scratch = by_triton["arguments"][count:]
        assert not any(scratch), name
        assert by_triton | {"arguments": by_triton["arguments"][:count]} == in_artifact, name


@pytest.mark.slow
def test_errors_are_codes_and_words(launches: tuple[dict[str, Any], str]) -> None:
    cases, said = launches
    assert cases["the driver refuses"]["status"] == cases["unknown"]["status"] == 1
    assert "attention are aligned to 16 bytes: what the driver says" in said
    assert "this artifact has no machine code for attention of this kind" in said
