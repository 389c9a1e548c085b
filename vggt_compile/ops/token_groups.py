"""Tokens in groups: which group a token is in, the mean of each group, and a group's value for each of its tokens.

A group is one token that stays, and the sources that merge into it. Groups are numbered by the tokens that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op


@triton_op("vggt_compile::token_groups", mutates_args=())
def token_groups(order: Tensor, index: Tensor, similarity: Tensor, merged: int | None = None) -> Tensor:
    """The group of each token, [B, N] int64, where `merged` of S sources, or all, join that of their destination.

    Args:
        order: [N] int64, every token once, the S sources last. The others stay: the i-th of them is group i.
        index: [B, S] int64, the group that each source would join.
        similarity: [B, S], how well it fits there. The best ones merge, of equal ones the first. The other sources
            stay too, as the groups from N − S on, in their order.
    """
    (tokens,), (batch, sources) = order.shape, index.shape
    kept = tokens - sources
    if merged is not None:
        best = similarity.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(best).scatter(1, best, _count(sources, batch, best))
        alone = (rank >= merged).cumsum(1) + kept - 1
        index = torch.where(rank < merged, index, alone)
    groups = torch.cat((_count(kept, batch, order), index), 1)
    return torch.empty_like(groups).scatter(1, order.expand(batch, -1), groups)


def _count(size: int, rows: int, like: Tensor) -> Tensor:
    """0, 1, … in each of so many rows."""
    return torch.arange(size, device=like.device).expand(rows, -1)


@token_groups.register_fake
def _groups(order: Tensor, index: Tensor, similarity: Tensor, merged: int | None = None) -> Tensor:
    return order.new_empty(index.shape[0], order.shape[0])


@triton_op("vggt_compile::group_sizes", mutates_args=())
def group_sizes(group: Tensor, groups: int) -> Tensor:
    """How many tokens are in each group, [B, groups] fp32, from `group` [B, N]."""
    ones = torch.ones_like(group, dtype=torch.float32)
    return ones.new_zeros(group.shape[0], groups).scatter_add(1, group, ones)


@group_sizes.register_fake
def _sizes(group: Tensor, groups: int) -> Tensor:
    return group.new_empty(group.shape[0], groups, dtype=torch.float32)


@triton_op("vggt_compile::group_members", mutates_args=())
def group_members(group: Tensor) -> Tensor:
    """The tokens [B, N] int64 of the first group, then of the next, each group's in the order of the model."""
    return group.argsort(dim=1, stable=True)


@group_members.register_fake
def _members(group: Tensor) -> Tensor:
    return torch.empty_like(group, dtype=torch.int64)


@triton_op("vggt_compile::group_means", mutates_args=())
def group_means(x: Tensor, members: Tensor, size: Tensor) -> Tensor:
    """Means of the tokens `x` [B, H, N, D] in each group, [B, H, groups, D] in the dtype of `x`, summed in fp32.

    `members` [B, N] and `size` [B, groups] are those of `group_members` and `group_sizes`. A group of one token is that
    token, exactly. Sums run along the members, so that equal inputs give equal bits on one device. In memory the result
    lies token by token, [B, groups, H, D].
    """
    if x.is_cuda and x.dtype != torch.float64:
        from vggt_compile.ops.token_groups_kernel import launch

        return launch(x, members, size)
    return reference(x, members, size)


def reference(x: Tensor, members: Tensor, size: Tensor) -> Tensor:
    """The definition of `group_means`: the tokens laid out by group, and the sum of each run of them."""
    batch, heads, tokens, width = x.shape
    index = members[:, :, None, None].expand(batch, tokens, heads, width)
    rows = x.transpose(1, 2).gather(1, index).to(torch.promote_types(x.dtype, torch.float32))
    sums = torch.segment_reduce(rows, "sum", lengths=size.long(), axis=1, unsafe=True)
    return (sums / size[:, :, None, None]).to(x.dtype).transpose(1, 2)


@group_means.register_fake
def _means(x: Tensor, members: Tensor, size: Tensor) -> Tensor:
    batch, heads, _, width = x.shape
    return x.new_empty(batch, size.shape[1], heads, width).transpose(1, 2)


@triton_op("vggt_compile::from_groups", mutates_args=())
def from_groups(x: Tensor, group: Tensor) -> Tensor:
    """Every token gets what its group has: `x` [B, H, groups, D] and `group` [B, N] → [B, H, N, D].

    In memory it lies token by token, [B, N, H, D], as attention's output does.
    """
    batch, heads, _, width = x.shape
    index = group[:, :, None, None].expand(batch, group.shape[1], heads, width)
    return x.transpose(1, 2).gather(1, index).transpose(1, 2)


@from_groups.register_fake
def _spread(x: Tensor, group: Tensor) -> Tensor:
    batch, heads, _, width = x.shape
    return x.new_empty(batch, group.shape[1], heads, width).transpose(1, 2)
