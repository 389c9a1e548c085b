"""How sharp an attention is, and where its mass goes: logit scale, entropy, itself, special tokens, other frames.

A is the attention matrix of one head, [N, N] with rows that sum to 1. It is never held: drawn rows of it are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vggt_compile.measures.operator import measure
from vggt_compile.measures.sample import Rows, drawn, each_head, exact, mean, quantities, weights
from vggt_compile.measures.tokens import middle, summed


@measure("logits", "logit_scale")
def logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """Logit scale s: standard deviation of a query's logits over keys, as the root of its mean square over queries.

    s² = scale² · tr(E[q qᵀ] Cov(k)), exact in O(N · D²). A constant that all logits of a row share does not count, as
    it does not for the softmax.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, tokens = q.shape[:2], q.shape[-2]
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    centre = middle(k)
    queries = summed(_squares, q) / tokens
    keys = summed(lambda part: _squares(part - centre), k) / tokens
    found = (queries * keys).sum((-2, -1)).unflatten(0, heads)
    return quantities(exact(scale * found.clamp(min=0).sqrt()))


def _squares(x: Tensor) -> Tensor:
    return x.mT @ x


@measure("entropy", "entropy")
def entropy(q: Tensor, k: Tensor, scale: float | None, *, rows: Rows = 512, seed: int = 0) -> Tensor:
    """Entropy of a row of A over log N, mean over rows: 1 where all keys get the same, 0 where one gets all."""
    tokens = q.shape[-2]
    places = drawn(tokens, rows, seed, q.device)

    def of_head(q: Tensor, k: Tensor) -> Tensor:
        found = torch.special.entr(weights(q[places], k, scale)).sum(-1) / math.log(tokens)
        return quantities(mean(found, tokens))

    return each_head(of_head, q, k)


@measure("itself", "to_itself")
def itself(q: Tensor, k: Tensor, scale: float | None, *, rows: Rows = 512, seed: int = 0) -> Tensor:
    """Share of a query's attention that its own key gets, mean over rows: 1 − D, the coefficient of mixing."""
    tokens = q.shape[-2]
    places = drawn(tokens, rows, seed, q.device)

    def of_head(q: Tensor, k: Tensor) -> Tensor:
        own = weights(q[places], k, scale).gather(1, places[:, None])[:, 0]
        return quantities(mean(own, tokens))

    return each_head(of_head, q, k)


@measure("mass", "special_to_patch", "patch_to_special", "across_frames")
def mass(
    q: Tensor, k: Tensor, scale: float | None, frames: int, special: int, *, rows: Rows = 512, seed: int = 0
) -> Tensor:
    """Share of special queries' attention that patches get, of patch queries' that special keys get, and of all
    queries' that tokens of other frames get.

    Uniform attention gives (P − special) / P, special / P and (F − 1) / F. Without special tokens the first is not
    defined and NaN.
    """
    per_frame = q.shape[-2] // frames
    tokens = torch.arange(frames * per_frame, device=q.device)
    is_special = tokens % per_frame < special
    groups = (tokens[is_special], tokens[~is_special])
    places = [group[drawn(len(group), rows, seed, q.device)] if len(group) else group for group in groups]

    def by_frame(q: Tensor, k: Tensor) -> Tensor:
        """[2, S, F]: what the special keys and the patches of each frame get."""
        found = weights(q, k, scale).unflatten(-1, (frames, per_frame))
        return torch.stack((found[..., :special].sum(-1), found[..., special:].sum(-1)))

    def away(found: Tensor, group: Tensor, whole: Tensor) -> Tensor:
        """What a group contributes to the share that goes to other frames, with its error."""
        shares = found.sum(0).scatter(1, group[:, None] // per_frame, 0.0).sum(-1)
        return mean(shares, len(whole)) * (len(whole) / len(tokens))

    def of_head(q: Tensor, k: Tensor) -> Tensor:
        found = [by_frame(q[group], k) for group in places]
        parts = torch.stack([away(*one) for one in zip(found, places, groups, strict=True) if len(one[1])])
        return quantities(
            mean(found[0][1].sum(-1), len(groups[0])),
            mean(found[1][0].sum(-1), len(groups[1])),
            torch.stack((parts[:, 0].sum(), parts[:, 1].norm())),
        )

    return each_head(of_head, q, k)
