"""The model that a command works on: one written here, by name, or a user's factory as `module:callable`."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn

from vggt_compile.errors import BadInput, UnknownName
from vggt_compile.models import VGGT, Pi3, available, load_checkpoint, pi3, pretrained, vggt
from vggt_compile.models.layers import LayerScale
from vggt_compile.models.presets import PI3_PRESETS, VGGT_PRESETS

RANDOM = (
    "random weights: the geometry means nothing; the differences show what the plan changes in this model, "
    "not what it costs a trained one"
)
SHIPPED = "shipped with the package"
_BUILDERS: dict[str, tuple[Callable[[str], VGGT | Pi3], str]] = {
    **{f"vggt-{preset}": (vggt, preset) for preset in VGGT_PRESETS},
    **{f"pi3-{preset}": (pi3, preset) for preset in PI3_PRESETS},
}
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode.

    Attributes:
        patch: side of a patch in pixels, which image sides must be multiples of; 1 where unknown.
        weights: path of the checkpoint, or `SHIPPED`; None where weights are random.
    """

    name: str
    model: nn.Module
    patch: int
    weights: str | None = None


def named(name: str, device: torch.device, seed: int = 0, checkpoint: str | None = None) -> Subject:
    """A model written here, with weights of a checkpoint, else those that come with the package, else random ones."""
    if checkpoint is None and name in available():
        return Subject(name, pretrained(name).to(device), patch_size(name), SHIPPED)
    if checkpoint is not None:
        model = _bare(name)
        _load(model, checkpoint)
        model = model.to(device)
    else:
        build, preset = _builder(name)
        torch.manual_seed(seed)
        with device:
            model = build(preset)
        _open_gates(model)
    return Subject(name, model.eval(), model.config.patch_size, checkpoint)


def patch_size(name: str) -> int:
    """Side of a patch of a model written here, in pixels."""
    return _bare(name).config.patch_size


def outline(name: str) -> Subject:
    """A model of which only shapes count: uninitialised weights, so the largest takes no time and no memory."""
    if ":" in name:
        return _imported(name)
    model = _bare(name).to_empty(device="cpu")
    return Subject(name, model.eval(), model.config.patch_size)


def _builder(name: str) -> tuple[Callable[[str], VGGT | Pi3], str]:
    if name not in _BUILDERS:
        raise UnknownName("model", name, _BUILDERS)
    return _BUILDERS[name]


def _bare(name: str) -> VGGT | Pi3:
    build, preset = _builder(name)
    with torch.device("meta"):
        return build(preset)


def _load(model: nn.Module, path: str) -> None:
    try:
        load_checkpoint(model, path)
    except _UNREADABLE as error:
        raise BadInput(f"cannot load --checkpoint {path}: {error}") from error


def _open_gates(model: nn.Module) -> None:
    """Gains of the residual branches to 1: at their initial 0.01 untrained attention has no visible effect."""
    for module in model.modules():
        if isinstance(module, LayerScale):
            nn.init.ones_(module.gamma)


def _imported(name: str) -> Subject:
    module_name, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"cannot import {name}: {error}") from error
    model = factory() if callable(factory) else None
    if not isinstance(model, nn.Module):
        raise BadInput(f"{name} must be callable without arguments and give an nn.Module")
    patch = getattr(getattr(model, "config", None), "patch_size", 1)
    return Subject(name, model.eval(), patch if isinstance(patch, int) else 1)
