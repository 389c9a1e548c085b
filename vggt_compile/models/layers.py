"""The transformer block that every part of these models is made of, under the released checkpoints' names."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_compile.models.rope import Rotation, rotate

# Asked here and not in a forward: Dynamo of torch 2.11 cannot trace the question and breaks the graph at it.
AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla")))
"""Kinds of devices that have an autocast to switch off; the meta device has none."""


class Attention(nn.Module):
    """Multi-head self-attention: one fused projection, exactly one `scaled_dot_product_attention`, one projection out.

    Args:
        dim: width of a token, a multiple of `heads`.
        heads: number of heads.
        qk_norm: normalise each head's queries and keys (arXiv:2302.05442).
    """

    def __init__(self, dim: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """`[B, N, C]` → `[B, N, C]`; `rotation` holds the angles of the N tokens, shared by batch and heads."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # Norms and angles are fp32 under autocast and the values are not; attention wants one dtype.
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps with a GELU between them, `[..., dim]` → `[..., out]`."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned gain for each feature of a residual branch (arXiv:2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each behind its LayerScale.

    Args:
        dim: width of a token.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `dim`.
        layer_scale: initial gain of both branches; None leaves the branches unscaled.
        qk_norm: see `Attention`.
        eps: of the two block norms; the norms inside attention keep torch's default.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        qk_norm: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qk_norm)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dim)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


def init_linear(module: nn.Module) -> None:
    """The ViT initialisation, for `nn.Module.apply`: truncated normal weights of deviation 0.02, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x`, widened where it is narrower than fp32: exponentials and geometry do not survive 8 bits of mantissa."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off on `device`, whichever kind it is: heads run in their parameters' dtype."""
    return torch.autocast(device.type, enabled=False) if device.type in AUTOCAST else contextlib.nullcontext()
