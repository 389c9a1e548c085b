"""A graph gets its Python code when it is run, and not at each change.

`recompile` writes the code and has Python compile it, a tenth of a second for a model of 6000 operations. A trace of
torch.export and the passes after it call it 100 times, of which 80 codes are never run: 3 of 16 seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.fx import GraphModule, graph_module
from torch.fx.graph import _PyTreeCodeGen


@contextmanager
def written_when_run() -> Iterator[None]:
    """For graphs that are made or changed inside the block; until one is run, or made anew, it has no `code`."""
    with mock.patch.object(GraphModule, "recompile", _later):
        yield


_write = GraphModule.recompile


def _later(gm: GraphModule) -> None:
    """What `recompile` leaves behind, with a forward that begins with `recompile` itself."""
    if isinstance(gm.graph._codegen, _PyTreeCodeGen):
        gm._in_spec, gm._out_spec = gm.graph._codegen.pytree_info.in_spec, gm.graph._codegen.pytree_info.out_spec
    cls: Any = type(gm)
    if "_wrapped_call" not in vars(cls):
        cls._wrapped_call = graph_module._WrappedCall(cls, vars(cls).get("__call__"))
        cls.__call__ = _call
    cls.forward = _written


def _written(gm: GraphModule, *args: Any, **kwargs: Any) -> Any:
    _write(gm)
    return type(gm).forward(gm, *args, **kwargs)


def _call(gm: Any, *args: Any, **kwargs: Any) -> Any:
    return gm._wrapped_call(gm, *args, **kwargs)
