"""The operands of one attention, and what must hold between them whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Operands:
    """Arguments of `attention` under the same names, with `scale` given; its docstring says what they mean."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_index: Tensor | None
    block_count: Tensor | None
    always: int
    q_block: int
    k_block: int
    key_log_weight: Tensor | None
    own_k: Tensor | None
    own_v: Tensor | None
    own: Tensor | None
    scale: float

    def weight(self) -> Tensor | None:
        """The log-weights as a view [B, H, A + N]."""
        if self.key_log_weight is None:
            return None
        return self.key_log_weight.expand(*self.q.shape[:2], self.k.shape[2])

    def check(self) -> None:
        """ValueError for what no implementation could compute."""
        _must(self.q.ndim == self.k.ndim == self.v.ndim == 4, "q, k and v are [batch, heads, tokens, head_dim]")
        _must(self.q.dtype == self.k.dtype == self.v.dtype, "q, k and v have one dtype")
        _must(self.q.dtype in DTYPES, "q, k and v are bfloat16, float16, float32 or float64")
        _must(self.k.shape == self.v.shape, "k and v have one shape")
        _must(self.q.shape[:2] == self.k.shape[:2], "q and k have the same batch and heads")
        _must(self.q.shape[3] == self.k.shape[3], "q and k have the same head_dim")
        _must(self.scale > 0, "scale is positive")
        _must(self.always >= 0, "always is not negative")
        _must(self.always <= self.k.shape[2], "there are as many keys as are always read")
        self._check_lists()
        self._check_weight()
        self._check_own()

    def _check_lists(self) -> None:
        _must((self.block_index is None) == (self.block_count is None), "block_index comes with block_count")
        if self.block_index is None or self.block_count is None:
            return
        batch, heads, queries, _ = self.q.shape
        blocks = (queries + self.q_block - 1) // self.q_block
        _must(self.block_index.dtype == self.block_count.dtype == torch.int32, "block lists are int32")
        _must(self.block_index.ndim == 4, "block_index is [batch, heads, query blocks, capacity]")
        _must(self.block_count.shape == (batch, heads, blocks), "block_count is [batch, heads, query blocks]")
        _must(self.block_index.shape[:3] == (batch, heads, blocks), "block_index has a list for each query block")

    def _check_weight(self) -> None:
        if self.key_log_weight is None:
            return
        _must(self.key_log_weight.dtype == torch.float32, "key_log_weight is float32")
        _must(self.key_log_weight.ndim <= 3, "key_log_weight is [batch or 1, heads or 1, keys]")
        _must(self.key_log_weight.shape[-1] == self.k.shape[2], "key_log_weight has one number for each key")

    def _check_own(self) -> None:
        _must((self.own is None) == (self.own_k is None) == (self.own_v is None), "own, own_k, own_v come together")
        if self.own is None or self.own_k is None or self.own_v is None:
            return
        _must(self.own_k.shape == self.own_v.shape == self.q.shape, "own_k and own_v have the shape of q")
        _must(self.own_k.dtype == self.own_v.dtype == self.q.dtype, "own_k and own_v have the dtype of q")
        _must(self.own.dtype == torch.bool, "own is bool")
        _must(self.own.shape == (self.q.shape[2],), "own is [queries]")


def _must(holds: bool, law: str) -> None:
    """A condition on sizes that may be symbols."""
    torch._check_value(holds, lambda: f"vggt_compile::attention: {law}")
