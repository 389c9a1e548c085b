"""Which tokens merge into which, and attention over what is left, in the words of the documentation, by loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from vggt_compile.ops.token_roles import merge_order


def roles(frames: int, grid: tuple[int, int], special: int, setting: dict) -> list[str]:
    found = []
    for frame in range(frames):
        found += ["special"] * special
        if frame == 0 and setting.get("reference", True):
            found += ["reference"] * (grid[0] * grid[1])
            continue
        patches = drawn(frame, frames, grid, special, setting)
        others = [i for i, role in enumerate(patches) if role != "cell"]
        number = int(round(setting.get("protect", 0.1) * 10_000) * len(others) / 10_000)
        for i in range(number):
            patches[others[math.ceil(i * len(others) / number)]] = "protected"
        found += patches
    return found


def drawn(frame: int, frames: int, grid: tuple[int, int], special: int, setting: dict) -> list[str]:
    """Patches of one frame, those that stand for a cell told from the others."""
    (rows, columns), (down, right) = grid, setting.get("cell", (2, 2))
    if setting.get("cells", "fixed") == "fixed":
        stand = [r % down == 0 and c % right == 0 for r in range(rows) for c in range(columns)]
    else:  # as the operator has drawn them; the laws of drawing have tests of their own
        stand = list(standing(frames, grid, special, setting)[frame])
    return ["cell" if it else "source" for it in stand]


def standing(frames: int, grid: tuple[int, int], special: int, setting: dict) -> list[list[bool]]:
    """Which patches stand for a cell, for each frame, where nothing but that tells them from others."""
    order = merge_order(*layout(frames, grid, special, {**setting, "protect": 0.0, "reference": False}))
    cells = frames * math.prod(-(-n // by) for n, by in zip(grid, setting.get("cell", (2, 2)), strict=True))
    stand = torch.zeros(len(order), dtype=torch.bool)
    stand[order[frames * special :][:cells]] = True
    return stand.view(frames, -1)[:, special:].tolist()


def layout(frames: int, grid: tuple[int, int], special: int, setting: dict) -> tuple:
    """Arguments of `merge_order`."""
    cell = setting.get("cell", (2, 2))
    others = math.prod(grid) - math.prod(-(-n // by) for n, by in zip(grid, cell, strict=True))
    protected = int(round(setting.get("protect", 0.1) * 10_000) * others / 10_000)
    seed = setting.get("seed", 0) if setting.get("cells") == "seeded" else None
    x = torch.empty(1, 1, frames * (special + math.prod(grid)), 1)
    return x, special, *grid, cell, protected, setting.get("reference", True), seed


def merging(
    frames: int, grid: tuple[int, int], setting: dict, special: int = 5, features: Callable | None = None
) -> Callable:
    """The core of an attention; `features(q, k)` [B, N, C] is what tokens are compared by."""
    role = roles(frames, grid, special, setting)
    merging_frames = frames - int(setting.get("reference", True))
    limit = merging_frames * int(round(setting.get("ratio", 0.9) * 10_000) * (special + math.prod(grid)) / 10_000)

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        compared = compared_by(setting, q, k) if features is None else features(q, k)
        outs = []
        for item in range(len(q)):
            groups = grouped(role, unit(compared[item].to(v.dtype)), limit)
            outs.append(attended(q[item], k[item], v[item], groups, setting.get("weight") == "log_count"))
        return torch.stack(outs).to(v.dtype)

    return core


def compared_by(setting: dict, q: Tensor, k: Tensor) -> Tensor:
    return (q if setting.get("metric") == "queries" else k).double().mean(1)


def unit(x: Tensor) -> Tensor:
    return (x.double() / x.double().norm(dim=-1, keepdim=True)).to(x.dtype).double()


def grouped(role: list[str], compared: Tensor, limit: int) -> list[list[int]]:
    """Tokens that become one, the one that stays first."""
    sources = [i for i, name in enumerate(role) if name == "source"]
    destinations = [i for i, name in enumerate(role) if name in ("special", "reference", "cell")]
    similarity = compared[sources] @ compared[destinations].T
    best = {token: destinations[int(row.argmax())] for token, row in zip(sources, similarity, strict=True)}
    ranked = sorted(zip((-similarity.amax(1)).tolist(), sources, strict=True))
    joins = {token for _, token in ranked[:limit]}
    groups = {i: [i] for i in range(len(role)) if i not in joins}
    for token in joins:
        groups[best[token]].append(token)
    return list(groups.values())


def attended(q: Tensor, k: Tensor, v: Tensor, groups: list[list[int]], counted: bool) -> Tensor:
    """Attention [H, N, D] of one item in float64, where queries and keys merge alike."""
    return attended_apart(q, k, v, groups, groups, counted)


def attended_apart(
    q: Tensor, k: Tensor, v: Tensor, queries: list[list[int]], keys: list[list[int]], counted: bool = False
) -> Tensor:
    """Attention [H, N, D] of one item in float64 between groups of queries and groups of keys."""

    def means(x: Tensor, groups: list[list[int]]) -> Tensor:
        return torch.stack([x[:, group].double().mean(1) for group in groups], 1).to(v.dtype).double()

    q, k, v = means(q, queries), means(k, keys), means(v, keys)
    bias = torch.tensor([math.log(len(group)) if counted else 0.0 for group in keys])
    out = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    result = torch.empty(out.shape[0], sum(map(len, queries)), out.shape[2], dtype=out.dtype)
    for i, group in enumerate(queries):
        result[:, group] = out[:, i : i + 1]
    return result


def one_by_one(tokens: int) -> list[list[int]]:
    """Groups in which no token has merged."""
    return [[i] for i in range(tokens)]


def joined(compared: Tensor, parts: list[tuple[list[int], list[int]]], tokens: int) -> list[list[int]]:
    """Groups once each source of a part has joined the most similar destination of that part."""
    groups = {i: [i] for i in range(tokens) if not any(i in sources for sources, _ in parts)}
    for sources, destinations in parts:
        if sources:
            best = (compared[sources] @ compared[destinations].T).argmax(1).tolist()
            for token, place in zip(sources, best, strict=True):
                groups[destinations[place]].append(token)
    return list(groups.values())


def input_of(model: nn.Module) -> Callable:
    """Features that are what the attention's projections read."""
    seen = {}
    for block in model.global_blocks:
        block.attn.register_forward_pre_hook(lambda module, given: seen.update(x=given[0]))
    return lambda q, k: seen["x"]


@st.composite
def merges(draw: st.DrawFn) -> tuple[int, tuple[int, int], int, dict]:
    """Frames, grid, special tokens, and a setting."""
    size = st.integers(1, 6)
    setting = {
        "cell": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "cells": draw(st.sampled_from(["fixed", "seeded"])),
        "seed": draw(st.integers(-5, 5)),
        "protect": draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])),
        "reference": draw(st.booleans()),
    }
    return draw(size), (draw(size), draw(size)), draw(st.integers(0, 3)), setting
