"""Statistics from some rows of many, with the error that this makes.

Rows are drawn one from each of equal runs, by a hash that is the same on every device. The variance of a mean is
estimated as if they were drawn without regard to the runs, which is too large on average, never too small (Cochran,
Sampling Techniques, chapter 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from vggt_compile.ops.random_blocks import scrambled
from vggt_compile.registry import Range

Rows = Annotated[int, Range(8)]
"""How many queries or tokens are drawn; the error falls with its root."""


def drawn(count: int, rows: int, seed: int, device: torch.device) -> Tensor:
    """`rows` of `count` indices, ascending; all where there are no more."""
    rows = min(rows, count)
    slot = torch.arange(rows, device=device)
    start = slot * count // rows
    length = (slot + 1) * count // rows - start
    return start + scrambled(scrambled(slot) + 7919 * (seed + 1)) % length


def mean(values: Tensor, count: int) -> Tensor:
    """[..., S] values of S drawn of `count` rows → [..., 2]: their mean, and its standard error, 0 where S = count."""
    rows = values.shape[-1]
    error = values.std(-1) * ((1 / rows - 1 / count) ** 0.5) if rows < count else 0 * values.sum(-1)
    return torch.stack((values.mean(-1), error), -1)


def exact(value: Tensor) -> Tensor:
    """[...] → [..., 2] with no error."""
    return torch.stack((value, torch.zeros_like(value)), -1)


def quantities(*found: Tensor) -> Tensor:
    """Quantities [..., 2] → [..., quantities, 2]."""
    return torch.stack(found, -2)


def each_head(measure: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    """`measure(q, k)` of every [N, D] in [B, H, N, D], as [B, H, ...]; one at a time, for memory."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found: Sequence[Tensor] = [
        measure(one.to(wide), other.to(wide)) for one, other in zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)
    ]
    return torch.stack(list(found)).unflatten(0, q.shape[:2])


def weights(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Rows [S, N] of the attention matrix softmax(scale · q kᵀ) of queries [S, D] and keys [N, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q * scale @ k.mT).softmax(-1)  # scaling the product would be one more pass over [S, N]
