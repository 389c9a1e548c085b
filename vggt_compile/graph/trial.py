"""A run of an operation on fake operands, told apart from another one by what it computes.

Values have names, and pass through dtypes. A cast may stand before a view in one run and after it in the other, as
einsum's do: rounding numbers and moving them exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx.experimental import _config as symbolic
from torch.utils._python_dispatch import TorchDispatchMode

from vggt_compile.graph.enclosing import Autocast
from vggt_compile.graph.symbols import form

aten = torch.ops.aten
_MOVES = {aten._unsafe_view.default, aten._reshape_alias.default, aten.clone.default}

Call = Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of an operation from its operands."""


class Casts(NamedTuple):
    """The dtypes to which operands are cast, by their number, arguments that state a dtype, and results' dtypes."""

    operands: Mapping[int, torch.dtype]
    stated: Mapping[str, torch.dtype]
    gives: tuple[torch.dtype, ...] = ()


NOTHING = Casts({}, {})


class _Value(NamedTuple):
    """A tensor of a run: numbers by name, the dtypes they went through, and the operand they are, if one."""

    name: int
    path: tuple[torch.dtype, ...]
    operand: int | None = None

    def to(self, dtype: torch.dtype) -> _Value:
        return self if self.path[-1] == dtype else self._replace(path=(*self.path, dtype))


class Trial(TorchDispatchMode):
    """What a call in some regions comes to.

    `did` is equal for trials that compute the same, with the same names `seen`; `given` is the result, and `cast` the
    first dtype other than its own that each operand is cast to.
    """

    def __init__(
        self,
        function: OpOverload,
        operands: Sequence[Any],
        call: Call,
        regions: Sequence[Autocast],
        seen: dict[Hashable, int],
        casts: Casts = NOTHING,
    ) -> None:
        super().__init__()
        self.cast: dict[int, torch.dtype] = {}
        self._seen, self._order = seen, list[Hashable]()
        self._values: dict[int, _Value] = {}
        self._alive: list[Tensor] = []  # so that no two have one id
        with ExitStack() as stack:
            stack.enter_context(among_fakes(operands))
            args, kwargs = call([self._operand(*numbered, casts) for numbered in enumerate(operands)])
            for region in regions:
                stack.enter_context(torch.autocast(*region))
            stack.enter_context(self)
            self.given = function(*args, **{**kwargs, **casts.stated})
        self.did = tuple(self._order), self._named(self.given)

    def _operand(self, index: int, operand: Any, casts: Casts) -> Any:
        """An operand as an object of its own: two nodes may share one fake value."""
        if not isinstance(operand, Tensor):
            return operand
        dtype = casts.operands.get(index, operand.dtype)
        own = operand.detach().to(dtype)
        self._know(own, _Value(self._name(("operand", index)), (operand.dtype,), index).to(dtype))
        return own

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # questions about a device
            return function(*args, **kwargs)
        key: Hashable = function, self._named((args, kwargs)), len(self._order)
        first = self._values.get(id(args[0])) if args else None
        out = function(*args, **kwargs)
        if first is not None and _casts(function, args[0], out, kwargs):
            if first.operand is not None and len(first.path) == 1 and out.dtype != first.path[0]:
                self.cast.setdefault(first.operand, out.dtype)
            self._know(out, first.to(out.dtype))
        elif first is not None and _moves(function, args[0], out):
            key = function, first.name, self._named((args[1:], kwargs))
            for index, tensor in enumerate(tensors(out)):
                self._know(tensor, first._replace(name=self._name((key, index))))
        else:
            self._order.append(key)
            for index, tensor in enumerate(tensors(out)):
                self._know(tensor, _Value(self._name((key, index)), (tensor.dtype,)))
        return out

    def _name(self, key: Hashable) -> int:
        return self._seen.setdefault(key, len(self._seen))

    def _know(self, tensor: Tensor, value: _Value) -> None:
        self._values[id(tensor)] = value
        self._alive.append(tensor)

    def _named(self, tree: Any) -> Hashable:
        """Arguments or results with names in the place of tensors."""
        if isinstance(tree, Tensor):
            value = self._values.get(id(tree))
            return ("unknown", form(tree)) if value is None else (value.name, value.path)
        if isinstance(tree, (tuple, list)):
            return tuple(map(self._named, tree))
        if isinstance(tree, dict):
            return tuple((name, self._named(entry)) for name, entry in sorted(tree.items()))
        return form(tree)


def _casts(function: OpOverload, given: Tensor, out: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation gives numbers of its operand in another dtype, and no more."""
    kept = kwargs.get("memory_format") in (None, torch.preserve_format)
    return function is aten._to_copy.default and kept and out.device == given.device and out.layout == given.layout


def _moves(function: OpOverload, given: Tensor, out: Any) -> bool:
    """Whether an operation gives numbers of its operand as they are."""
    return (function.is_view or function in _MOVES) and all(one.dtype == given.dtype for one in tensors(out))


def dtypes(out: Any) -> tuple[torch.dtype, ...]:
    """Of all tensors in a result."""
    return tuple(tensor.dtype for tensor in tensors(out))


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [tensor for one in out for tensor in tensors(one)] if isinstance(out, (tuple, list)) else []


@contextmanager
def among_fakes(operands: Sequence[Any]) -> Iterator[None]:
    """Where operations run on values of a graph, and what they ask of sizes stays unsaid: the trace has said it."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(enable_python_dispatcher())  # some compositions know symbolic sizes in Python only
        stack.enter_context(symbolic.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        fakes = next((operand.fake_mode for operand in operands if isinstance(operand, FakeTensor)), None)
        if fakes is not None and fakes.shape_env is not None:
            stack.enter_context(fakes.shape_env.suppress_guards())
            stack.enter_context(fakes.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(fakes if fakes is not None else nullcontext())
        yield
