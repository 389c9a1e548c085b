"""The only reader of operations in torch IR (what Dynamo hands to a backend) and aten IR (what torch.export gives).

Everything else in the package sees records without a dialect: attention calls, module paths, values.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from vggt_compile.site import AttentionCall

aten = torch.ops.aten

_SDPA = {torch._C._nn.scaled_dot_product_attention, F.scaled_dot_product_attention}
_SDPA_ATEN = {aten.scaled_dot_product_attention.default}
_MATMUL = {torch.matmul, operator.matmul, torch.bmm, aten.matmul.default, aten.bmm.default, aten.mm.default}
_SOFTMAX = {torch.softmax, F.softmax, aten.softmax.int, aten._softmax.default}
_DROPOUT = {F.dropout, torch.dropout, aten.dropout.default}
_MULTIPLY = {operator.mul, torch.mul, operator.imul, aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor}
_ADD = {operator.add, torch.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor}
_DIVIDE = {operator.truediv, torch.div, operator.itruediv, aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor}
_TRANSPOSE = {torch.transpose, torch.swapaxes, aten.transpose.int}
_PERMUTE = {torch.permute, aten.permute.default}
_MT = {aten.mT.default}
_PLAIN = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor")
}
_IN_PLACE = {*_PLAIN, operator.setitem}
_PASS_THROUGH = {torch.clone, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default}
_LINEAR = {F.linear, torch._C._nn.linear, aten.linear.default}
_CONV = {torch.conv2d, F.conv2d, torch._C._nn.conv2d if hasattr(torch._C._nn, "conv2d") else None, aten.conv2d.default}


def value(node: Node) -> Any:
    """The fake value of a node, in whichever field its dialect keeps it."""
    return node.meta.get("example_value", node.meta.get("val"))


def append_outputs(graph: torch.fx.Graph, nodes: Sequence[Node]) -> None:
    """Let a graph give more values after those that it gives."""
    output = graph.output_node()
    (given,) = output.args
    assert isinstance(given, (tuple, list))
    output.args = ((*given, *nodes),)


def value_key(graph: torch.fx.Graph) -> str:
    """The field in which nodes of this graph keep their fake value."""
    return "val" if any("val" in node.meta for node in graph.nodes) else "example_value"


def module_path(node: Node) -> str | None:
    """Dotted path of the module that made the node, from the root of what was compiled; None where Dynamo lost it."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = next(reversed(stack.values()))[0]
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)  # L['self'] and indexing of containers
    head, *rest = path.split(".")
    return ".".join(rest[1:] if head in ("L", "G") else [head, *rest])


def attention_choices(graph: torch.fx.Graph) -> dict[Node, Any]:
    """Which of PyTorch's attention kernels are allowed before each node, as `sdpa_kernel` said last; None at first."""
    allowed: Any = None
    found: dict[Node, Any] = {}
    for node in graph.nodes:
        found[node] = allowed
        if chooses_attention(node):
            allowed = torch.fx.node.map_arg((node.args, node.kwargs), lambda given: given.args)
    return found


def chooses_attention(node: Node) -> bool:
    """Whether the node allows and forbids kernels for all attentions after it, as a trace writes `sdpa_kernel`."""
    return operation(node) == "_sdpa_kernel"


def operation(node: Node) -> str:
    """What a node does under one name for all dialects: `mul` for `a * b`, `torch.mul`, `a.mul(b)` and aten's.

    Operands are in the same order then. Empty for what is neither PyTorch's nor an operator of Python.
    """
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__ if target.namespace == "aten" else str(target.overloadpacket)
    home = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    name = str(getattr(target, "__name__", ""))
    return {"truediv": "div"}.get(name, name) if home in ("torch", "_operator") else ""


def named_operands(node: Node) -> dict[str, Any]:
    """The operands of an operator that has a schema, by the names that it gives them; those left out are not there."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def acts_on_elements(node: Node) -> bool:
    """Whether each element of the value depends on one of each operand, up to broadcasting, and on no chance."""
    if in_place(node):
        return False
    cast = operation(node) in _CASTS or inert_source(node) is not None
    return cast or any(torch.Tag.pointwise in overload.tags for overload in _overloads(node))


def pure(node: Node) -> bool:
    """Whether the node computes the same value from the same operands each time, and changes none of them."""
    name, overloads = operation(node), _overloads(node)
    if in_place(node) or checks(node) or name.startswith(("empty", "new_empty")):
        return False
    if inert_source(node) is not None or name in _CASTS | _PYTHONIC:
        return True
    return bool(overloads) and not any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def checks(node: Node) -> bool:
    """Whether the node gives nothing, and only stops a run for which something does not hold."""
    return operation(node).startswith("_assert")


def inspects(node: Node) -> bool:
    """Whether the node only checks another one's dtype and device, as an export writes it before casts."""
    return operation(node) == "_assert_tensor_metadata"


def settled(node: Node) -> bool:
    """Whether the node only checks what holds of the value as it was traced, and so of all that it will see."""
    if not inspects(node) or len(node.args) != 1:
        return False
    seen = value(cast(Node, node.args[0]))
    return isinstance(seen, Tensor) and all(
        given is None or _is(getattr(seen, name), given) for name, given in node.kwargs.items()
    )


def _is(seen: object, asked: object) -> bool:
    if isinstance(seen, torch.device) and isinstance(asked, torch.device) and asked.index is None:
        return seen.type == asked.type
    return seen == asked


def fresh(node: Node) -> bool:
    """Whether the value has memory of its own, shared with no operand."""
    returns = [back for overload in _overloads(node) for back in overload._schema.returns]
    return bool(returns) and inert_source(node) is None and all(back.alias_info is None for back in returns)


def owns(node: Node) -> bool:
    """Whether the value has memory that none of its operands has: by its schema, and as it was traced."""
    if operation(node) in _CASTS or inert_source(node) is not None:
        return False
    if operation(node) == "getitem" and isinstance(value(node.args[0]), (tuple, list)):  # type: ignore[arg-type]
        return owns(node.args[0])  # type: ignore[arg-type]
    returns = [back for one in _overloads(node) if not one._schema.is_mutable for back in one._schema.returns]
    if not returns or any(back.alias_info is not None for back in returns):
        return False
    given = {_storage(value(operand)) for operand in node.all_input_nodes}
    return _storage(value(node)) not in given - {None}


def _storage(seen: Any) -> int | None:
    return seen.untyped_storage()._cdata if isinstance(seen, Tensor) else None


_CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool", "_to_copy"}
_PYTHONIC = {"getitem", "getattr", "floordiv", "mod", "and_", "unflatten", "reshape", "contiguous", "size", "dim"}
_PYTHONIC |= {"sym_size", "sym_min", "sym_max", "not_", "_backend_from_string", "interpolate"}


def _overloads(node: Node) -> tuple[torch._ops.OpOverload, ...]:
    """What of aten's, or of our own, the node may run."""
    if isinstance(node.target, torch._ops.OpOverload):
        return (node.target,) if node.target.namespace in ("aten", "vggt_compile") else ()
    return _overloads_of(operation(node))


@functools.cache
def _overloads_of(name: str) -> tuple[torch._ops.OpOverload, ...]:
    packet = getattr(aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):  # a name such as `__eq__` is a method of the namespace
        return ()
    return tuple(getattr(packet, overload) for overload in packet.overloads())


def attention_call(node: Node) -> AttentionCall | None:
    """The node as an attention call, None where it is something else."""
    if node.op != "call_function" or node.target not in _SDPA | _SDPA_ATEN:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return AttentionCall(
        node,
        given["query"],
        given["key"],
        given["value"],
        mask=given.get("attn_mask"),
        dropout=given.get("dropout_p", 0.0),
        causal=given.get("is_causal", False),
        scale=given.get("scale"),
        gqa=given.get("enable_gqa", False),
    )


def is_attention_like(node: Node) -> bool:
    """Attention or a softmax: where there is one, a plan may have meant this graph."""
    return attention_call(node) is not None or softmax_input(node) is not None


def matmul_operands(node: object) -> tuple[Node, Node] | None:
    return _binary(node, _MATMUL, ("matmul", "bmm", "__matmul__"))


def softmax_input(node: object) -> Node | None:
    """The input of a softmax over the last dimension."""
    if not isinstance(node, Node) or not _calls(node, _SOFTMAX, ("softmax",)):
        return None
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    source = node.args[0] if node.args else node.kwargs.get("input")
    last = value(node).ndim - 1 if isinstance(value(node), Tensor) else None
    return source if isinstance(source, Node) and dim in (-1, last) else None


def transposed(node: object) -> Node | None:
    """x where the node is x with its last two dimensions exchanged."""
    if not isinstance(node, Node) or not node.args or not isinstance(source := node.args[0], Node):
        return None
    if node.target in _MT or (node.target is getattr and node.args[1] == "mT"):
        return source
    order = permutation(node)
    return source if order is not None and order == _swapped(len(order), -2, -1) else None


def permutation(node: Node) -> list[int] | None:
    """The order of dimensions of a permute or a transpose."""
    ndim = getattr(value(node), "ndim", 0)
    dims: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (list, tuple)) else node.args[1:]
    if not dims or not all(isinstance(dim, int) for dim in dims):
        return None
    if _calls(node, _PERMUTE, ("permute",)):
        return [int(dim) % ndim for dim in dims]
    if _calls(node, _TRANSPOSE, ("transpose", "swapaxes")) and len(dims) == 2:
        return _swapped(ndim, *dims)
    return None


def _swapped(ndim: int, one: int, other: int) -> list[int]:
    order = list(range(ndim))
    order[one], order[other] = order[other], order[one]
    return order


def in_place(node: Node) -> bool:
    """Whether the node changes one of its operands."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.target in _IN_PLACE or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


class Plainly(NamedTuple):
    """An operation that gives what another one writes over its first operand."""

    target: Any
    kwargs: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(Tensor, self.target) if isinstance(self.target, str) else self.target
        return function(*args, **kwargs)


def plainly(node: Node) -> Plainly | None:
    """How to compute what the node writes over its first operand, and over that one alone; None if that has no name."""
    target: Any = node.target
    found: Any
    if isinstance(target, torch._ops.OpOverload):
        found = _plain_overload(target)
    elif node.kwargs.get("inplace"):
        return Plainly(target, {**node.kwargs, "inplace": False})
    elif node.op == "call_method":
        found = name if hasattr(Tensor, name := str(target).removesuffix("_")) else None
    else:
        found = _PLAIN.get(target)
    return None if found is None else Plainly(found, dict(node.kwargs))


def _plain_overload(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    packet = getattr(aten, target.overloadpacket.__name__.removesuffix("_"), None)
    found: torch._ops.OpOverload | None = getattr(packet, target._overloadname, None)
    if target.namespace != "aten" or found is None or found._schema.is_mutable:
        return None
    takes, took = ([argument.name for argument in one._schema.arguments] for one in (found, target))
    written = [argument.is_write for argument in target._schema.arguments]
    return found if takes == took and written[0] and sum(written) == 1 else None


def scaled(node: object) -> tuple[Node, float] | None:
    """(x, c) where the node is x·c or x/c with a number c."""
    for targets, methods, invert in ((_MULTIPLY, ("mul", "mul_"), False), (_DIVIDE, ("div", "div_"), True)):
        if isinstance(node, Node) and _calls(node, targets, methods) and len(node.args) == 2:
            tensor, number = node.args if isinstance(node.args[0], Node) else reversed(node.args)
            if isinstance(tensor, Node) and isinstance(number, (int, float)) and math.isfinite(number):
                return None if invert and tensor is not node.args[0] else (tensor, 1 / number if invert else number)
    return None


def addition(node: Node) -> tuple[Node, Node] | None:
    """The two tensors of which the node is the plain sum."""
    if not _calls(node, _ADD, ("add", "add_")) or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return (left, right) if all(isinstance(value(term), Tensor) for term in (left, right)) else None


def tensor_users(node: Node) -> list[Node]:
    """What reads a value, but for questions about its sizes."""
    return [user for user in node.users if not isinstance(value(user), (int, torch.SymInt, torch.Size))]


def inert_source(node: Node) -> Node | None:
    """x where the node is x unchanged: dropout outside training, clone, detach."""
    if _calls(node, _PASS_THROUGH, ("clone", "detach", "contiguous")):
        return node.args[0] if isinstance(node.args[0], Node) else None
    if _calls(node, _DROPOUT, ("dropout",)):
        given = dict(zip(("input", "p", "training"), node.args, strict=False)) | dict(node.kwargs)
        source = given["input"]
        if (given.get("p", 0.5) == 0 or not given.get("training", True)) and isinstance(source, Node):
            return source
    return None


def multi_head_attention(node: Node) -> dict[str, Any] | None:
    """Arguments by name where the node is PyTorch's functional multi-head attention."""
    if node.op != "call_function" or node.target is not F.multi_head_attention_forward:
        return None
    names = F.multi_head_attention_forward.__code__.co_varnames
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def projection_input(node: Node) -> Node | None:
    """What the linear map reads that the value of a node comes from, through steps with one tensor each."""
    while node.target not in _LINEAR:
        tensors = [source for source in node.all_input_nodes if isinstance(value(source), (Tensor, tuple, list))]
        if len(tensors) != 1:
            return None
        (node,) = tensors
    source = node.args[0] if node.args else node.kwargs["input"]
    return source if isinstance(source, Node) else None


def patch_grid(node: Node) -> tuple[Any, Any] | None:
    """(rows, columns) where the node is a patch embedding: a convolution of images whose stride is its kernel."""
    if node.op != "call_function" or node.target not in _CONV:
        return None
    names = ("input", "weight", "bias", "stride")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    source, weight, out = value(given["input"]), value(given["weight"]), value(node)
    kernel, stride = tuple(weight.shape[-2:]), given.get("stride", 1)
    stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
    if source.shape[1] != 3 or len(out.shape) != 4 or kernel != stride or max(kernel) == 1:
        return None
    return out.shape[-2], out.shape[-1]


def _calls(node: Node, targets: set[Any], methods: tuple[str, ...]) -> bool:
    return (node.op == "call_function" and node.target in targets) or (
        node.op == "call_method" and node.target in methods
    )


def _binary(node: object, targets: set[Any], methods: tuple[str, ...]) -> tuple[Node, Node] | None:
    if not isinstance(node, Node) or not _calls(node, targets, methods):
        return None
    operands = (*node.args, *node.kwargs.values())
    if len(operands) != 2 or not all(isinstance(operand, Node) for operand in operands):
        return None
    return operands  # type: ignore[return-value]
