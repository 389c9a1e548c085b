"""Which code of a model stands in the way of tracing, recognised by structure, and the form that takes its place.

Forks and vendored copies are the rule in this field, so import paths say nothing. A class is recognised by what its
code does; where its traceable form can be compared with it, it must give the same bits.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from vggt_compile.families.forms import flattened_in_few_passes, grid_positions, in_few_passes, in_set_passes, rotate
from vggt_compile.families.rebuild import needs_rebuilding, reads_around_getattr, rebuilt, shares_out_a_batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shim:
    """A method of a class and the form that tracing sees instead of it; `what` says that form in words."""

    owner: type
    method: str
    original: FunctionType
    traceable: Callable[..., Any]
    what: str

    @property
    def name(self) -> str:
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.method}"

    def wrapped(self) -> FunctionType:
        """The method that runs the original, except while Dynamo or export traces."""
        original, traceable = self.original, self.traceable

        @functools.wraps(original)
        def either(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return traceable(self, *args, **kwargs)
            return original(self, *args, **kwargs)

        return either  # type: ignore[return-value]


def recognise(cls: type) -> Iterator[Shim]:
    """Shims for a class of modules and for the helpers beside it."""
    if cls.__module__.startswith("torch."):
        return
    for logger in _printing_loggers(cls):
        yield _silence(logger)
    for method, function in list(vars(cls).items()):
        if isinstance(function, FunctionType) and needs_rebuilding(function):
            yield from _rebuilt(cls, method, function, "rebuilt without locals(), CUDA hints and capability queries")
        elif isinstance(function, FunctionType) and shares_out_a_batch(function):
            yield from _rebuilt(cls, method, function, "stochastic depth that counts a batch without fixing it")
    for dictionary in _dictionaries_beside(cls):
        yield from _readable(dictionary)
    if _loops_over_flattened_frames(cls):
        yield _few_passes_of_flattened(cls)
    if _loops_over_frames(cls):
        yield _few_passes(cls)
    if _skips_its_loop(cls):
        yield _set_passes(cls)
    if _reads_largest_position(cls):
        yield from _rope(cls)
        for helper in _companions(cls):
            yield from _positions(helper)


def _names_in(cls: type, method: str, arguments: int) -> set[str]:
    """The names that a method defined by the class itself refers to; empty where its arity differs."""
    function = vars(cls).get(method)
    if not isinstance(function, FunctionType) or function.__code__.co_argcount != arguments + 1:
        return set()
    return set(function.__code__.co_names)


def _by_name(original: FunctionType, form: Callable[..., Any]) -> Callable[..., Any]:
    """The form under the parameter names of the original, which callers may use."""
    names = original.__code__.co_varnames[1 : original.__code__.co_argcount]

    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return form(self, *[given[name] for name in names if name in given])

    return bound


def _reads_largest_position(cls: type) -> bool:
    """forward(tokens, positions) that turns `positions.max()` into an int: a table-driven rotary embedding."""
    return {"int", "max", "chunk"} <= _names_in(cls, "forward", 2)


def _companions(rope: type) -> list[type]:
    """Classes beside the rotary embedding whose __call__(batch, height, width, device) lists grid positions."""
    beside = vars(sys.modules.get(rope.__module__, object)).values()
    return [c for c in beside if isinstance(c, type) and "cartesian_prod" in _names_in(c, "__call__", 4)]


def _rope(cls: type) -> Iterator[Shim]:
    base = next((name for name in _numbers_of(cls) if _rotates_alike(cls, name)), None)
    if base is None:
        log.warning("%s looks like a rotary embedding but computes something else; tracing will break there", cls)
        return

    def form(self: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        return rotate(tokens, positions, getattr(self, base))

    forward = vars(cls)["forward"]
    what = "rotary angles from positions, without their maximum and without a cache"
    yield Shim(cls, "forward", forward, _by_name(forward, form), what)


def _numbers_of(cls: type) -> list[str]:
    try:
        return [name for name, value in vars(cls()).items() if type(value) in (int, float)]
    except TypeError:  # its constructor wants arguments that we cannot guess
        return []


def _rotates_alike(cls: type, base: str) -> bool:
    """Whether `rotate` with this attribute as base gives the bits of the class, whatever its other numbers are."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 40, (2, 9, 2), generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        tokens = torch.randn(2, 3, 9, 16, generator=generator).to(dtype)
        probe = cls()
        for name in _numbers_of(cls):
            setattr(probe, name, getattr(probe, name) + (7.0 if name == base else 1.0))
        with torch.no_grad():
            if not torch.equal(probe(tokens, positions), rotate(tokens, positions, getattr(probe, base))):
                return False
    return True


def _positions(cls: type) -> Iterator[Shim]:
    cpu = torch.device("cpu")
    if not torch.equal(cls()(2, 3, 5, device=cpu), grid_positions(2, 3, 5, cpu)):
        log.warning("%s looks like a grid of positions but computes something else; tracing will keep its cache", cls)
        return

    def form(self: Any, batch: int, height: int, width: int, device: torch.device) -> Tensor:
        return grid_positions(batch, height, width, device)

    call = vars(cls)["__call__"]
    yield Shim(cls, "__call__", call, _by_name(call, form), "patch positions from the grid, without a cache")


def _loops_over_frames(cls: type) -> bool:
    """A dense head: forward(tokens, images, start, frames_chunk_size) with a Python loop over chunks of frames."""
    function = vars(cls).get("forward")
    return (
        {"range", "cat"} <= _names_in(cls, "forward", 4)
        and isinstance(function, FunctionType)
        and (function.__code__.co_varnames[2:5:2] == ("images", "frames_chunk_size"))
    )


def _few_passes(cls: type) -> Shim:
    forward = vars(cls)["forward"]

    def form(self: Any, tokens: Any, images: Tensor, start: int, chunk: int | None = 8) -> Any:
        return in_few_passes(functools.partial(forward, self), tokens, images, start, chunk)

    what = "a number of chunks that does not change with every frame count"
    return Shim(cls, "forward", forward, _by_name(forward, form), what)


def _loops_over_flattened_frames(cls: type) -> bool:
    """A dense head: forward(feats, H, W, patch_start_idx, chunk_size) that makes batch and frames one axis."""
    function = vars(cls).get("forward")
    return (
        {"range", "reshape"} <= _names_in(cls, "forward", 5)
        and isinstance(function, FunctionType)
        and function.__code__.co_varnames[1:6] == ("feats", "H", "W", "patch_start_idx", "chunk_size")
        and not function.__code__.co_flags & inspect.CO_VARKEYWORDS  # what it takes there would have to be cut as well
    )


def _few_passes_of_flattened(cls: type) -> Shim:
    forward = vars(cls)["forward"]

    def form(self: Any, feats: Any, height: int, width: int, start: int, chunk: int | None = 8) -> Any:
        return flattened_in_few_passes(functools.partial(forward, self), feats, height, width, start, chunk)

    what = "a number of chunks that does not change with every frame count"
    return Shim(cls, "forward", forward, _by_name(forward, form), what)


def _skips_its_loop(cls: type) -> bool:
    """The dense head written here: forward(layers, image_size, special) with a loop over frames for eager mode only."""
    return {"is_compiling", "chunk", "predict"} <= _names_in(cls, "forward", 3)


def _set_passes(cls: type) -> Shim:
    forward = vars(cls)["forward"]

    def form(self: Any, layers: Any, size: tuple[int, int], special: int) -> Tensor:
        return in_set_passes(self.predict, layers, size, special, self.chunk)

    return Shim(cls, "forward", forward, _by_name(forward, form), "as many chunks as an export sets, in a compile one")


def _dictionaries_beside(cls: type) -> list[type]:
    """Dictionary classes that a model's module names."""
    beside = vars(sys.modules.get(cls.__module__, object)).values()
    return [c for c in beside if isinstance(c, type) and issubclass(c, dict) and not c.__module__.startswith("torch.")]


def _readable(cls: type) -> Iterator[Shim]:
    """Methods of a dictionary class that keep its state out of the way of its own __getattr__."""
    for method, function in list(vars(cls).items()):
        if isinstance(function, FunctionType) and reads_around_getattr(function):
            yield from _rebuilt(cls, method, function, "a dictionary that reads its own state where tracing can")


def _rebuilt(cls: type, method: str, function: FunctionType, what: str) -> Iterator[Shim]:
    form = rebuilt(function)
    if form is not None:
        yield Shim(cls, method, function, form, what)


def _printing_loggers(cls: type) -> list[type]:
    """Classes of home-made loggers that a model's module calls: one method ends in `print`, which breaks the graph."""
    globals_ = vars(sys.modules.get(cls.__module__, object)).values()
    owners = {type(v) for v in globals_ if hasattr(type(v), "info") and not isinstance(v, logging.Logger)}
    return [owner for owner in owners if _printing_method(owner) is not None]


def _printing_method(cls: type) -> str | None:
    functions = {n: f for n, f in vars(cls).items() if isinstance(f, FunctionType)}
    return next((n for n, f in functions.items() if "print" in f.__code__.co_names), None)


def _silence(cls: type) -> Shim:
    method = _printing_method(cls)
    assert method is not None
    return Shim(cls, method, vars(cls)[method], lambda *_, **__: None, "a logger that prints is silent")
