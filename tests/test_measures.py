"""Measures of collapse against closed forms, against whole matrices, and their stated errors against the truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vggt_compile import registry
from vggt_compile.errors import PlanError
from vggt_compile.measures.attention import entropy, itself, logits, mass
from vggt_compile.measures.blocks import recall, sparsity
from vggt_compile.measures.contraction import contraction, mixing
from vggt_compile.measures.sample import drawn, mean
from vggt_compile.measures.spectrum import effective_rank, spectrum, token_spectrum
from vggt_compile.measures.tokens import cosine, length, redundancy, residual, step
from vggt_compile.ops.select_blocks import select_blocks

SHARP = 200.0
"""A logit beside zeros that takes all attention, to the last bit of fp64."""
sizes = st.integers(2, 24)


def operands(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
    """One batch item and head of queries and keys whose products are the logits, in fp64."""
    return q.double()[None, None], k.double()[None, None], 1.0


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(found: Tensor) -> list[float]:
    """Of the first item and head, where they are exact."""
    assert found[0, 0, :, 1].eq(0).all()
    return found[0, 0, :, 0].tolist()


def equicorrelated(tokens: int, c: float) -> tuple[Tensor, Tensor, float]:
    """Logits c on the diagonal and 0 elsewhere: A = λ I + (1 − λ) 11ᵀ/n with λ = (e^c − 1) / (e^c + n − 1)."""
    return operands(c * torch.eye(tokens), torch.eye(tokens))


# Attention matrices that are known


@given(sizes)
def test_uniform_attention(tokens: int) -> None:
    given = operands(torch.zeros(tokens, 3), noise(tokens, 3))
    assert values(logits(*given)) == [0]
    assert values(entropy(*given)) == pytest.approx([1])
    assert values(itself(*given)) == pytest.approx([1 / tokens])
    assert values(spectrum(*given)) == pytest.approx([1, 1, 0], abs=1e-6)
    assert values(contraction(*given[:2], noise(1, tokens, 5), 1.0))[0] > 20


@given(sizes)
def test_the_identity(tokens: int) -> None:
    given = equicorrelated(tokens, SHARP)
    assert values(entropy(*given)) == pytest.approx([0], abs=1e-6)
    assert values(spectrum(*given)) == pytest.approx([tokens, tokens, 1])
    assert values(contraction(*given[:2], noise(1, tokens, 5), 1.0)) == pytest.approx([0], abs=1e-6)


@given(sizes)
def test_rank_one(tokens: int) -> None:
    """All queries are equal, so all rows are."""
    given = operands(noise(1, 4).expand(tokens, -1), noise(tokens, 4, seed=1))
    row = (given[0] @ given[1].mT)[0, 0, 0].softmax(-1)
    assert values(spectrum(*given)) == pytest.approx([1, 1, 0], abs=1e-6)
    assert values(entropy(*given)) == pytest.approx([-(row * row.log()).sum().item() / math.log(tokens)])


@given(st.integers(1, 5), st.integers(2, 5))
def test_clusters_that_see_themselves_only(clusters: int, each: int) -> None:
    own = torch.eye(clusters).repeat_interleave(each, 0)
    given = operands(SHARP * own, own)
    tokens = clusters * each
    assert values(entropy(*given)) == pytest.approx([math.log(each) / math.log(tokens)])
    assert values(spectrum(*given)) == pytest.approx([clusters, clusters, float(clusters > 1)], abs=1e-5)


@given(sizes, st.floats(0.1, 6))
def test_equal_weight_for_all_others(tokens: int, c: float) -> None:
    """Singular values are 1 once and λ n − 1 times, and centred tokens shrink by λ."""
    own = math.exp(c)
    lam, total = (own - 1) / (own + tokens - 1), own + tokens - 1
    given = equicorrelated(tokens, c)
    assert values(itself(*given)) == pytest.approx([math.exp(c) / (math.exp(c) + tokens - 1)], rel=1e-5)
    sigma = torch.tensor([1.0, *[lam] * (tokens - 1)])
    stable = 1 + (tokens - 1) * lam**2
    assert values(spectrum(*given)) == pytest.approx([effective_rank(sigma).item(), stable, lam], rel=1e-5)
    assert values(contraction(*given[:2], noise(1, tokens, 5), 1.0)) == pytest.approx([-math.log(lam)], rel=1e-5)
    spread = -(own / total * math.log(own / total) + (tokens - 1) / total * math.log(1 / total))
    assert values(entropy(*given)) == pytest.approx([spread / math.log(tokens)], rel=1e-5)
    assert values(logits(*given)) == pytest.approx([c * math.sqrt(tokens - 1) / tokens], rel=1e-5)


def test_independent_logits_have_the_entropy_and_ranks_of_the_theory() -> None:
    """docs/collapse.md: for normal logits of deviation s ≲ 1."""
    s, n = 0.5, 1000
    given = operands(s * noise(n, n), torch.eye(n))
    assert values(logits(*given))[0] == pytest.approx(s, rel=0.01)
    assert values(entropy(*given, rows=n))[0] == pytest.approx(1 - s**2 / (2 * math.log(n)), rel=0.001)
    _, stable, ratio = values(spectrum(*given, rows=n))
    assert stable == pytest.approx(math.exp(s**2), rel=0.01)
    assert ratio == pytest.approx(2 * math.sqrt(math.expm1(s**2) / n), rel=0.05)


# All rows are the whole matrix


@given(sizes, st.integers(1, 6), st.floats(0.1, 4), st.integers(0, 99))
def test_with_all_rows_everything_is_that_of_the_matrix(tokens: int, dim: int, size: float, seed: int) -> None:
    q, k, x = (noise(1, 1, tokens, width, seed=seed + i) for i, width in enumerate((dim, dim, 3)))
    product = q[0, 0] @ k[0, 0].T * size
    matrix = product.softmax(-1)
    sigma = torch.linalg.svdvals(matrix)
    want = [effective_rank(sigma).item(), ((sigma**2).sum() / sigma[0] ** 2).item(), (sigma[1] / sigma[0]).item()]
    assert values(spectrum(q, k, size)) == pytest.approx(want, rel=1e-4, abs=1e-5)
    rows = -(matrix * matrix.log()).sum(-1).mean() / math.log(tokens)
    assert values(entropy(q, k, size)) == pytest.approx([rows.item()], rel=1e-5)
    assert values(logits(q, k, size)) == pytest.approx(
        [product.var(-1, correction=0).mean().sqrt().item()], rel=1e-4, abs=1e-6
    )
    mixed = matrix @ x[0, 0]
    shrunk = (mixed - mixed.mean(0)).norm() / (x[0, 0] - x[0, 0].mean(0)).norm()
    assert values(contraction(q, k, x[0], size)) == pytest.approx([-shrunk.log().item()], rel=1e-4, abs=1e-5)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 6), st.integers(0, 99))
def test_mass_is_that_of_the_matrix(frames: int, special: int, patches: int, seed: int) -> None:
    per_frame = special + patches
    tokens = frames * per_frame
    q, k = (noise(1, 1, tokens, 4, seed=seed + i) for i in range(2))
    matrix = (q @ k.mT * 0.7).softmax(-1)[0, 0].view(frames, per_frame, frames, per_frame)
    to_patch, to_special, across = mass(q, k, 0.7, frames, special)[0, 0, :, 0].tolist()
    if special:
        assert to_patch == pytest.approx(matrix[:, :special, :, special:].sum((2, 3)).mean().item(), rel=1e-5)
    else:
        assert math.isnan(to_patch)
    assert to_special == pytest.approx(matrix[:, special:, :, :special].sum((2, 3)).mean().item(), rel=1e-5, abs=1e-9)
    own = sum(matrix[frame, :, frame].sum() for frame in range(frames))
    assert across == pytest.approx(1 - own.item() / tokens, rel=1e-5, abs=1e-6)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 6))
def test_mass_of_uniform_attention(frames: int, special: int, patches: int) -> None:
    per_frame = special + patches
    given = torch.zeros(1, 1, frames * per_frame, 2)
    to_patch, to_special, across = mass(given, given, None, frames, special)[0, 0, :, 0].tolist()
    want = (special / per_frame, (frames - 1) / frames)
    assert (to_special, across) == pytest.approx(want, abs=1e-6)
    assert not special or to_patch == pytest.approx(patches / per_frame)


# Blocks


@given(st.integers(1, 4), st.integers(0, 2), st.integers(4, 9))
def test_uniform_attention_needs_its_share_of_blocks(frames: int, special: int, patches: int) -> None:
    given = torch.zeros(1, 1, frames * (special + patches), 2)
    sizes = {"q_block": 4, "k_block": 1, "rows": 10_000}
    blocks = frames * patches
    needed = [math.ceil(share * blocks - 1e-4) / blocks for share in (0.9, 0.95, 0.99)]
    assert values(sparsity(given, given, None, frames, special, **sizes)) == pytest.approx(needed)
    kept = max(1, blocks // 4) / blocks
    assert values(recall(given, given, None, frames, special, **sizes)) == pytest.approx([kept, kept])


def test_blocks_that_see_themselves_are_found_by_their_means() -> None:
    """8 blocks of 16 patches: each needs one block of keys, and means tell which."""
    own = torch.eye(8).repeat_interleave(16, 0)
    given = operands(SHARP * own, own)
    sizes = {"q_block": 16, "k_block": 16, "rows": 10_000}
    assert values(sparsity(*given, 4, 0, **sizes)) == [1 / 8] * 3
    assert values(recall(*given, 4, 0, keep=1 / 8, **sizes)) == pytest.approx([1, 1])


def test_means_that_tell_nothing_miss_what_the_best_blocks_hold() -> None:
    """Keys of a block cancel, so its mean is zero, and each query looks for one key alone."""
    keys = torch.cat((torch.eye(32), -torch.eye(32)), 1).reshape(64, 32)  # e_i, −e_i, …
    given = operands(SHARP * keys[:1].expand(64, -1), keys)
    predicted, best = values(recall(*given, 1, 0, keep=1 / 4, rows=10_000, q_block=16, k_block=2))
    assert best == pytest.approx(1)
    assert predicted in (0, pytest.approx(1))  # the first blocks, whatever lies in them
    given = operands(SHARP * keys[-2:-1].expand(64, -1), keys)
    assert values(recall(*given, 1, 0, keep=1 / 4, rows=10_000, q_block=16, k_block=2)) == pytest.approx([0, 1])


def test_drawn_blocks_are_predicted_as_each_by_itself() -> None:
    """Also where the last block is short."""
    q, k = (noise(1, 1, 45, 4, seed=i).float() for i in range(2))  # blocks of 8, and one of 5
    matrix, own = (q @ k.mT * 0.5).softmax(-1)[0, 0], []
    for block in torch.arange(45).split(8):
        held = torch.stack([part.sum(-1).mean() for part in matrix[block].split(4, -1)])
        index, _ = select_blocks(q[:, :, block], k, 0.25, q_block=8, k_block=4)
        own.append(torch.stack((held[index.flatten()].sum(), held.topk(3).values.sum())))
    want = torch.stack(own).mean(0).tolist()
    assert values(recall(q, k, None, 1, 0, rows=10_000, q_block=8, k_block=4)) == pytest.approx(want, rel=1e-5)


# Tokens that are known


@given(st.integers(3, 20), st.floats(0, 0.99))
def test_equiangular_tokens(tokens: int, rho: float) -> None:
    x = torch.cat((torch.full((tokens, 1), math.sqrt(rho)), math.sqrt(1 - rho) * torch.eye(tokens)), 1).double()[None]
    assert values(cosine(x)) == pytest.approx([rho], abs=1e-6)
    assert values(length(3 * x)) == pytest.approx([3])
    assert values(residual(x)) == pytest.approx([math.sqrt((1 - rho) * (tokens - 1) / tokens)], rel=1e-5)
    want = [tokens - 1, tokens - 1, 1, 1 / (tokens - 1)]
    assert values(token_spectrum(x)) == pytest.approx(want, rel=1e-4)
    assert values(redundancy(x, similar=0.5)) == pytest.approx([rho, float(rho >= 0.5)], abs=1e-6)


@given(st.integers(2, 12), st.floats(0, 5))
def test_two_clusters(each: int, apart: float) -> None:
    """At (1, ±apart): one direction is left after centring."""
    x = torch.tensor([[1.0, apart], [1.0, -apart]], dtype=torch.float64).repeat(each, 1)[None]
    tokens, between = 2 * each, (1 - apart**2) / (1 + apart**2)
    pairs = (2 * each * (each - 1) + 2 * each**2 * between) / (tokens * (tokens - 1))
    assert values(cosine(x)) == pytest.approx([pairs], abs=1e-6)
    assert values(residual(x)) == pytest.approx([apart / math.sqrt(1 + apart**2)], abs=1e-6)
    assert values(redundancy(x)) == pytest.approx([1, 1])
    if apart > 0.1:
        assert values(token_spectrum(x)) == pytest.approx([1, 1, 0, 1], abs=1e-5)


@given(st.floats(0, 0.9), st.integers(0, 99))
def test_a_step_towards_the_mean(share: float, seed: int) -> None:
    """X' = X − share · JX: its spread is (1 − share) of what it was, and its mean the same."""
    x = noise(1, 12, 5, seed=seed)
    centred = x - x.mean(1, keepdim=True)
    dt, contracted = values(step(x, -share * centred))
    assert dt == pytest.approx(share * (centred.norm() / x.norm()).item(), rel=1e-5, abs=1e-7)
    after = x - share * centred
    assert contracted == pytest.approx(-math.log(1 - share) + math.log(after.norm() / x.norm()), abs=1e-6)


def test_values_that_are_mixed() -> None:
    v = noise(2, 3, 10, 4)
    out = v.mean(2, keepdim=True) + 0.25 * (v - v.mean(2, keepdim=True))
    torch.testing.assert_close(mixing(v, v, out)[..., 0].float(), torch.full((2, 3, 1), math.log(4)))


def test_collapse_is_told_to_the_last_digits_of_fp32() -> None:
    """Spread around a large mean: sums of squares in fp32 would not know it."""
    x = (1000 + noise(1, 300, 8)).float()
    centred = x.double() - x.double().mean(1, keepdim=True)
    assert values(residual(x)) == pytest.approx([(centred.norm() / x.double().norm()).item()], rel=1e-6)
    sigma = torch.linalg.svdvals(centred[0])
    assert values(token_spectrum(x))[0] == pytest.approx(effective_rank(sigma).item(), rel=1e-6)


# Errors of what is drawn


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 9))
def test_one_row_of_each_run_is_drawn(count: int, rows: int, seed: int) -> None:
    places = drawn(count, rows, seed, torch.device("cpu"))
    rows = min(rows, count)
    assert len(places) == rows
    for slot, place in enumerate(places.tolist()):
        assert slot * count // rows <= place < (slot + 1) * count // rows


def structured(tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Queries and keys that vary slowly along the sequence, and by noise."""
    slow = torch.linspace(0, 6, tokens, dtype=torch.float64)
    waves = torch.stack((slow.sin(), slow.cos(), (3 * slow).sin()), -1)
    q, k = (torch.cat((waves, noise(tokens, 5, seed=seed + i)), -1) for i in range(2))
    return q[None, None], k[None, None], 0.8


@pytest.mark.parametrize("function", [entropy, contraction])
def test_the_standard_error_is_not_too_small(function: Any) -> None:
    """Over many draws the deviation from the truth is about the error that is stated."""
    q, k, scale = structured()
    given = (q, k, noise(1, 400, 6), scale) if function is contraction else (q, k, scale)
    truth = function(*given, rows=400)[0, 0, 0, 0]
    found = torch.stack([function(*given, rows=50, seed=seed)[0, 0, 0] for seed in range(60)])
    deviation, stated = (x.square().mean().sqrt() for x in (found[:, 0] - truth, found[:, 1]))
    assert 0.8 < deviation / stated < 1.2


def test_the_error_falls_with_the_root_of_the_rows() -> None:
    q, k, scale = structured(2000)
    few, many = (entropy(q, k, scale, rows=rows)[0, 0, 0, 1] for rows in (100, 400))
    assert few / many == pytest.approx(2, rel=0.25)
    assert mean(noise(7), 7)[1] == 0


@pytest.mark.parametrize("logits", ["structured", "noise"])
def test_singular_values_are_as_wrong_as_stated_at_most(logits: str) -> None:
    given = structured() if logits == "structured" else (*(noise(1, 1, 400, 300, seed=i) for i in range(2)), 0.04)
    _, stable, ratio = values(spectrum(*given, rows=400))
    found = torch.stack([spectrum(*given, rows=100, seed=seed)[0, 0] for seed in range(40)])
    assert found[:, 0, 0].max() <= 100
    assert found[:, 0, 1].min() > 0
    deviation = found[:, 1:, 0] - torch.tensor([stable, ratio])
    assert (deviation.square().mean(0) < 1.2 * found[:, 1:, 1].square().mean(0)).all()


# What holds for every measure


def around(tokens: int = 40, frames: int = 4, special: int = 2) -> dict[str, Any]:
    """Arguments for every measure, two batch items and three heads."""
    names = ("q", "k", "v", "out")
    found: dict[str, Any] = {name: noise(2, 3, tokens, 8, seed=i).float() for i, name in enumerate(names)}
    found |= {name: noise(2, tokens, 24, seed=9 + i).float() for i, name in enumerate(("x", "update"))}
    return found | {"scale": None, "frames": frames, "special": special}


def call(entry: registry.Measure, given: dict[str, Any], **options: Any) -> Tensor:
    options = {name: value for name, value in options.items() if name in entry.parameters}
    return entry.operator(*(given[name] for name in entry.reads), **options)


@pytest.fixture(params=[entry.name for entry in registry.measures()])
def entry(request: pytest.FixtureRequest) -> registry.Measure:
    return registry.find_measure(request.param)


def test_it_has_the_shape_that_tracing_is_told(entry: registry.Measure) -> None:
    operands = tuple(around()[name] for name in entry.reads)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(entry.operator, operands, test_utils=utilities)
    assert call(entry, around()).shape == (2, 3 if "q" in entry.reads else 1, len(entry.quantities), 2)


def test_items_and_heads_are_measured_for_themselves(entry: registry.Measure) -> None:
    whole = call(entry, around(), rows=16)
    one = {name: x[1:] if isinstance(x, Tensor) else x for name, x in around().items()}
    torch.testing.assert_close(call(entry, one, rows=16), whole[1:])


def test_autocast_does_not_reach_it(entry: registry.Measure) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = call(entry, around())
    assert torch.equal(found, call(entry, around()))


def test_what_is_not_a_number_is_told_and_not_raised(entry: registry.Measure) -> None:
    broken = {n: torch.full_like(x, torch.nan) if isinstance(x, Tensor) else x for n, x in around().items()}
    assert call(entry, broken)[..., 0].isnan().all()


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return found


@settings(max_examples=1)
@given(st.just(3000))
def test_memory_grows_with_the_tokens_and_not_with_their_pairs(tokens: int) -> None:
    for entry in registry.measures():
        largest = []
        for size in (tokens, 2 * tokens):
            with _Largest() as mode:
                entry.run(
                    *(around(size, frames=10)[name] for name in entry.reads),
                    **({"rows": 32} if "rows" in entry.parameters else {}),
                    **({"q_block": 16} if "q_block" in entry.parameters else {}),
                )
            largest.append(mode.elements)
        assert largest[1] <= 2.1 * largest[0]
        assert largest[1] < 70 * 2 * tokens


def test_a_measure_is_registered_once() -> None:
    with pytest.raises(PlanError, match=r"already registered by vggt_compile\.measures\.tokens"):
        registry.add_measure(registry.Measure("cosine", around, (), (), around))
