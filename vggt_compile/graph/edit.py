"""New nodes before a site: the driver lends an editor to a pass, and takes everything back if the pass refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.fx.node import map_arg

from vggt_compile.graph.dialect import Part, autocast_at, value, value_key
from vggt_compile.graph.symbols import Symbols
from vggt_compile.site import Size


class Editor:
    """Adds calls before one node, each with its fake value and the module path of that node."""

    def __init__(self, part: Part, symbols: Symbols) -> None:
        self.symbols = symbols
        self._graph = part.gm.graph
        self._around = self._regions = part.autocast
        self._key = value_key(part.gm.graph)
        self._anchor: Node | None = None
        self._fresh: list[Node] = []

    @contextmanager
    def before(self, anchor: Node) -> Iterator[Editor]:
        """Within the block, calls go before `anchor`; they are undone if the block raises."""
        self._anchor, self._fresh = anchor, []
        self._regions = (*self._around, *autocast_at(anchor))
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
        seen = self._fake(function, args, kwargs)
        with self._graph.inserting_before(self._anchor):
            node = self._graph.call_function(function, args, kwargs)
        node.meta = {
            k: v for k, v in self._anchor.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")
        }
        node.meta[self._key] = seen
        self._fresh.append(node)
        return node

    def size(self, size: Size) -> int | Node:
        """A size as an argument for `call`."""
        return self.symbols.node(size, self.call)

    def reshape(self, x: Node, *shape: Size) -> Node:
        return self.call(torch.reshape, x, tuple(self.size(s) for s in shape))

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """The node in a dtype; itself where it has that one."""
        return x if value(x).dtype == dtype else self.call(torch.ops.aten.to.dtype, x, dtype)

    def _fake(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assert self._anchor is not None
        plain_args, plain_kwargs = map_arg((args, kwargs), value)
        seen = value(self._anchor)
        with ExitStack() as stack:
            for region in self._regions:
                stack.enter_context(torch.autocast(region.device, region.dtype, region.enabled, region.cache))
            stack.enter_context(seen.fake_mode if isinstance(seen, FakeTensor) else nullcontext())
            stack.enter_context(enable_python_dispatcher())  # some compositions know symbolic sizes in Python only
            return function(*plain_args, **plain_kwargs)
