"""Roles and groups of tokens: laws of the operators by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_groups_run import DTYPES, SHAPES, case
from tokens_oracle import layout, merges, roles, standing
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled
from torch.fx.experimental.proxy_tensor import make_fx

from vggt_compile.ops.token_groups import from_groups, group_means, group_members, group_sizes, token_groups
from vggt_compile.ops.token_roles import merge_order

GRID = (5, 7)
ROOT = Path(__file__).parents[1]


@given(merges())
@settings(max_examples=200)
def test_tokens_are_ordered_by_their_role(case: tuple) -> None:
    """Every token once; special ones first, sources last, and of each role in the order of the model."""
    role = roles(*case)
    names = ("special", "reference", "cell", "protected", "source")
    want = sorted(range(len(role)), key=lambda i: names.index(role[i]))
    assert merge_order(*layout(*case)).tolist() == want


@given(merges())
@settings(max_examples=100)
def test_one_patch_stands_for_each_cell(case: tuple) -> None:
    _, grid, _, setting = case
    down, right = setting["cell"]
    cells = {(r // down, c // right) for r in range(grid[0]) for c in range(grid[1])}
    for stand in standing(*case):
        places = [divmod(i, grid[1]) for i, it in enumerate(stand) if it]
        assert Counter((r // down, c // right) for r, c in places) == Counter(cells)


def test_drawn_patches_are_told_by_their_seed_and_cover_a_cell_evenly() -> None:
    def drawn(seed: int) -> Tensor:
        return torch.tensor(standing(300, (5, 7), 1, {"cell": (2, 3), "cells": "seeded", "seed": seed}))

    often = drawn(0).double().mean(0).view(5, 7)
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert not torch.equal(drawn(0)[1:], drawn(1)[:-1])
    want = torch.full((5, 7), 1 / 6)
    want[4], want[:, 6], want[4, 6] = 1 / 3, 1 / 2, 1.0
    spread = (want * (1 - want) / 300).sqrt()
    assert ((often - want).abs() <= 4 * spread).all()
    assert len(drawn(0).view(300, -1).unique(dim=0)) > 290


@given(merges(), st.integers(1, 3), st.integers(0, 99), st.floats(0, 1))
@settings(max_examples=100)
def test_only_sources_merge_and_every_token_is_in_one_group(case: tuple, batch: int, seed: int, part: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    order, role = merge_order(*layout(*case)), roles(*case)
    sources = role.count("source")
    kept, merged = len(role) - sources, int(part * sources)
    destinations = kept - role.count("protected")
    index = torch.randint(destinations, (batch, sources), generator=generator)
    similarity = torch.randint(5, (batch, sources), generator=generator).float()
    group = token_groups(order, index, similarity, merged)
    groups = len(role) - merged
    assert torch.equal(group[:, order[:kept]], torch.arange(kept).expand(batch, -1))
    for item in range(batch):
        ranked = sorted(range(sources), key=lambda i: (-similarity[item, i], i))
        joins = set(ranked[:merged])
        alone = [i for i in range(sources) if i not in joins]
        want = {i: int(index[item, i]) for i in joins} | {i: kept + n for n, i in enumerate(alone)}
        assert group[item, order[kept:]].tolist() == [want[i] for i in range(sources)]
    size = group_sizes(group, groups)
    assert torch.equal(size.sum(1), torch.full((batch,), float(len(role))))
    assert size.min() >= 1
    if merged == sources:
        assert torch.equal(token_groups(order, index, similarity), group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_groups_give_means_and_their_tokens_get_them_back(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, 8, generator=generator).to(dtype)
    group = torch.stack([torch.randperm(40, generator=generator) % 25 for _ in range(2)])
    size = group_sizes(group, 25)
    means = group_means(x, group_members(group), size)
    back = from_groups(means, group)
    assert means.dtype == back.dtype == dtype
    assert back.transpose(1, 2).is_contiguous()
    for item in range(2):
        assert size[item].tolist() == torch.bincount(group[item], minlength=25).tolist()
        for i in range(25):
            members = group[item] == i
            mean = x[item][:, members].double().mean(1)
            if members.sum() == 1:
                assert torch.equal(means[item, :, i].double(), mean)
            torch.testing.assert_close(means[item, :, i], mean.to(dtype))
            assert (back[item][:, members] == means[item, :, i : i + 1]).all()


def test_the_operators_are_ones_that_torch_knows() -> None:
    ops = torch.ops.vggt_compile
    for seed in (None, 3):
        torch.library.opcheck(ops.merge_order.default, (*layout(3, GRID, 2, {})[:-1], seed))
    order = merge_order(*layout(3, (3, 4), 1, {}))
    x, index, similarity = torch.randn(2, 2, 39, 8), torch.randint(9, (2, 13)), torch.rand(2, 13)
    for merged in (None, 5):
        torch.library.opcheck(ops.token_groups.default, (order, index, similarity, merged))
    group = token_groups(order, index, similarity)
    torch.library.opcheck(ops.group_sizes.default, (group, 26))
    size = group_sizes(group, 26)
    torch.library.opcheck(ops.group_members.default, (group,))
    torch.library.opcheck(ops.group_means.default, (x, group_members(group), size))
    torch.library.opcheck(ops.from_groups.default, (x[:, :, :26], group))


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=50)
def test_members_are_the_tokens_of_each_group_in_order(batch: int, tokens: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (batch, tokens), generator=generator)
    want = [[i for g in range(groups) for i in range(tokens) if row[i] == g] for row in group.tolist()]
    assert group_members(group).tolist() == want


@pytest.mark.slow
def test_the_kernel_in_the_interpreter_gives_the_same_means() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/token_groups_run.py")]
    done = subprocess.run(command, env=env, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(SHAPES) * len(DTYPES))


def test_the_launch_of_the_kernel_is_traced_with_symbolic_lengths() -> None:
    """As Inductor sees it for a GPU; nothing is launched, so any device will do."""
    pytest.importorskip("triton")
    from vggt_compile.ops.token_groups_kernel import launch

    def run(x: Tensor, members: Tensor, size: Tensor) -> Tensor:
        return launch(x, members, size)

    with set_wrap_triton_enabled(True):
        traced = make_fx(run, tracing_mode="symbolic")(*case((2, 3, 40, 8, 25), torch.float32))
    (call,) = (node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target))
    given = call.kwargs["kwargs"]
    for name in ("tokens", "groups"):
        assert isinstance(given[name].meta["val"], torch.SymInt), name


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_gpus_that_are_not_here(target: int, dtype: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vggt_compile.ops.token_groups_kernel import LANES, ROWS, _means

    constants = {"D": 64, "CHANNELS": 1024, "LANES": LANES, "ROWS": ROWS}
    types = {"x": f"*{dtype}", "members": "*i64", "end": "*i64", "means": f"*{dtype}"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in _means.arg_names}
    placed = {(_means.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(_means, signature, constexprs=placed)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 4})
    assert "atom" not in made.asm["ptx"]
    assert ".local" not in made.asm["ptx"]  # nothing spills
