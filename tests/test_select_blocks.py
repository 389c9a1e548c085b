"""The operators that choose key blocks: their law against loops and a sort, their kernel, and how they compile."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import blocks_oracle as oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch._library.triton import set_wrap_triton_enabled
from torch.fx.experimental.proxy_tensor import make_fx
from upstream import VARIABLE

from vggt_compile.ops import random_blocks as random_blocks_module
from vggt_compile.ops import token_roles
from vggt_compile.ops.random_blocks import random_blocks, sown
from vggt_compile.ops.select_blocks import budget, select_blocks

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"q_block": 4, "k_block": 2}


def whole(*shape: int, seed: int = 0, spread: int = 3) -> Tensor:
    """Small whole numbers: sums and products are exact, and many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-spread, spread + 1, shape, generator=generator).float()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def listed(index: Tensor, count: Tensor) -> list:
    """The lists without their unused slots."""
    heads = [[h.tolist() for h in b] for b in index]
    return [
        [[row[:n] for row, n in zip(rows, ns, strict=True)] for rows, ns in zip(bs, cs, strict=True)]
        for bs, cs in zip(heads, count.tolist(), strict=True)
    ]


LENGTHS = st.integers(1, 40).filter(lambda n: n % 4 != 3)  # a mean over three would round
SHARES = st.integers(0, 20).map(lambda n: n / 20)


@given(
    LENGTHS,
    st.integers(1, 40),
    SHARES,
    SHARES,
    SHARES,
    st.sampled_from(["mean", "max"]),
    st.sampled_from(["reference", "reach"]),
    st.integers(0, 99),
)
def test_the_lists_are_those_of_a_sort(
    queries: int, keys: int, keep: float, cdf: float, most: float, pool: str, coverage: str, seed: int
) -> None:
    q, k = whole(2, 2, queries, 4, seed=seed), whole(2, 2, keys, 4, seed=seed + 100)
    options = dict(keep=keep, cdf=cdf, most=most, pool=pool, coverage=coverage, scale=0.25, **SMALL)
    try:
        want = oracle.lists(q, k, **options)
    except oracle.TooClose:
        assume(False)
    index, count = select_blocks(q, k, **options)
    assert index.dtype == count.dtype == torch.int32
    assert index.shape == (2, 2, -(-queries // 4), budget(-(-keys // 2), keep, cdf, most)[1])
    assert listed(index, count) == want
    unused = torch.arange(index.shape[-1]) >= count[..., None]
    assert not index[unused].any()


@given(LENGTHS, st.integers(1, 40), SHARES, SHARES, SHARES, st.data())
def test_so_many_at_least_are_a_share(
    queries: int, keys: int, keep: float, cdf: float, most: float, data: st.DataObject
) -> None:
    """Lists are those of the share that comes to `least` blocks, where the share asked for comes to fewer."""
    q, k, blocks = whole(1, 2, queries, 4), whole(1, 2, keys, 4, seed=1), -(-keys // 2)
    least = data.draw(st.integers(1, blocks))
    share = max(keep, -(-10_000 * least // blocks) / 10_000)  # in steps of 1/10000, and there are 20 blocks at most
    got = select_blocks(q, k, keep, cdf, most=most, least=least, **SMALL)
    assert all(map(torch.equal, got, select_blocks(q, k, share, cdf, most=most, **SMALL)))
    assert (got[1] >= least).all()


def test_of_equal_blocks_the_first_ones_are_kept() -> None:
    q, k = torch.ones(1, 1, 8, 4), torch.ones(1, 1, 20, 4)
    index, _ = select_blocks(q, k, 0.3, **SMALL)
    assert index.tolist() == [[[[0, 1, 2]] * 2]]
    k[:, :, 10:12] = 2  # one better, the rest still equal
    index, _ = select_blocks(q, k, 0.3, **SMALL)
    assert index.tolist() == [[[[0, 1, 5]] * 2]]
    k[:, :, 10:12] = 0
    k[:, :, :2] = -k[:, :, :2] * 0  # the zero that is negative is a zero
    assert str(k[0, 0, 0, 0].item()) == "-0.0"
    index, _ = select_blocks(torch.ones(1, 1, 4, 4), k[:, :, [0, 10]], 0.5, q_block=4, k_block=1)
    assert index.tolist() == [[[[0]]]]


def test_published_sizes_and_scale() -> None:
    q, k = noise(1, 2, 300, 16), noise(1, 2, 1000, 16, seed=1)
    index, count = select_blocks(q, k, 0.25)
    assert index.shape == (1, 2, 3, 4)
    assert listed(index, count) == oracle.lists(q, k, 0.25)
    covered = select_blocks(q, k, 0.0, 0.8, most=1.0)
    assert listed(*covered) == oracle.lists(q, k, 0.0, 0.8, most=1.0)
    other = select_blocks(q, k, 0.0, 0.8, most=1.0, scale=20.0)
    assert listed(*other) == oracle.lists(q, k, 0.0, 0.8, most=1.0, scale=20.0) != listed(*covered)


def kept(*args: Any, **kwargs: Any) -> Tensor:
    index, count = select_blocks(*args, **kwargs)
    blocks = -(-args[1].shape[-2] // kwargs.get("k_block", 64))
    return oracle.mask(index, count, blocks)


@pytest.mark.parametrize("cdf", [0.0, 0.7])
def test_what_is_kept_grows_with_keep(cdf: float) -> None:
    q, k = noise(2, 2, 33, 8), noise(2, 2, 51, 8, seed=1)
    masks = [kept(q, k, keep / 10, cdf, most=1.0, **SMALL) for keep in range(11)]
    for less, more in itertools.pairwise(masks):
        assert (less <= more).all()
    assert masks[0].any(-1).all()
    assert masks[-1].all()


def test_what_is_kept_grows_with_cdf_and_reaches_it() -> None:
    q, k = noise(1, 2, 33, 8), noise(1, 2, 51, 8, seed=1)
    mass = torch.softmax(oracle.pooled(q[0, 0], 4, "mean") @ oracle.pooled(k[0, 0], 2, "mean").T * 8**-0.5, -1)
    last = torch.zeros(1, dtype=torch.bool)
    for cdf in (0.1, 0.5, 0.9, 0.99):
        below = kept(q, k, 0.0, cdf, most=1.0, **SMALL)[0, 0]
        reaching = kept(q, k, 0.0, cdf, coverage="reach", most=1.0, **SMALL)[0, 0]
        assert (last <= below).all()
        assert ((mass * below).sum(-1) <= cdf + 2e-5).logical_or(below.sum(-1) == 1).all()
        assert ((mass * reaching).sum(-1) >= cdf).all()
        last = below


def test_most_cuts_the_worst_ones_but_never_below_keep() -> None:
    q, k = noise(1, 1, 8, 8), noise(1, 1, 40, 8, seed=1)
    free, cut = (kept(q, k, 0.0, 0.95, most=most, **SMALL) for most in (1.0, 0.3))
    assert (cut <= free).all()
    assert (cut.sum(-1) == 6).all()
    assert kept(q, k, 1.0, 0.95, most=0.3, **SMALL).all()


def test_batch_items_and_heads_do_not_mix() -> None:
    q, k = noise(3, 2, 21, 8), noise(3, 2, 37, 8, seed=1)
    together = select_blocks(q, k, 0.2, 0.6, **SMALL)
    for b, h in itertools.product(range(3), range(2)):
        alone = select_blocks(q[b : b + 1, h : h + 1], k[b : b + 1, h : h + 1], 0.2, 0.6, **SMALL)
        assert all(torch.equal(x[b, h], y[0, 0]) for x, y in zip(together, alone, strict=True))


def test_strides_do_not_matter() -> None:
    fused = noise(2, 37, 3, 4, 8)
    q, k, _ = fused.permute(2, 0, 3, 1, 4).unbind(0)
    strided, dense = select_blocks(q, k, 0.2, **SMALL), select_blocks(q.contiguous(), k.contiguous(), 0.2, **SMALL)
    assert all(map(torch.equal, strided, dense))


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scored_in_fp32(dtype: torch.dtype, pool: str) -> None:
    q, k = noise(1, 2, 37, 8).to(dtype), noise(1, 2, 51, 8, seed=1).to(dtype)
    want = select_blocks(q.float(), k.float(), 0.2, 0.6, pool, **SMALL)
    assert all(map(torch.equal, select_blocks(q, k, 0.2, 0.6, pool, **SMALL), want))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, select_blocks(q, k, 0.2, 0.6, pool, **SMALL), want))


OPTIONS = [{"keep": 0.3}, {"keep": 0.1, "cdf": 0.8, "coverage": "reach", "pool": "max", "scale": 0.3}]


@pytest.mark.parametrize("options", [*OPTIONS, {"keep": 0.1, "cdf": 0.3, "least": 4}])
def test_the_operator_is_one_that_torch_knows(options: dict) -> None:
    args = noise(1, 2, 21, 8), noise(1, 2, 37, 8, seed=1)
    torch.library.opcheck(torch.ops.vggt_compile.select_blocks.default, args, {**options, **SMALL})
    torch.library.opcheck(torch.ops.vggt_compile.random_blocks.default, (*args, 0.3), {"seed": 3, **SMALL})


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_few_compiles_serve_all_lengths(options: dict) -> None:
    def both(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            *torch.ops.vggt_compile.select_blocks(q, k, **options, **SMALL),
            *torch.ops.vggt_compile.random_blocks(q, k, 0.3, **SMALL),
        )

    compiled = torch.compile(both, dynamic=True, fullgraph=True)
    counters.clear()
    for queries, keys in ((21, 37), (32, 32), (5, 90), (90, 26)):
        q, k = whole(2, 2, queries, 8), whole(2, 2, keys, 8, seed=1)
        assert all(map(torch.equal, compiled(q, k), both(q, k))), (queries, keys)
    assert counters["stats"]["unique_graphs"] <= 2  # Inductor tells very short rows from others


@pytest.mark.slow
def test_the_kernel_in_the_interpreter_gives_the_same_lists() -> None:
    pytest.importorskip("triton")
    from select_blocks_run import CASES

    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/select_blocks_run.py")]
    done = subprocess.run(command, env=env, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(CASES))


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_gives_the_same_lists() -> None:
    from select_blocks_run import CHOICES, GROUPS, POOLED, SHAPES, agrees, pools

    for shape, pool in itertools.product(POOLED, ("mean", "max")):
        pools(shape, pool, "cuda")
    for shape, choice in itertools.product([*SHAPES, GROUPS, (1, 3, 300, 5000, 64)], CHOICES):
        agrees(shape, choice, "cuda")


def test_the_launch_of_the_kernel_is_traced_with_symbolic_lengths() -> None:
    """As Inductor sees it for a GPU; nothing is launched, so any device will do."""
    pytest.importorskip("triton")
    from vggt_compile.ops.select_blocks_kernel import LANES, launch

    def run(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        floor, cap = budget(k.shape[2], 0.25, 0.9, 0.5)
        across = F.pad(k.mT, (0, -k.shape[2] % LANES))
        return launch(q, across, k.shape[2], floor, cap, 0.9, False, programs=264)

    with set_wrap_triton_enabled(True):
        traced = make_fx(run, tracing_mode="symbolic")(noise(2, 4, 21, 24), noise(2, 4, 77, 24))
    calls = [node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(calls) == 1
    given = calls[0].kwargs["kwargs"]
    for name in ("queries", "blocks", "groups", "floor", "cap"):
        assert isinstance(given[name].meta["val"], torch.SymInt), name
        assert not given[name].meta["val"].node.expr.is_number, name
    assert (given["D"], given["WIDTH"]) == (24, 32)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_random_blocks_are_as_many_and_form_a_list(keep: float) -> None:
    q, k = noise(2, 3, 30, 8), noise(2, 3, 75, 8)
    index, count = random_blocks(q, k, keep, **SMALL)
    want_index, want_count = select_blocks(q, k, keep, **SMALL)
    assert index.shape == want_index.shape
    assert torch.equal(count, want_count)
    assert index.dtype == count.dtype == torch.int32
    assert (index.diff(dim=-1) > 0).all()
    assert index.min() >= 0
    assert index.max() < 38


def test_random_blocks_are_told_by_their_seed_and_differ_between_rows() -> None:
    q, k = noise(2, 3, 128, 8), noise(2, 3, 400, 8)
    index, _ = random_blocks(q, k, 0.1, seed=1, **SMALL)
    assert torch.equal(index, random_blocks(q + 1, k * 2, 0.1, seed=1, **SMALL)[0])
    assert not torch.equal(index, random_blocks(q, k, 0.1, seed=2, **SMALL)[0])
    assert len(index.flatten(0, 2).unique(dim=0)) == 2 * 3 * 32
    often = torch.bincount(index.flatten().long(), minlength=200)
    mean = 2 * 3 * 32 / 10
    assert (often - mean).abs().max() < 5 * mean**0.5
    assert ((often - mean).double() ** 2).mean() < 1.5 * mean


@pytest.mark.upstream
@pytest.mark.parametrize(("ratio", "cdf"), [(0.5, None), (0.75, None), (None, 0.9), (0.75, 0.8), (0.5, 0.97)])
def test_the_published_code_marks_the_same_blocks(
    ratio: float | None, cdf: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own modules, but for the two functions of its CUDA extension that the choice of blocks needs."""
    source = Path(os.environ.get(VARIABLE, ""), "sparse-vggt", "src")
    if VARIABLE not in os.environ or not source.is_dir():
        pytest.skip(f"set {VARIABLE} to a folder that holds a checkout of sparse-vggt")
    pytest.importorskip("einops")
    for name in ("sparse_vggt", "sparse_vggt.models", "sparse_vggt.utils"):  # their __init__ import models
        package = types.ModuleType(name)
        package.__path__ = [str(source.joinpath(*name.split(".")))]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("spas_sage_attn", "spas_sage_attn._qattn", "spas_sage_attn.quant_per_block", "spas_sage_attn.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["spas_sage_attn"]._qattn = sys.modules["spas_sage_attn._qattn"]  # type: ignore[attr-defined]
    sys.modules["spas_sage_attn.quant_per_block"].per_block_int8 = None  # type: ignore[attr-defined]
    utils: Any = sys.modules["spas_sage_attn.utils"]
    utils.block_map_lut_triton = None
    utils.hyperparameter_check = lambda value, heads, device: torch.full((heads,), value, device=device)

    def fill(found: Tensor, count: Tensor, order: Tensor) -> Tensor:
        ranked = torch.arange(order.shape[-1]) < count.clamp(min=1)[..., None]
        return found.scatter(-1, order, ranked)

    utils.fill_block_map_triton = fill
    from sparse_vggt.models.attention import predict_attention  # type: ignore[import-not-found]
    from sparse_vggt.utils.sparse_wrapper import get_block_mask  # type: ignore[import-not-found]

    q, k = noise(2, 2, 700, 16) * 2, noise(2, 2, 1500, 16, seed=1) * 2
    theirs = get_block_mask(predict_attention(q, k), 0, sparse_ratio=ratio, cdf_threshold=cdf)
    assert torch.equal(kept(q, k, 0.0 if ratio is None else 1 - ratio, cdf or 0.0, most=1.0), theirs)


def test_numbers_of_seeds_are_apart_and_small_enough_to_be_added_to_indices() -> None:
    for apart in (random_blocks_module._WORD // 3, token_roles._APART):
        begins = {sown(seed, apart) for seed in range(1000)}
        assert len(begins) == 1000
        assert max(begins) < 2**30
