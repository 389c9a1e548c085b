"""New nodes before a site: the driver lends an editor to a pass, and takes everything back if the pass refuses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

from vggt_compile.errors import RewriteBug
from vggt_compile.graph.dialect import inspects, module_path, pure, value, value_key
from vggt_compile.graph.enclosing import Part, autocasts
from vggt_compile.graph.symbols import Symbols, form
from vggt_compile.site import Size


class Editor:
    """Adds calls before one node, each with its fake value and the module path of that node."""

    def __init__(self, part: Part, symbols: Symbols) -> None:
        self.symbols = symbols
        self._gm, self._graph = part.gm, part.gm.graph
        self._around, self._opened = part.autocast, autocasts(self._graph)
        self._key = value_key(part.gm.graph)
        fakes = (seen.fake_mode for node in self._graph.nodes if isinstance(seen := value(node), FakeTensor))
        self._fakes: AbstractContextManager[Any] = next(fakes, nullcontext())
        self._seen: dict[Hashable, Any] = {}
        self._anchor: Node | None = None
        self._fresh: list[Node] = []
        self._fresh_constants: list[str] = []
        self._inherited: dict[str, Any] = {}
        self._bequeathed: dict[str, Any] = {}

    @contextmanager
    def before(self, anchor: Node) -> Iterator[Editor]:
        """Within the block, calls go before `anchor`; they are undone if the block raises."""
        self._anchor, self._fresh, self._fresh_constants = anchor, [], []
        try:
            yield self
        except BaseException:
            self.undo()
            raise
        finally:
            self._anchor = None

    def undo(self) -> None:
        """Erase what was added before the current anchor, and what was left for the next layer."""
        for node in reversed(self._fresh):
            self._graph.erase_node(node)
        for name in self._fresh_constants:
            delattr(self._gm, name)
        self._fresh, self._fresh_constants, self._bequeathed = [], [], {}

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Add `function(*args, **kwargs)`; arguments may be nodes."""
        return self._added("call_function", function, function, args, kwargs)

    def again(self, node: Node, operands: Mapping[Node, Node]) -> Node:
        """Add the operation of a node once more, with other operands in place of some of its own."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda x: operands.get(x, x))
        function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        return self._added(node.op, node.target, function, args, kwargs)

    def replace(self, old: Node, new: Node) -> None:
        """Let everything that reads `old` read `new`, and erase what nothing reads any more."""
        verify(module_path(old) or str(old), old, new)
        old.replace_all_uses_with(new)
        self.sweep(old)

    def sweep(self, *unread: Node) -> None:
        """Erase these nodes, and what they alone have read, where nothing reads them."""
        waiting, gone = list(unread), set()
        while waiting:
            node = waiting.pop()
            removable = node.op == "get_attr" or pure(node)
            if node in gone or not removable or not all(inspects(user) for user in node.users):
                continue
            for look in list(node.users):
                self._graph.erase_node(look)
            waiting += node.all_input_nodes
            self._graph.erase_node(node)
            gone.add(node)

    def _added(self, op: str, target: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        assert self._anchor is not None, "an editor works inside `before`"
        seen = self._fake(function, args, kwargs)
        with self._graph.inserting_before(self._anchor):
            node = self._graph.create_node(op, target, args, kwargs)
        node.meta = {
            k: v for k, v in self._anchor.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")
        }
        node.meta[self._key] = seen
        self._opened[node] = self._opened[self._anchor]
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

    def next_layer(self) -> None:
        """Go on to the next global attention: it may read what the one before it has left."""
        self._inherited, self._bequeathed = self._bequeathed, {}

    def inherit(self, name: str) -> Any:
        """What the global attention just before this one has left under a name; None where it left nothing."""
        return self._inherited.get(name)

    def bequeath(self, name: str, thing: Any) -> None:
        """Leave something, nodes among it, to the next global attention of the graph and to no other."""
        self._bequeathed[name] = thing

    def constant(self, name: str, make: Callable[[], torch.Tensor]) -> Node:
        """A tensor that is part of the graph; `make` is called where no site before has asked for this name.

        No buffer, because AOTAutograd wants to know for each one which of the user's it is.
        """
        assert self._anchor is not None, "an editor works inside `before`"
        attribute = f"_vggt_compile_{name}"
        if not hasattr(self._gm, attribute):
            with torch.inference_mode(False):  # a compile may happen in that mode, and later runs outside it
                setattr(self._gm, attribute, make())
            self._fresh_constants.append(attribute)
        with self._graph.inserting_before(self._anchor):
            node = self._graph.create_node("get_attr", attribute)
        node.meta[self._key] = getattr(self._gm, attribute)
        self._opened[node] = self._opened[self._anchor]
        self._fresh.append(node)
        return self.call(torch.ops.aten.lift_fresh_copy.default, node)

    def _fake(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a call gives: a fake value. Equal ones share it, as alike layers get the same calls."""
        assert self._anchor is not None
        plain_args, plain_kwargs = map_arg((args, kwargs), value)
        regions = (*self._around, *self._opened[self._anchor])
        key = function, regions, form((plain_args, plain_kwargs))
        if key in self._seen:
            return self._seen[key]
        with ExitStack() as stack:
            for region in regions:
                stack.enter_context(torch.autocast(region.device, region.dtype, region.enabled, region.cache))
            stack.enter_context(self._fakes)
            stack.enter_context(enable_python_dispatcher())  # some compositions know symbolic sizes in Python only
            self._seen[key] = function(*plain_args, **plain_kwargs)
        return self._seen[key]


def verify(place: str, old: Node, new: Node) -> None:
    """RewriteBug where a value is of another shape, dtype or device than the one whose place it takes."""
    was, now = value(old), value(new)
    if was.dtype != now.dtype or was.device != now.device:
        raise RewriteBug(place, f"{was.dtype} on {was.device} into {now.dtype} on {now.device}")
    if not statically_known_true(sym_eq(tuple(was.shape), tuple(now.shape))):
        raise RewriteBug(place, f"shape {tuple(was.shape)} into {tuple(now.shape)}")
