"""Profiles of collapse: scenes and their spread, what plans change, the picture, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import alternating
import pytest
import torch
from alternating import Spec, build
from commandline import fails
from PIL import Image
from torch import Tensor, nn

from vggt_compile import Plan, registry
from vggt_compile.__main__ import main
from vggt_compile.analysis import profile_picture
from vggt_compile.analysis.changes import change, changes
from vggt_compile.analysis.predict import predict
from vggt_compile.analysis.profile import Point, Profile, profile
from vggt_compile.errors import BadInput

SPEC = Spec(head_dim=16)
EVERY = [entry.name for entry in registry.measures()]
THIN = {"layers": {"*": {"keys": {"method": "grid", "stride": [1, 2]}}}}
MERGE = {"layers": {"*": {"tokens": {"method": "merge", "ratio": 0.5}}}}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def scene(frames: int = 4) -> Tensor:
    return alternating.images(SPEC, 1, frames, (5, 7))


def test_profiles_average_scenes_and_tell_their_spread() -> None:
    model, scenes = build(SPEC), [scene(), 2 * scene()]
    one, other, both = (profile(model, given, Plan(name="dense"), ["cosine"]) for given in (*zip(scenes), scenes))
    for layer, point in both.curve("cosine").items():
        first, second = (found.curve("cosine")[layer].value for found in (one, other))
        assert point.value == pytest.approx((first + second) / 2)
        assert point.error == pytest.approx(abs(first - second) / 2)
    assert (both.frames, both.tokens, both.layers, both.rewritten) == (4, 160, [0, 1], 0)
    merged = profile(model, scenes, Plan.read(MERGE), ["cosine"])
    assert merged.rewritten == 2
    assert merged.to_dict()["layers"][1]["cosine"]["scenes"] != both.to_dict()["layers"][1]["cosine"]["scenes"]


def test_changes_are_paired_by_scenes() -> None:
    model, scenes, more = build(SPEC), [scene(), 3 * scene()], [scene(frames=6), 3 * scene(frames=6)]
    plans = Plan(name="dense"), Plan.read(MERGE, "merge")
    found = [profile(model, given, plan, ["cosine"]) for plan in plans for given in (scenes, more)]
    got = changes(found)
    assert [(one.of, one.against) for one in got] == [
        ("merge, 4 frames", "dense, 4 frames"),
        ("merge, 6 frames", "dense, 6 frames"),
        ("dense, 6 frames", "dense, 4 frames"),
    ]
    by_scene = [
        sum(merged[layer]["cosine"].value - dense[layer]["cosine"].value for layer in (0, 1)) / 2
        for merged, dense in zip(found[2].scenes, found[0].scenes, strict=True)
    ]
    point = got[0].quantities["cosine"]
    assert point.value == pytest.approx(sum(by_scene) / 2)
    assert point.error == pytest.approx(abs(by_scene[0] - by_scene[1]) / 2)
    assert change(found[0], found[0], "cosine") == Point(0, 0)
    alone = [profile(model, scenes[:1], plan, ["cosine"]) for plan in plans]
    assert changes(alone)[0].to_dict()["quantities"]["cosine"]["error"] is None


def test_why_a_plan_left_layers_is_a_note() -> None:
    found = profile(build(SPEC), [scene()], Plan.read({**MERGE, "min_tokens": 10_000}), ["cosine"])
    assert found.rewritten == 0
    assert found.notes == ["layers left as they are: fewer tokens than min_tokens=10000"]


@pytest.mark.filterwarnings("ignore:vggt_compile")
def test_what_cannot_be_profiled_is_an_error() -> None:
    with pytest.raises(BadInput, match="one frame only"):
        profile(build(SPEC), [scene(frames=1)], Plan(), ["cosine"])
    local = nn.Sequential(nn.Flatten(0, 1), build(SPEC).patch_embed)
    with pytest.raises(BadInput, match="none of the 0 attentions of this model is over frames"):
        profile(local, [scene()], Plan(), ["cosine"])
    causal = build(Spec(core=alternating.causal))
    with pytest.raises(BadInput, match=r"none of the 4 attentions .* \(cosine is not measured .*: it is causal\)"):
        profile(causal, [scene()], Plan(), ["cosine"])
    broken = build(SPEC)
    broken.global_blocks[0].attn.proj.weight.fill_(torch.nan)
    with pytest.raises(BadInput, match=r"activations at layer 1 \(global_blocks.1.attn\) are not numbers"):
        profile(broken, [scene()], Plan(), ["cosine", "entropy"])


@pytest.mark.parametrize(("counts", "measures"), [((4,), ["cosine"]), ((2, 3, 4), EVERY)])
def test_pictures_of_one_line_and_of_many(counts: tuple[int, ...], measures: list[str], tmp_path: Path) -> None:
    plans = {"dense": Plan(name="dense"), "merge": Plan.read(MERGE, "merge")}
    found: list[Profile] = [
        profile(build(SPEC), [scene(frames=count)], plan, measures) for count in counts for plan in plans.values()
    ]
    predictions = [predict(one) for one in found]
    assert bool(predictions[0].lines) == (len(measures) > 1)
    profile_picture.draw(found, "a title", tmp_path / "collapse.png", predictions)
    with Image.open(tmp_path / "collapse.png") as image:
        assert len(image.convert("L").getcolors()) > 20


# The command


def test_the_command_writes_a_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--frames", "2", "--plans", "g2f", "--measures", "cosine,entropy", "--rows", "64", "--size", "56", "56"]
    assert main(["analyze", "pi3-small", *options, "--out", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "collapse.json").read_text())
    assert [(p["plan"], p["frames"], p["rewritten"]) for p in record["profiles"]] == [("dense", 2, 0), ("g2f", 2, 4)]
    for found in record["profiles"]:
        assert [layer["layer"] for layer in found["layers"]] == list(range(8))
        assert all(0 < layer["entropy"]["value"] <= 1 and layer["cosine"]["error"] == 0 for layer in found["layers"])
    assert (tmp_path / "collapse.png").stat().st_size > 10_000
    page = (tmp_path / "collapse.md").read_text()
    assert page.count("\n## ") == 3  # two profiles, and changes
    assert "note: cosines are not predicted: that takes the measure itself or logits" in page


@pytest.mark.slow
def test_the_command_sets_predictions_beside_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with random weights, as the benchmark on a GPU runs it, with what predictions need."""
    options = ["--random", "--frames", "2,3", "--plans", "keys=" + json.dumps(THIN), "--size", "28", "42"]
    measures = "cosine,length,step,residual,logits,itself,entropy,spectrum"
    assert main(["analyze", "vggt-tiny", *options, "--measures", measures, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "collapse.json").read_text())
    assert record["settings"]["weights"] == "random"
    assert [(p["plan"], p["frames"]) for p in record["predictions"]] == [
        (p["plan"], p["frames"]) for p in record["profiles"]
    ]
    for found, measured in zip(record["predictions"], record["profiles"], strict=True):
        assert set(found["lines"]) >= {"cosine", "next_cosine", "residual_ratio", "entropy", "attention_sigma_ratio"}
        keys = [layer["keys"] for layer in measured["layers"]]
        assert [layer["keys"] for layer in found["mixed"]["itself"]] == keys
        assert all((one < measured["tokens"]) == (found["plan"] == "keys") for one in keys)
    printed = capsys.readouterr().out
    assert printed.startswith("vggt-tiny with random weights, orbit")
    assert "fitted: pace " in printed
    assert "theory: fewer keys: mixing is" in printed


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("pi3-smal",), "did you mean 'pi3-small'?"),
        (("pi3-small", "--frames", "1"), "two or more"),
        (("pi3-small", "--measures", "cosin"), "did you mean 'cosine'?"),
        (("pi3-small", "--rows", "2"), "must be 8 or more"),
        (("pi3-small", "--plans", "fastvgg"), "did you mean 'fastvggt'?"),
        (("pi3-small", "--count", "0"), "one scene or more"),
        (("pi3-small", "--size", "30", "42"), "nearest: --size 28 42"),
        (("pi3-small", "--images", "no/such/folder"), "no such folder"),
        (("no_such_module:build",), "cannot import no_such_module:build"),
        (("vggt-tiny",), "no trained weights of vggt-tiny come with the package"),
        (("pi3-small", "--random"), "--random: pi3-small has weights"),
        (("vggt-tiny", "--random", "--checkpoint", "model.pt"), "--random: vggt-tiny has weights"),
    ],
)
def test_bad_input_is_one_line(argv: tuple[str, ...], part: str, tmp_path: Path, capsys: Any) -> None:
    assert part in fails(capsys, "analyze", *argv, "--out", str(tmp_path))


FACTORIES = """
import torch
from alternating import Spec, build

def inside_frames():
    return torch.nn.Sequential(torch.nn.Flatten(0, 1), build(Spec()).patch_embed)

def not_numbers():
    model = build(Spec())
    torch.nn.init.constant_(model.global_blocks[0].attn.proj.weight, torch.nan)
    return model
"""


@pytest.mark.filterwarnings("ignore:vggt_compile")
@pytest.mark.parametrize(
    ("factory", "options", "part"),
    [
        ("inside_frames", (), "none of the 0 attentions of this model is over frames"),
        ("not_numbers", (), "activations at layer 1 (global_blocks.1.attn) are not numbers"),
        ("not_numbers", ("--images", "views"), "views: 2 images, but --frames asks for 3"),
    ],
)
def test_models_and_folders_that_cannot_be_analyzed(
    factory: str, options: tuple[str, ...], part: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "factories_to_analyze.py").write_text(FACTORIES)
    (tmp_path / "views").mkdir()
    for name in ("0.png", "1.png"):
        Image.new("RGB", (14, 10), "red").save(tmp_path / "views" / name)
    model = f"factories_to_analyze:{factory}"
    assert part in fails(capsys, "analyze", model, "--frames", "3", "--size", "10", "14", *options)


# The benchmark, as far as it runs without a GPU
