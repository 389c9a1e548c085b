"""A shim: a method of a model's class, and the form that takes its place while Dynamo or export traces.

Below it is what every recogniser needs: the names that a method refers to, and a call by the method's own names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch


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


def names_in(cls: type, method: str, arguments: int) -> set[str]:
    """The names that a method defined by the class itself refers to; empty where its arity differs."""
    function = vars(cls).get(method)
    if not isinstance(function, FunctionType) or function.__code__.co_argcount != arguments + 1:
        return set()
    return set(function.__code__.co_names)


def by_name(original: FunctionType, form: Callable[..., Any]) -> Callable[..., Any]:
    """The form under the parameter names of the original, which callers may use."""
    names = original.__code__.co_varnames[1 : original.__code__.co_argcount]

    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return form(self, *[given[name] for name in names if name in given])

    return bound
