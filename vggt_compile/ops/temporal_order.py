"""Patches in the order of a place and then of time, with those first that others merge into.

Tokens are frames of special tokens and then patches. The frames are cut into windows of so many, the last one shorter;
patches lie window by window, in a window place by place, and at a place frame by frame. In that sequence every run of
so many patches has as many destinations, evenly spread, and the rest are sources.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op


@triton_op("vggt_compile::temporal_order", mutates_args=())
def temporal_order(
    x: Tensor, special: int, patches: int, frames: int, reference: bool, run: int, destinations: int
) -> Tensor:
    """Tokens [N] int64: special ones, the reference's patches, destinations, sources; the last two in the sequence.

    Args:
        x: [B, H, F·(special + patches), D]; only its length and its device count.
        frames: of a window.
        reference: whether the patches of the first frame are kept out of the sequence.
        run, destinations: patch i of the sequence is a destination where i·destinations mod run < destinations. So
            there are ⌊(R − 1)·destinations / run⌋ + 1 of R patches.
    """
    token = torch.arange(x.shape[2], device=x.device)
    per_frame, first = special + patches, int(reference)
    frame, patch = token // per_frame - first, token % per_frame - special
    start = frame // frames * frames  # of the window
    wide = (x.shape[2] // per_frame - first - start).clamp(max=frames)
    place = start * patches + patch * wide + frame - start
    role = torch.where(place * destinations % run < destinations, _DESTINATION, _SOURCE)
    role = torch.where(frame < 0, _REFERENCE, role)
    role = torch.where(patch < 0, _SPECIAL, role)
    place = torch.where(role <= _REFERENCE, token, place)
    return (role * x.shape[2] + place).argsort()


_SPECIAL, _REFERENCE, _DESTINATION, _SOURCE = range(4)


@temporal_order.register_fake
def _shape(x: Tensor, *rest: Any, **named: Any) -> Tensor:
    return x.new_empty(x.shape[2], dtype=torch.int64)
