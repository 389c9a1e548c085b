"""Automatic plans: what is measured is what the backend does, targets are met, and what cannot be met says so."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import fails
from modelutils import images, randomized
from torch import Tensor, nn

import vggt_compile
from vggt_compile.__main__ import main
from vggt_compile.auto import gains, hopeless
from vggt_compile.auto.calibration import Calibration, calibrate
from vggt_compile.auto.candidates import DENSE, candidates, composed, everywhere
from vggt_compile.auto.change import change, combined
from vggt_compile.auto.find import find
from vggt_compile.auto.runner import Runner, Traced
from vggt_compile.auto.target import Target
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.dry_run import explain as traced
from vggt_compile.dry_run import fresh_call
from vggt_compile.errors import BadInput, PlanError
from vggt_compile.models import pi3, vggt
from vggt_compile.plan import Plan
from vggt_compile.probes import Probe
from vggt_compile.report import Report

pytestmark = pytest.mark.filterwarnings("ignore:vggt_compile")
SIZE = (56, 56)
EAGER: Any = vggt_sparse_eager
FEW = {
    "frame": {"scope": "frame"},
    "keys": {"keys": "grid"},
    "merge": {"tokens": {"method": "merge", "reference": False}},
}


def explain(*given: Any, **options: Any) -> Report:
    with torch.no_grad():
        return traced(*given, dynamic=False, **options)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomized(pi3("tiny"))


@pytest.fixture(scope="module")
def scene() -> Tensor:
    return images(1, 4, 3, *SIZE)


@pytest.fixture(scope="module")
def calibration(model: nn.Module, scene: Tensor) -> Calibration:
    return calibrate(model, scene)


@pytest.fixture(scope="module")
def without_numbers(model: nn.Module, scene: Tensor) -> Traced:
    return Traced(model, scene)


@pytest.mark.parametrize("name", ["merge 0.9 + keys 1x2", "blocks 0.25", "frame"])
def test_a_runner_computes_what_the_backend_does(
    model: nn.Module, scene: Tensor, without_numbers: Traced, name: str
) -> None:
    plan, other = everywhere(name, candidates("pi3")[name]), everywhere("frame", candidates("pi3")["frame"])
    runner = Runner(model, scene)
    runner(other, scene)  # leaves nothing behind
    found = runner(plan, scene)
    torch.compiler.reset()
    with torch.no_grad():
        expected = torch.compile(fresh_call(), backend=EAGER, options={"plan": plan}, dynamic=False)(model, scene)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)
    assert runner.report(plan).attention_left() == explain(model, scene, plan=plan).attention_left()
    assert without_numbers.report(plan).rows == runner.report(plan).rows


def test_dense_outputs_are_those_of_the_model(model: nn.Module, scene: Tensor) -> None:
    with torch.no_grad():
        expected = model(scene)
    found = Runner(model, scene).first
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor)


def test_change_does_not_see_a_similarity_of_the_world(model: nn.Module, scene: Tensor) -> None:
    with torch.no_grad():
        dense = model(scene)
    assert combined(change(dense, dense, SIZE)) < 1e-6
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    turn = turn * torch.linalg.det(turn)
    moved = {name: tensor.clone() for name, tensor in dense.items()}
    moved["points"] = 3 * dense["points"] @ turn.mT + 1
    moved["local_points"] = 3 * dense["local_points"]
    moved["camera_poses"][..., :3, :3] = turn @ dense["camera_poses"][..., :3, :3]
    moved["camera_poses"][..., :3, 3] = 3 * dense["camera_poses"][..., :3, 3] @ turn.mT + 1
    assert combined(change(moved, dense, SIZE)) < 1e-4


def test_change_of_depth_is_the_relative_one(model: nn.Module, scene: Tensor) -> None:
    with torch.no_grad():
        dense = model(scene)
    dense |= {"local_points": torch.ones_like(dense["local_points"])}
    moved = dense | {"local_points": dense["local_points"].clone()}
    moved["local_points"][:, :1] *= 1.5  # one of four frames; the ratio of medians stays 1
    found = change(moved, dense, SIZE)
    assert found["depth"] == pytest.approx(0.5 / 4, rel=1e-3)
    assert found["camera"] < 1e-12


def test_change_of_other_outputs_is_that_of_each_tensor() -> None:
    assert change([torch.tensor([3.0, 4.4])], [torch.tensor([3.0, 4.0])], SIZE) == {"[0]": pytest.approx(0.08)}
    assert change({"x": torch.tensor([math.nan])}, {"x": torch.ones(1)}, SIZE)["['x']"] == math.inf


def test_change_to_nan_is_infinite(model: nn.Module, scene: Tensor) -> None:
    with torch.no_grad():
        dense = model(scene)
    assert combined(change(dense | {"points": dense["points"] * math.nan}, dense, SIZE)) == math.inf


def test_a_calibration_has_an_error_and_a_cost_of_every_candidate(calibration: Calibration) -> None:
    assert list(calibration.errors) == [0, 1]
    for layer, found in calibration.errors.items():
        left_out = calibration.left_out[layer]
        assert set(found) | set(left_out) == set(calibration.policies)
        assert found[DENSE] == 0
        assert all(math.isfinite(error) and error > 0 for name, error in found.items() if name != DENSE)
        costs = calibration.flops.layers[layer]
        assert costs["keys 3x3"] <= costs["keys 2x2"] < costs["keys 1x2"] < costs[DENSE]


def test_errors_of_layers_are_those_of_plans(calibration: Calibration, model: nn.Module, scene: Tensor) -> None:
    plan = Plan.read({"layers": {"1": {"scope": "frame"}}})
    with torch.no_grad():
        dense = model(scene)
        found = torch.compile(fresh_call(), backend=EAGER, options={"plan": plan}, dynamic=False)(model, scene)
    assert calibration.errors[1]["frame"] == pytest.approx(combined(change(found, dense, SIZE)), rel=1e-3)


def test_a_uniform_plan_is_predicted_exactly(calibration: Calibration) -> None:
    for name in ("keys 2x2", "frame", "merge 0.9"):
        choice = dict.fromkeys(calibration.errors, name)
        assert calibration.predicted(choice) == pytest.approx(calibration.measured(choice))


def test_factors_are_what_all_layers_are_over_their_sum() -> None:
    errors = {0: {"a": 0.1, "b": 0.0}, 1: {"a": 0.3}}
    found = gains.factors(errors, {"a": 0.2, "b": 0.0})
    assert found == {"a": pytest.approx(0.5), "b": 1.0}


def test_smoothing_leaves_a_product_as_it_is_and_halves_what_is_beside_it() -> None:
    product = {layer: {name: s * t for name, t in (("a", 0.1), ("b", 0.4))} for layer, s in enumerate((1.0, 2.0, 5.0))}
    smooth = gains.smoothed(product)
    assert all(smooth[at] == pytest.approx(found) for at, found in product.items())
    odd = {**product, 1: {"a": 0.2, "b": 0.8 * math.e}}
    before = math.log(odd[1]["b"] * odd[0]["a"] / odd[1]["a"] / odd[0]["b"])
    smooth = gains.smoothed(odd)
    after = math.log(smooth[1]["b"] * smooth[0]["a"] / smooth[1]["a"] / smooth[0]["b"])
    assert (before, after) == (pytest.approx(1), pytest.approx(0.5))


def test_smoothing_leaves_zero_and_infinity_alone() -> None:
    smooth = gains.smoothed({0: {"dense": 0.0, "a": 0.1, "b": math.inf}, 1: {"dense": 0.0, "a": 0.2}})
    assert smooth[0] == {"dense": 0.0, "a": pytest.approx(0.1), "b": math.inf}
    assert smooth[1] == {"dense": 0.0, "a": pytest.approx(0.2)}


@pytest.mark.parametrize("target", ["speedup=2", "flops=0.8", "speedup=1.2"])
def test_a_plan_reaches_its_target_with_the_least_predicted_error(calibration: Calibration, target: str) -> None:
    found = find(calibration, wanted := Target.read(target))
    reached = found.speedup >= wanted.value if wanted.kind == "speedup" else found.flops <= wanted.value
    assert reached
    costs, limit = calibration.flops, calibration.flops.of(found.choice)
    every = itertools.product(*(list(tried) for tried in calibration.errors.values()))
    choices = [dict(zip(calibration.errors, names, strict=True)) for names in every]
    assert found.predicted <= min(calibration.predicted(c) for c in choices if costs.of(c) <= limit) + 1e-12


def test_the_report_of_a_plan_has_the_share_that_was_asked_for(
    calibration: Calibration, model: nn.Module, scene: Tensor
) -> None:
    found = find(calibration, Target("flops", 0.8))
    report = explain(model, scene, plan=found.plan)
    assert report.attention_left() == pytest.approx(found.flops)
    assert {row.layer for row in report.rewritten} == {layer for layer, name in found.choice.items() if name != DENSE}


def test_an_error_is_met_where_it_is_measured(calibration: Calibration) -> None:
    mild = find(calibration, Target("speedup", 1.1)).measured
    found = find(calibration, Target("error", 2 * mild))
    assert 0 < found.measured <= 2 * mild
    assert found.speedup > 1


def test_another_round_never_makes_a_plan_worse(calibration: Calibration) -> None:
    target = Target("speedup", 2)
    first, second = find(calibration, target), find(calibration, target, rounds=2)
    assert second.measured <= first.measured
    assert second.speedup >= 2


def test_a_plan_is_a_file_that_the_backend_takes(
    calibration: Calibration, model: nn.Module, scene: Tensor, tmp_path: Path
) -> None:
    plan = find(calibration, Target("speedup", 2)).plan
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert Plan.load(tmp_path / "plan.json") == plan
    assert explain(model, scene, plan=str(tmp_path / "plan.json"), strict=True).rewritten


def test_layers_of_one_policy_share_a_rule() -> None:
    policies = candidates("pi3")
    plan = composed({0: policies["frame"], 1: policies[DENSE], 2: policies["frame"]}, "x")
    assert plan.to_json()["layers"] == {"0,2": {"scope": "frame"}}


@pytest.mark.parametrize("family", ["pi3", "vggt", "generic"])
def test_the_first_frame_is_kept_where_coordinates_refer_to_it(family: str) -> None:
    policies = candidates(family)
    kept = dict(policies["keys 2x2"].keys.parameters)["keep_first_frame"]
    assert kept == (family != "pi3") == dict(policies["merge 0.9"].tokens.parameters)["reference"]


def test_costs_can_be_those_of_more_frames(model: nn.Module, scene: Tensor, calibration: Calibration) -> None:
    more = calibrate(model, scene, frames=9, policies=FEW)
    assert more.errors[0]["frame"] == calibration.errors[0]["frame"]
    assert more.flops.layers[0][DENSE] == pytest.approx(calibration.flops.layers[0][DENSE] * (9 / 4) ** 2)


def test_time_is_that_of_the_device(model: nn.Module, scene: Tensor, calibration: Calibration) -> None:
    timed = calibrate(model, scene, cost="time", policies=FEW).time
    assert timed is not None
    assert timed.dense > 0
    assert [set(found) for found in timed.layers.values()] == [{DENSE, *FEW}] * 2
    assert all(value >= 0 for found in timed.layers.values() for value in found.values())
    assert calibration.time is None


def test_work_goes_on_where_it_stopped(
    model: nn.Module, scene: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work.jsonl"
    first = calibrate(model, scene, work=work, policies=FEW)
    lines = work.read_text().splitlines()
    work.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:20])
    ran = []
    monkeypatch.setattr("vggt_compile.auto.gauge.change", lambda *given: ran.append(1) or change(*given))
    again = calibrate(model, scene, work=work, policies=FEW)
    assert len(ran) == 3
    assert again.errors == first.errors
    with pytest.raises(BadInput, match="images is"):
        calibrate(model, scene + 0.01, work=work, policies=FEW)


def test_the_same_calibration_gives_the_same_plan(model: nn.Module, scene: Tensor) -> None:
    plans = [vggt_compile.find_plan(model, scene[0], {"speedup": 3}, policies=FEW) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("speedup=1e9", "the cheapest candidate at every layer gives"),
        ("flops=0.01", "is attention inside frames that no plan changes"),
        ("error=1e-12", "the mildest candidate at one layer alone has"),
    ],
)
def test_an_unreachable_target_says_what_is_in_reach(calibration: Calibration, target: str, part: str) -> None:
    with pytest.raises(BadInput, match=part):
        find(calibration, Target.read(target))


def test_what_is_called_reachable_is(calibration: Calibration) -> None:
    most = calibration.flops.dense / calibration.least(calibration.flops)
    assert find(calibration, Target("speedup", most * (1 - 1e-9))).speedup == pytest.approx(most)


@pytest.mark.parametrize("given", [{"speed": 2}, {"speedup": 1}, {"flops": 0}, {"error": "x"}, {}, 4, {"flops": 1.5}])
def test_a_target_that_cannot_be_meant_is_refused(given: object) -> None:
    with pytest.raises((BadInput, PlanError)):
        Target.read(given)


def test_bad_input_is_named(model: nn.Module, scene: Tensor) -> None:
    with pytest.raises(BadInput, match="one frame only"):
        calibrate(model, scene[:, :1])
    with pytest.raises(BadInput, match="of one shape"):
        calibrate(model, [scene, scene[:, :2]])
    with pytest.raises(BadInput, match="cost 'time' is that of the images"):
        calibrate(model, scene, cost="time", frames=9)
    with pytest.raises(PlanError, match="did you mean 'keys 2x2'"):
        calibrate(model, scene, policies=["keys 2×2"])
    with pytest.raises(PlanError, match="unknown axis"):
        calibrate(model, scene, policies={"mine": {"token": "merge"}})
    with pytest.raises(PlanError, match="did you mean 'time'"):
        calibrate(model, scene, cost="tim")


def test_activations_that_are_no_numbers_are_named(scene: Tensor) -> None:
    model = randomized(pi3("tiny"))
    model.decoder[1].attn.qkv.bias.data.fill_(math.nan)
    with pytest.raises(BadInput, match="NaN or infinity for scene 0"):
        calibrate(model, scene)


def test_a_model_without_attention_over_frames_is_named(scene: Tensor) -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((-1, -2)) * 2

    with pytest.raises(BadInput, match="none of the 0 attentions of this model is over frames"):
        calibrate(Flat().eval(), scene)


def test_blocks_are_hopeless_where_the_mass_is_spread() -> None:
    def probe(value: float) -> Probe:
        return Probe(0, "x", "blocks_90", value, 0.0, (value,), 1)

    kept = {name: share for name, p in candidates("pi3").items() if (share := hopeless.kept_blocks(p)) is not None}
    assert kept == {"blocks 0.5": 0.5, "blocks 0.25": 0.25, "blocks 0.1": 0.1}
    assert hopeless.reasons({"blocks_90": probe(0.6)}, kept).keys() == {"blocks 0.25", "blocks 0.1"}
    assert hopeless.reasons({"blocks_90": probe(0.15)}, kept) == {}
    assert hopeless.reasons({}, kept) == {}


def test_vggt_is_calibrated_under_autocast(scene: Tensor) -> None:
    model = randomized(vggt("tiny"))
    with torch.autocast("cpu", torch.bfloat16):
        gauge = calibrate(model, scene, policies=["frame"]).gauge
        assert 0 < gauge(everywhere("frame", candidates("vggt")["frame"])) < math.inf
        plan = Plan.read({"layers": {"1": {"keys": {"method": "grid", "keep_first_frame": True}}}})
        assert gauge.parts(plan).keys() == {"camera", "depth", "points"}


@pytest.mark.slow
def test_the_command_writes_plans(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = (randomized(pi3("tiny")), "weights", 14)
    monkeypatch.setattr("vggt_compile.cli.profile.load_model", lambda *_, **__: loaded)
    argv = ["plan", "pi3-tiny", "--scenes", "orbit", "--frames", "3", "--size", "56", "56", "--device", "cpu", "--json"]
    out = ["--out", str(tmp_path / "plan.json"), "--work", str(tmp_path / "work")]
    assert main([*argv, "--target", "speedup=2", "--target", "flops=0.9", *out]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == [str(tmp_path / "plan-speedup-2.json"), str(tmp_path / "plan-flops-0.9.json")]
    assert Plan.load(told["files"][0]).to_json() == told["found"][0]["plan"]
    assert main([*(word for word in argv if word != "--json"), "--target", "speedup=2", *out]) == 0
    assert "error of one layer" in capsys.readouterr().out
    assert Plan.load(tmp_path / "plan.json") == Plan.load(told["files"][0])


def test_bad_arguments_of_the_command_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'speedup'?" in fails(capsys, "plan", "pi3-small", "--target", "speedups=4")
    assert "two or more" in fails(capsys, "plan", "pi3-small", "--target", "speedup=4", "--frames", "1")
    assert "one scene or more" in fails(capsys, "plan", "pi3-small", "--target", "speedup=4", "--count", "0")


@pytest.mark.gpu
def test_a_gpu_is_timed_and_finds_the_errors_that_a_cpu_does(model: nn.Module, scene: Tensor) -> None:
    there = calibrate(copy.deepcopy(model).cuda(), scene.cuda(), policies=FEW)
    here = calibrate(model, scene, policies=FEW)
    assert there.time is not None
    assert there.costs.dense > 0
    for layer, found in here.errors.items():
        for name, error in found.items():
            assert there.errors[layer][name] == pytest.approx(error, rel=0.02, abs=1e-4)
