"""A loop over runs of frames that stays a loop in the graph: its body is traced and compiled once, for any count.

`scan` is the loop that torch.compile and torch.export both know. Inductor writes what each turn gives straight into the
results, so nothing is copied, and memory beyond the results is that of one run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.utils._pytree import tree_map

Run = Callable[[Callable[[Tensor], Tensor]], Any]
"""A head over some frames: of a function that takes them out of a tensor [B, F, …], gives tensors [B, frames, …]."""


def over_frames(
    run: Callable[[Tensor], Any], frames: int, most: int, device: torch.device, *, equal: bool = False
) -> Any:
    """What `run` gives for all frames, made of a few frames at a time.

    Args:
        run: of the numbers of some frames, int64, gives tensors [B, as many, …] in any nest of tuples and
            dictionaries. Frames are independent of each other in it.
        frames: how many there are; may be symbolic. The last run repeats the last frame to be as long as the others.
        most: frames of a run.
        equal: as few runs as `most` allows are of equal length, and not of `most` frames. It is symbolic where `frames`
            is; up to `most` frames are one run without repetition.

    Returns:
        The same nest of tensors [B, frames, …].
    """
    turns = (frames - 1) // most + 1
    # The bounds hold anyhow: code for one frame is other code, and a tracer cannot tell how long a quotient may be.
    length = torch.sym_min(most, torch.sym_max(2, (frames - 1) // turns + 1)) if equal and most > 1 else most

    def turn(carried: Tensor, first: Tensor) -> tuple[Tensor, Any]:
        # Inductor tries kernels out on whatever lies in memory: none of it may lead out of the images.
        rows = (first + torch.arange(length, device=device)).clamp(0, frames - 1)
        return carried.clone(), run(rows)  # a scan carries something; here nothing depends on the turn before

    _, parts = scan(turn, torch.zeros((), device=device), length * torch.arange(turns, device=device))
    return tree_map(lambda part: _in_a_row(part)[:, :frames], parts)


def _in_a_row(parts: Tensor) -> Tensor:
    """[turns, B, frames of a turn, …] → [B, frames, …], which is a copy unless there is one scene.

    The copy is written out: a view that may have to be one asks whether there is one scene, and whether one turn.
    """
    scenes = parts.transpose(0, 1)
    if not isinstance(parts.shape[1], int) or parts.shape[1] != 1:
        scenes = scenes.clone(memory_format=torch.contiguous_format)
    return scenes.flatten(1, 2)
