"""What other threads run leaves no marks in a trace.

Torch notes in the nodes of an export which of them lie in code that Dynamo leaves alone, as custom operators do, in a
dictionary of the whole process. A thread that runs one beside a compile for an artifact puts its note there too, and
fails with a KeyError where the compile has put another dictionary in its place meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import Any
from unittest import mock

from torch.fx import traceback


@contextmanager
def of_this_thread() -> Iterator[None]:
    """Inside the block only the thread that has entered it leaves marks."""
    annotate, here = traceback.annotate, get_ident()

    def annotate_here(marks: dict[str, Any]) -> AbstractContextManager[None]:
        return annotate(marks) if get_ident() == here else nullcontext()

    with mock.patch.object(traceback, "annotate", annotate_here):
        yield
