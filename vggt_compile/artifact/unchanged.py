"""What a graph writes into is read off it, where AOTAutograd would run it to find out.

Before it traces a graph, AOTAutograd runs all of it with fake tensors, which is a quarter of its time: the graph may
write into its inputs. A model that is exported hardly does; where its graph shows that it does not, results of the
known shapes stand for a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import aot_autograd
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts

from vggt_compile.graph.dialect import value
from vggt_compile.graph.writes import changes_no_input


@contextmanager
def read_off() -> Iterator[None]:
    """Compiles inside the block run no graph that shows what it changes."""
    collect, run = aot_autograd.run_functionalized_fw_and_collect_metadata, PropagateUnbackedSymInts.run

    def told(interpreter: Any, *args: Any) -> Any:
        with mock.patch.object(PropagateUnbackedSymInts, "run", run):  # its sub-graphs are run as ever
            known = results(interpreter.module, args)
            return interpreter.run(*args) if known is None else known

    def collecting(*given: Any, **named: Any) -> Any:
        inner = collect(*given, **named)

        def asked(*args: Any) -> Any:
            with mock.patch.object(PropagateUnbackedSymInts, "run", told):
                return inner(*args)

        return asked

    with mock.patch.object(aot_autograd, "run_functionalized_fw_and_collect_metadata", collecting):
        yield


def results(gm: GraphModule, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Tensors like what a graph gives for inputs, each in memory of its own; inputs that it hands on are the same.

    None where it, or a sub-graph, may write into an input, or what it gives is not known.
    """
    if not changes_no_input(gm):
        return None
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), args, strict=True))
    (asked,) = gm.graph.output_node().args
    assert isinstance(asked, tuple | list)
    if not all(one in given or _known(one) for one in asked):
        return None
    return tuple(given[one] if one in given else _like(one) for one in asked)


def _known(one: Any) -> bool:
    seen = value(one) if isinstance(one, Node) and one.op == "call_function" else None
    return isinstance(seen, FakeTensor) and seen.fake_mode is detect_fake_mode()


def _like(node: Any) -> Tensor:
    x: Tensor = value(node)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
