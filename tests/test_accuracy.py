"""The accuracy bench: laws of its numbers, resuming, real recordings, clear errors, and that it tells good from bad."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import alternating
import pytest
import safetensors.torch
import torch
from layouts import write_colmap, write_seven_scenes, write_tum
from modelutils import randomized

from vggt_compile import collect_reports, vggt_sparse
from vggt_compile.__main__ import main
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.bench.accuracy.cases import Geometry, Recorded, Rendered, read_scenes, rendered_case
from vggt_compile.bench.accuracy.page import controls_section, page
from vggt_compile.bench.accuracy.picture import pareto
from vggt_compile.bench.accuracy.plans import CONTROLS, FRAME_ONLY, layer_plans, read_plans, split
from vggt_compile.bench.accuracy.record import entries, ran_on
from vggt_compile.bench.accuracy.run import Bench, measure, total
from vggt_compile.bench.accuracy.score import METRICS, in_world, scores
from vggt_compile.bench.accuracy.statistics import POOLED, interval, summaries
from vggt_compile.cli.accuracy import fingerprint, global_layers, read_frames
from vggt_compile.dry_run import fresh_call
from vggt_compile.errors import BadInput, PlanError
from vggt_compile.journal import Journal, Key
from vggt_compile.metrics import Similarity
from vggt_compile.models import pi3, prediction, pretrained
from vggt_compile.scenes import HELD_OUT_SEEDS, HELD_OUT_TEXTURES, Views, render

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
SIZE = 56


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny π³ that were never trained, but act."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(randomized(pi3("tiny")).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def views() -> Views:
    return render(HELD_OUT_SEEDS[0], 4, (SIZE, SIZE), "video")


def tiny(**changes: Any) -> Bench:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "model": randomized(pi3("tiny")),
        "name": "pi3-tiny",
        "weights": "none",
        "source": Rendered(("orbit/indoor",), 1, SIZE),
        "frames": (2,),
        "plans": read_plans("dense,frame only"),
    }
    return Bench(**(given | changes))


def done(bench: Bench, path: Path) -> list[dict[str, Any]]:
    return list(measure(bench, Journal(path, bench.settings()), lambda _: None))


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["bench", "accuracy", *argv]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vggt_compile: error: ")
    return line


def truth(views: Views) -> Geometry:
    return rendered_case(views).truth


# Numbers


def test_the_truth_has_perfect_scores(views: Views) -> None:
    found = scores(truth(views), truth(views))
    assert tuple(found) == METRICS
    for name in METRICS:
        perfect = 0.0 if name in ("ATE", "AbsRel", "chamfer") else 100.0
        assert found[name] == pytest.approx(perfect, abs=1e-5), name


def test_a_similarity_of_the_found_world_changes_no_score_and_is_undone(views: Views) -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    turn = turn * torch.linalg.det(turn)
    moved = Similarity(turn, torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor(2.5).double())
    true = truth(views)
    points = moved.points(true.points.flatten(0, 2)).view(true.points.shape)
    found = Geometry(moved.cameras(true.extrinsics).float(), true.depth * 2.5, points.float())
    assert scores(found, true)["AUC@5"] == 100
    assert scores(found, true)["chamfer"] == pytest.approx(0, abs=1e-4)
    back = in_world(found, true)
    assert (back.extrinsics - true.extrinsics).abs().max() < 1e-4
    assert (back.points - true.points).abs().max() < 1e-4
    assert (back.depth - true.depth).abs().max() < 1e-4


def test_metrics_whose_truth_is_unknown_are_absent(views: Views) -> None:
    found = scores(truth(views), Geometry(views.extrinsics[0]))
    assert set(METRICS) - set(found) == {"AbsRel", "delta1.25", "chamfer"}


def test_pixels_of_unknown_depth_do_not_count(views: Views) -> None:
    true, holes = truth(views), views.depth[0].clone()
    holes[:, :20] = 0
    wrong = true.points.clone()
    wrong[:, :20] = 1e6
    assert scores(true._replace(points=wrong), true._replace(depth=holes))["chamfer"] == pytest.approx(0, abs=1e-6)


def test_an_interval_moves_and_scales_with_its_values() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    mean, low, high = interval(values)
    assert low < mean == 4.0 < high
    assert interval(values) == (mean, low, high)
    assert interval([10 - 2 * x for x in values]) == pytest.approx(
        (10 - 2 * mean, 10 - 2 * high, 10 - 2 * low), abs=0.5
    )
    assert interval([3.0] * 4) == (3.0, 3.0, 3.0)
    assert interval([3.0]) == (3.0, None, None)
    with pytest.raises(ValueError, match="no scene"):
        interval([])


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    drawn = torch.randn(300, 30, generator=torch.Generator().manual_seed(0))
    ends = [interval(sample, resamples=400) for sample in drawn.tolist()]
    share = sum(low <= 0 <= high for _, low, high in ends) / len(ends)
    assert 0.90 <= share <= 0.97  # of 0.95; percentile intervals of 30 values are a little short


def test_differences_are_taken_scene_by_scene() -> None:
    def row(plan: str, seed: int, auc: float, **more: Any) -> dict[str, Any]:
        numbers = {"truth": {"AUC@30": auc}, "baseline": {"AUC@30": 100.0}}
        place = {"plan": plan, "scene": "orbit/indoor", "seed": seed}
        return place | {"attention_left": 0.5, "rewritten": 1} | numbers | more

    rows = [row("dense", 0, 90.0), row("a", 0, 80.0), row("dense", 1, 50.0), row("a", 1, 40.0)]
    first, second = summaries(rows, "dense")
    assert first["difference"]["AUC@30"] == [0.0, 0.0, 0.0]
    assert second["difference"]["AUC@30"] == [-10.0, -10.0, -10.0]
    assert second["truth"]["AUC@30"][0] == 60.0
    broken = summaries([*rows[:3], {**row("a", 1, 0.0), "failed": "NaN"}], "dense")[1]
    assert (broken["count"], broken["failed"], broken["truth"]["AUC@30"]) == (1, 1, [80.0, None, None])


def test_the_front_holds_what_nothing_cheaper_reaches() -> None:
    points = [(100.0, 80.0), (50.0, 70.0), (60.0, 60.0), (50.0, 65.0), (20.0, 10.0)]
    assert pareto(points) == [(20.0, 10.0), (50.0, 70.0), (100.0, 80.0)]


# Plans and scenes


def test_plans_are_recipes_controls_files_and_json(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"layers": {"0": {"scope": "frame"}}}')
    text = f'g2f, frame only, {tmp_path}/mine.json, odd={{"layers": {{"1,3": {{"scope": "frame"}}}}, "min_tokens": 4}}'
    plans = read_plans(text)
    assert list(plans) == ["dense", "g2f", FRAME_ONLY, "mine", "odd"]
    assert plans["odd"].min_tokens == 4
    assert split('{"a": [1, 2]},b') == ['{"a": [1, 2]}', "b"]
    assert {"dense", *CONTROLS} <= set(read_plans(None))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dens", "did you mean 'dense'"),
        ("x={", "is not JSON"),
        ('{"layers": {"0": {"scope": "frame"}}},{"layers": {}}', "two plans are named 'custom'"),
    ],
)
def test_wrong_plans_are_named(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        read_plans(text)


def test_every_layer_has_a_plan_and_the_model_is_asked_for_their_number() -> None:
    plans = layer_plans(global_layers(pi3("tiny").eval()))
    assert list(plans) == ["dense", "layer 0", "layer 1", FRAME_ONLY]


def test_controls_of_a_choice_read_equally_many_keys(tmp_path: Path) -> None:
    source = Rendered(("orbit/indoor",), 1, 8 * 14)
    bench = tiny(source=source, frames=(5,), plans=read_plans("random blocks,predicted blocks"))
    _, chance, choice = done(bench, tmp_path / "rows")
    assert chance["attention_left"] == choice["attention_left"] < 1
    assert chance["rewritten"] == choice["rewritten"] == 2
    assert chance["truth"] != choice["truth"]


def test_the_page_starts_with_every_control_that_was_run(tmp_path: Path) -> None:
    bench = tiny(plans=read_plans("frame only,random blocks"))
    made = entries(bench, done(bench, tmp_path / "rows"), "plans")
    title, table = controls_section(made)
    assert "Can it tell?" in title
    headers = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert headers == ["model", "frames", "scenes", "dense", "frame only", "random blocks"]


def test_scenes_are_trajectories_in_kinds() -> None:
    assert read_scenes("orbit, rooms,orbit/objects") == ("orbit/indoor", "rooms/rooms", "orbit/objects")
    for text, words in (("orbitt", "did you mean 'orbit'"), ("orbit/object", "did you mean 'objects'")):
        with pytest.raises(PlanError, match=words):
            read_scenes(text)


def test_rendered_cases_are_held_out_ones() -> None:
    source = Rendered(("orbit/indoor",), 2, SIZE, "held_out")
    assert [seed for _, seed in source.keys(2)] == list(HELD_OUT_SEEDS[:2])
    case = source.case("orbit/indoor", HELD_OUT_SEEDS[0], 2)
    want = render(HELD_OUT_SEEDS[0], 2, (SIZE, SIZE), textures=list(HELD_OUT_TEXTURES))
    assert torch.equal(case.images, want.images)


# Running


def test_eager_graphs_compute_what_inductor_computes() -> None:
    spec = alternating.Spec()
    model, given = alternating.build(spec), alternating.images(spec, 1, 3, (2, 2))
    found = []
    for backend in (vggt_sparse_eager, vggt_sparse):
        with collect_reports() as reports:
            options: dict[str, Any] = {"plan": {"layers": {"0": {"scope": "frame"}}}}
            found.append(torch.compile(fresh_call(), backend=backend, options=options, dynamic=False)(model, given))
        assert len(reports[0].rewritten) == 1
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert (found[0] - model(given)).abs().max() > 1e-2


def test_many_plans_do_not_fill_dynamos_cache(tmp_path: Path) -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = done(tiny(plans=layer_plans(2)), tmp_path / "rows")
    assert [row["rewritten"] for row in rows] == [0, 1, 1, 2]


def test_a_plan_that_never_reached_the_model_is_an_error(tmp_path: Path) -> None:
    """Dynamo may give up a function, with a warning at most, and run the model as it is."""
    with torch.compiler.set_stance("force_eager"), pytest.raises(BadInput, match="'dense' never reached the model"):
        done(tiny(), tmp_path / "rows")


def test_a_rerun_skips_what_is_there_and_adds_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "work" / "rows.jsonl"
    first = done(tiny(), path)
    assert [row["plan"] for row in first] == ["dense", FRAME_ONLY]
    assert first[0]["baseline"]["AUC@30"] == 100
    assert first[1]["attention_left"] < 1
    path.write_text(path.read_text() + '{"plan": "den')  # the run was killed while it wrote
    asked: list[int] = []
    render_case = Rendered.case

    def case(self: Rendered, scene: str, seed: int, frames: int) -> Any:
        asked.append(seed)
        return render_case(self, scene, seed, frames)

    monkeypatch.setattr(Rendered, "case", case)
    assert done(tiny(), path) == first
    assert asked == []
    more = tiny(source=Rendered(("orbit/indoor",), 2, SIZE))
    rows = done(more, path)
    assert rows[:2] == first
    assert len(rows) == total(more) == 4
    assert asked == [HELD_OUT_SEEDS[1]]
    assert len(path.read_text().splitlines()) == 5


def test_results_of_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path, tiny().settings())
    with pytest.raises(BadInput, match="dtype is 'fp32' there and 'bf16' here; take another file"):
        Journal(path, tiny(dtype="bf16").settings())
    path.write_text("something else\n")
    with pytest.raises(BadInput, match="not a file of this bench"):
        Journal(path, tiny().settings())


def test_a_plan_that_changed_under_its_name_is_refused(tmp_path: Path) -> None:
    journal, key = Journal(tmp_path / "rows", {}), Key("mine", 2, "orbit/indoor", 0)
    journal.append(key._asdict() | {"policy": {"layers": {}}})
    assert journal.get(key, {"layers": {}}) is not None
    with pytest.raises(BadInput, match=r"the plan 'mine' was .* give it another name"):
        Journal(tmp_path / "rows", {}).get(key, {"layers": {"0": {}}})


def test_a_fingerprint_tells_weights_apart() -> None:
    model = pi3("tiny")
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert fingerprint(model) != before


def test_output_that_is_not_finite_is_counted_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(outputs: Any, size: Any) -> Any:
        found = prediction(outputs, size)
        read.calls += 1
        return found if read.calls == 1 else found._replace(depth=found.depth * torch.nan)

    read.calls = 0
    monkeypatch.setattr("vggt_compile.bench.accuracy.run.prediction", read)
    dense, control = done(tiny(), tmp_path / "rows")
    assert "NaN or infinite" in control["failed"]
    assert control["rewritten"] == 2
    assert [row["failed"] for row in summaries([dense, control], "dense")] == [0, 1]
    bench = tiny()
    with torch.no_grad():
        bench.model.decoder[-1].ls2.gamma.fill_(torch.nan)
    with pytest.raises(BadInput, match="the dense pi3-tiny gives no geometry"):
        done(bench, tmp_path / "others")


def test_an_entry_names_the_machines_that_ran_its_rows() -> None:
    rows = [{"machine": {"device": name, "system": "Linux"}} for name in ("a GPU", "a GPU", "CPU, 2 threads")]
    assert ran_on(rows[:2]) == {"device": "a GPU", "system": "Linux"}
    assert ran_on(rows) == {"device": "a GPU and CPU, 2 threads", "system": "Linux"}


# The command


def test_the_committed_page_is_made_from_the_committed_record() -> None:
    record = json.loads((BENCHMARKS / "accuracy.json").read_text())
    assert (BENCHMARKS / "accuracy.md").read_text() == page(record)
    assert all((BENCHMARKS / record["pictures"] / name).exists() for name in ("accuracy.png", "layers.png"))


@pytest.mark.parametrize("form", ["plans", "layers"])
def test_the_command_writes_json_page_and_picture(
    form: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "accuracy", "--model", "pi3-tiny", "--checkpoint", str(checkpoint), "--frames", "2"]
    argv += ["--scenes", "orbit,wide", "--count", "1", "--out", str(tmp_path), "--device", "cpu", "--json"]
    assert main([*argv, *(["--layers"] if form == "layers" else ["--plans", "frame only"])]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    record = json.loads((tmp_path / "accuracy.json").read_text())
    assert record["entries"] == [entry]
    assert (tmp_path / "accuracy.md").read_text() == page(record)
    assert (tmp_path / ("layers.png" if form == "layers" else "accuracy.png")).stat().st_size > 10_000
    assert {row["scene"] for row in entry["rows"]} == {"orbit/indoor", "wide/indoor", POOLED}


@pytest.mark.parametrize(
    ("write", "absent"),
    [(write_tum, {"chamfer"}), (write_seven_scenes, {"chamfer"}), (write_colmap, {"AbsRel", "delta1.25", "chamfer"})],
)
def test_recordings_are_judged_with_what_they_know(
    write: Any, absent: set[str], views: Views, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(views, tmp_path / "desk")
    argv = ["bench", "accuracy", "--model", "pi3-tiny", "--checkpoint", str(checkpoint), "--images"]
    argv += [str(tmp_path / "desk"), "--frames", "2", "--stride", "2", "--count", "5", "--plans", "frame only"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--device", "cpu", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    dense, control = entry["rows"]
    assert (dense["scene"], dense["count"]) == ("desk", 2)
    assert set(METRICS) - set(dense["truth"]) == absent
    assert set(control["baseline"]) == set(METRICS)


def test_windows_are_spread_over_a_recording_and_fit(views: Views, tmp_path: Path) -> None:
    write_tum(views, tmp_path / "desk")
    source = Recorded(tmp_path / "desk", None, 2, SIZE, 14)
    assert source.keys(2) == [("desk", 0), ("desk", 2)]
    case = source.case("desk", 2, 2)
    assert (case.truth.extrinsics - views.extrinsics[0, 2:]).abs().max() < 1e-3
    with pytest.raises(BadInput, match="has 4 frames with poses; 5 frames at stride 1 need 5: fewer --frames"):
        source.keys(5)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "pi3-large"], "no trained weights of pi3-large come with the package"),
        (["--model", "pi3-smal"], "did you mean 'pi3-small'"),
        (["--model", "pi3-tiny", "--checkpoint", "none.pt"], "cannot load --checkpoint none.pt"),
        (["--images", "nowhere"], "no file or folder nowhere"),
        (["--poses", "nowhere"], "--poses belong to --images"),
        (["--images", ".", "--scenes", "orbit"], "give one of them"),
        (["--frames", "two"], "not numbers between commas"),
        (["--frames", "1"], "needs two or more"),
        (["--size", "100"], "nearest: --size 98"),
        (["--count", "0"], "at least 1"),
        (["--scenes", "orbitt"], "did you mean 'orbit'"),
        (["--layers", "--plans", "dense"], "leave --plans out"),
        (["--plans", "g3f"], "did you mean 'g2f'"),
    ],
)
def test_bad_arguments_are_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert words in fails(capsys, *argv, "--out", str(tmp_path))


def test_a_foreign_record_is_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "accuracy.json").write_text('{"mine": 1}')
    assert "not a record of this bench" in fails(capsys, "--out", str(tmp_path))
    assert (tmp_path / "accuracy.json").read_text() == '{"mine": 1}'


def test_frame_counts_are_sorted() -> None:
    assert read_frames("8,2,8") == (2, 8)


@pytest.mark.slow
def test_a_model_whose_frames_do_not_see_each_other_scores_far_below_dense(tmp_path: Path) -> None:
    source = Rendered(("orbit/indoor",), 2, 224)
    bench = tiny(model=pretrained("pi3-small"), name="pi3-small", source=source, frames=(6,))
    dense, control = summaries(done(bench, tmp_path / "rows"), "dense")
    assert dense["truth"]["AUC@30"][0] > 60
    assert control["truth"]["AUC@30"][0] < 25
    assert control["difference"]["AUC@30"][2] < -40
    assert control["truth"]["chamfer"][0] > 1.5 * dense["truth"]["chamfer"][0]
