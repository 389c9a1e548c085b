"""Where results were made."""

from __future__ import annotations

import platform
import sys

import torch

import vggt_compile


def machine(device: torch.device) -> dict[str, str]:
    """Device, system and versions of this process."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "system": platform.system(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "vggt_compile": vggt_compile.__version__,
    }
