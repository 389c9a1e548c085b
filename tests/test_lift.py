"""Spelled-out attention: which spellings are read as attention, and which only look like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import nodes
from lifted import TRACES, assert_same, attentions, dynamo, export
from numerics import assert_as_accurate
from torch import Tensor

SHAPE = (2, 3, 10, 8)


def scaled_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * q.shape[-1] ** -0.5
    attn = q @ k.transpose(-2, -1)
    return attn.softmax(dim=-1) @ v


def scaled_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.3, -1) @ v


def divided_logits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1), v)


def divided_by_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import math

    return F.softmax((q @ k.mT).div(math.sqrt(q.shape[-1])), dim=3).matmul(v)


def both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (((q * 0.5) @ k.permute(0, 1, 3, 2)) * 0.7).softmax(-1) @ v


def scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    q *= 0.3
    logits = q @ k.transpose(-2, -1)
    logits *= 0.9
    return logits.softmax(-1) @ v


def scaled_by_method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = (q + 0).mul_(0.3)
    return (q @ torch.transpose(k, -2, -1)).softmax(-1) @ v


def scaled_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k * 0.3).transpose(-2, -1)).softmax(-1) @ v


def scaled_transposed_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ (k.transpose(-2, -1) * 0.3)).softmax(-1) @ v


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attn = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
    return F.dropout(attn, 0.5, training=False) @ v


def permuted_from_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.transpose(1, 2)
    return (q @ k.permute(0, 2, 3, 1) * 0.3).softmax(-1) @ v


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.3).softmax(-1), v).reshape(SHAPE)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple((2 * torch.randn(SHAPE, generator=generator)).to(dtype) for _ in range(3))  # type: ignore[return-value]


def queries_changed_after_scaling(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scaled = q * 0.3
    scaled.add_(1.0)
    return (scaled @ k.transpose(-2, -1)).softmax(-1) @ v


LIFTED = [
    scaled_queries, scaled_logits, divided_logits, divided_by_root, both_scaled, scaled_in_place, scaled_by_method,
    scaled_keys, scaled_transposed_keys, with_dropout, batched, queries_changed_after_scaling,
]  # fmt: skip


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", LIFTED)
def test_a_spelling_becomes_one_attention(spelling: Callable, dtype: torch.dtype, trace: Callable) -> None:
    q, k, v = operands(dtype)
    out, gm, report, _ = trace(spelling, q, k, v)
    assert attentions(gm) == 1
    assert [row.implementation for row in report.rows] == ["sdpa"]
    assert out.dtype == dtype
    assert_as_accurate(out, spelling(q, k, v), spelling(q.double(), k.double(), v.double()))


def test_symbolic_sizes() -> None:
    q, k, v = operands()
    out, gm, report, _ = dynamo(scaled_queries, q, k, v, dynamic=True)
    assert attentions(gm) == 1
    assert_as_accurate(out, scaled_queries(q, k, v), scaled_queries(q.double(), k.double(), v.double()))
    assert report.rows[0].flops_before == 4 * 8 * 3 * 2 * 10 * 10


def test_the_inputs_of_a_lifted_attention_are_not_changed_in_place_again() -> None:
    q, k, v = operands()
    fresh = q.clone()
    out, _, _, _ = dynamo(lambda q, k, v: (q.mul_(0.5) @ k.mT).softmax(-1) @ v, fresh, k, v)
    assert torch.equal(fresh, q * 0.5)
    want = ((q.double() * 0.5) @ k.double().mT).softmax(-1) @ v.double()
    assert_as_accurate(out, ((q * 0.5) @ k.mT).softmax(-1) @ v, want)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((10, 10), float("-inf")).triu(1)
    return ((q @ k.transpose(-2, -1)) * 0.3 + mask).softmax(-1) @ v


def masked_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q @ k.transpose(-2, -1)) * 0.3
    logits.masked_fill_(torch.ones(10, 10, dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(-1) @ v


def keys_changed_after_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
    k.add_(1.0)
    return weights @ v + k.sum()


def queries_changed_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    scaled = q * 0.3
    q.zero_()
    return (scaled @ k.transpose(-2, -1)).softmax(-1) @ v + q.sum()


def transposed_keys_changed_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = k.clone().transpose(-2, -1)
    scaled = keys * 0.3
    keys.zero_()
    return (q @ scaled).softmax(-1) @ v + keys.sum()


def masked_product_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.transpose(-2, -1)
    logits += torch.full((10, 10), float("-inf")).triu(1)
    return logits.softmax(-1) @ v


def masked_weights_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
    weights.masked_fill_(torch.ones(10, 10, dtype=torch.bool).triu(1), 0.0)
    return weights @ v


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
    return weights @ v, weights


def weights_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1) * 0.3).softmax(-1) * 2) @ v


def weights_used_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return k.transpose(-2, -1) @ (q @ k.transpose(-2, -1) * 0.3).softmax(-1)


REFUSED = [
    (masked, "mask or bias"),
    (masked_in_place, "changed in place or used elsewhere"),
    (masked_product_in_place, "mask or bias"),
    (keys_changed_after_use, "keys are changed in place"),
    (queries_changed_between, "queries or keys are changed in place"),
    (transposed_keys_changed_between, "queries or keys are changed in place"),
    (permuted_from_tokens, "permutation of other dimensions"),
    (masked_weights_in_place, "used elsewhere"),
    (weights_returned, "used elsewhere"),
    (weights_scaled, "before they meet the values"),
    (weights_used_right, "before they meet the values"),
]


@pytest.mark.parametrize(("function", "reason"), REFUSED)
def test_what_only_looks_like_attention_is_left_with_a_reason(function: Callable, reason: str) -> None:
    q, k, v = operands()
    want = function(q, k, v)
    out, gm, report, before = dynamo(function, q, k, v)
    assert nodes(gm) == before
    assert [reason in (row.reason or "") for row in report.rows] == [True]
    assert report.rows[0].implementation == "spelled out"
    assert_same(out, want)


@pytest.mark.parametrize(("function", "reason"), REFUSED)
def test_exported_look_alikes_are_left(function: Callable, reason: str) -> None:
    q, k, v = operands()
    out, gm, _, before = export(function, q, k, v)
    assert nodes(gm) == before
    assert_same(out, function(q, k, v))


def test_active_dropout_is_not_lifted() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout((q @ k.transpose(-2, -1) * 0.3).softmax(-1), 0.5, training=True) @ v

    _, gm, report, before = dynamo(function, *operands())
    assert nodes(gm) == before
    assert "before they meet the values" in (report.rows[0].reason or "")


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-2) @ v,
        lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(1) @ v,
        lambda q, k, v: q.softmax(-1) @ k.softmax(-2).transpose(-2, -1) @ v,
        lambda q, k, v: (q @ k[:, :, :8]).softmax(-1) @ v[:, :, :8],
        lambda q, k, v: (q @ k.transpose(-3, -2).permute(0, 2, 3, 1)).softmax(-1).sum() * v,
    ],
)
def test_a_softmax_that_is_no_attention_is_no_site(function: Callable) -> None:
    q, k, v = operands()
    out, gm, report, before = dynamo(function, q, k, v)
    assert nodes(gm) == before
    assert report.rows == []
    assert torch.equal(out, function(q, k, v))


def test_shared_keys_of_fewer_heads_keep_their_numbers() -> None:
    """Keys that broadcast over heads, or have no heads at all, are multi-query attention."""
    q, k, v = operands()
    for shared_k, shared_v in ((k[:, :1], v[:, :1]), (k[0, 0], v[0, 0]), (k[:1], v[:1])):
        torch._dynamo.reset()
        out, _, _, _ = dynamo(scaled_queries, q, shared_k, shared_v)
        want = scaled_queries(q, shared_k, shared_v)
        assert out.shape == want.shape
        assert_as_accurate(out, want, scaled_queries(q.double(), shared_k.double(), shared_v.double()))


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("function", [*LIFTED, *(function for function, _ in REFUSED)])
def test_a_dense_plan_leaves_every_spelling(function: Callable, trace: Callable) -> None:
    q, k, v = operands()
    out, gm, _, before = trace(function, q, k, v, plan={})
    assert nodes(gm) == before
    assert_same(out, function(q, k, v))
