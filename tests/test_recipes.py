"""Recipes: which layers of which family they name and with what rates, that they rewrite, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from modelutils import images
from regions import small

from vggt_compile import explain
from vggt_compile.bench.measured import measured, speeds
from vggt_compile.recipes import recipes

FAMILIES = {"vggt": 24, "pi3": 18}


def policies(name: str, family: str) -> list[dict[str, Any]]:
    """What a recipe does to each layer of a model of its published depth."""
    plan = recipes()[name].plan.at(FAMILIES[family])
    return [plan.policy(layer, family).to_json() for layer in range(FAMILIES[family])]


@pytest.mark.parametrize("family", FAMILIES)
def test_httm_merges_in_every_layer(family: str) -> None:
    for policy in policies("httm", family):
        assert set(policy) == {"tokens"}
        assert {n: policy["tokens"][n] for n in ("queries", "outliers", "keys", "patches", "frames")} == {
            "queries": 0.9, "outliers": 0.1, "keys": 0.7, "patches": 128, "frames": 30
        }  # fmt: skip


RATES = {
    "spark3r-100": (1, 1),
    "spark3r-300": (2, 8),
    "spark3r-500": (3, 13),
    "spark3r-1000": (4, 25),
    "spark3r": (2, 8),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize(("family", "sensitive"), [("vggt", range(11, 17)), ("pi3", range(8, 13))])
def test_spark3r_spares_its_sensitive_layers(name: str, family: str, sensitive: range) -> None:
    for layer, policy in enumerate(policies(name, family)):
        factor = 1 if layer in sensitive else 3
        queries, frames = (rate * factor for rate in RATES[name])
        if queries == frames == 1:
            assert policy == {}
            continue
        rows, columns = policy["tokens"]["cell"]
        assert (rows * columns, policy["tokens"]["frames"]) == (queries, 20)
        assert (policy["keys"]["frames"], policy["keys"]["stride"]) == (frames, [1, 1])


@pytest.mark.parametrize(("family", "ends"), [("vggt", (10, 14, 18)), ("pi3", (8, 10, 14))])
def test_regime_merges_least_in_the_middle(family: str, ends: tuple[int, int, int]) -> None:
    for layer, policy in enumerate(policies("regime", family)):
        ratio, tile = [(0.99, (3, 2)), (0.5, None), (0.5, (4, 3)), (0.99, (5, 3))][sum(layer >= end for end in ends)]
        assert policy["tokens"]["ratio"] == ratio
        assert policy["tokens"]["weight"] == "log_count"
        assert policy["tokens"]["reference"] == (family == "vggt")
        if tile is None:
            assert "keys" not in policy
            continue
        assert (policy["keys"]["stride"], policy["keys"]["kept"]) == ([tile[0]] * 2, [tile[1]] * 2)
        assert policy["keys"]["phase"] == "shifted"


@pytest.mark.parametrize("name", ["httm", "spark3r", "spark3r-100", "regime"])
def test_recipes_rewrite_the_layers_that_they_name(name: str) -> None:
    for model in map(small, ("vggt", "pi3")):
        torch._dynamo.reset()
        with torch.no_grad():
            report = explain(model, images(1, 3, 3, 56, 70), plan=name, strict=True)
        named = [row for row in report.global_rows if row.reason != "the plan leaves this layer dense"]
        assert len(report.rewritten) == len(named) > 0
        assert report.attention_left() < 1


def test_every_recipe_has_a_source_and_no_two_are_one_but_for_aliases() -> None:
    known = recipes()
    assert all(recipe.source and recipe.summary for recipe in known.values())
    for name, recipe in known.items():
        others = [other.name for other in known.values() if other.plan == recipe.plan and other.name != name]
        for other in others:
            assert "the same as" in recipe.published + known[other].published


def test_what_was_measured_is_told_by_the_plan_and_by_the_name(tmp_path: Path) -> None:
    recipe = recipes()["httm"]
    row = {"scene": "all scenes", "plan": "mine", "count": 7, "difference": {"AUC@30": [-1.25, -2, 0]}}
    entry = {
        "model": "pi3-small",
        "form": "plans",
        "settings": {"source": "rendered"},
        "plans": {"mine": recipe.plan.to_json()},
    }
    entries = [{**entry, "frames": 16, "rows": [row]}, {**entry, "frames": 8, "rows": [row]}]
    (tmp_path / "accuracy.json").write_text(json.dumps({"entries": entries}))
    warm = [(100, "dense", 3.0), (100, "httm", 1.5), (300, "httm", 5.0), (32, "dense", 1.0), (32, "httm", 1.0)]
    rows = [{"frames": frames, "variant": name, "warm_s": seconds} for frames, name, seconds in warm]
    (tmp_path / "model.json").write_text(json.dumps({"machine": {"gpu": "a GPU"}, "warm": rows}))
    more = [("long", "vggt", 800, 0.5), ("pi3", "pi3", 100, 0.25), ("recipes", "vggt", 32, 0.8)]
    for name, model, frames, seconds in more:
        rows = [{"frames": frames, "variant": way, "warm_s": s} for way, s in (("dense", 1.0), ("httm", seconds))]
        record = {"machine": {"gpu": "a GPU"}, "settings": {"model": model}, "warm": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert speeds(recipe, "vggt", tmp_path) == ("a GPU", {32: 1.25, 800: 2.0, 100: 2.0})
    assert measured(recipe, tmp_path) == [
        "VGGT-1B, a GPU, 800 frames: 2.00 times as fast as dense",
        "π³, a GPU, 100 frames: 4.00 times as fast as dense",
        "pi3-small, 16 frames, 7 rendered scenes: AUC@30 -1.2 against dense",
    ]
    assert measured(recipes()["regime"], tmp_path) == []
    assert measured(recipe, tmp_path / "nowhere") == []
