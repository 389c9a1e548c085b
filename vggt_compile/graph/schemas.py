"""A sub-graph that many calls share is asked once what it changes.

AOTAutograd wants to know of each call of a sub-graph which operands it writes into, twice, and torch 2.11 traces the
sub-graph to find out. Of 100 calls that is most of AOTAutograd's time. Later ones remember the answer themselves.

Of a loop it wants to know that too, and traces the body as it stands, without decompositions. Calls of sub-graphs in a
body are traced on the way, and what comes of that must not be kept as what the sub-graph is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from torch._guards import HopDispatchSetCache, InvokeSubgraphCache, TracingContext
from torch._higher_order_ops import utils
from torch._higher_order_ops.invoke_subgraph import InvokeSubgraphHOP


@contextmanager
def asked_once() -> Iterator[None]:
    """For one compile."""
    with _blocks_once(), _loops_aside():
        yield


@contextmanager
def _blocks_once() -> Iterator[None]:
    """As torch 2.13 does it: by sub-graph, name, and types of the operands."""
    if hasattr(InvokeSubgraphCache, "get_functionalize_schema_entry"):
        yield
        return
    kind: Any = InvokeSubgraphHOP
    ask = kind.gen_schema
    known: dict[Hashable, Any] = {}

    def gen_schema(self: Any, subgraph: Any, identifier: str, *operands: Any) -> Any:
        key = subgraph, identifier, tuple(map(type, operands))
        if key not in known:
            known[key] = ask(self, subgraph, identifier, *operands)
        return known[key]

    kind.gen_schema = gen_schema
    try:
        yield
    finally:
        kind.gen_schema = ask


@contextmanager
def _loops_aside() -> Iterator[None]:
    """While a loop is asked, sub-graphs are kept in a place of their own."""
    ask = utils._check_alias_and_mutation

    def aside(*given: Any) -> None:
        tracing = TracingContext.try_get()
        kept = mock.patch.object(tracing, "hop_dispatch_set_cache", HopDispatchSetCache()) if tracing else nullcontext()
        with kept:
            ask(*given)

    with mock.patch.object(utils, "_check_alias_and_mutation", aside):
        yield
