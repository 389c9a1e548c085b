"""Merged tokens on a GPU at the sizes of real models: against float64 piece by piece, the same bits twice, and memory.

python -m pytest -m gpu tests/test_merge_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from harness import Capture, run
from torch import Tensor

from vggt_compile import collect_reports, vggt_sparse
from vggt_compile.ops.match_tokens import match_tokens, unit
from vggt_compile.ops.token_groups import group_means, group_members, group_sizes

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FRAMES, PATCHES, SPECIAL, CELLS = 100, 28 * 37, 5, 14 * 19
TOKENS = FRAMES * (PATCHES + SPECIAL)
BF16 = torch.finfo(torch.bfloat16).eps


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def extra_bytes(run: Callable[[], Any]) -> int:
    """What a call needs beside what is there, its result included."""
    run()  # compiles kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


RUNS = [(None, None), (20 * 700, 20 * CELLS)]


@pytest.mark.parametrize("channels", [64, 1024])
@pytest.mark.parametrize("runs", RUNS)
def test_matches_are_the_best_ones_to_rounding(channels: int, runs: tuple[int | None, int | None]) -> None:
    sources, destinations = (FRAMES - 1) * 700, (FRAMES - 1) * CELLS
    source, destination = noise(1, sources, channels), noise(1, destinations, channels, seed=1)
    index, similarity = match_tokens(source, destination, *runs)
    allowed = 8 * channels**0.5 * torch.finfo(torch.float32).eps  # sums of products of numbers below 1, in fp32
    pick = torch.randperm(sources, generator=torch.Generator().manual_seed(0))[:2000].to(DEVICE)
    for part in pick.split(250):
        products = unit(source)[0, part].double() @ unit(destination)[0].double().T
        if runs[0] is not None and runs[1] is not None:
            apart = (part // runs[0]).unsqueeze(1) != torch.arange(destinations, device=DEVICE) // runs[1]
            products = products.masked_fill(apart, -torch.inf)
        best, got = products.amax(1), products.gather(1, index[0, part].unsqueeze(1)).squeeze(1)
        assert (best - got).max() <= allowed
        assert (similarity[0, part].double() - got).abs().max() <= allowed


@pytest.mark.parametrize("runs", RUNS)
def test_matches_are_the_same_twice_and_need_memory_for_the_tokens_only(runs: tuple[int | None, int | None]) -> None:
    sources, destinations = (FRAMES - 1) * 700, (FRAMES - 1) * CELLS
    source, destination = noise(1, sources, 64), noise(1, destinations, 64, seed=1)
    first, second = (match_tokens(source, destination, *runs) for _ in range(2))
    assert all(map(torch.equal, first, second))
    extra = extra_bytes(lambda: match_tokens(source, destination, *runs))
    assert extra <= 4 * (sources + destinations) * 64 * 4 + 2**20
    assert extra < sources * destinations / 10


def groups(kind: str) -> tuple[Tensor, int]:
    """Groups of all tokens: as many as FastVGGT leaves, of like size, or all but one token each in the first."""
    kept = TOKENS // 3
    generator = torch.Generator(DEVICE).manual_seed(0)
    group = torch.randint(kept, (1, TOKENS), generator=generator, device=DEVICE)
    if kind == "one is large":
        group = torch.where(torch.arange(TOKENS, device=DEVICE) % 4 == 0, group, 0)
    group[0, :kept] = torch.arange(kept, device=DEVICE)
    return group, kept


@pytest.mark.parametrize("kind", ["alike", "one is large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_means_are_those_of_float64_to_rounding(kind: str, dtype: torch.dtype) -> None:
    x = noise(1, TOKENS, 3, 16, 64, dtype=dtype)[:, :, 1].transpose(1, 2)  # a view of a fused projection
    group, kept = groups(kind)
    size = group_sizes(group, kept)
    means = group_means(x, group_members(group), size)
    assert means.dtype == dtype
    assert means.isfinite().all()
    largest = int(size.max())
    for head in range(0, 16, 5):
        wide = x[0, head].double()
        want = torch.zeros(kept, 64, dtype=torch.float64, device=DEVICE).index_add_(0, group[0], wide)
        want = want / size[0].double().unsqueeze(1)
        rounding = torch.finfo(dtype).eps * want.abs() + largest**0.5 * torch.finfo(torch.float32).eps
        assert ((means[0, head].double() - want).abs() <= rounding).all()
    alone = size[0] == 1
    assert torch.equal(means[:, :, alone], x[:, :, :kept][:, :, alone])


@pytest.mark.parametrize("kind", ["alike", "one is large"])
def test_means_are_the_same_twice_and_need_memory_for_the_groups_only(kind: str) -> None:
    x = noise(1, TOKENS, 3, 16, 64)[:, :, 1].transpose(1, 2)
    group, kept = groups(kind)
    members, size = group_members(group), group_sizes(group, kept)
    means = group_means(x, members, size)
    for _ in range(5):
        assert torch.equal(group_means(x, members, size), means)
    assert torch.equal(group_members(group), members)
    assert extra_bytes(lambda: group_means(x, members, size)) <= means.nbytes + 32 * kept + 2**20


PLANS: dict[str, dict[str, Any]] = {
    "merge": {"tokens": {"method": "merge", "metric": "input", "cells": "seeded"}},
    "merge, weights, windows": {
        "tokens": {"method": "merge", "ratio": 0.5, "weight": "log_count"},
        "keys": {"method": "grid", "stride": [3, 3], "kept": [2, 2], "phase": "shifted"},
    },
    "merge, blocks": {"tokens": "merge", "blocks": {"method": "predict", "keep": 0.3}},
    "queries, frames": {
        "tokens": {"method": "merge_queries", "frames": 5},
        "keys": {"method": "grid", "stride": [1, 1], "frames": 4},
    },
    "heads": {"tokens": "merge_heads"},
    "heads, blocks": {"tokens": "merge_heads", "blocks": {"method": "predict", "keep": 0.3}},
}


@pytest.mark.parametrize("name", PLANS)
def test_a_layer_is_what_the_definition_computes(name: str) -> None:
    """Rounding decides between destinations that are almost as similar, so a few tokens may differ by much."""
    model = build(Spec(heads=4, head_dim=64, pairs=1))
    x, plan = alternating.images(Spec(), 1, 6, (14, 19)), {"layers": {"*": PLANS[name]}}
    want = run(model, x, capture=Capture(plan=plan, strict=True))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model.to(DEVICE), backend=vggt_sparse, options={"plan": plan, "strict": True})
        got = compiled(x.to(DEVICE)).cpu()
    off = (got - want).norm(dim=-1) > 1e-2 * want.norm(dim=-1)
    assert off.float().mean() < 0.02


@pytest.mark.parametrize("name", PLANS)
def test_a_layer_gives_the_same_bits_twice_in_memory_for_the_tokens(name: str) -> None:
    model = build(Spec(heads=16, head_dim=64, pairs=1)).to(DEVICE, torch.bfloat16)
    x = alternating.images(Spec(), 1, 32, (28, 37)).to(DEVICE, torch.bfloat16)
    options = {"plan": {"layers": {"*": PLANS[name]}}, "strict": True}
    with torch.inference_mode(), collect_reports() as reports:
        compiled = torch.compile(model, backend=vggt_sparse, options=options)
        first = compiled(x)
        assert torch.equal(compiled(x), first)
        extra = extra_bytes(lambda: compiled(x))
    assert reports[0].attention_left() < 0.9
    tokens = 32 * 1041
    assert extra <= 40 * tokens * 1024 * 2
    assert extra < tokens**2 * 2  # one head's logits in bf16
