"""A sub-graph that many calls share is asked once what it changes, and not at all where that is seen.

AOTAutograd wants to know of each call of a sub-graph which operands it writes into, twice, and torch 2.11 traces the
sub-graph to find out. Of 100 calls that is most of AOTAutograd's time. Later ones remember the answer themselves.

Of a loop it wants to know that too, and traces the body as it stands, without decompositions. Calls of sub-graphs in a
body are traced on the way, and what comes of that must not be kept as what the sub-graph is.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

from torch._guards import HopDispatchSetCache, TracingContext
from torch._higher_order_ops import utils
from torch._higher_order_ops.invoke_subgraph import InvokeSubgraphHOP
from torch._higher_order_ops.schema import HopSchemaGenerator
from torch.fx import GraphModule

from vggt_compile.graph.dialect import value
from vggt_compile.graph.writes import changes_no_input, gives_new_tensors


@contextmanager
def asked_once() -> Iterator[None]:
    """For one compile."""
    with _blocks_once(), _loops_aside():
        yield


@contextmanager
def _blocks_once() -> Iterator[None]:
    """As torch 2.13 remembers it: by sub-graph, name, and types of the operands."""
    ask = InvokeSubgraphHOP.gen_schema
    known: dict[Hashable, Any] = {}

    def gen_schema(self: Any, subgraph: Any, identifier: str, *operands: Any) -> Any:
        key = subgraph, identifier, tuple(map(type, operands))
        if key not in known:
            made = _made(subgraph)
            answer: Any = ask if made is None else partial(_changes_nothing, made)
            known[key] = answer(self, subgraph, identifier, *operands)
        return known[key]

    with mock.patch.object(InvokeSubgraphHOP, "gen_schema", gen_schema):
        yield


def _made(subgraph: Any) -> list[Any] | None:
    """What a sub-graph gives, where it is seen to write into nothing."""
    if not isinstance(subgraph, GraphModule) or not changes_no_input(subgraph):
        return None
    made = [value(node) for node in subgraph.graph.output_node().all_input_nodes]
    given: Any = subgraph.graph.output_node().args[0]
    return made if len(made) == len(given) and all(one is not None for one in made) else None


def _changes_nothing(made: list[Any], hop: Any, subgraph: GraphModule, identifier: str, *operands: Any) -> Any:
    """The answer that torch would give of a sub-graph that writes into nothing."""
    schema = HopSchemaGenerator(hop)
    schema.add_arg("subgraph", subgraph)
    schema.add_arg("identifier", identifier)
    for index, operand in enumerate(operands):
        schema.add_arg(f"arg{index}", operand)
    for one in made:
        schema.add_output(one)
    return schema.gen_schema()


@contextmanager
def _loops_aside() -> Iterator[None]:
    """While a loop is asked, sub-graphs are kept in a place of their own."""
    ask = utils._check_alias_and_mutation

    def aside(body: Any, *given: Any) -> None:
        if isinstance(body, GraphModule) and changes_no_input(body) and gives_new_tensors(body):
            return
        tracing = TracingContext.try_get()
        kept = mock.patch.object(tracing, "hop_dispatch_set_cache", HopDispatchSetCache()) if tracing else nullcontext()
        with kept:
            ask(body, *given)

    with mock.patch.object(utils, "_check_alias_and_mutation", aside):
        yield
