"""The Triton kernel of `group_means`: one program for a group and some channels, which reads the members in order.

Law: what it writes is `token_groups.reference`, to the order in which the members of a group are summed, and that order
is always the same: there is no atomic addition.
"""

# mypy: disallow-incomplete-defs=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from vggt_compile.ops.sizes import cdiv

ROWS, LANES = 16, 128
"""Members that a program reads at a time, and how many of their channels."""


def launch(x: Tensor, members: Tensor, size: Tensor, *, wrap: Callable[[Any], Any] = wrap_triton) -> Tensor:
    """Means as in `group_means`, of tokens that are not in float64."""
    batch, heads, tokens, width = x.shape
    groups, channels = size.shape[1], int(heads * width)  # lengths may be symbols, the width is a constant
    end = size.long().cumsum(1)
    means = torch.empty((batch, groups, heads, width), dtype=x.dtype, device=x.device)
    wrap(_means)[(groups, cdiv(channels, LANES), batch)](
        x,
        members.contiguous(),
        end,
        means,
        *x.stride(),
        tokens,
        groups,
        D=int(width),
        CHANNELS=channels,
        LANES=LANES,
        ROWS=ROWS,
        num_warps=4,
    )
    return means.transpose(1, 2)


@triton.jit(do_not_specialize=["tokens", "groups"])
def _means(
    x, members, end, means, x_batch, x_head, x_token, x_lane, tokens, groups,
    D: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    group, item = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * LANES + tl.arange(0, LANES)
    there = channel < CHANNELS
    end += item * groups + group
    last = tl.load(end)
    first = tl.load(end - 1, mask=group > 0, other=0)
    members += item * tokens
    lane = x + item * x_batch + (channel // D).to(tl.int64) * x_head + (channel % D) * x_lane
    total = tl.zeros([LANES], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        token = tl.load(members + row, mask=row < last, other=0)
        values = tl.load(
            lane[None, :] + token[:, None] * x_token, mask=(row < last)[:, None] & there[None, :], other=0.0
        )
        total += tl.sum(values.to(tl.float32), 0)
    mean = total / (last - first).to(tl.float32)
    out = means + (item * groups + group) * CHANNELS + channel
    tl.store(out, mean.to(means.dtype.element_ty), mask=there)
