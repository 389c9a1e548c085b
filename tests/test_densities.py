"""What runs report of the pairs that they computed: the operator against a mask, and graphs that hand it out."""

from __future__ import annotations

from typing import Any

import alternating
import blocks_oracle as oracle
import pytest
import torch
from alternating import Spec, build
from harness import nodes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters

from vggt_compile import Densities, collect_densities, collect_reports, vggt_sparse
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.ops.density import density
from vggt_compile.ops.random_blocks import random_blocks
from vggt_compile.ops.select_blocks import select_blocks

SPEC = Spec(head_dim=16)
BLOCKS = {"q_block": 32, "k_block": 16}


def plan(layers: str = "*", **parameters: Any) -> dict:
    return {"layers": {layers: {"blocks": {"method": "predict", **BLOCKS, **parameters}}}}


def compiled(model: Any, *, backend: Any = vggt_sparse_eager, **options: Any) -> Any:
    return torch.compile(model, backend=backend, dynamic=False, options={"densities": True, **options})


def scene(batch: int = 1, frames: int = 4) -> Tensor:
    return alternating.images(SPEC, batch, frames, (5, 7))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


# The operator


@given(
    queries=st.integers(1, 40),
    listed=st.integers(1, 40),
    always=st.integers(0, 9),
    dense=st.integers(0, 5),
    keep=st.floats(0, 1),
    cdf=st.sampled_from((0.0, 0.5)),
    seed=st.integers(0, 99),
)
def test_density_is_the_mean_of_the_mask(
    queries: int, listed: int, always: int, dense: int, keep: float, cdf: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 3, tokens, 8, generator=generator) for tokens in (queries, listed))
    index, count = select_blocks(q, k, keep, cdf, most=1.0, q_block=4, k_block=3)
    got = density(index, count, queries, always + listed, always, 4, 3, dense)
    mask = oracle.mask(index, count, -(-listed // 3)).repeat_interleave(4, 2).repeat_interleave(3, 3)
    mask = mask[:, :, :queries, :listed]
    mask = torch.cat((mask.new_ones(2, 3, queries, always), mask), 3)
    mask = torch.cat((mask.new_ones(2, 3, dense, always + listed), mask), 2)
    torch.testing.assert_close(got, mask.float().mean((2, 3)))


def test_density_of_lists_of_no_block_and_of_all() -> None:
    q, k = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 7, 8)
    index, count = random_blocks(q, k, 1.0, 0, 4, 2)
    assert density(index, count, 10, 8, 1, 4, 2, 3).eq(1).all()
    unread = density(torch.full_like(index, 99), torch.zeros_like(count), 10, 8, 1, 4, 2, 2)
    torch.testing.assert_close(unread, torch.full((1, 2), (10 * 1 + 2 * 8) / (12 * 8)))


def test_density_is_of_the_tokens_there_were_before_some_merged_or_were_dropped() -> None:
    index, count = random_blocks(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 7, 8), 1.0, 0, 4, 2)
    share = density(index, count, 10, 8, 1, 4, 2, 3, own_keys=5, of_tokens=20)
    torch.testing.assert_close(share, torch.full((1, 2), (13 * 8 + 5) / (20 * 20)))


def test_density_has_the_shape_that_tracing_is_told() -> None:
    index, count = random_blocks(torch.randn(2, 3, 10, 8), torch.randn(2, 3, 7, 8), 0.5, 0, 4, 2)
    torch.library.opcheck(torch.ops.vggt_compile.density.default, (index, count, 10, 8, 1, 4, 2, 3, 5, 20))


# In models


def test_a_run_reports_what_the_report_counts_where_the_data_do_not_decide() -> None:
    model = compiled(build(SPEC), plan=plan(keep=0.25))
    with collect_reports() as reports, collect_densities() as densities:
        model(scene(2))
    rows = reports[0].rewritten
    assert [(row.layer, row.path) for row in densities.rows] == [(row.layer, row.path) for row in rows]
    for found, row in zip(densities.rows, rows, strict=True):
        assert row.measured
        # The report takes every kept block to be a whole one.
        assert found.least <= found.density <= found.most <= row.flops_after / row.flops_before + 1e-6
        assert found.density == pytest.approx(row.flops_after / row.flops_before, rel=0.05)
    assert densities.mean() == pytest.approx(sum(row.density for row in densities.rows) / 2)


def test_the_data_decide_under_cdf() -> None:
    model = compiled(build(SPEC), plan=plan(keep=0.0, cdf=0.6, most=1.0))
    with collect_reports() as reports, collect_densities() as densities:
        model(scene())
    for found, row in zip(densities.rows, reports[0].rewritten, strict=True):
        assert row.flops_after / row.flops_before < found.density < 1
        assert found.least < found.most


def test_outputs_are_those_of_the_same_plan_without_densities() -> None:
    model, x = build(SPEC), scene()
    without = torch.compile(model, backend=vggt_sparse_eager, dynamic=False, options={"plan": plan()})(x)
    assert torch.equal(compiled(model, plan=plan())(x), without)
    with collect_densities():
        assert torch.equal(compiled(model, plan=plan())(x), without)


def test_nothing_is_added_to_a_graph_unless_asked_for() -> None:
    graphs = []

    def backend(gm: Any, inputs: Any, *, options: Any) -> Any:
        run = vggt_sparse_eager(gm, inputs, options=options)
        graphs.append(gm)
        return run

    for options in ({}, {"densities": True}):
        torch.compile(build(SPEC), backend=backend, dynamic=False, options={"plan": plan(), **options})(scene())
        torch._dynamo.reset()
    without, with_them = graphs
    assert "density" not in nodes(without)
    assert nodes(with_them).count("vggt_compile.density") == 2
    assert len(with_them.graph.output_node().args[0]) == len(without.graph.output_node().args[0]) + 2


def test_code_compiled_with_densities_is_not_used_without_them() -> None:
    model, x = build(SPEC), scene()
    with collect_reports() as reports, collect_densities() as densities:
        torch.compile(model, backend=vggt_sparse_eager, dynamic=False, options={"plan": plan()})(x)
        assert densities.rows == []
        compiled(model, plan=plan())(x)
        compiled(model, plan=plan())(x)
    assert len(reports) == 2
    assert [row.runs for row in densities.rows] == [2, 2]


def test_runs_are_averaged_and_blocks_are_nested() -> None:
    model = compiled(build(SPEC), plan=plan("0", keep=0.0, cdf=0.6, most=1.0))
    inputs = [scene() * scale for scale in (0.1, 3.0)]
    with collect_densities() as both:
        alone = []
        for x in inputs:
            with collect_densities() as one:
                model(x)
            alone.append(one.rows[0].density)
    model(inputs[0])  # in no block
    assert both.rows[0].runs == 2
    assert both.rows[0].density == pytest.approx(sum(alone) / 2)
    assert alone[0] != alone[1]


def test_it_prints_as_a_table_or_says_what_is_missing() -> None:
    with collect_densities() as densities:
        assert "no densities: nothing ran that was compiled with options={'densities': True}" in str(densities)
        compiled(build(SPEC), plan=plan(keep=1.0))(scene())
    assert "least head" in str(densities)
    assert "100.0% of the pairs" in str(densities)
    assert densities.to_dict()["rows"][1]["path"] == "global_blocks.1.attn"
    assert '"mean": 1.0' in densities.to_json()


def test_it_is_an_option_of_two_values() -> None:
    with pytest.raises(Exception, match="densities is True or False, not 1"):
        compiled(build(SPEC), plan=plan(), densities=1)(scene())


def test_a_plan_without_blocks_hands_out_nothing() -> None:
    model, x = build(SPEC), scene()
    with collect_densities() as densities:
        out = compiled(model, plan={"layers": {"*": {"scope": "frame"}}})(x)
    assert densities.rows == []
    assert out.shape == model(x).shape


@pytest.mark.slow
def test_compiled_by_inductor_with_its_caches(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = build(Spec(head_dim=16, pairs=1)), scene(2)
    setting = plan(keep=0.1, cdf=0.6)
    with collect_densities() as eager:
        want = compiled(model, plan=setting)(x)

    def run() -> tuple[Tensor, Densities]:
        torch._dynamo.reset()
        counters.clear()
        with collect_densities() as densities:
            return compiled(model, plan=setting, backend=vggt_sparse)(x), densities

    for hits in (0, 1):
        out, densities = run()
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        assert densities.mean() == pytest.approx(eager.mean())


def test_symbolic_frames() -> None:
    model = torch.compile(
        build(SPEC), backend=vggt_sparse_eager, dynamic=True, options={"densities": True, "plan": plan(keep=0.25)}
    )
    found = []
    with collect_reports() as reports:
        for frames in (4, 9):
            with collect_densities() as densities:
                model(scene(frames=frames))
            found.append(densities.mean())
    assert len(reports) == 1
    special, patches = 9 * 5, 9 * 35
    pairs = special * (special + patches) + patches * (special + 5 * 16)  # 5 of 20 blocks
    assert found[1] == pytest.approx(pairs / (special + patches) ** 2, rel=0.02)
    assert found[0] != found[1]
