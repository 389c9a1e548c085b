"""Which code of a model stands in the way of tracing, recognised by structure, and the form that takes its place.

Forks and vendored copies are the rule in this field, so import paths say nothing. A class is recognised by what its
code does; where its traceable form can be compared with it, it must give the same bits.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import FunctionType

from vggt_compile.families import dense_heads, rotary
from vggt_compile.families.rebuild import needs_rebuilding, reads_around_getattr, rebuilt, shares_out_a_batch
from vggt_compile.families.shim import Shim


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
    yield from dense_heads.recognise(cls)
    yield from rotary.recognise(cls)


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
