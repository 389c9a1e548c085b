"""What a library says of its weights: the same in tables as in statements, and some of the code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vggt_compile
from vggt_compile.artifact.listed import tables

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


class Odd(nn.Module):
    """Images [B, S, 3, H, W] times weights of two dtypes, of rank 0 to 2, with unusual strides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.mixing = nn.Parameter(torch.rand(3, 4).T.contiguous().T)
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("bschw,cd->bsdhw", images[:, :, self.order], self.mixing) * self.scale


def test_weights_are_found_where_tables_say_so(tmp_path: Path) -> None:
    model, images = Odd().eval(), torch.rand(1, 3, 3, 4, 6)
    vggt_compile.export(model, images, plan={}, frames=3, path=tmp_path / "model.pt2", check=False)
    torch.testing.assert_close(vggt_compile.load(tmp_path / "model.pt2")(images), model(images))


STATEMENTS = """
    inputs_info_[0].name = "images";
    constants_info_[0].name = "a";
    constants_info_[0].dtype = cached_torch_dtype_float32;
    constants_info_[0].shape = {2, 3};
    constants_info_[1].name = "b";
    constants_info_[1].dtype = cached_torch_dtype_int64;
    constants_info_[1].shape = {};
    constants_info_[1].opaque_metadata = {7, 8};
    update_constants_map(std::move(constants_map));
"""


def test_what_only_some_weights_have_stays_a_statement() -> None:
    lines = STATEMENTS.strip("\n").splitlines()
    written = tables(lines)
    assert written[:2] == [lines[0], lines[-2]]
    assert written[-1] == lines[-1]
    fields = ("name", "dtype", "shape")
    assert [sum(f".{field} =" in line for line in written[1:]) for field in fields] == [1, 1, 1]
    assert [line.strip() for line in written if line.strip().startswith(('"', "{2", "{}", "cached"))] == [
        '"a",', '"b",', "cached_torch_dtype_float32,", "cached_torch_dtype_int64,", "{2, 3},", "{},",
    ]  # fmt: skip
    assert tables(lines[:1] + lines[-1:]) == lines[:1] + lines[-1:]
