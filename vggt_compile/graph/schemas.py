"""A sub-graph that many calls share is asked once what it changes.

AOTAutograd wants to know of each call of a sub-graph which operands it writes into, twice, and torch 2.11 traces the
sub-graph to find out. Of 100 calls that is most of AOTAutograd's time. Later ones remember the answer themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._guards import InvokeSubgraphCache
from torch._higher_order_ops.invoke_subgraph import InvokeSubgraphHOP


@contextmanager
def asked_once() -> Iterator[None]:
    """For one compile, as torch 2.13 does it: by sub-graph, name, and types of the operands."""
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
