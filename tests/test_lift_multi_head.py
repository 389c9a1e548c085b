"""`multi_head_attention_forward` is projections around one attention, wherever no mask or extra key is in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import nodes
from lifted import assert_same, attentions, dynamo
from numerics import assert_as_accurate
from torch import Tensor, nn


class Around(nn.Module):
    """A module that holds another, so that the attention has a path."""

    def __init__(self, mha: nn.MultiheadAttention, call: Callable) -> None:
        super().__init__()
        self.mha, self.call = mha, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.mha, *inputs)


def mha(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(16, 2, **options).eval().requires_grad_(False)
    if made.in_proj_bias is not None:
        nn.init.normal_(made.in_proj_bias)
        nn.init.normal_(made.out_proj.bias)
    return made


def functional(module: nn.MultiheadAttention, x: Tensor, **options: Any) -> Any:
    """The module's output in float64, for the reference, and as it is."""
    want = module.double()(x.double(), x.double(), x.double(), **options)[0]
    module.float()
    return want, module(x, x, x, **options)[0]


def eager(function: Callable, *inputs: Tensor) -> Any:
    """The graph of a dense plan, run node by node: eager bits without the module's own fast path."""
    return dynamo(function, *inputs, plan={})[0]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multi_head_attention_becomes_projections_and_one_attention(
    batch_first: bool, bias: bool, need_weights: bool
) -> None:
    module, x = mha(batch_first=batch_first, bias=bias), torch.randn(3, 5, 16)
    out, gm, report, _ = dynamo(Around(module, lambda mha, x: mha(x, x, x, need_weights=need_weights)[0]), x)
    assert attentions(gm) == 1
    rows = [(row.path, row.heads, row.head_dim, row.implementation) for row in report.rows]
    assert rows == [("mha", 2, 8, "sdpa")]
    assert report.notes == []
    want, eager = functional(module, x)
    assert out.shape == eager.shape
    assert_as_accurate(out, eager, want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_functional_multi_head_attention_of_other_keys(dynamic: bool) -> None:
    module, q, k, v = mha(), torch.randn(4, 2, 16), torch.randn(6, 2, 16), torch.randn(6, 2, 16)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            q, k, v, 16, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.5, module.out_proj.weight,
            module.out_proj.bias, training=False, need_weights=False,
        )[0]  # fmt: skip

    out, gm, _, _ = dynamo(call, q, k, v, dynamic=dynamic)
    assert attentions(gm) == 1
    eager = call(q, k, v)
    module.double()
    assert_as_accurate(out, eager, call(q.double(), k.double(), v.double()))


@pytest.mark.parametrize(
    ("options", "call", "reason"),
    [
        ({}, {"attn_mask": torch.zeros(5, 5)}, "attention mask"),
        ({}, {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}, "attention mask"),
        ({"add_bias_kv": True}, {}, "extra keys"),
        ({"add_zero_attn": True}, {}, "extra keys"),
        ({"kdim": 16, "vdim": 8}, {}, "separate projections"),
    ],
)
def test_unusual_multi_head_attention_is_left_with_a_reason(options: dict, call: dict, reason: str) -> None:
    module, x = mha(batch_first=True, **options), torch.randn(3, 5, 16)
    v = x[..., : options.get("vdim", 16)]
    out, gm, report, before = dynamo(lambda x, v: module(x, x, v, need_weights=False, **call)[0], x, v)
    assert nodes(gm) == before
    assert len(report.notes) == 1
    assert reason in report.notes[0]
    assert torch.equal(out, module(x, x, v, need_weights=False, **call)[0])


def test_multi_head_attention_whose_weights_are_used_is_left() -> None:
    module, x = mha(batch_first=True), torch.randn(3, 5, 16)
    out, gm, report, before = dynamo(lambda x: module(x, x, x), x)
    assert nodes(gm) == before
    assert "used elsewhere" in report.notes[0]
    assert_same(out, eager(lambda x: module(x, x, x), x))


def test_multi_head_attention_in_training_is_left() -> None:
    module, x = mha(batch_first=True, dropout=0.5).train(), torch.randn(3, 5, 16)
    _, gm, report, before = dynamo(lambda x: module(x, x, x, need_weights=False)[0], x)
    assert nodes(gm) == before
    assert "drops out" in report.notes[0]


def test_multi_head_attention_without_a_batch_is_left() -> None:
    module, x = mha(), torch.randn(5, 16)
    out, gm, report, before = dynamo(lambda x: module(x, x, x, need_weights=False)[0], x)
    assert torch.equal(out, module(x, x, x, need_weights=False)[0])
    assert nodes(gm) == before or attentions(gm) == 1, report.notes


def test_multi_head_attention_under_a_dense_plan_is_untouched() -> None:
    module, x = mha(batch_first=True), torch.randn(3, 5, 16)
    out, gm, _, before = dynamo(lambda x: module(x, x, x, need_weights=False)[0], x, plan={})
    assert nodes(gm) == before
    assert "multi_head_attention_forward" in before
    want, fast = functional(module, x)
    assert_as_accurate(out, fast, want)
