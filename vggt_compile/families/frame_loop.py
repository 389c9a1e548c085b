"""A loop over runs of frames that stays a loop in the graph: its body is traced and compiled once, for any count.

`scan` is the loop that torch.compile and torch.export both know. Inductor writes what each turn gives straight into the
results, so nothing is copied, and memory beyond the results is that of one run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.utils._pytree import tree_map

Run = Callable[[Callable[[Tensor], Tensor]], Any]
"""A head over some frames: of a function that takes them out of a tensor [B, F, …], gives tensors [B, frames, …]."""


def over_frames(run: Callable[[Tensor], Any], frames: int, length: int, device: torch.device) -> Any:
    """What `run` gives for all frames, made of `length` frames at a time.

    Args:
        run: of the numbers of `length` frames, int64, gives tensors [B, length, …] in any nest of tuples and
            dictionaries. Frames are independent of each other in it.
        frames: how many there are; may be symbolic. The last run repeats the last frame to be as long as the others.

    Returns:
        The same nest of tensors [B, frames, …].
    """

    def turn(carried: Tensor, first: Tensor) -> tuple[Tensor, Any]:
        rows = (first + torch.arange(length, device=device)).clamp(max=frames - 1)
        return carried.clone(), run(rows)  # a scan carries something; here nothing depends on the turn before

    firsts = length * torch.arange((frames + length - 1) // length, device=device)
    _, parts = scan(turn, torch.zeros((), device=device), firsts)
    return tree_map(lambda part: part.transpose(0, 1).flatten(1, 2)[:, :frames], parts)


def in_passes(run: Run, frames: int, passes: int) -> Any:
    """The same without a loop, for code that may hold none: so many calls of `run`, for frames in equal parts."""
    cuts = [index * frames // passes for index in range(passes + 1)]
    # Numbers to split by: torch 2.11 cannot tell how long a slice between two quotients is.
    lengths = [after - before for before, after in itertools.pairwise(cuts)]

    def part(index: int) -> Any:
        return run(lambda x: x.split(lengths, 1)[index])

    parts = map(part, range(passes))
    return tree_map(lambda *same: torch.cat(same, 1), *parts)
