"""The demo: it measures, compares, draws, and judges a trained model by the true scene."""

import json
import types
import warnings

import pytest
import torch
from PIL import Image

from vggt_compile.__main__ import main
from vggt_compile.backend import Options, reported_rewrite


def rewritten_only(gm, inputs, *, options):
    """The backend without Inductor, which takes a minute or two on a CPU; its own tests and `make demo` run that."""
    reported_rewrite(gm, Options.read(options))
    return gm.forward


@pytest.mark.parametrize("model", ["pi3-tiny", "vggt-tiny"])
def test_demo_measures_compares_and_draws(capsys, folder, monkeypatch, model):
    monkeypatch.setattr("vggt_compile.cli.experiment.vggt_sparse", rewritten_only)
    for i in range(3):
        folder(f"{i}.png", (30, 44), value=60 * i)
    out = folder.path / "out"
    argv = ["demo", "--model", model, "--images", str(folder.path), "--resize", "--out", str(out), "--json"]
    argv.append("--compile-dense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(argv) == 0
    seen = capsys.readouterr()
    result = json.loads(seen.out)
    assert json.loads((out / "demo.json").read_text()) == result
    assert seen.err == ""
    assert result["weights"] == "random"
    assert any(note.startswith("random weights") for note in result["notes"])
    assert result["input"] == {"frames": 3, "size": [28, 42], "names": ["0.png", "1.png", "2.png"]}
    assert [run["name"] for run in result["runs"]] == ["eager dense", "compiled dense", "compiled rewritten"]
    assert all(run["warm_s"] > 0 for run in result["runs"])
    dense, rewritten = result["deviations"].values()
    assert set(dense) == {"camera", "depth", "points", "confidence"}
    assert all(dense[name]["relative"] < 1e-5 for name in dense)
    assert rewritten["camera"]["relative"] > 1e-4
    inner = {"pi3-tiny": 1, "vggt-tiny": 2}[model]  # half of the global layers, where the default plan acts
    assert sum(bool(row["axes"]) for row in result["report"]["rows"]) == inner
    with Image.open(result["picture"]) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
        assert picture.height > 400


def test_demo_judges_a_trained_model_by_the_true_scene(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("vggt_compile.cli.experiment.vggt_sparse", rewritten_only)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["demo", "--frames", "4", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weights"] == "shipped with the package"
    assert not any("random" in note for note in result["notes"])
    assert [run["name"] for run in result["runs"]] == ["eager dense", "compiled rewritten"]
    assert set(result["scores"]) == {"eager dense", "compiled rewritten"}
    assert result["scores"]["eager dense"]["AUC@30"] > 50
    assert Image.open(result["picture"]).format == "PNG"


def test_a_run_that_is_not_finite_has_no_score_and_does_not_stop_the_demo(capsys, monkeypatch, tmp_path):
    def broken(gm, inputs, *, options):
        reported_rewrite(gm, Options.read(options))
        return lambda *given: [tensor * torch.nan for tensor in gm.forward(*given)]

    monkeypatch.setattr("vggt_compile.cli.experiment.vggt_sparse", broken)
    assert main(["demo", "--frames", "2", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["scores"]) == {"eager dense"}
    assert "outputs of compiled rewritten are not all finite" in result["notes"]
    assert Image.open(result["picture"]).format == "PNG"


def test_the_text_of_a_result_has_both_tables():
    from vggt_compile.cli import demo
    from vggt_compile.cli.compare import Deviation
    from vggt_compile.cli.measure import Run
    from vggt_compile.report import Report

    runs = (Run("eager dense", 2.0, 1.0, None, {}), Run("compiled rewritten", 62.0, 0.25, 2**31, {}))
    deviations = {"compiled rewritten": {"depth": Deviation(0.0123, 0.5)}}
    fields = {
        "runs": runs,
        "deviations": deviations,
        "report": Report(),
        "notes": ["so"],
        "device": torch.device("cpu"),
        "scores": {"eager dense": {"AUC@30": 83.25}},
    }
    text = demo.text(types.SimpleNamespace(**fields), "demo.png")
    for part in ("4.00×", "62.0 s", "250.0 ms", "2.00 GiB", "1.23e-02", "note: so", "picture: demo.png", "83.2"):
        assert part in text
