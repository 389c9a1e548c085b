"""A compiled graph gives what its program gives where nothing compiles it, up to rounding.

How far rounding goes is a matter of the program: an iterative head may make a large difference of a small one, and a
choice of blocks may fall the other way. So the program is asked as well: it is run again on images that differ by
rounding, and an output may be off by a few times what that changes.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from vggt_compile.artifact.later import Later
from vggt_compile.artifact.library import Library
from vggt_compile.artifact.opened import answer, give, opened
from vggt_compile.artifact.program import Program
from vggt_compile.artifact.request import Span
from vggt_compile.errors import WrongCode

BOUND = {"fp32": 1e-3, "autocast": 5e-2, "bf16": 5e-2}
"""Relative to the norm of an output. In fp32 a thousand times what was seen. One rounding to bf16 is off by up to 2⁻⁹;
a hundred of them in a row, with random signs, by 2 %."""

ROUNDING = {"fp32": 2.0**-20, "autocast": 2.0**-8, "bf16": 2.0**-8}
"""How much images are changed, relative to each number: a few roundings."""

Outputs = dict[str, tuple[Tensor, float]]
DRAWS = 2
TIMES = 4.0
"""An output may be off by so many times the most that these draws changed it."""


class Expected(Later[Outputs]):
    """Each output that a program gives for a scene without a compiler, and the most that it may be off by.

    Attributes:
        images: the scene.
    """

    def __init__(self, made: Program, precision: str, device: torch.device) -> None:
        self.images = scene(made.span, device)
        super().__init__(partial(_outputs, made, self.images, precision))


def checked(made: Program, library: Library, want: Expected, device: torch.device) -> dict[str, Any]:
    """What a library gives for a scene, compared with what is expected.

    Returns:
        For the manifest: the scene, and for each output how far it was off and might have been.

    Raises:
        WrongCode: an output is off by more.
    """
    runner, images = opened(library.path, device), want.images
    if not library.holds_weights:
        give(runner, library.constants)
    with torch.no_grad():
        got = _named(answer(runner, images.clone()))
    seen = {}
    for name, (tensor, bound) in want.result().items():
        deviation = off(got[name], tensor) if name in got else math.inf
        seen[name] = {"deviation": _short(deviation), "bound": _short(bound)}
    wrong = {name: one for name, one in seen.items() if one["deviation"] > one["bound"]}
    if wrong:
        raise WrongCode(str(made.span), wrong)
    return {"batch": images.shape[0], "frames": images.shape[1], "outputs": seen}


def _outputs(made: Program, images: Tensor, precision: str) -> Outputs:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch.cuda.device(images.device) if images.is_cuda else nullcontext():
        want = _named(made.graph(images.clone()))
        near = [_named(made.graph(_rounded(images, precision, generator))) for _ in range(DRAWS)]
    noise = {name: max(off(other[name], tensor) for other in near) for name, tensor in want.items()}
    return {name: (tensor, max(BOUND[precision], TIMES * noise[name])) for name, tensor in want.items()}


def scene(span: Span, device: torch.device) -> Tensor:
    """Random images, the same each time, and as few as a span serves."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(span.batch[0], span.frames[0], 3, *span.size, generator=generator).to(device)


def off(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖; infinite where shapes, dtypes, or the places of numbers without a value differ."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    valued = want.isfinite()
    if not torch.equal(got.isfinite(), valued):
        return math.inf
    one, other = (x[valued].double() for x in (got, want))
    difference, norm = float((one - other).norm()), float(other.norm())
    return difference / norm if norm else math.inf if difference else 0.0


def _rounded(images: Tensor, precision: str, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    return images * (1 + ROUNDING[precision] * noise)


def _named(outputs: Any) -> dict[str, Tensor]:
    """Every tensor of nested outputs, under its path as in `pose_enc_list.3`; `output` where there is one alone."""
    leaves, _ = tree_flatten_with_path(outputs)
    return {".".join(map(_step, path)) or "output": leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _step(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))


def _short(number: float) -> float:
    return float(f"{number:.2g}")
