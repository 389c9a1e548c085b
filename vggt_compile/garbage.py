"""Fewer garbage collections while a compile makes millions of objects, most of which live as long as it does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

NEVER = 2**31 - 1


@contextmanager
def few_collections() -> Iterator[None]:
    """Inside the block only young objects are collected, in all threads.

    A full collection goes through every object of the process and finds next to nothing here (how long that takes:
    docs/benchmarks/compile-time.md). What became garbage meanwhile goes with the first one after the block.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
