"""A process that runs an artifact and knows torch alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

BARE = """
    import sys, torch
    from torch._inductor import aoti_load_package
    run = aoti_load_package({path!r})
    torch.save([run(x) for x in torch.load({images!r})], {out!r})
    assert not any(name.startswith("vggt_compile") for name in sys.modules)
"""


def bare(path: Path, images: list[torch.Tensor], tmp_path: Path) -> list[Any]:
    """What a process gives that knows torch alone."""
    torch.save(images, tmp_path / "images.pt")
    code = BARE.format(path=str(path), images=str(tmp_path / "images.pt"), out=str(tmp_path / "out.pt"))
    lines = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run(
        [sys.executable, "-c", lines], check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, timeout=120
    )
    return torch.load(tmp_path / "out.pt")
