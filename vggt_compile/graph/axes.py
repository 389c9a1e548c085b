"""Where an axis of a value comes from: which axis of each operand it is, if the operation treats its places alike.

An operation acts on tokens by themselves if the axis of tokens can be followed through it. Then it computes the same of
some tokens as of all, and taking these tokens out may come before it or after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from vggt_compile.graph import dialect
from vggt_compile.graph.symbols import equal, size_of, times
from vggt_compile.site import Size

Origins = dict[Node, int | None]
"""The axis of each operand; None in one that the axis does not run through."""


def sizes(node: Node) -> tuple[Size, ...]:
    """The shape of a node's value; of the first of several, which then differ in the axis they were cut along."""
    seen = dialect.value(node)
    seen = seen[0] if isinstance(seen, (tuple, list)) else seen
    return tuple(map(size_of, seen.shape)) if isinstance(seen, Tensor) else ()


def origins(node: Node, axis: int) -> Origins | None:
    """The axis that `axis` of the node's value is in each operand, None where the operation mixes or cuts it."""
    if axis >= len(sizes(node)) or dialect.in_place(node) or not node.args:
        return None
    rule = _RULES.get(dialect.operation(node))
    if rule is None:
        return _elements(node, axis) if dialect.acts_on_elements(node) else None
    found = rule(node, axis)
    if found is None:
        return None
    return {**dict.fromkeys(node.all_input_nodes), **found}


def onward(node: Node, operand: Node, axis: int) -> int | None:
    """The axis of the node's value that `axis` of this operand, and of no other, becomes; None where there is none."""
    for candidate in range(len(sizes(node))):
        found = origins(node, candidate)
        if found is not None and found.get(operand) == axis:
            alone = all(other is operand or at is None for other, at in found.items())
            return candidate if alone else None
    return None


def arranges(node: Node) -> bool:
    """Whether the node only arranges or picks elements of one tensor."""
    tensors = [x for x in node.all_input_nodes if sizes(x)]
    return dialect.operation(node) in _LAYOUT and len(tensors) == 1 and not dialect.in_place(node)


def names_sizes(node: Node) -> bool:
    """Whether the operation is told the shape of its value, so that other tokens need other arguments."""
    return dialect.operation(node) in _SIZED


def _elements(node: Node, axis: int) -> Origins | None:
    """Broadcasting: axes are counted from the right, and one of size 1 is no such axis."""
    if not isinstance(dialect.value(node), Tensor):  # `max` along an axis
        return None
    whole, found = sizes(node), {}
    for operand in node.all_input_nodes:
        shape = sizes(operand)
        at = axis - (len(whole) - len(shape))
        runs = bool(shape) and at >= 0 and equal(shape[at], whole[axis])
        found[operand] = at if runs else None
    return found


def _reshaped(node: Node, axis: int) -> Origins | None:
    """As many elements lie before it, and it is as long."""
    source: Any = node.args[0]
    whole, shape = sizes(node), sizes(source)
    before = times(*whole[:axis])
    for at, size in enumerate(shape):
        if equal(size, whole[axis]) and equal(times(*shape[:at]), before):
            return {source: at}
    return None


def _permuted(node: Node, axis: int) -> Origins | None:
    order = dialect.permutation(node)
    return None if order is None else {node.args[0]: order[axis]}  # type: ignore[dict-item]


def _dim(node: Node, position: int, ndim: int, default: int = 0) -> int:
    given: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return int(given) % ndim


def _picked(node: Node, axis: int) -> Origins:
    """`unbind`, `select`: one axis less than before."""
    source: Any = node.args[0]
    return {source: axis + (axis >= _dim(node, 1, len(sizes(source))))}


def _cut(position: int) -> Callable[[Node, int], Origins | None]:
    """`chunk`, `split`, `narrow`: parts along an axis, which is not ours."""

    def rule(node: Node, axis: int) -> Origins | None:
        source: Any = node.args[0]
        return {source: axis} if _dim(node, position, len(sizes(source))) != axis else None

    return rule


def _indexed(node: Node, axis: int) -> Origins | None:
    """`x[…]`: one of several values, or slices, numbers, new axes and an ellipsis."""
    source, index = node.args
    if isinstance(dialect.value(source), (tuple, list)):  # type: ignore[arg-type]
        return {source: axis}  # type: ignore[dict-item]
    steps = list(index) if isinstance(index, tuple) else [index]
    if not all(step is None or step is Ellipsis or isinstance(step, (slice, int)) for step in steps):
        return None
    ndim = len(sizes(source))  # type: ignore[arg-type]
    rest = [slice(None)] * (ndim - sum(isinstance(step, (slice, int)) for step in steps))
    at = steps.index(Ellipsis) if Ellipsis in steps else len(steps)
    steps[at : at + 1] = rest
    place, lies = 0, []  # `lies` has the axis of the source for each axis of the value
    for step in steps:
        if not isinstance(step, int):
            lies.append(place if step == slice(None) else None)
        place += step is not None
    return None if lies[axis] is None else {source: lies[axis]}  # type: ignore[dict-item]


def _joined(node: Node, axis: int) -> Origins | None:
    if _dim(node, 1, len(sizes(node))) == axis:
        return None
    return dict.fromkeys(node.all_input_nodes, axis)


def _stacked(node: Node, axis: int) -> Origins | None:
    new = _dim(node, 1, len(sizes(node)))
    return None if new == axis else dict.fromkeys(node.all_input_nodes, axis - (axis > new))


def _normed(node: Node, axis: int) -> Origins | None:
    source, shape = node.args[0], node.args[1]
    assert isinstance(shape, (list, tuple))
    return {source: axis} if axis < len(sizes(node)) - len(shape) else None  # type: ignore[dict-item]


def _projected(node: Node, axis: int) -> Origins | None:
    return {node.args[0]: axis} if axis < len(sizes(node)) - 1 else None  # type: ignore[dict-item]


_SIZED = {"reshape", "view", "_unsafe_view", "unflatten"}
_RESHAPES = _SIZED | {"flatten", "unsqueeze", "squeeze"}
_LAYOUT = _RESHAPES | {"permute", "transpose", "swapaxes", "unbind", "select", "getitem"}
_LAYOUT |= {"chunk", "split", "narrow", "slice", "contiguous", "clone"}
_RULES: dict[str, Callable[[Node, int], Origins | None]] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), _permuted),
    **dict.fromkeys(("unbind", "select"), _picked),
    **dict.fromkeys(("chunk", "split"), _cut(2)),
    **dict.fromkeys(("narrow", "slice"), _cut(1)),
    "getitem": _indexed,
    "cat": _joined,
    "stack": _stacked,
    "layer_norm": _normed,
    "rms_norm": _normed,
    "linear": _projected,
}
