"""What test_cache.py runs in fresh processes: a small trunk, compiled by the plans on the command line.

    python cache_run.py OUT PLAN...

Writes OUT: for each plan (JSON) in turn the output of the compiled trunk and what Inductor's caches counted.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

FRAMES, PATCHES, CHANNELS = 3, 6, 32


class Attention(nn.Module):
    """Views, products and attention only: Inductor calls what exists and has nothing to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.proj = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Trunk(nn.Module):
    """Attention inside frames and over frames in turn, as in VGGT."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.frame_blocks = nn.ModuleList(Block() for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, patches, channels = x.shape
        for inside, over in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = inside(x.reshape(batch * frames, patches, channels))
            x = over(x.reshape(batch, frames * patches, channels)).reshape(batch, frames, patches, channels)
        return x


def trunk(depth: int = 1, seed: int = 0) -> Trunk:
    """Weights large enough that no plan gives nearly the numbers of another."""
    model, generator = Trunk(depth).eval().requires_grad_(False), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return model


def images(frames: int = FRAMES) -> Tensor:
    return torch.randn(1, frames, PATCHES, CHANNELS, generator=torch.Generator().manual_seed(1))


def main(out: str, *plans: str) -> None:
    from vggt_compile import vggt_sparse

    model, x, results = trunk(), images(), []
    for plan in map(json.loads, plans):
        counters.clear()
        with torch.no_grad():
            y = torch.compile(model, backend=vggt_sparse, options={"plan": plan})(x)
        results.append({"output": y, "counters": {name: dict(group) for name, group in counters.items()}})
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
