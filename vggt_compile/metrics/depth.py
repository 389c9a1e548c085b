"""Depth maps up to scale: AbsRel and δ < 1.25, with one scale for all frames of a scene.

A scale for each frame would forgive frames that disagree with each other, which is what a reconstruction is about.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vggt_compile.metrics.cameras import check_finite

Alignment = Literal["median", "least_squares", "none"]


def depth_scale(predicted: Tensor, true: Tensor, valid: Tensor, align: Alignment = "median") -> Tensor:
    """What to multiply predicted depth `[..., S, H, W]` by: one scale `[...]` for each scene.

    `median` is the ratio of the medians (the lower one of an even count), `least_squares` minimises Σ (s·p − t)², and
    `none` is 1, for metric depth.
    """
    ours, theirs = (torch.where(valid, depth, torch.nan).flatten(-3) for depth in (predicted, true))
    if align == "median":
        return theirs.nanmedian(-1).values / ours.nanmedian(-1).values
    if align == "least_squares":
        return (ours * theirs).nansum(-1) / ours.square().nansum(-1)
    if align == "none":
        return torch.ones_like(ours[..., 0])
    raise ValueError(f"align is median, least_squares or none, got {align!r}")


def depth_metrics(
    predicted: Tensor, true: Tensor, valid: Tensor | None = None, align: Alignment = "median"
) -> dict[str, float]:
    """AbsRel (a fraction) and delta1.25 (a percentage) of depth maps `[..., S, H, W]`, means over pixels, then scenes.

    Args:
        valid: which pixels count, `[..., S, H, W]`; those without a true depth, 0 or not finite, never do.
        align: how the scale is found, see `depth_scale`.

    Raises:
        ValueError: shapes that differ or lack a dimension, a scene without a valid pixel, predicted depth that is NaN
            or infinite where it counts, or whose scale is not positive.
    """
    if predicted.shape != true.shape or predicted.ndim < 3 or (valid is not None and valid.shape != true.shape):
        shapes = ", ".join(str(list(t.shape)) for t in (predicted, true, valid) if t is not None)
        raise ValueError(f"predicted and true depth and the mask must be of one shape [..., S, H, W], got {shapes}")
    counts = true.isfinite() & (true > 0)
    if valid is not None:
        counts &= valid.bool()
    pixels = counts.sum((-3, -2, -1))
    if 0 in pixels.shape or not bool(pixels.all()):
        raise ValueError("a scene has no pixel with a valid true depth (positive, finite and in the mask)")
    check_finite("predicted depth maps", predicted[counts])
    predicted, true = predicted.double(), true.double()
    scale = depth_scale(predicted, true, counts, align)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError("the predicted depth has no positive scale: most of it is zero or negative")
    ours = predicted * scale[..., None, None, None]
    relative = torch.where(counts, (ours - true).abs() / true, 0.0)
    # As products, because a ratio of a negative depth would be below any bound.
    within = counts & (ours < 1.25 * true) & (true < 1.25 * ours)
    return {
        "AbsRel": (relative.sum((-3, -2, -1)) / pixels).mean().item(),
        "delta1.25": (100 * within.sum((-3, -2, -1)) / pixels).mean().item(),
    }
