"""The operator that matches tokens: its law against loops, its kernel, and how it compiles."""

from __future__ import annotations

import itertools
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from match_tokens_run import DTYPES, SHAPES, agrees, exact
from torch import Tensor
from torch._dynamo.utils import counters
from torch._library.triton import set_wrap_triton_enabled
from torch.fx.experimental.proxy_tensor import make_fx

from vggt_compile.ops import sizes
from vggt_compile.ops.match_tokens import match_tokens, unit

ROOT = Path(__file__).parents[1]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_loops(source: Tensor, destination: Tensor) -> tuple[list, list]:
    """The first destination of the largest product, for each source of [B, S, C] of length one."""
    index: list[list[int]] = []
    similarity: list[list[float]] = []
    for sources, destinations in zip(source.tolist(), destination.tolist(), strict=True):
        products = [[sum(map(operator.mul, one, other)) for other in destinations] for one in sources]
        similarity.append([max(row) for row in products])
        index.append([row.index(max(row)) for row in products])
    return index, similarity


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=30)
def test_each_source_finds_the_first_of_the_most_similar(batch: int, sources: int, targets: int, seed: int) -> None:
    """Few channels, so that there are many ties."""
    source, destination = exact(batch, sources, 6, seed), exact(batch, targets, 6, seed + 100)
    want, products = by_loops(source, destination)
    index, similarity = match_tokens(source * 3, destination * 0.25)
    assert index.dtype == torch.int64
    assert similarity.dtype == torch.float32
    assert index.tolist() == want
    assert similarity.tolist() == products


@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30)
def test_runs_are_matched_each_for_itself(batch: int, sources: int, source_run: int, run: int, seed: int) -> None:
    targets = -(-sources // source_run) * run - seed % run  # the last run of destinations may be shorter
    source, destination = exact(batch, sources, 6, seed), exact(batch, targets, 6, seed + 100)
    index, similarity = match_tokens(source, destination, source_run, run)
    for i in range(-(-sources // source_run)):
        mine, theirs = slice(i * source_run, (i + 1) * source_run), slice(i * run, (i + 1) * run)
        alone = match_tokens(source[:, mine], destination[:, theirs])
        assert torch.equal(index[:, mine], alone[0] + i * run)
        assert torch.equal(similarity[:, mine], alone[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_similarities_are_products_of_tokens_of_length_one_in_their_dtype(dtype: torch.dtype) -> None:
    source, destination = noise(2, 50, 24).to(dtype), noise(2, 70, 24, seed=1).to(dtype)
    index, similarity = match_tokens(source, destination)
    want, products = by_loops(unit(source), unit(destination))
    assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    allowed = 4 * torch.finfo(similarity.dtype).eps
    want_similarity = torch.tensor(products, dtype=torch.float64)
    torch.testing.assert_close(similarity.double(), want_similarity, rtol=0, atol=allowed)
    assert index.tolist() == want


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = exact(2, 33, 8, seed=0), exact(2, 21, 8, seed=1)
    whole = match_tokens(source, destination)
    monkeypatch.setattr(sizes, "PIECE_BYTES", 2 * 21 * 4 * 5)  # five sources of both items
    assert all(map(torch.equal, match_tokens(source, destination), whole))


def test_batch_items_and_strides_do_not_matter() -> None:
    fused = noise(2, 90, 2, 8)
    source, destination = fused[:, 1::2, 0], fused[:, ::3, 1]
    index, similarity = match_tokens(source, destination)
    for i in range(2):
        alone = match_tokens(source[i : i + 1].contiguous(), destination[i : i + 1].contiguous())
        assert torch.equal(index[i : i + 1], alone[0])
        torch.testing.assert_close(similarity[i : i + 1], alone[1])


def test_autocast_does_not_matter() -> None:
    source, destination = noise(1, 40, 16), noise(1, 60, 16, seed=1)
    want = match_tokens(source, destination)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, match_tokens(source, destination), want))


def test_a_token_of_zeros_is_similar_to_nothing() -> None:
    source, destination = torch.zeros(1, 2, 8), noise(1, 5, 8)
    index, similarity = match_tokens(source, destination)
    assert index.tolist() == [[0, 0]]
    assert not similarity.any()


def test_the_operator_is_one_that_torch_knows() -> None:
    for runs in ((), (3, 4)):
        given = (noise(2, 9, 8), noise(2, 12, 8, seed=1), *runs)
        torch.library.opcheck(torch.ops.vggt_compile.match_tokens.default, given)


@pytest.mark.slow
def test_few_compiles_serve_all_lengths() -> None:
    compiled = torch.compile(torch.ops.vggt_compile.match_tokens.default, dynamic=True, fullgraph=True)
    counters.clear()
    for sources, destinations in ((21, 37), (32, 32), (5, 90), (90, 26)):
        given = exact(2, sources, 8, seed=0), exact(2, destinations, 8, seed=1)
        assert all(map(torch.equal, compiled(*given), match_tokens(*given))), (sources, destinations)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_the_kernel_in_the_interpreter_finds_the_same_destinations() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/match_tokens_run.py")]
    done = subprocess.run(command, env=env, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(SHAPES) * len(DTYPES))


@pytest.mark.gpu
def test_the_kernel_on_a_gpu_finds_the_same_destinations() -> None:
    shapes = [*SHAPES, (2, 5000, 3000, 64), (1, 3000, 2000, 1024)]
    for shape, dtype in itertools.product(shapes, [*DTYPES, torch.bfloat16]):
        agrees(shape, dtype, "cuda")


def test_the_launch_of_the_kernel_is_traced_with_symbolic_lengths() -> None:
    """As Inductor sees it for a GPU; nothing is launched, so any device will do."""
    pytest.importorskip("triton")
    from vggt_compile.ops.match_tokens_kernel import launch

    def run(source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
        return launch(source, destination)

    with set_wrap_triton_enabled(True):
        traced = make_fx(run, tracing_mode="symbolic")(noise(2, 21, 24), noise(2, 77, 24))
    (call,) = (node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target))
    given = call.kwargs["kwargs"]
    for name in ("sources", "destinations"):
        assert isinstance(given[name].meta["val"], torch.SymInt), name
        assert not given[name].meta["val"].node.expr.is_number, name
    assert (given["C"], given["LANES"]) == (24, 32)
