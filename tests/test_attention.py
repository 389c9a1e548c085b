"""The operator `attention` on the CPU: its definition says what it says, eager, compiled and exported."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, double, eager, operands, reads, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate
from torch import Tensor

from vggt_compile.ops import sizes
from vggt_compile.ops.attention import attention, reference
from vggt_compile.ops.operands import Operands

CASES = st.builds(
    Case,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 80),
    always=st.integers(0, 20),
    patches=st.integers(1, 90),
    head_dim=st.sampled_from((32, 80)),
    density=st.sampled_from((None, 0, 0.3, 1)),
    weighted=st.booleans(),
    own=st.booleans(),
    fused=st.booleans(),
    seed=st.integers(0, 9),
)
EVERYTHING = Case(batch=2, weighted=True, own=True)


def run(x: Operands) -> Tensor:
    return attention(*arguments(x))


def arguments(x: Operands) -> tuple:
    return tuple(getattr(x, name) for name in x.__dataclass_fields__)


@given(case=CASES)
@settings(max_examples=60)
def test_it_is_what_is_written_down(case: Case) -> None:
    x = double(operands(case))
    torch.testing.assert_close(run(x), wanted(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_it_is_as_accurate_as_eager(dtype: torch.dtype, head_dim: int) -> None:
    x = operands(replace(EVERYTHING, dtype=dtype, head_dim=head_dim))
    assert_as_accurate(run(x), eager(x), wanted(x))


def test_full_lists_are_dense_attention() -> None:
    x = double(operands(Case(density=1)))
    torch.testing.assert_close(run(x), F.scaled_dot_product_attention(x.q, x.k, x.v))
    torch.testing.assert_close(attention(x.q, x.k, x.v), F.scaled_dot_product_attention(x.q, x.k, x.v))


def test_lists_are_a_mask() -> None:
    x = double(operands(Case(density=0.4)))
    torch.testing.assert_close(run(x), F.scaled_dot_product_attention(x.q, x.k, x.v, attn_mask=reads(x)))


def test_empty_lists_leave_the_keys_that_all_read() -> None:
    x = double(operands(Case(density=0)))
    first = x.k[:, :, : x.always], x.v[:, :, : x.always]
    torch.testing.assert_close(run(x), F.scaled_dot_product_attention(x.q, *first))


def test_a_query_without_keys_gives_zeros() -> None:
    assert (run(operands(Case(density=0, always=0))) == 0).all()
    x = operands(Case(density=None))
    assert (run(replace(x, key_log_weight=torch.full((x.k.shape[2],), -torch.inf))) == 0).all()


def test_a_weight_of_log_n_is_a_key_n_times() -> None:
    x = double(operands(Case(density=None)))
    times = torch.randint(0, 4, (x.k.shape[2],))
    weighted = run(replace(x, key_log_weight=times.float().log()))
    repeated = (y.repeat_interleave(times, dim=2) for y in (x.k, x.v))
    torch.testing.assert_close(weighted, F.scaled_dot_product_attention(x.q, *repeated), rtol=1e-6, atol=1e-6)


def test_an_own_key_is_one_more_key() -> None:
    x = double(operands(Case(queries=9, density=None, own=True)))
    assert x.own is not None
    assert x.own_k is not None
    assert x.own_v is not None
    for i, has in enumerate(x.own.tolist()):
        k, v = (torch.cat((y, z[:, :, i : i + 1]), 2) if has else y for y, z in ((x.k, x.own_k), (x.v, x.own_v)))
        one = slice(i, i + 1)
        torch.testing.assert_close(run(x)[:, :, one], F.scaled_dot_product_attention(x.q[:, :, one], k, v))


def test_keys_that_are_not_read_may_be_anything() -> None:
    x = operands(EVERYTHING)
    kept = run(x)
    nobody = ~reads(x).any(2)
    assert nobody.any()
    x.k[nobody], x.v[nobody] = torch.nan, torch.nan
    assert torch.equal(run(x), kept)
    x.own_k[:, :, ~x.own], x.own_v[:, :, ~x.own] = torch.nan, torch.nan
    assert torch.equal(run(x), kept)


def test_batch_items_and_heads_do_not_meet() -> None:
    x = operands(EVERYTHING)
    together = run(x)
    for b in range(2):
        for h in range(2):
            cut = {
                name: y[b : b + 1, h : h + 1]
                for name in ("q", "k", "v", "block_index", "block_count", "own_k", "own_v")
                if (y := getattr(x, name)) is not None
            }
            alone = run(replace(x, **cut, key_log_weight=x.key_log_weight[:, h : h + 1]))
            torch.testing.assert_close(alone[0, 0], together[b, h])


@pytest.mark.parametrize("density", [None, 0.5])
def test_pieces_make_no_difference(density: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = double(operands(replace(EVERYTHING, density=density)))
    whole = run(x)
    monkeypatch.setattr(sizes, "PIECE_BYTES", 20_000)
    torch.testing.assert_close(run(x), whole)


def test_the_result_lies_token_by_token() -> None:
    x = operands(EVERYTHING)
    assert run(x).transpose(1, 2).is_contiguous()
    with torch.device("meta"):
        assert reference(operands(replace(EVERYTHING, density=None, own=False))).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", [Case(density=None), EVERYTHING], ids=["dense", "everything"])
def test_torch_finds_nothing_wrong_with_it(case: Case) -> None:
    torch.library.opcheck(torch.ops.vggt_compile.attention.default, arguments(operands(case)))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("density", [None, 0.5])
def test_compiled_it_is_the_same(dynamic: bool, density: float | None) -> None:
    @torch.compile(fullgraph=True, dynamic=dynamic)
    def compiled(*args):  # type: ignore[no-untyped-def]
        return attention(*args) * 2

    for queries in (70, 101):
        x = operands(replace(EVERYTHING, density=density, queries=queries))
        torch.testing.assert_close(compiled(*arguments(x)), run(x) * 2)


def test_lengths_are_symbols_of_one_graph() -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(q, k, v):  # type: ignore[no-untyped-def]
        return attention(q, k, v, always=5)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for queries, patches in ((70, 90), (33, 40), (140, 200)):
            x = operands(Case(queries=queries, patches=patches, density=None))
            torch.testing.assert_close(compiled(x.q, x.k, x.v), attention(x.q, x.k, x.v, always=5))


def test_exported_it_is_one_node_for_every_length() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, always=5)

    x = operands(Case(density=None))
    queries, keys = torch.export.Dim("queries", min=2), torch.export.Dim("keys", min=8)
    program = torch.export.export(Model(), (x.q, x.k, x.v), dynamic_shapes=({2: queries}, {2: keys}, {2: keys}))
    assert [n for n in program.graph.nodes if n.target is torch.ops.vggt_compile.attention.default]
    x = operands(Case(queries=31, patches=50, density=None))
    torch.testing.assert_close(program.module()(x.q, x.k, x.v), attention(x.q, x.k, x.v))


def test_a_gradient_is_refused_in_words() -> None:
    x = operands(Case(density=None))
    out = attention(x.q.requires_grad_(), x.k, x.v)
    with pytest.raises(NotImplementedError, match="no gradient: run the rewritten model under"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ({"k": torch.zeros(1, 2, 97, 16)}, "k and v have one shape"),
        ({"block_count": None}, "block_index comes with block_count"),
        ({"always": 98}, "as many keys as are always read"),
        ({"scale": -1.0}, "scale is positive"),
        ({"key_log_weight": torch.zeros(3)}, "one number for each key"),
        ({"own": torch.ones(70, dtype=torch.bool)}, "come together"),
        ({"q_block": 16}, "block_count is"),
        ({"q": torch.zeros(1, 2, 70, 32).half()}, "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, law: str) -> None:
    with pytest.raises(ValueError, match=law):
        run(replace(operands(Case()), **change))


def test_it_is_imported_without_triton() -> None:
    code = """
        import sys
        sys.modules["triton"] = None
        import torch
        from vggt_compile.ops.attention import attention
        x = torch.ones(1, 1, 2, 32)
        attention(x, x, x)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_autocast_around_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 32, generator=generator) for _ in range(3))
    alone = attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v), alone)
