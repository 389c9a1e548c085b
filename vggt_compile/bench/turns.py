"""Benchmarks that run beside each other on one GPU time one after the other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other benchmark of this machine times anything on the GPUs that this process sees."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "-")
    with (Path(tempfile.gettempdir()) / f"vggt_compile-bench-{devices}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the file, also where the process is killed
        yield
