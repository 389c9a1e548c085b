"""What the code of a module can see of it: all but the values of its weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
OPAQUE = (type, FunctionType, MethodType, ModuleType, Tensor)
"""Whose identity says all: what else they hold is not part of a module's state."""


@dataclass(frozen=True)
class Same:
    """Equal to the very same object only, which it keeps alive: no other will have its address."""

    what: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.what is other.what

    def __hash__(self) -> int:
        return id(self.what)


def likeness(module: nn.Module) -> Hashable:
    """Equal for two modules, or two moments of one, that differ in no more than what their weights hold.

    Weights are compared by shape, strides, dtype and device, and by which of them are the same one. What has no state
    that can be read is compared by identity, so modules may be told apart that do the same.
    """
    return _seen(module, {})


def weights(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, one for each name; those of like modules are in one order."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [tensor for _, tensor in named]


def described(x: Tensor) -> Hashable:
    """What a trace with fake tensors depends on; sizes as they are written, which may be symbols."""
    sizes = tuple(map(str, (*x.shape, *x.stride(), x.storage_offset())))
    return type(x), x.ndim, sizes, x.dtype, x.device, x.requires_grad


def _seen(x: Any, met: dict[int, int]) -> Hashable:
    if isinstance(x, PLAIN):
        return type(x), x
    if id(x) in met:
        return "again", met[id(x)]
    met[id(x)] = len(met)
    if isinstance(x, nn.Module):
        return _module(x, met)
    if isinstance(x, dict):
        return type(x), _fields(x, met)
    if isinstance(x, list | tuple):
        return type(x), tuple(_seen(item, met) for item in x)
    if isinstance(x, set | frozenset) and all(isinstance(item, PLAIN) for item in x):
        return type(x), frozenset(x)
    return Same(x), () if isinstance(x, OPAQUE) else _fields(getattr(x, "__dict__", {}), met)


def _fields(given: Mapping[Any, Any], met: dict[int, int]) -> Hashable:
    return tuple((_seen(key, met), _seen(value, met)) for key, value in given.items())


def _module(module: nn.Module, met: dict[int, int]) -> Hashable:
    own = dict(vars(module))
    tensors = own.pop("_parameters") | own.pop("_buffers")
    return type(module), _fields(own, met), tuple((name, _weight(tensor, met)) for name, tensor in tensors.items())


def _weight(tensor: Tensor | None, met: dict[int, int]) -> Hashable:
    if tensor is None:
        return None
    if id(tensor) in met:
        return "again", met[id(tensor)]
    met[id(tensor)] = len(met)
    return described(tensor)
