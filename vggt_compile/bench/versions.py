"""What a record says of the machine that made it: the GPU and the versions of what ran on it."""

from __future__ import annotations

import sys


def versions() -> dict[str, str]:
    import torch
    import triton

    import vggt_compile

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "python": sys.version.split()[0],
        "vggt_compile": vggt_compile.__version__,
    }
