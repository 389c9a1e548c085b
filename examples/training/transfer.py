"""The trunk of a VGGT from that of a π³ of the same width: both alternate the same blocks over the same patches.

What a VGGT has beyond it, a camera token and a first frame that is the world, it then learns in few steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vggt_compile.models import VGGT


@torch.no_grad()
def take_trunk(model: VGGT, pi3: Mapping[str, Tensor]) -> None:
    """Fill encoder, blocks and special tokens of `model` from a π³'s parameters; its heads stay as they are.

    Camera and register tokens are π³'s registers plus their own random start, which tells the first frame from others.
    """
    aggregator = model.aggregator
    state = aggregator.state_dict()
    for name, tensor in pi3.items():
        if (own := blocks_name(name)) is not None:
            state[own].copy_(tensor)
    registers = pi3["register_token"].float()  # [1, 1, registers, C]
    aggregator.camera_token += registers[:, :, :1].to(aggregator.camera_token.device)
    aggregator.register_token += registers[:, :, 1:].to(aggregator.register_token.device)


def blocks_name(name: str) -> str | None:
    """Where π³'s parameter is in an aggregator: even blocks of its decoder see their frame, odd ones all frames."""
    if name.startswith("encoder."):
        return name.replace("encoder.", "patch_embed.", 1)
    if not name.startswith("decoder."):
        return None
    _, index, rest = name.split(".", 2)
    return f"{'global' if int(index) % 2 else 'frame'}_blocks.{int(index) // 2}.{rest}"
