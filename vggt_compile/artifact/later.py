"""What an export needs at its end, found out while it waits for others than Python.

A thread that runs Python beside a trace makes both wait for Python's lock. A hash of VGGT-1B's weights took 30 seconds
beside traces and made them wait for 7 (three exports on one H200); while g++ works nobody wants the lock.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Later(Generic[Result]):
    """What a function gives, computed once by a thread of its own, from when somebody says so or asks for it."""

    def __init__(self, run: Callable[[], Result]) -> None:
        self._run = run
        self._found: Future[Result] | None = None

    def begin(self) -> None:
        """Once is enough."""
        if self._found is None:
            thread = ThreadPoolExecutor(1, thread_name_prefix="later")
            self._found = thread.submit(self._run)
            thread.shutdown(wait=False)

    def result(self) -> Result:
        self.begin()
        assert self._found is not None
        return self._found.result()
