"""Sub-graphs in a library have sizes of their own: what torch's writer of C++ takes to be those of the code around.

Inductor gives sizes that kernels ask for short names, `ps0`, `ps1`, …, counted in each graph anew. A sub-graph is
written into the scope where it is called, and there a name that is known outside is not computed again. So a kernel
inside may be given another size than it asked for: it reads and writes where nothing of its own is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor.codegen.wrapper import EnterSubgraphLine
from torch.utils._ordered_set import OrderedSet


@contextmanager
def apart() -> Iterator[None]:
    """Compiles inside the block compute in each sub-graph the sizes that it asks for; C++ then sees the inner ones."""
    enter = EnterSubgraphLine.__post_init__

    def __post_init__(line: Any) -> None:
        enter(line)  # keeps the names of the code around for the end of the sub-graph
        line.wrapper.computed_sizes = OrderedSet()

    with mock.patch.object(EnterSubgraphLine, "__post_init__", __post_init__):
        yield
