"""The accuracy bench: which plans and scenes it runs, how it goes on after a break, and that it tells good from bad."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import alternating
import pytest
import torch
from accuracy_bench import SIZE, done, tiny

from vggt_compile import collect_reports, vggt_sparse
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.bench.accuracy.cases import Rendered, read_scenes
from vggt_compile.bench.accuracy.page import controls_section
from vggt_compile.bench.accuracy.plans import CONTROLS, FRAME_ONLY, layer_plans, read_plans, split
from vggt_compile.bench.accuracy.record import entries, ran_on
from vggt_compile.bench.accuracy.run import total
from vggt_compile.bench.accuracy.statistics import summaries
from vggt_compile.cli.accuracy import fingerprint, global_layers
from vggt_compile.dry_run import fresh_call
from vggt_compile.errors import BadInput, PlanError
from vggt_compile.journal import Journal, Key
from vggt_compile.models import pi3, prediction, pretrained
from vggt_compile.scenes import HELD_OUT_SEEDS, HELD_OUT_TEXTURES, render


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


def test_eager_graphs_compute_what_inductor_computes(vectors: None) -> None:
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


@pytest.mark.slow
def test_a_model_whose_frames_do_not_see_each_other_scores_far_below_dense(tmp_path: Path) -> None:
    source = Rendered(("orbit/indoor",), 2, 224)
    bench = tiny(model=pretrained("pi3-small"), name="pi3-small", source=source, frames=(6,))
    dense, control = summaries(done(bench, tmp_path / "rows"), "dense")
    assert dense["truth"]["AUC@30"][0] > 60
    assert control["truth"]["AUC@30"][0] < 25
    assert control["difference"]["AUC@30"][2] < -40
    assert control["truth"]["chamfer"][0] > 1.5 * dense["truth"]["chamfer"][0]
