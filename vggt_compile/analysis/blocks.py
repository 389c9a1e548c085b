"""How well the means of blocks tell where attention lies: what chosen blocks cover of it, beside chance and the best.

Everything is about patch queries. Of their attention some goes to special keys, which every plan with blocks reads; the
rest is what blocks compete for, and shares are shares of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.analysis.probe import watch
from vggt_compile.errors import BadInput
from vggt_compile.graph.hilbert import hilbert_order
from vggt_compile.ops.random_blocks import random_blocks
from vggt_compile.ops.select_blocks import budget, pooled, select_blocks
from vggt_compile.ops.sizes import cdiv
from vggt_compile.site import Site, TokenLayout


@dataclass(frozen=True)
class Blocks:
    """How patches are cut, and how many key blocks a block of queries reads; parameters of the method `predict`."""

    keep: float = 0.25
    q_block: int = 128
    k_block: int = 64
    order: str = "raster"

    def patches(self, layout: TokenLayout) -> Tensor:
        """Where the patches of all frames lie in the sequence, [F · P], in the order in which blocks are cut."""
        frames, per_frame, special = _numbers(layout.frames, layout.per_frame, layout.special)
        places = torch.arange(frames * per_frame).view(frames, per_frame)[:, special:]
        if self.order == "hilbert":
            rows, columns = _numbers(*(layout.grid or (None, None)))
            places = places[:, list(hilbert_order(rows, columns))]
        return places.flatten()


@dataclass(frozen=True)
class LayerBlocks:
    """One global attention in blocks. All maps are [heads, query blocks, key blocks], means over batch items.

    Attributes:
        patches: of one frame, so that frames can be told in the maps.
        mass: share of a query block's attention that a key block gets; with `special` a row sums to 1.
        scores: softmax of the products of means, which is what `predict` ranks.
        kept, drawn, best: which blocks are read by `predict`, by `random`, and by the largest true mass; 0 to 1.
        special: [heads, query blocks], share of the attention that special keys get.
        rows: [query blocks], how many queries each has.
    """

    layer: int
    path: str
    frames: int
    patches: int
    mass: Tensor
    scores: Tensor
    kept: Tensor
    drawn: Tensor
    best: Tensor
    special: Tensor
    rows: Tensor

    def covered(self, read: Tensor) -> float:
        """Share of the attention to patches that some blocks get, over all queries and heads."""
        return float((self._weighted * read).sum() / self._weighted.sum())

    def curve(self, ranked_by: Tensor) -> Tensor:
        """[key blocks + 1]: the share that the first n blocks of each row cover, ranked by something, for every n."""
        order = ranked_by.argsort(-1, descending=True)
        gained = self._weighted.gather(-1, order).sum((0, 1)).cumsum(-1)
        return torch.cat((gained.new_zeros(1), gained / gained[-1]))

    @cached_property
    def _weighted(self) -> Tensor:
        return self.mass * self.rows[:, None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: shares, and the curves over the number of blocks."""
        special = float((self.special.mean(0) * self.rows).sum() / self.rows.sum())
        shares = {name: self.covered(read) for name, read in self.choices().items()}
        agree = float((self.kept * self.best).sum() / self.best.sum())
        curves = {"predicted": self.curve(self.scores).tolist(), "best": self.curve(self.mass).tolist()}
        return {"layer": self.layer, "path": self.path, "special": special} | {
            "covered": shares,
            "agree": agree,
            "curves": curves,
        }

    def choices(self) -> dict[str, Tensor]:
        return {"predicted": self.kept, "random": self.drawn, "best": self.best}


def analyze_blocks(model: nn.Module, images: Tensor, blocks: Blocks, seed: int = 0) -> list[LayerBlocks]:
    """Every global layer of a dense model on images [B, S, 3, H, W]; B is 1, because maps of scenes do not average.

    Raises:
        BadInput: more than one scene, no global attention, or a layout of tokens that nobody tells.
    """
    if images.shape[0] != 1:
        raise BadInput(f"{images.shape[0]} scenes at once: look at one after the other")
    found: list[LayerBlocks] = []
    watch(model, images, see=lambda site, q, k: found.append(of_layer(site, q, k, blocks, seed)))
    return found


def of_layer(site: Site, q: Tensor, k: Tensor, blocks: Blocks, seed: int = 0) -> LayerBlocks:
    """One attention, from its queries and keys [1, H, N, D]."""
    if site.layout is None or site.layout.special is None:
        raise BadInput(f"the special tokens of {site.path} are unknown; docs/architecture.md says how to add a family")
    places = blocks.patches(site.layout).to(q.device)
    scale = q.shape[-1] ** -0.5 if site.call.scale is None else site.call.scale
    patch_q, patch_k = q[:, :, places], k[:, :, places]
    mass, special = true_mass(patch_q, k, places, scale, blocks)
    size = (blocks.q_block, blocks.k_block)
    scores = pooled(patch_q, size[0], "mean") @ pooled(patch_k, size[1], "mean").mT * scale
    count, _ = budget(mass.shape[-1], blocks.keep, cdf=0.0, most=1.0)
    kept = select_blocks(patch_q, patch_k, blocks.keep, q_block=size[0], k_block=size[1], scale=scale)
    drawn = random_blocks(patch_q, patch_k, blocks.keep, seed * 1000 + (site.layer or 0), *size)
    frames, per_frame, skipped = _numbers(site.layout.frames, site.layout.per_frame, site.layout.special)
    rows = torch.full((mass.shape[-2],), float(size[0]))
    rows[-1] = len(places) - (len(rows) - 1) * size[0]
    return LayerBlocks(
        layer=site.layer or 0,
        path=site.path,
        frames=frames,
        patches=per_frame - skipped,
        mass=mass[0].cpu(),
        scores=scores.softmax(-1)[0].cpu(),
        kept=_read(mass, kept[0])[0].cpu(),
        drawn=_read(mass, drawn[0])[0].cpu(),
        best=_read(mass, mass.topk(count, -1).indices)[0].cpu(),
        special=special[0].cpu(),
        rows=rows,
    )


def true_mass(q: Tensor, k: Tensor, places: Tensor, scale: float, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The attention of patch queries [B, H, M, D] to all keys [B, H, N, D], pooled: means over queries, sums over keys.

    `places` [M] are the patches among the keys. Returns [B, H, nQ, nK] for them and [B, H, nQ] for special keys. One
    block of queries at a time, so memory is linear in the tokens.
    """
    filled = cdiv(len(places), blocks.k_block) * blocks.k_block - len(places)
    mass, special = [], []
    for part in q.split(blocks.q_block, 2):
        weights = (part.float() @ k.float().mT * scale).softmax(-1).mean(2)
        patches = weights[..., places]
        special.append(weights.sum(-1) - patches.sum(-1))
        mass.append(nn.functional.pad(patches, (0, filled)).unflatten(-1, (-1, blocks.k_block)).sum(-1))
    return torch.stack(mass, 2), torch.stack(special, 2).clamp(min=0)


def _read(like: Tensor, index: Tensor) -> Tensor:
    """Lists of blocks without unused slots as a map of zeros and ones."""
    return torch.zeros_like(like).scatter(-1, index.long(), 1.0)


def _numbers(*sizes: Any) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in sizes):
        raise BadInput(f"the layout of the tokens has sizes that are not known numbers: {', '.join(map(str, sizes))}")
    return sizes
