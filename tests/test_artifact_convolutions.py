"""A convolution has one layout for all counts of images, so a compile that asks for it notes nothing of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from test_artifact_plans import SPAN, exported
from torch import Tensor

from vggt_compile.artifact import assumed
from vggt_compile.artifact.convolutions import of_any_number

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With more, a CPU runs every small convolution by the same kernel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kernel_and_layout(x: Tensor, weight: Tensor, transposed: bool) -> tuple[object, torch.memory_format]:
    """What torch's fake convolution asks for."""
    kernel = torch._C._select_conv_backend(
        x, weight, bias=None, stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=transposed,
        output_padding=[0, 0], groups=1, bias_sizes=None,
    )  # fmt: skip
    return kernel, torch._C._conv_determine_backend_memory_format(x, weight, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_layout_is_that_of_every_kernel(one_thread: None, transposed: bool, dtype: torch.dtype) -> None:
    run = F.conv_transpose2d if transposed else F.conv2d
    kernels = set()
    for count, of_x, of_weight, width in itertools.product((3, 15, 16, 40), LAYOUTS, LAYOUTS, (1, 3)):
        x = torch.randn(count, 6, 10, 12, dtype=dtype).to(memory_format=of_x)
        weight = torch.randn(6, 6, width, width, dtype=dtype).to(memory_format=of_weight)
        chosen, layout = kernel_and_layout(x, weight, transposed)
        with of_any_number():
            general, asked = kernel_and_layout(x, weight, transposed)
        kernels |= {str(chosen), str(general)}
        assert asked == layout
        assert run(x, weight).is_contiguous(memory_format=asked)
    assert len(kernels) > 1


def runs() -> list[tuple[int, int]]:
    """After a convolution of all images of a span."""
    made, _ = exported(SPAN)
    images = next(node.meta["val"] for node in made.graph.nodes if node.op == "placeholder")
    with images.fake_mode:
        F.conv2d(images.flatten(0, 1), torch.zeros(4, 3, 1, 1))
    return assumed.runs(made, SPAN)


def test_a_span_is_not_cut_where_another_kernel_would_run() -> None:
    with of_any_number():
        assert runs() == [(3, 40)]
    assert runs() == [(3, 7), (8, 40)]
