"""Shims: while Dynamo or export traces, code that asks a tensor for a number takes a form made of shapes alone.

The published models look up rotary angles in a table as long as the largest position, and keep that table and the patch
positions in Python dictionaries. The first breaks the graph inside every attention, the second leaves tensors of the
trace behind in the model. Both compute what positions alone determine, so the traced form does that; eager calls run
the original code, bit for bit.

Classes are recognised by structure, not by import path: forks and vendored copies are the rule in this field. A class
is armed only after its traceable form has given the same bits as its own code.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.families.bound_names import without_locals

log = logging.getLogger(__name__)

FEW_FRAMES = 24
PASSES = 4


@dataclass(frozen=True)
class Shim:
    """One wrapped method. `what` says in words what tracing sees instead."""

    owner: type
    method: str
    original: FunctionType
    what: str

    @property
    def name(self) -> str:
        return f"{self.owner.__module__}.{self.owner.__qualname__}"


_armed: dict[type, Shim] = {}
_examined: weakref.WeakSet[type] = weakref.WeakSet()
_prepared: weakref.WeakKeyDictionary[nn.Module, tuple[type, ...]] = weakref.WeakKeyDictionary()


def arm() -> list[Shim]:
    """Wrap every class in this process that is recognised and not wrapped yet; returns the new shims."""
    fresh = [shim for cls in _subclasses(nn.Module) if cls not in _examined for shim in _examine(cls)]
    _mark_capability_query_constant()
    return fresh


def prepare(model: nn.Module) -> list[Shim]:
    """Make one model traceable, for `torch.export` or a backend other than ours.

    Our own backend does this by itself at every compile. Wrapping acts on the classes that the model uses: eager calls
    of other models of the same class keep their bits, and their traces become clean as well.

    Returns the shims in force for this model, an empty list where nothing needed one. Undo with `unprepare`.
    """
    classes = {type(module) for module in model.modules()}
    for cls in classes:
        _examined.discard(cls)
    arm()
    relatives = classes | {type(value) for module in model.modules() for value in vars(module).values()}
    used = tuple(owner for owner in _armed if owner in relatives or any(issubclass(c, owner) for c in classes))
    _prepared[model] = used
    return [_armed[owner] for owner in used]


def unprepare(model: nn.Module) -> None:
    """Restore the classes of a prepared model, unless another prepared model still uses them."""
    used = _prepared.pop(model, ())
    kept = {owner for owners in _prepared.values() for owner in owners}
    for owner in used:
        if owner not in kept and owner in _armed:
            shim = _armed.pop(owner)
            setattr(owner, shim.method, shim.original)
            _examined.discard(owner)


def _examine(cls: type) -> Iterator[Shim]:
    _examined.add(cls)
    candidates: list[tuple[type, Callable[[type], Shim | None]]] = [(c, _silence) for c in _printing_loggers(cls)]
    candidates += [(cls, functools.partial(_bound_names_shim, method=m)) for m in _asks_for_locals(cls)]
    if _loops_over_frames(cls):
        candidates.append((cls, _few_passes_shim))
    if _reads_largest_position(cls):
        candidates += [(cls, _rope_shim), *((c, _positions_shim) for c in _companions(cls))]
    for owner, recognise in candidates:
        shim = None if owner in _armed else recognise(owner)
        if shim is not None:
            _armed[owner] = shim
            log.info("traceable: %s (%s)", shim.name, shim.what)
            yield shim


def _subclasses(cls: type) -> Iterator[type]:
    direct: list[type] = cls.__subclasses__()
    for sub in direct:
        yield sub
        yield from _subclasses(sub)


def _names_in(cls: type, method: str, arguments: int) -> set[str]:
    """The names that a method defined by the class itself refers to; empty where its arity differs."""
    function = vars(cls).get(method)
    if not isinstance(function, FunctionType) or function.__code__.co_argcount != arguments + 1:
        return set()
    return set(function.__code__.co_names)


def _reads_largest_position(cls: type) -> bool:
    """forward(tokens, positions) that turns `positions.max()` into an int: a table-driven rotary embedding."""
    return {"int", "max", "chunk"} <= _names_in(cls, "forward", 2)


def _companions(rope: type) -> list[type]:
    """Classes beside the rotary embedding whose __call__(batch, height, width, device) lists grid positions."""
    beside = vars(sys.modules.get(rope.__module__, object)).values()
    return [c for c in beside if isinstance(c, type) and "cartesian_prod" in _names_in(c, "__call__", 4)]


def _rope_shim(cls: type) -> Shim | None:
    base = next((name for name in _numbers_of(cls) if _rotates_alike(cls, name)), None)
    if base is None:
        log.warning("%s looks like a rotary embedding but computes something else; tracing will break there", cls)
        return None

    def traceable(self: Any, tokens: Tensor, positions: Tensor) -> Tensor:
        return rotate(tokens, positions, getattr(self, base))

    return _wrap(cls, "forward", traceable, "rotary angles from positions, without their maximum and without a cache")


def _positions_shim(cls: type) -> Shim | None:
    probe = cls()
    if not torch.equal(probe(2, 3, 5, device=torch.device("cpu")), grid_positions(2, 3, 5, torch.device("cpu"))):
        log.warning("%s looks like a grid of positions but computes something else; tracing will keep its cache", cls)
        return None

    def traceable(self: Any, batch: int, height: int, width: int, device: torch.device) -> Tensor:
        return grid_positions(batch, height, width, device)

    return _wrap(cls, "__call__", traceable, "patch positions from the grid, without a cache")


def _printing_loggers(cls: type) -> list[type]:
    """Classes of home-made loggers that a model's module calls: one method ends in `print`, which breaks the graph."""
    globals_ = vars(sys.modules.get(cls.__module__, object)).values()
    owners = {type(v) for v in globals_ if hasattr(type(v), "info") and not isinstance(v, logging.Logger)}
    return [owner for owner in owners if _printing_method(owner) is not None]


def _printing_method(cls: type) -> str | None:
    functions = {n: f for n, f in vars(cls).items() if isinstance(f, FunctionType)}
    return next((n for n, f in functions.items() if "print" in f.__code__.co_names), None)


def _asks_for_locals(cls: type) -> list[str]:
    return [n for n, f in vars(cls).items() if isinstance(f, FunctionType) and "locals" in f.__code__.co_names]


def _bound_names_shim(cls: type, method: str) -> Shim | None:
    function = without_locals(vars(cls)[method])
    if function is None:
        return None
    return _wrap(cls, method, function, f"{method} knows which names are bound without calling locals()")


def _loops_over_frames(cls: type) -> bool:
    """A dense head: forward(tokens, images, start, frames_chunk_size) with a Python loop over chunks of frames."""
    function = vars(cls).get("forward")
    return (
        {"range", "cat"} <= _names_in(cls, "forward", 4)
        and isinstance(function, FunctionType)
        and (function.__code__.co_varnames[2:5:2] == ("images", "frames_chunk_size"))
    )


def _few_passes_shim(cls: type) -> Shim:
    forward = vars(cls)["forward"]

    def traceable(self: Any, tokens: Any, images: Tensor, start: int, chunk: int | None = 8) -> Any:
        return in_few_passes(functools.partial(forward, self), tokens, images, start, chunk)

    return _wrap(cls, "forward", traceable, "a number of chunks that does not change with every frame count")


def in_few_passes(forward: Callable[..., Any], tokens: Any, images: Tensor, start: int, chunk: int | None) -> Any:
    """Run a dense head over runs of frames, as its own loop does, but in one pass or in `PASSES`.

    A loop over chunks of 8 frames makes every frame count a graph of its own, with as many copies of the head. Here
    one graph serves all counts below `FEW_FRAMES` and one all others. A pass of 300 frames of 392×518 in VGGT-1B holds
    75 of them, about 23 GiB: less than what the model in one graph saves by not keeping 20 of its 24 layers.
    """
    frames = images.shape[1]
    if chunk is None or frames < FEW_FRAMES:
        return forward(tokens, images, start, None)
    step = frames // PASSES
    cuts = [*(index * step for index in range(PASSES)), frames]
    parts = [
        forward([None if t is None else t[:, a:b] for t in tokens], images[:, a:b], start, None)
        for a, b in itertools.pairwise(cuts)
    ]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, 1)
    return tuple(torch.cat(outputs, 1) for outputs in zip(*parts, strict=True))


def _silence(cls: type) -> Shim:
    method = _printing_method(cls)
    assert method is not None
    return _wrap(cls, method, lambda *_: None, "a logger that prints is silent")


def _wrap(cls: type, method: str, traceable: Callable[..., Any], what: str) -> Shim:
    original: FunctionType = vars(cls)[method]
    names = original.__code__.co_varnames[1 : original.__code__.co_argcount]

    @functools.wraps(original)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            given = dict(zip(names, args, strict=False)) | kwargs
            return traceable(self, *[given[name] for name in names if name in given])
        return original(self, *args, **kwargs)

    setattr(cls, method, either)
    return Shim(cls, method, original, what)


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


def rotate(tokens: Tensor, positions: Tensor, base: float) -> Tensor:
    """Two-dimensional rotary embedding (RoPE, arXiv 2104.09864; per axis as in arXiv 2403.13298).

    Args:
        tokens: [B, H, N, D], D divisible by 4; the first half of D turns with the row, the second with the column.
        positions: [B, N, 2], row and column in patches, integers.
        base: the longest wavelength is 2π·base patches.

    Returns:
        [B, H, N, D] in the dtype of `tokens`; angles are rounded to that dtype, as the published tables are.
    """
    half = tokens.shape[-1] // 2
    frequency = 1.0 / base ** (torch.arange(0, half, 2, device=tokens.device).float() / half)
    angle = (positions[..., None].to(frequency.dtype) * frequency).to(tokens.dtype)[:, None]  # [B, 1, N, 2, D/4]
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    axes = tokens.unflatten(-1, (2, half))
    first, second = axes.chunk(2, -1)
    return (axes * cos + torch.cat((-second, first), -1) * sin).flatten(-2)


def grid_positions(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """[batch, height·width, 2]: row and column of every patch, row by row."""
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None].expand(height, width)
    return torch.stack((rows, columns), -1).reshape(1, height * width, 2).expand(batch, -1, -1).clone()


def _mark_capability_query_constant() -> None:
    """`torch.cuda.is_bf16_supported()` in a forward (VGGT-Ω) is a fact of the machine, not of the inputs."""
    torch.compiler.assume_constant_result(torch.cuda.is_bf16_supported)
