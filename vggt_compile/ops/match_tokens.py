"""For every token of one set the most similar one of another, by the cosine of the angle between them.

Tokens are brought to length one in fp32 and rounded to their dtype again, products are summed in fp32. All similarities
at once would be gigabytes at a hundred frames: the function below goes through them piece by piece, and on CUDA a
kernel keeps the best ones only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op

from vggt_compile.ops.sizes import pieces


@triton_op("vggt_compile::match_tokens", mutates_args=())
def match_tokens(
    source: Tensor, destination: Tensor, source_run: int | None = None, destination_run: int | None = None
) -> tuple[Tensor, Tensor]:
    """The destination that each source is most similar to; of equally similar ones the first.

    Args:
        source, destination: [B, S, C] and [B, T, C], of any strides, T ≥ 1. Each batch item is matched for itself. A
            token of zeros is similar to nothing, 0 to everything.
        source_run, destination_run: the i-th run of so many sources is matched with the i-th run of so many
            destinations only, which must be there; the last runs may be shorter. All with all where None.

    Returns:
        index [B, S] int64 and similarity [B, S] fp32, or fp64 if the tokens are.
    """
    source, destination = unit(source), unit(destination)
    if source.is_cuda:
        from vggt_compile.ops.match_tokens_kernel import launch

        return launch(source, destination, source_run, destination_run)
    with torch.autocast(source.device.type, enabled=False):  # similarities are fp32 whatever is around
        return reference(source, destination, source_run, destination_run)


@match_tokens.register_fake
def _shapes(
    source: Tensor, destination: Tensor, source_run: int | None = None, destination_run: int | None = None
) -> tuple[Tensor, Tensor]:
    shape = source.shape[:2]
    return source.new_empty(shape, dtype=torch.int64), source.new_empty(shape, dtype=_wide(source))


def unit(x: Tensor) -> Tensor:
    """[..., C] with every token of length one, in the dtype of `x`."""
    return F.normalize(x.to(_wide(x)), dim=-1).to(x.dtype)


def reference(
    source: Tensor, destination: Tensor, source_run: int | None = None, destination_run: int | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, for tokens of length one: products of some sources with all destinations, then of the next."""
    wide = _wide(source)
    columns = destination.to(wide).mT
    batch, count, _ = source.shape
    apart = _runs(source, destination, source_run, destination_run)
    best = []
    for part in pieces(count, batch * destination.shape[1] * wide.itemsize):
        products = source[:, part].to(wide) @ columns
        if apart is not None:
            products = products.masked_fill(apart[0][part] != apart[1], -torch.inf)
        best.append(products.max(-1))
    similarity, index = (torch.cat(found, 1) for found in zip(*best, strict=True))
    return index, similarity


def _runs(
    source: Tensor, destination: Tensor, source_run: int | None, destination_run: int | None
) -> tuple[Tensor, Tensor] | None:
    """Which run each source [S, 1] and each destination [T] is in, None where there is only one."""
    if source_run is None or destination_run is None:
        return None
    mine = torch.arange(source.shape[1], device=source.device).unsqueeze(-1) // source_run
    return mine, torch.arange(destination.shape[1], device=source.device) // destination_run


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
