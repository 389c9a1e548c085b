"""New nodes before a site: the driver lends an editor to a pass, and takes everything back if the pass refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vggt_compile.graph.dialect import value, value_key
from vggt_compile.graph.symbols import Symbols
from vggt_compile.site import Size


class Editor:
    """Adds calls before one node, each with its fake value and the module path of that node."""

    def __init__(self, gm: GraphModule, symbols: Symbols) -> None:
        self.symbols = symbols
        self._graph = gm.graph
        self._key = value_key(gm.graph)
        self._anchor: Node | None = None
        self._fresh: list[Node] = []

    @contextmanager
    def before(self, anchor: Node) -> Iterator[Editor]:
        """Within the block, calls go before `anchor`; they are undone if the block raises."""
        self._anchor, self._fresh = anchor, []
        try:
            yield self
        except BaseException:
            self.undo()
            raise
        finally:
            self._anchor = None

    def undo(self) -> None:
        """Erase what was added before the current anchor."""
        for node in reversed(self._fresh):
            self._graph.erase_node(node)
        self._fresh = []

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Add `function(*args, **kwargs)`; arguments may be nodes."""
        assert self._anchor is not None, "an editor works inside `before`"
        with self._graph.inserting_before(self._anchor):
            node = self._graph.call_function(function, args, kwargs)
        node.meta = {
            k: v for k, v in self._anchor.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")
        }
        node.meta[self._key] = self._fake(function, args, kwargs)
        self._fresh.append(node)
        return node

    def size(self, size: Size) -> int | Node:
        """A size as an argument for `call`."""
        return self.symbols.node(size, self.call)

    def reshape(self, x: Node, *shape: Size) -> Node:
        return self.call(torch.reshape, x, tuple(self.size(s) for s in shape))

    def _fake(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        plain_args, plain_kwargs = map_arg((args, kwargs), value)
        seen = value(self._anchor) if self._anchor is not None else None
        with seen.fake_mode if isinstance(seen, FakeTensor) else nullcontext():
            return function(*plain_args, **plain_kwargs)
