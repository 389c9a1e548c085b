"""The kernel for Hopper: compiled it overlaps and spills nothing, it is chosen where it suits, on a GPU it is right."""

from __future__ import annotations

import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case, eager, operands, wanted
from numerics import assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from vggt_compile.ops import hopper
from vggt_compile.ops.attention import attention, reference
from vggt_compile.ops.hopper_variant import variant
from vggt_compile.ops.operands import Operands

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
LIMIT = 232448  # bytes of shared memory that one program may have on sm_90
BF16 = Case(
    batch=2, queries=300, always=70, patches=500, head_dim=64, q_block=128, k_block=64, dtype=torch.bfloat16, fused=True
)
CASES = {
    "lists": BF16,
    "no lists": replace(BF16, density=None),
    "nothing listed": replace(BF16, density=0.0),
    "nothing read": replace(BF16, density=0.0, always=0),
    "all listed": replace(BF16, density=1.0, always=1),
    "few listed, none always": replace(BF16, density=0.1, always=0),
    "whole units always": replace(BF16, always=128),
    "no key is cut": replace(BF16, always=64, patches=512),
    "one query": replace(BF16, queries=1),
    "one frame": replace(BF16, queries=37, always=5, patches=32, density=1.0),
    "own keys": replace(BF16, own=True),
    "own keys only": replace(BF16, own=True, density=0.0, always=0),
    "own keys, no lists": replace(BF16, own=True, density=None),
    "blocks of two": replace(BF16, q_block=256, k_block=128),
    "blocks of four": replace(BF16, k_block=256),
    "heads of 32": replace(BF16, head_dim=32),
    "heads of 128": replace(BF16, head_dim=128, own=True),
    "fp16": replace(BF16, dtype=torch.float16, own=True),
    "copies": replace(BF16, fused=False),
}


def on_gpu(x: Operands) -> Operands:
    return Operands(**{n: y.cuda() if isinstance(y, torch.Tensor) else y for n, y in vars(x).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_is_the_operator(name: str) -> None:
    x = operands(CASES[name])
    mine = on_gpu(x)
    assert hopper.suits(mine) or not hopper.here(mine.q.device)
    assert_as_accurate(attention(*vars(mine).values()).cpu(), eager(x), wanted(x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lists", "no lists", "own keys", "blocks of two", "heads of 128"])
def test_a_launch_finds_what_was_compiled_beside_other_work(name: str) -> None:
    from vggt_compile.ops.attention_hopper_kernel import attention_hopper

    x = on_gpu(operands(replace(CASES[name], batch=1)))
    if not hopper.here(x.q.device):
        pytest.skip("needs a Hopper GPU and Triton's Gluon")
    kernels, *_ = attention_hopper.device_caches[torch.cuda.current_device()]
    kernels.clear()
    hopper.compile_beside([x, x])
    finish_compiling()
    assert len(kernels) == 1
    attention(*vars(x).values())
    assert len(kernels) == 1


def test_each_variant_is_compiled_once_and_only_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(hopper, "_compile_ahead", lambda made_for, device: begun.append(made_for))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [operands(case) for case in (BF16, CASES["own keys"], BF16, replace(BF16, dtype=torch.float32))]
        given = [Operands(**{n: fake(mode, y) for n, y in vars(x).items()}) for x in given]
    hopper.compile_beside(given)
    assert begun == []
    monkeypatch.setattr(hopper, "here", lambda device: True)
    hopper.compile_beside(given)
    finish_compiling()
    assert sorted(map(str, begun)) == sorted(str(variant(x)) for x in given[:2])


def finish_compiling() -> None:
    for thread in threading.enumerate():
        if thread.name == "attention_hopper":
            thread.join()


def fake(mode: FakeTensorMode, x: Any) -> Any:
    return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x


FIRST = 128  # the keys of a tile, after which the maximum stays where keys are short enough
LENGTHS: dict[str, Any] = {
    "short": lambda q, k: (q, k),
    "growing": lambda q, k: (q, torch.cat([k[:, :, :FIRST] / 8, k[:, :, FIRST:] * 3], 2)),
    "one long key": lambda q, k: (q, torch.cat([k[:, :, :-1], k[:, :, -1:] * 40], 2)),
    "one long query": lambda q, k: (torch.cat([q[:, :, :200], q[:, :, 200:201] * 60, q[:, :, 201:]], 2), k),
    "beyond every range": lambda q, k: (q * 300, k * 30),
    "all alike": lambda q, k: (torch.ones_like(q), torch.ones_like(k)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_it_is_the_operator_however_long_queries_and_keys_are(lengths: str, dtype: torch.dtype) -> None:
    """Beside the case where no maximum can be passed by much, those where it must run, for all rows or for one."""
    x = operands(replace(BF16, queries=500, patches=1500, dtype=dtype, own=True, density=0.7))
    q, k = LENGTHS[lengths](x.q, x.k)
    x = replace(x, q=q, k=k)
    assert_as_accurate(attention(*vars(on_gpu(x)).values()).cpu(), eager(x), wanted(x))


@pytest.mark.gpu
def test_it_is_the_same_every_time() -> None:
    x = on_gpu(operands(replace(BF16, queries=5000, patches=7000, heads=4)))
    first = attention(*vars(x).values())
    assert all(torch.equal(attention(*vars(x).values()), first) for _ in range(5))


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31() -> None:
    """A fused projection of 2.3·10⁹ elements; of its last tokens the result is known from a copy."""
    tokens, heads = 400_000, 30
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    fused = torch.randn(1, tokens, 3, heads, 64, device="cuda", dtype=torch.bfloat16)
    assert fused.numel() > 2**31
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    q = q[:, :, -256:]
    blocks = (tokens + 63) // 64
    index = torch.arange(blocks - 40, blocks, device="cuda", dtype=torch.int32).expand(1, heads, 2, 40).contiguous()
    count = torch.full((1, heads, 2), 40, device="cuda", dtype=torch.int32)
    out = attention(q, k, v, index, count)
    near = Operands(
        *(y[:, :, -2560:].double() for y in (q, k, v)), None, None, 0, 128, 64, None, None, None, None, scale=0.125
    )
    assert (out.double() - reference(near)).abs().max() < 1e-2


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 80},
        {"dtype": torch.float32},
        {"weighted": True},
        {"q_block": 64},
        {"k_block": 32},
    ],
)
def test_what_it_cannot_do_is_left_to_the_other_kernel(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "here", lambda device: True)
    assert hopper.suits(operands(BF16))
    assert not hopper.suits(operands(replace(BF16, **change)))


def test_strides_that_it_cannot_load_are_left_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "here", lambda device: True)
    x = operands(BF16)
    odd = torch.randn(2, 2, 570, 65).bfloat16()[..., :64]
    assert not hopper.suits(replace(x, k=odd))
    assert not hopper.suits(replace(x, v=x.v.transpose(2, 3).contiguous().transpose(2, 3)))
    own = operands(replace(BF16, own=True))
    assert hopper.suits(own)
    assert not hopper.suits(replace(own, own_k=torch.randn(2, 2, 64, 300).bfloat16().transpose(2, 3)))
    assert not hopper.suits(replace(x, q=torch.randn(2 * 2 * 300 * 64 + 1).bfloat16()[1:].view(2, 2, 300, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiled_it_overlaps_and_spills_nothing(head_dim: int, tmp_path: Path) -> None:
    """As it is launched, where it needs most registers; tests/test_hopper_launch.py has all, made ahead of time."""
    kernel = compiled(operands(replace(BF16, head_dim=head_dim, own=True, density=0.5)))
    assert kernel.metadata.shared <= LIMIT
    source = tmp_path / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    assembler = max((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*"))  # the newest one
    command = [assembler, "-v", "-arch=sm_90a", source, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "serialized" not in said  # the assembler gives up overlap where it cannot follow the registers


def compiled(x: Operands) -> Any:
    """The kernel for sm_90, from the very arguments with which it would be launched."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from vggt_compile.ops.attention_hopper_kernel import _arguments, attention_hopper, constants

    made_for = variant(x)
    assert made_for is not None
    given = _arguments(x, made_for, x.q, x.block_count, torch.empty(1)) | constants(made_for)
    signature = {name: _type(name, given[name]) for name in attention_hopper.arg_names}
    names = attention_hopper.arg_names
    constants = {(names.index(name),): given[name] for name in names if signature[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(attention_hopper, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def _type(name: str, value: Any) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.bool: "i1"}
    if name.isupper():
        return "constexpr"
    if hasattr(value, "block_shape"):
        return f"tensordesc<{names[value.base.dtype]}{value.block_shape},{value.layout!r}>"
    if isinstance(value, torch.Tensor):
        return f"*{names[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"
