"""A choice of blocks serves so many layers in a row, of the same sizes and in the same run, and no others."""

from __future__ import annotations

import alternating
import pytest
import torch
import torch.nn.functional as F
from alternating import Spec, build
from axes import by_hand
from blocks_model import BLOCKS, SPEC, confined, plan, scene
from harness import Capture, nodes, run
from torch import Tensor, nn

from vggt_compile.ops.select_blocks import select_blocks
from vggt_compile.report import Report


def choosers(report: Report) -> list[int | None]:
    """For each global layer, the layer that chose its blocks; None where it is dense."""
    found = []
    for row in report.global_rows:
        setting = row.axes.get("blocks")
        found.append(setting and setting.get("chosen_at", row.layer))
    return found


KEEP = {"method": "predict", **BLOCKS, "keep": 0.25, "refresh": 3}
SHARED: list[tuple[dict, list]] = [
    ({"*": KEEP}, [0, 0, 0, 3, 3, 3, 6]),
    ({"*": {**KEEP, "refresh": 1}}, [0, 1, 2, 3, 4, 5, 6]),
    ({"*": {**KEEP, "refresh": 100}}, [0] * 7),
    ({"0-1": KEEP, "3-6": KEEP}, [0, 0, None, 3, 3, 3, 6]),
    ({"0-1": KEEP, "2-6": {**KEEP, "keep": 0.5}}, [0, 0, 2, 2, 2, 5, 5]),
    ({"0-1": KEEP, "2": {**KEEP, "order": "hilbert"}, "3-6": KEEP}, [0, 0, 2, 3, 3, 3, 6]),
    ({"0": KEEP, "1": {"method": "random", **BLOCKS}, "2-6": KEEP}, [0, 1, 2, 2, 2, 5, 5]),
    ({"1,3,5": KEEP}, [None, 1, None, 3, None, 5, None]),
]


@pytest.mark.parametrize(("layers", "expected"), SHARED)
def test_a_choice_serves_so_many_layers_in_a_row(layers: dict, expected: list) -> None:
    model, x = build(Spec(head_dim=16, pairs=7)), scene()
    capture = Capture(plan={"layers": {name: {"blocks": setting} for name, setting in layers.items()}}, strict=True)
    run(model, x, capture=capture)
    assert choosers(capture.report) == expected
    choices = sum(layer == index for index, layer in enumerate(expected))
    assert nodes(capture.graphs[0]).count("vggt_compile.select_blocks") + ("random" in str(layers)) == choices
    assert capture.graphs[0].graph.eliminate_dead_code() is False


def test_a_shared_choice_is_that_of_the_layer_that_chose() -> None:
    model, x, lists = build(Spec(head_dim=16, pairs=5)), scene(2), []

    def choose(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if calls[0] % 2 == 0:
            lists.append(select_blocks(q, k, 0.25, **BLOCKS))
        calls[0] += 1
        return lists[-1]

    calls = [0]
    out = run(model, x, capture=(capture := Capture(plan=plan(refresh=2), strict=True)))
    want = by_hand(model, x, confined(4, 5, choose))
    assert choosers(capture.report) == [0, 0, 2, 2, 4]
    assert "refresh=2, chosen_at=2" in capture.report.table()
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert not torch.allclose(out, run(model, x, capture=Capture(plan=plan())), rtol=1e-3, atol=1e-4)


def test_layers_of_other_sizes_choose_anew() -> None:
    def more_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)

    spec = Spec(head_dim=16, pairs=5, cores={1: more_heads, 2: more_heads, 4: alternating.scaled})
    capture = Capture(plan=plan(refresh=100), strict=True)
    run(build(spec), scene(), capture=capture)
    assert choosers(capture.report) == [0, 1, 1, 3, 4]


def test_a_second_run_of_the_model_in_one_graph_chooses_anew() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build(SPEC)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return self.model(images), self.model(images.flip(1))

    capture = Capture(plan=plan(refresh=100), strict=True)
    run(Twice(), scene(), capture=capture)
    assert [row.layer for row in capture.report.global_rows] == [0, 1, 0, 1]
    assert nodes(capture.graphs[0]).count("vggt_compile.select_blocks") == 2


# Errors and refusals
