"""Which rows of a linear map's weights a value comes from, where it is that map's output arranged.

A fused projection computes queries, keys and values at once, [B, N, C] → [B, N, 3C], and they are told apart by
reshapes, permutations and indices. Any of them is as well the output of a smaller linear map with some of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vggt_compile.graph import dialect
from vggt_compile.graph.axes import arranges, names_sizes, origins, sizes
from vggt_compile.graph.edit import Editor


@dataclass(frozen=True)
class Projection:
    """A value as features of a linear map's output.

    Attributes:
        node: the value; `linear` the map that it comes from.
        features: which feature each element is, [sizes of the value] with 1 in place of the axes in `kept`; a tuple of
            those where the value is several tensors.
        kept: axes of the value that are whole axes of the input, batch and tokens, → which of it they are.
    """

    node: Node
    linear: Node
    features: Any
    kept: dict[int, int]

    @classmethod
    def of(cls, node: Node) -> Projection | None:
        """The value as a projection; None where more was done to it than arranging and picking features."""
        if dialect.operation(node) == "linear":
            *before, width = sizes(node)
            if not isinstance(width, int) or len(node.args) < 2:
                return None
            features = torch.arange(width).reshape(*(1 for _ in before), width)
            return cls(node, node, features, {at: at for at, size in enumerate(before) if size != 1})
        above = cls.of(node.all_input_nodes[0]) if arranges(node) else None
        return None if above is None else above._through(node)

    def _through(self, node: Node) -> Projection | None:
        kept = {}
        for axis in range(len(sizes(node))):
            found = origins(node, axis)
            if found is not None and (at := found[self.node]) in self.kept:
                kept[axis] = self.kept[at]
        if sorted(kept.values()) != sorted(self.kept.values()):
            return None
        shape = [1 if axis in kept else size for axis, size in enumerate(sizes(node))]
        if not all(isinstance(size, int) for size in shape):
            return None
        if names_sizes(node):
            return Projection(node, self.linear, self.features.reshape(shape), kept)
        args, kwargs = map_arg((node.args, node.kwargs), lambda x: self.features if x is self.node else x)
        function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        return Projection(node, self.linear, function(*args, **kwargs), kept)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the weights, in the order of the value's elements."""
        parts = [self.features] if isinstance(self.features, Tensor) else list(self.features)
        return tuple(row for part in parts for row in part.flatten().tolist())

    def arranged(self, edit: Editor, features: Node) -> Node:
        """Its rows' features as the last axis, [B, n, rows], → as the value has them, for as many tokens."""
        before = sizes(features)[:-1]
        rest = [axis for axis in range(self.features.ndim) if axis not in self.kept]
        inner = tuple(self.features.shape[axis] for axis in rest)
        lying = sorted(self.kept.values())
        order = [
            lying.index(self.kept[axis]) if axis in self.kept else len(lying) + rest.index(axis)
            for axis in range(self.features.ndim)
        ]
        x = edit.reshape(features, *(before[at] for at in lying), *inner)
        return x if order == sorted(order) else edit.call(torch.permute, x, tuple(order))


def project(edit: Editor, projections: Sequence[Projection], x: Node) -> list[Node]:
    """Values of one linear map from another input, by one map with their rows."""
    linear = projections[0].linear
    rows = [row for projection in projections for row in projection.rows]
    _, weight, *bias = (*linear.args, *linear.kwargs.values())
    given = [_rows(edit, parameter, rows) for parameter in (weight, *bias) if isinstance(parameter, Node)]
    out = edit.call(F.linear, x, *given)
    if len(projections) == 1:
        return [projections[0].arranged(edit, out)]
    start, parts = 0, []
    for projection in projections:
        count = len(projection.rows)
        parts.append(projection.arranged(edit, edit.call(torch.narrow, out, -1, start, count)))
        start += count
    return parts


def readers(linear: Node, besides: Callable[[Node], bool]) -> list[Projection] | None:
    """The values through which a linear map's output is read, each some of its features, but for those set aside.

    None where something reads all features at once.
    """
    found: list[Projection] = []
    waiting = [linear]
    while waiting:
        for user in waiting.pop(0).users:
            projection = None if besides(user) else Projection.of(user)
            if projection is None and not besides(user):
                return None
            if projection is not None and len(projection.rows) < sizes(linear)[-1]:
                found.append(projection)
            elif projection is not None:
                waiting.append(user)
    return found


def _rows(edit: Editor, parameter: Node, rows: Sequence[int]) -> Node:
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        whole = len(rows) == sizes(parameter)[0]
        return parameter if whole else edit.call(torch.narrow, parameter, 0, rows[0], len(rows))
    index = edit.constant(f"rows_{hash(tuple(rows)):x}".replace("-", "m"), lambda: torch.tensor(rows))
    return edit.call(torch.index_select, parameter, 0, index)
