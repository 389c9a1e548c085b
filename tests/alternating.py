"""Tiny models that alternate between attention inside frames and over frames, and what is true of each of them.

The names of modules, the special tokens, the heads and the attention itself can be chosen; an attention is a function
of q, k, v [B, H, N, D], so every unusual one is a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dropping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], enable_gqa=True)


def crossing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:])


def narrow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v[..., ::2])
    return torch.cat((out, out), -1)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def spelled_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def spelled_out_with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[-2], k.shape[-2], device=q.device)
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + mask).softmax(-1) @ v


class Attention(nn.Module):
    """Self-attention with fused projections around a core."""

    def __init__(self, heads: int, head_dim: int, core: Core = sdpa) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.core = heads, core
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.core(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class FunctionalAttention(nn.Module):
    """The same interface around PyTorch's own multi-head attention."""

    def __init__(self, heads: int, head_dim: int, *, need_weights: bool = False) -> None:
        super().__init__()
        self.mha, self.need_weights = nn.MultiheadAttention(heads * head_dim, heads, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=self.need_weights)[0]


class Block(nn.Module):
    def __init__(self, attention: nn.Module, width: int, name: str = "attn") -> None:
        super().__init__()
        self.norm, self.name = nn.LayerNorm(width), name
        self.add_module(name, attention)

    def forward(self, x: Tensor) -> Tensor:
        return x + getattr(self, self.name)(self.norm(x))


@dataclass(frozen=True)
class Spec:
    """How to build an `Alternating` model.

    Attributes:
        names: "vggt" (frame_blocks, global_blocks), "pi3" (one decoder list), or "hidden" (names that nobody knows).
        pairs: frame and global blocks, each.
        special: tokens of a frame before its patches.
        encoder: special tokens of an encoder before the trunk, None for no encoder.
        registers_only: global blocks that see special tokens only.
        reuse: all pairs are the same two modules.
        core: of every global attention; `cores` overrides it for single layers.
    """

    names: str = "vggt"
    pairs: int = 2
    special: int = 5
    patch: int = 2
    heads: int = 2
    head_dim: int = 8
    encoder: int | None = None
    registers_only: tuple[int, ...] = ()
    reuse: bool = False
    core: Core = sdpa
    cores: dict[int, Core] = field(default_factory=dict)
    functional: bool = False


class Alternating(nn.Module):
    """images [B, F, 3, H, W] → tokens [B, F, special + H/patch · W/patch, C]."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.heads * spec.head_dim
        self.patch_embed = nn.Conv2d(3, width, spec.patch, spec.patch)
        self.special = nn.Parameter(torch.randn(1, spec.special, width))
        if spec.encoder is not None:
            self.storage = nn.Parameter(torch.randn(1, spec.encoder, width))
            self.encoder = Block(Attention(spec.heads, spec.head_dim), width, "mix")
        inner = [self._block(sdpa) for _ in range(spec.pairs)]
        outer = [self._block(spec.cores.get(i, spec.core), functional=spec.functional) for i in range(spec.pairs)]
        if spec.reuse:
            inner, outer = inner[:1] * spec.pairs, outer[:1] * spec.pairs
        if spec.names == "vggt":
            self.frame_blocks, self.global_blocks = nn.ModuleList(inner), nn.ModuleList(outer)
        elif spec.names == "pi3":
            self.decoder = nn.ModuleList(block for pair in zip(inner, outer, strict=True) for block in pair)
        else:
            self.a, self.b = nn.ModuleList(inner), nn.ModuleList(outer)

    def _block(self, core: Core, *, functional: bool = False) -> Block:
        spec = self.spec
        made = (
            FunctionalAttention(spec.heads, spec.head_dim) if functional else Attention(spec.heads, spec.head_dim, core)
        )
        return Block(made, spec.heads * spec.head_dim, "mix" if spec.names == "hidden" else "attn")

    def _pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        if self.spec.names == "vggt":
            return list(zip(self.frame_blocks, self.global_blocks, strict=True))
        if self.spec.names == "pi3":
            return list(zip(self.decoder[::2], self.decoder[1::2], strict=True))
        return list(zip(self.a, self.b, strict=True))

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        x = self.patch_embed(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        if self.spec.encoder is not None:
            x = self.encoder(torch.cat((self.storage.expand(x.shape[0], -1, -1), x), 1))[:, self.spec.encoder :]
        x = torch.cat((self.special.expand(x.shape[0], -1, -1), x), 1)
        per_frame, width, special = x.shape[1], x.shape[2], self.spec.special
        for i, (inner, outer) in enumerate(self._pairs()):
            x = inner(x.reshape(batch * frames, per_frame, width))
            if i in self.spec.registers_only:
                registers = x[:, :special].reshape(batch, frames * special, width)
                registers = outer(registers).reshape(batch * frames, special, width)
                x = torch.cat((registers, x[:, special:]), 1)
            else:
                x = outer(x.reshape(batch, frames * per_frame, width))
        return x.reshape(batch, frames, per_frame, width)


def build(spec: Spec) -> Alternating:
    """The model with weights large enough that its attention has structure."""
    torch.manual_seed(0)
    model = Alternating(spec).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight"):
            parameter.mul_(3)
    return model


def images(spec: Spec, batch: int, frames: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 3, grid[0] * spec.patch, grid[1] * spec.patch, generator=generator)


@dataclass(frozen=True)
class Truth:
    """What a report must say of one attention, in execution order."""

    scope: str
    layer: int | None = None
    frames: int | None = None
    per_frame: int | None = None
    special: int | None = None


def truth(spec: Spec, frames: int, grid: tuple[int, int]) -> list[Truth]:
    """The attentions of `build(spec)` for such images. Families count block indices, others count global attentions."""
    per_frame = spec.special + grid[0] * grid[1]
    sites = [Truth("frame")] if spec.encoder is not None else []
    met = 0
    for i in range(spec.pairs):
        sites.append(Truth("frame"))
        if i in spec.registers_only:
            sites.append(Truth("other"))
            continue
        layer = met if spec.names == "hidden" else i
        sites.append(Truth("global", layer, frames, per_frame, spec.special))
        met += 1
    return sites
