"""Loops of a graph are compiled as loops that count their turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch


@contextmanager
def numbered_turns() -> Iterator[None]:
    """Inductor may read the number of a turn inside the block: torch.compile lets no graph read one unless told to."""
    tracing = torch._guards.TracingContext.try_get()
    mode = tracing.fake_mode if tracing is not None else None
    if mode is None or mode.shape_env is None:
        yield
        return
    shapes, before = mode.shape_env, mode.shape_env.settings
    shapes.settings = replace(before, allow_scalar_outputs=True)
    try:
        yield
    finally:
        shapes.settings = before
