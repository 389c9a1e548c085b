"""Weights of convolutions are stored in the order that their kernels read; what is computed stays the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from vggt_compile import models
from vggt_compile.artifact.library import serves
from vggt_compile.artifact.program import program
from vggt_compile.artifact.request import Span
from vggt_compile.artifact.stored import channels_last, store_channels_last
from vggt_compile.plan import Plan

sizes = st.integers(1, 5)


def in_order(x: Tensor) -> bool:
    """Whether channels are last, and no size of one leaves that open."""
    _, b, h, w = x.shape
    return x.stride() == (b * h * w, 1, w * b, b)


@given(sizes, sizes, sizes, sizes)
def test_channels_last_is_the_same_tensor_in_that_order(a: int, b: int, h: int, w: int) -> None:
    x = torch.rand(a, b, h, w)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert in_order(y)
    assert y.is_contiguous(memory_format=torch.channels_last)


class Convolves(nn.Module):
    def __init__(self, read: Callable[[Convolves, Tensor], Tensor], groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


def viewed(model: Convolves, x: Tensor) -> Tensor:
    """A view over channels and rows, which no tensor with channels last has."""
    made: Tensor = model.up(model.first(x))
    return made.view(x.shape[0], -1)


def looped(model: Convolves, x: Tensor) -> Tensor:
    def turn(carried: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
        return carried.clone(), model.up(F.relu(model.first(one[None])))

    _, made = torch._higher_order_ops.scan(turn, x[0, 0, 0].clone(), x)
    return made


def cast(model: Convolves, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        made: Tensor = model.up(model.first(x))
    return made.float()


def also_normed(model: Convolves, x: Tensor) -> Tensor:
    made: Tensor = model.up(model.first(x))
    return made * model.first.weight.norm()


def graph_of(model: nn.Module, x: Tensor) -> GraphModule:
    with torch.no_grad():
        traced = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: Dim("images", min=2)},))
        return traced.run_decompositions({}).module(check_guards=False)


def laid_out(model: nn.Module) -> set[str]:
    return {name for name, x in model.named_parameters() if x.dim() == 4 and in_order(x)}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Convolves(viewed), {"first.weight", "up.weight"}),
        (Convolves(looped), {"first.weight", "up.weight"}),
        (Convolves(cast), {"first.weight", "up.weight"}),
        (Convolves(also_normed), {"up.weight"}),
        (Convolves(viewed, groups=2), {"up.weight"}),
    ],
    ids=["viewed", "looped", "cast", "read otherwise", "groups"],
)
def test_weights_of_convolutions_alone_are_laid_out_anew(model: Convolves, expected: set[str]) -> None:
    x = torch.rand(3, 4, 5, 7)
    gm = graph_of(model, x)
    with torch.no_grad():
        before = gm(x)
        store_channels_last(gm)
        assert laid_out(gm) == expected
        torch.testing.assert_close(gm(x), before)
    assert not laid_out(model), "the model's own weights"


def test_code_for_one_order_is_not_given_a_weight_in_another() -> None:
    x = torch.rand(2, 3, 4, 5)
    assert serves(x.clone(), x)
    assert not serves(channels_last(x), x)
    assert not serves(x + 1, x)
    assert not serves(x.double(), x)
    assert not serves(None, x)


@pytest.mark.parametrize("frames", [(3, 16), (2, 2)])
def test_weights_of_dense_heads_are_laid_out_and_the_model_is_as_it_was(frames: tuple[int, int]) -> None:
    """In a loop over parts of the images, and for two, which need none; so both can be given the same weights."""
    model = models.vggt("tiny", outputs=("depth",)).eval()
    model.depth_head.chunk = 4
    before = {name: (x.data_ptr(), x.stride()) for name, x in model.named_parameters()}
    made = program(model, Span(frames, (1, 1), (28, 42)), Plan(), "fp32", torch.device("cpu"), strict=True)
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    expected = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, convolutions)}
    assert laid_out(made.graph) == expected
    assert ("scan" in made.graph.code) == (frames[1] > 4)
    assert {name: (x.data_ptr(), x.stride()) for name, x in model.named_parameters()} == before
