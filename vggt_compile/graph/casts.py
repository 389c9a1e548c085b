"""What autocast does at an operation, asked of autocast itself, is said by casts of operands or by a stated dtype.

The operation runs on fake operands, with autocast as around it and, with what is thought to say the same, without. Both
runs must come to the same operations on the same values in the same dtypes. A cast may stand before a view that it
stood after, as einsum's do: rounding and moving numbers exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx.experimental import _config as symbolic
from torch.utils._python_dispatch import TorchDispatchMode

from vggt_compile.graph.dialect import Autocast
from vggt_compile.graph.symbols import form

aten = torch.ops.aten
_MOVES = {aten._unsafe_view.default, aten._reshape_alias.default, aten.clone.default}


class Unclear(Exception):
    """No cast of an operand and no dtype says what autocast does at an operation."""


class Casts(NamedTuple):
    """The dtypes to which some operands are cast, by their number, arguments that state a dtype, and what comes of it."""

    operands: Mapping[int, torch.dtype]
    stated: Mapping[str, torch.dtype]
    gives: tuple[torch.dtype, ...] = ()


Call = Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of an operation from its operands."""


def casts_at(function: OpOverload, operands: Sequence[Any], call: Call, regions: Sequence[Autocast]) -> Casts:
    """What stands for autocast where `function(*call(operands))` runs inside the regions, outermost first.

    Raises:
        Unclear: nothing that is known to.
    """
    seen: dict[Hashable, int] = {}
    off = [Autocast(device, None, False, None) for device in {region.device for region in regions}]
    try:
        want = _Run(function, operands, call, regions, seen)
    except Exception as error:
        raise Unclear(f"{function} does not run on fake operands: {error}") from error
    for casts in _candidates(function, operands, call, want):
        try:
            if _Run(function, operands, call, off, seen, casts).did == want.did:
                return casts._replace(gives=dtypes(want.given))
        except Exception:  # dtypes that do not fit without casts
            continue
    raise Unclear(f"autocast does at {function} what no cast of an operand does")


def _candidates(function: OpOverload, operands: Sequence[Any], call: Call, want: _Run) -> Iterator[Casts]:
    """Autocast casts all that it casts at one operation to one dtype. Other casts of `want` are the operation's own."""
    same = len({operand.dtype for operand in _tensors(operands) if operand.is_floating_point()}) < 2
    if same:
        yield Casts({}, {})
    for dtype in dict.fromkeys(want.cast.values()):
        yield Casts({index: to for index, to in want.cast.items() if to == dtype}, {})
    if not same:  # tried late, as a failure on fake operands is logged
        yield Casts({}, {})
    names = [argument.name for argument in function._schema.arguments]
    args, kwargs = call(operands)
    free = "dtype" in names and names.index("dtype") >= len(args) and kwargs.get("dtype") is None
    if free and isinstance(want.given, Tensor):
        yield Casts({}, {"dtype": want.given.dtype})


class _Value(NamedTuple):
    """A tensor of a run: numbers by name, the dtypes they went through, and the operand they are, if one."""

    name: int
    path: tuple[torch.dtype, ...]
    operand: int | None = None


class _Run(TorchDispatchMode):
    """The operations that a call comes to: `did` is equal for runs that compute the same, with the same names `seen`."""

    def __init__(
        self,
        function: OpOverload,
        operands: Sequence[Any],
        call: Call,
        regions: Sequence[Autocast],
        seen: dict[Hashable, int],
        casts: Casts = Casts({}, {}),
    ) -> None:
        super().__init__()
        self.cast: dict[int, torch.dtype] = {}
        self._seen, self._order = seen, list[Hashable]()
        self._values: dict[int, _Value] = {}
        self._alive: list[Tensor] = []
        with ExitStack() as stack:
            _enter_fakes(stack, operands)
            own = [self._operand(index, operand, casts) for index, operand in enumerate(operands)]
            args, kwargs = call(own)
            for region in regions:
                stack.enter_context(torch.autocast(*region))
            stack.enter_context(self)
            self.given = function(*args, **kwargs | casts.stated)
        self.did = tuple(self._order), self._named(self.given)

    def _operand(self, index: int, operand: Any, casts: Casts) -> Any:
        """An operand as an object of its own: two nodes may share one fake value."""
        if not isinstance(operand, Tensor):
            return operand
        value = _Value(self._name(("operand", index)), (operand.dtype,), index)
        operand = operand.detach()
        if index in casts.operands:
            operand, value = operand.to(casts.operands[index]), _to(value, casts.operands[index])
        self._know(operand, value)
        return operand

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # questions about a device
            return function(*args, **kwargs)
        named = self._named((args, kwargs))
        before = self._values.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
        out = function(*args, **kwargs)
        if before is not None and _only_casts(function, args[0], out, kwargs):
            if before.operand is not None and len(before.path) == 1 and out.dtype != before.path[0]:
                self.cast.setdefault(before.operand, out.dtype)
            self._know(out, _to(before, out.dtype))
            return out
        moved = before is not None and _moves(function, args[0], out)
        if moved:
            rest = self._named((args[1:], kwargs))
            key, path, operand = (function, before.name, rest), before.path, before.operand
        else:
            key, path, operand = (function, named, len(self._order)), None, None
            self._order.append(key)
        for index, tensor in enumerate(_tensors(out)):
            self._know(tensor, _Value(self._name((key, index)), path or (tensor.dtype,), operand))
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
            return value[:2] if value is not None else ("unknown", form(tree))
        if isinstance(tree, (tuple, list)):
            return tuple(map(self._named, tree))
        if isinstance(tree, dict):
            return tuple((name, self._named(entry)) for name, entry in sorted(tree.items()))
        return form(tree)


def _to(value: _Value, dtype: torch.dtype) -> _Value:
    return value if value.path[-1] == dtype else value._replace(path=(*value.path, dtype))


def _only_casts(function: OpOverload, given: Tensor, out: Any, kwargs: Mapping[str, Any]) -> bool:
    kept = kwargs.get("memory_format") in (None, torch.preserve_format)
    return function is aten._to_copy.default and kept and out.device == given.device and out.layout == given.layout


def _moves(function: OpOverload, given: Tensor, out: Any) -> bool:
    """Whether an operation gives numbers of its operand as they are."""
    return (function.is_view or function in _MOVES) and all(one.dtype == given.dtype for one in _tensors(out))


def dtypes(out: Any) -> tuple[torch.dtype, ...]:
    """Of all tensors in a result."""
    return tuple(tensor.dtype for tensor in _tensors(out))


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [tensor for one in out for tensor in _tensors(one)] if isinstance(out, (tuple, list)) else []


def _enter_fakes(stack: ExitStack, operands: Sequence[Any]) -> None:
    """What is asked of sizes here stays unsaid in the graph, as the graph's own trace said it already."""
    stack.enter_context(torch.no_grad())
    stack.enter_context(enable_python_dispatcher())  # some compositions know symbolic sizes in Python only
    stack.enter_context(symbolic.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
    fakes = next((operand.fake_mode for operand in operands if isinstance(operand, FakeTensor)), None)
    if fakes is not None:
        if fakes.shape_env is not None:
            stack.enter_context(fakes.shape_env.suppress_guards())
            stack.enter_context(fakes.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(fakes)
