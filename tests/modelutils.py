"""Helpers for tests of the reference models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from vggt_compile.models import pi3, vggt

Model = TypeVar("Model", bound=nn.Module)
BUILDERS = {"vggt": vggt, "pi3": pi3}
both = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def randomized(model: Model, std: float = 0.1, gain: float = 0.5) -> Model:
    """Move every parameter off its initial value and every LayerScale to about `gain`.

    At their initial values most blocks hardly matter, and what one frame does to another drowns in rounding.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(gain)
            parameter.add_(torch.empty(parameter.shape).normal_(std=std, generator=generator))
    return model.eval()


def tiny(build: Callable[..., nn.Module], **overrides: Any) -> Any:
    torch.manual_seed(0)
    return randomized(build("tiny", **overrides))


def images(*shape: int) -> Tensor:
    """Noise `[..., 3, H, W]` in 0..1, each image and colour of its own brightness."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*shape, generator=generator) * torch.rand(*shape[:-2], 1, 1, generator=generator)


def tensors(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs as a flat dict: lists become numbered keys."""
    flat = {}
    for key, value in outputs.items():
        flat.update({f"{key}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value})
    return flat


def errors(got: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Largest error of each output over its largest deviation from its mean, so that an offset hides nothing."""
    got, want = tensors(got), tensors(want)
    assert got.keys() == want.keys()
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    return {k: float((got[k] - want[k]).abs().max() / (want[k] - want[k].mean()).abs().max()) for k in want}


def worst(got: dict[str, Any], want: dict[str, Any]) -> float:
    """The largest of `errors`; infinite where an output or its expectation holds NaN."""
    return max(float("inf") if math.isnan(error) else error for error in errors(got, want).values())
