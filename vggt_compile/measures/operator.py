"""A measure is a function of tensors; registered, it is an operator whose shape is known without running it.

The operator is opaque to compilers: it runs as written, on sizes that are numbers by then. So a graph that holds it
stays one graph, also where its frames are symbolic, and a definition may loop over pieces.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vggt_compile.registry import Measure, add_measure, plain_type

Definition = Callable[..., Tensor]

OPERANDS = {
    **dict.fromkeys(("q", "k", "v", "out", "x", "update"), "Tensor"),
    **dict.fromkeys(("frames", "special"), "SymInt"),
    "scale": "float?",
}
"""What a measure may ask for by the names of its parameters, with the types of operator schemas.

q, k, v: [B, H, N, D] as the attention of the model reads them, before a plan changed anything. out: [B, H, N, D], what
came of the attention, under the plan. x: [B, N, C], the tokens of the residual stream before the attention. update:
[B, N, C], what is added to them. scale: of the logits, 1/√D where None. frames: F of them, each of N / F tokens.
special: tokens of a frame before its patches.
"""


def measure(name: str, *quantities: str) -> Callable[[Definition], Definition]:
    """Register a function as the measure `name`; keyword-only parameters are options of the plan language.

    The function returns [B, H, quantities, 2], or [B, 1, quantities, 2] where it reads no q: each quantity with its
    error, which is 0 where the quantity is exact.
    """

    def register(function: Definition) -> Definition:
        @functools.wraps(function)
        def run(*operands: Any, **options: Any) -> Tensor:
            device = next(operand.device for operand in operands if isinstance(operand, Tensor))
            with torch.no_grad(), torch.autocast(device.type, enabled=False):  # statistics are fp32 whatever is around
                return function(*operands, **options).float()

        operator: Any = torch.library.custom_op(
            f"vggt_compile::probe_{name}",
            run,
            mutates_args=(),
            schema=_schema(function),
            tags=(torch.Tag.cudagraph_unsafe,),  # eigenvalues wait for the device
        )
        operator.register_fake(functools.partial(_shape, "q" in _operands(function), len(quantities)))
        packet = getattr(torch.ops.vggt_compile, f"probe_{name}")
        add_measure(Measure(name, function, quantities, tuple(_operands(function)), packet.default))
        return function

    return register


def _operands(function: Definition) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


def _schema(function: Definition) -> str:
    options = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
    written = [f"{OPERANDS[name]} {name}" for name in _operands(function)]
    written += ["*"] * bool(options)
    written += [f"{plain_type(p.annotation).__name__} {p.name}={p.default}" for p in options]
    return f"({', '.join(written)}) -> Tensor"


def _shape(by_head: bool, quantities: int, first: Tensor, *rest: Any, **options: Any) -> Tensor:
    heads = first.shape[1] if by_head else 1
    return first.new_empty((first.shape[0], heads, quantities, 2), dtype=torch.float32)
