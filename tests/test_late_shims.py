"""A model whose shims were not armed in time is traced in pieces, and the user is told what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_compile.backend import vggt_sparse_eager


def imported_anew() -> ModuleType:
    """Classes that no compile has seen yet."""
    spec = importlib.util.spec_from_file_location("lookalikes_anew", Path(__file__).with_name("lookalikes.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rotated(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        turned = self.rotary(x, positions)
        return F.scaled_dot_product_attention(turned, turned, x)


def test_after_a_reset_the_first_compile_of_a_new_class_says_that_it_came_too_late() -> None:
    torch._dynamo.reset()  # also forgets whom to call when a compile starts
    model = Rotated(imported_anew().TableRotary())
    x, positions = torch.randn(1, 2, 6, 8), torch.arange(12).view(1, 6, 2) % 3
    compiled = torch.compile(model, backend=vggt_sparse_eager, options={"plan": "g2f"})
    with torch.no_grad():
        with pytest.warns(UserWarning, match="became known too late for this trace.*prepare"):
            first = compiled(x, positions)
        torch._dynamo.reset()
        again = torch.compile(model, backend=vggt_sparse_eager, options={"plan": "g2f"}, fullgraph=True)
        torch.testing.assert_close(again(x, positions), first)
