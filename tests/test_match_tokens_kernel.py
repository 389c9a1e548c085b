"""The kernel of `match_tokens` fits into the shared memory of every GPU, however wide the tokens are."""

from __future__ import annotations

import pytest
import torch
from machine_code import LIMITS
from torch import Tensor

triton = pytest.importorskip("triton")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def compiled(source: Tensor, destination: Tensor, target: int) -> object:
    """The kernel from the very arguments with which it would be launched."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vggt_compile.ops.match_tokens_kernel import launch

    seen = {}

    class Recorder:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Recorder:
            return self

        def __call__(self, *args: object, **named: object) -> None:
            seen.update(kernel=self.kernel, args=args, named=named)

    launch(source, destination, wrap=Recorder)
    kernel, named = seen["kernel"], dict(seen["named"])
    options = {name: named.pop(name) for name in ("num_warps", "num_stages")}
    given = dict(zip(kernel.arg_names, seen["args"], strict=False)) | named
    constants = {(kernel.arg_names.index(name),): value for name, value in named.items()}
    signature = {
        name: "constexpr" if name in named else TYPES[x.dtype] if isinstance(x, Tensor) else "i32"
        for name, x in given.items()
    }
    aligned = {(place,): [["tt.divisibility", 16]] for place, x in enumerate(seen["args"]) if isinstance(x, Tensor)}
    source_code = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source_code, target=GPUTarget("cuda", target, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("target", LIMITS)
@pytest.mark.parametrize(("width", "dtype"), [(1024, torch.float32), (1024, torch.bfloat16), (64, torch.bfloat16)])
def test_compiled_it_fits(target: int, width: int, dtype: torch.dtype) -> None:
    tokens = torch.zeros(1, 300, width, dtype=dtype)
    assert compiled(tokens, tokens, target).metadata.shared <= LIMITS[target]
