"""Probes of a plan: what graphs hand out, and that they change nothing else."""

from __future__ import annotations

import json
import math
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from harness import nodes, swapped
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vggt_compile import Plan, Probes, collect_densities, collect_probes, collect_reports, explain, registry
from vggt_compile.backend import vggt_sparse, vggt_sparse_eager
from vggt_compile.errors import PlanError
from vggt_compile.measures import attention, contraction, spectrum, tokens

SPEC = Spec(head_dim=16)
EVERY = [entry.name for entry in registry.measures()]
MERGE = {"layers": {"*": {"tokens": {"method": "merge", "ratio": 0.5}}}}
BLOCKS = {"layers": {"*": {"blocks": {"method": "predict", "q_block": 32, "k_block": 16, "cdf": 0.5}}}}
PLANS = {"dense": {}, "frame": {"layers": {"*": {"scope": "frame"}}}, "merge": MERGE, "blocks": BLOCKS}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def scene(batch: int = 1, frames: int = 4) -> Tensor:
    return alternating.images(SPEC, batch, frames, (5, 7))


def compiled(model: nn.Module, plan: object, *, backend: Any = vggt_sparse_eager, **options: Any) -> Any:
    given = {"dynamic": False, "fullgraph": True, **options}
    extra = given.pop("extra", {})
    return torch.compile(model, backend=backend, options={"plan": plan, **extra}, **given)


def probed(model: nn.Module, x: Tensor, plan: dict, *measures: object, **options: Any) -> Probes:
    with collect_probes() as probes:
        compiled(model, {**plan, "probe": list(measures)}, **options)(x)
    return probes


# Values


class Own(nn.Module):
    """The model again, which keeps what its own code has at each global attention."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.model, self.seen = build(spec), []

    def forward(self, x: Tensor) -> Tensor:
        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = self.model.spec.core(q, k, v)
            self.seen.append({"q": q, "k": k, "v": v, "out": out})
            return out

        hooks = [block.register_forward_hook(self._streams) for block in self.model.global_blocks]
        with swapped(self.model, core) as model:
            found = model(x)
        for hook in hooks:
            hook.remove()
        return found

    def _streams(self, block: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        self.seen[-1] |= {"x": given[0], "update": result - given[0]}


@pytest.mark.parametrize("core", [alternating.sdpa, alternating.scaled, alternating.spelled_out])
@pytest.mark.parametrize("names", ["vggt", "hidden"])
def test_they_measure_what_the_model_has(names: str, core: Any) -> None:
    own = Own(Spec(head_dim=16, core=core))
    own(scene(2))
    probes = probed(build(Spec(names, head_dim=16, core=core)), scene(2), {}, *EVERY)
    scale = {alternating.sdpa: None, alternating.scaled: 0.3, alternating.spelled_out: 16**-0.5}[core]
    assert list(probes.layers) == [0, 1]
    for layer, seen in enumerate(own.seen):
        given = {**seen, "scale": scale, "frames": 4, "special": 5}
        for entry in registry.measures():
            want = entry.run(*(given[name] for name in entry.reads))
            for index, quantity in enumerate(entry.quantities):
                row = probes.layers[layer][quantity]
                heads = want[..., index, 0].mean(0)
                torch.testing.assert_close(torch.tensor(row.heads), heads.float(), rtol=1e-3, atol=1e-4)
                assert row.value == pytest.approx(heads.mean().item(), rel=1e-3, abs=1e-4)


def test_parameters_of_a_measure_are_used() -> None:
    model, x = build(SPEC), scene()
    every, some = (probed(model, x, {}, {"measure": "entropy", "rows": rows}) for rows in (1000, 16))
    assert every.rows[0].error == 0
    assert some.rows[0].error > 0
    assert abs(some.rows[0].value - every.rows[0].value) < 5 * some.rows[0].error


def test_after_merging_the_attention_that_is_run_is_measured() -> None:
    """Values contract by what the merged attention gives; queries and keys of the first layer are as without a plan."""
    dense, merged = (probed(build(SPEC), scene(), plan, "mixing", "entropy") for plan in ({}, MERGE))
    assert merged.layers[0]["entropy"] == dense.layers[0]["entropy"]
    assert merged.layers[0]["value_contraction"].value != dense.layers[0]["value_contraction"].value
    framed = probed(build(SPEC), scene(), PLANS["frame"], "mixing")
    assert framed.layers[0]["value_contraction"].value < dense.layers[0]["value_contraction"].value


def test_runs_are_averaged_and_blocks_are_nested() -> None:
    model = compiled(build(SPEC), {"probe": ["cosine"]})
    with collect_probes() as both:
        alone = []
        for x in (scene(), 3 * scene()):
            with collect_probes() as one:
                model(x)
            alone.append(one.rows[0].value)
    model(scene())  # in no block
    assert both.rows[0].runs == 2
    assert both.rows[0].value == pytest.approx(sum(alone) / 2)
    assert alone[0] != alone[1]


# Graphs


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_output_is_the_same_to_the_bit(plan: str, dynamic: bool) -> None:
    model, x = build(SPEC), scene()
    without = compiled(model, PLANS[plan], dynamic=dynamic)(x)
    with collect_probes() as probes:
        assert torch.equal(compiled(model, {**PLANS[plan], "probe": EVERY}, dynamic=dynamic)(x), without)
    assert len(probes.rows) == 2 * sum(len(entry.quantities) for entry in registry.measures())


def test_one_graph_serves_all_numbers_of_frames() -> None:
    model = compiled(build(SPEC), {"probe": EVERY}, dynamic=True)
    found = []
    with collect_reports() as reports:
        for frames in (4, 9):
            with collect_probes() as probes:
                model(scene(frames=frames))
            found.append(probes.layers[0])
    assert len(reports) == 1
    fixed = probed(build(SPEC), scene(frames=9), {}, *EVERY)
    for quantity, row in fixed.layers[0].items():
        assert found[1][quantity].value == pytest.approx(row.value, rel=1e-3, abs=1e-4)
        assert found[0][quantity].value != row.value or quantity in ("blocks_99", "blocks_95", "blocks_90")


def test_nothing_is_added_to_a_graph_unless_asked_for() -> None:
    graphs = []

    def backend(gm: Any, inputs: Any, *, options: Any) -> Any:
        run = vggt_sparse_eager(gm, inputs, options=options)
        graphs.append(gm)
        return run

    for plan in ({}, {"probe": ["cosine", "entropy"]}):
        compiled(build(SPEC), plan, backend=backend)(scene())
        torch._dynamo.reset()
    without, with_them = graphs
    assert "probe" not in nodes(without)
    assert nodes(with_them).count("vggt_compile.probe_") == 4
    assert len(with_them.graph.output_node().args[0]) == len(without.graph.output_node().args[0]) + 4


def test_densities_and_probes_are_told_apart() -> None:
    plan = {**BLOCKS, "probe": ["cosine"]}
    with collect_densities() as densities, collect_probes() as probes:
        compiled(build(SPEC), plan, extra={"densities": True})(scene())
    alone = probed(build(SPEC), scene(), BLOCKS, "cosine")
    assert probes.rows == alone.rows
    assert [row.layer for row in densities.rows] == [0, 1]
    assert all(0 < row.density < 1 for row in densities.rows)


def test_a_report_says_what_is_measured_and_what_is_not() -> None:
    report = explain(build(SPEC), scene(), plan={"probe": ["cosine", "entropy"]})
    assert [(entry.layer, entry.measure) for entry in report.observed] == [
        (layer, name) for layer in (0, 1) for name in ("cosine", "entropy")
    ]
    assert "measured at layers 0-1: cosine, entropy" in str(report)
    json.loads(report.to_json())


class Bare(nn.Module):
    """Attention over frames whose result is not added to anything."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = model.frame_blocks[0], model.global_blocks[0].attn

    def forward(self, x: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        x = self.inner(x.flatten(0, 1)).unflatten(0, (batch, frames))
        return self.outer(x.flatten(1, 2))


@pytest.mark.filterwarnings("ignore:vggt_compile")
def test_what_a_model_has_not_is_a_note() -> None:
    model, x = Bare(build(SPEC)), torch.randn(1, 4, 9, 32)
    with collect_reports() as reports:
        probes = probed(model, x, {}, "cosine", "entropy", "mass")
    assert {row.quantity for row in probes.rows} == {"entropy"}
    assert reports[0].notes == [
        "cosine is not measured at layers 0: no residual connection follows its attention",
        "mass is not measured at layers 0: the number of special tokens in a frame is unknown",
    ]
    with collect_reports() as reports:
        assert probed(build(Spec(core=alternating.causal)), scene(), {}, "entropy").rows == []
    assert "entropy is not measured at layers 0-1: it is causal" in reports[0].notes


@pytest.mark.parametrize("post", ["add_", "iadd", "bias"])
def test_the_residual_is_found_in_whatever_form(post: str) -> None:
    """In place, or with a bias of another shape added before it."""

    class Added(Bare):
        def forward(self, x: Tensor) -> Tensor:
            batch, frames = x.shape[:2]
            x = self.inner(x.flatten(0, 1)).unflatten(0, (batch, frames)).flatten(1, 2)
            update = self.outer(x)
            if post == "add_":
                return x.add_(update)
            if post == "iadd":
                x += update
                return x
            return x + (update + x.new_ones(update.shape[-1])) * 0.5

    model, x = Added(build(SPEC)), torch.randn(1, 4, 9, 32)
    before = model.inner(x.flatten(0, 1)).view(1, 36, 32)
    update = model(x.clone()) - before
    probes = probed(model, x, {}, "step", "cosine")
    assert probes.layers[0]["step"].value == pytest.approx((update.norm() / before.norm()).item(), rel=1e-4)
    assert probes.layers[0]["cosine"].value == pytest.approx(tokens.cosine(before)[0, 0, 0, 0].item(), rel=1e-4)


@pytest.mark.slow
def test_compiled_by_inductor_with_its_caches(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    spec = Spec(head_dim=16, pairs=1)
    model, x = build(spec), scene(2)
    eager = probed(model, x, MERGE, *EVERY)
    torch._dynamo.reset()
    without = compiled(model, MERGE, backend=vggt_sparse)(x)
    for hits in (0, 1):
        torch._dynamo.reset()
        counters.clear()
        with collect_probes() as probes:
            out = compiled(model, {**MERGE, "probe": EVERY}, backend=vggt_sparse)(x)
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
        assert torch.equal(out, without)
        for row, want in zip(probes.rows, eager.rows, strict=True):
            assert (row.layer, row.quantity) == (want.layer, want.quantity)
            assert row.value == pytest.approx(want.value, rel=1e-3, abs=1e-4)


# Plans


@pytest.mark.parametrize(
    ("probe", "part"),
    [
        (["cosin"], "unknown measure 'cosin'; did you mean 'cosine'?"),
        ("cosine", "probe is a list of measures, not 'cosine'"),
        ([3], "probe wants names of measures or dictionaries with 'measure', not 3"),
        ([{"measure": "entropy", "row": 9}], "did you mean 'rows'?"),
        ([{"measure": "entropy", "rows": 2}], "'rows' of measure 'entropy' must be 8 or more, not 2; the nearest is 8"),
        (["cosine", {"measure": "cosine"}], "names the measure 'cosine' twice"),
    ],
)
def test_a_probe_that_cannot_be_meant(probe: object, part: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.read({"probe": probe})
    assert part in str(caught.value)


def test_a_plan_with_probes_is_json_and_back() -> None:
    plan = Plan.read({"probe": ["cosine", {"measure": "entropy", "rows": 64}]})
    assert plan.dense
    assert plan != Plan()
    assert Plan.read(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.at(24).probe == plan.probe


# Tables


def test_it_prints_as_a_table_or_says_what_is_missing() -> None:
    with collect_probes() as probes:
        assert "no probes: nothing ran that was compiled under a plan" in str(probes)
        compiled(build(SPEC), {"probe": ["cosine", "logits", {"measure": "entropy", "rows": 16}]})(scene())
    lines = str(probes).splitlines()
    assert len(lines) == 2 + 2 + 1  # two layers, a rule, a header of two lines
    assert "±" in lines[-1]
    assert json.loads(probes.to_json())["rows"][0]["path"] == "global_blocks.0.attn"


def test_numbers_without_end_are_null_in_json() -> None:
    probes = Probes()
    report = explain(build(SPEC), scene(), plan={"probe": ["cosine"]})
    probes.add(report.observed[0], torch.tensor([[[[math.inf, 0.0]]]]))
    assert json.loads(probes.to_json())["rows"][0]["value"] is None


# A GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_numbers_are_those_of_the_cpu_and_the_output_keeps_its_bits() -> None:
    model, x = build(Spec(head_dim=32)), scene(2)
    want = probed(model, x, MERGE, *EVERY)
    torch._dynamo.reset()
    model, x = model.cuda(), x.cuda()
    without = compiled(model, MERGE)(x)
    with collect_probes() as probes:
        assert torch.equal(compiled(model, {**MERGE, "probe": EVERY})(x), without)
    for row, other in zip(probes.rows, want.rows, strict=True):
        assert row.value == pytest.approx(other.value, rel=2e-2, abs=2e-3), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_grows_with_the_tokens() -> None:
    """At 50k tokens one head's matrix of fp32 would be 10 GB."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k = torch.randn(2, 1, 2, 50_000, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 50_000, 256, generator=generator, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for found in (attention.entropy(q, k, None), spectrum.spectrum(q, k, None), contraction.contraction(q, k, x, None)):
        assert found.isfinite().all()
    assert torch.cuda.max_memory_allocated() - before < 2**30
