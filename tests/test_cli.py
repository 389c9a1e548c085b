"""The command line: bad arguments are one line and exit code 1, JSON is JSON, every command does what it says."""

import json

import pytest
import torch
from commandline import TINY, fails

from vggt_compile.__main__ import COMMANDS, main
from vggt_compile.cli import doctor, subject
from vggt_compile.cli.options import read_plan
from vggt_compile.errors import PlanError


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("demo", "--frames", "1"), "two or more"),
        (("explain", "vggt-tiny", "--frames", "1"), "two or more"),
        (("explain", "vggt-tiny", "--size", "30", "42"), "nearest: --size 28 42"),
        (("explain", "vggt-tinny"), "did you mean 'vggt-tiny'?"),
        (("explain", "no_such_module:build"), "cannot import no_such_module:build"),
        (("explain", "json:no_such_name"), "cannot import json:no_such_name"),
        (("explain", "builtins:dict"), "must be callable without arguments and give an nn.Module"),
        (("explain", "vggt-tiny", "--plan", "g2ff"), "did you mean 'g2f'?"),
        (("explain", "vggt-tiny", "--plan", "{"), "--plan is not JSON"),
        (("explain", "vggt-tiny", "--plan", '{"layer": {}}'), "did you mean 'layers'?"),
        (("explain", "vggt-tiny", "--plan", "no/such.json"), "cannot read the plan"),
        (("explain",), "MODEL"),
        (("demo", "--device", "tpu"), "invalid choice"),
        (("nonsense",), "invalid choice"),
        ((), "COMMAND"),
    ],
)
def test_bad_arguments_are_one_line(capsys, argv, part):
    assert part in fails(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_points_to_the_doctor(capsys, tmp_path):
    assert "doctor" in fails(capsys, "demo", "--device", "cuda", "--out", str(tmp_path))


def test_a_checkpoint_of_another_model_is_one_line(capsys, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pt")
    argv = ("demo", "--checkpoint", str(tmp_path / "w.pt"), "--out", str(tmp_path), *TINY)
    assert "is no checkpoint of this Pi3" in fails(capsys, *argv)
    assert "cannot load" in fails(capsys, *argv[:2], str(tmp_path / "none.pt"), *argv[3:])
    (tmp_path / "w.safetensors").write_text("nonsense")
    assert "cannot load" in fails(capsys, *argv[:2], str(tmp_path / "w.safetensors"), *argv[3:])


def test_a_missing_extra_names_its_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'vggt_compile[demo]'" in fails(capsys, "demo", "--out", str(tmp_path))


def test_an_output_folder_that_cannot_be_made_is_one_line(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "--out" in fails(capsys, "demo", "--out", str(tmp_path / "file" / "out"))


def test_errors_are_json_too(capsys):
    assert main(["demo", "--frames", "1", "--json"]) == 1
    assert "two or more" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    assert "usage: python -m vggt_compile" in (text := capsys.readouterr().out)
    assert command in text
    if not command:
        assert all(name in text for name in COMMANDS)


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    assert "fast (default)" in capsys.readouterr().out
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"dense", "fast", "turbo", "g2f"} <= {recipe["name"] for recipe in listed["recipes"]}
    assert set(listed["recipes"][0]) == {"name", "summary", "source", "published", "measured", "plan"}
    assert listed["default"] == "fast"


def test_a_plan_is_a_name_a_file_or_json(tmp_path):
    text = '{"layers": {"0": {"scope": "frame"}}}'
    (tmp_path / "mine.json").write_text(text)
    assert read_plan(text) == read_plan(str(tmp_path / "mine.json"))
    assert read_plan(None).name == "fast"
    assert read_plan("dense").dense
    with pytest.raises(PlanError):
        read_plan('{"layers": 1}')


def test_explain_shows_each_global_layer(capsys):
    plan = '{"layers": {"0-1": {"scope": "frame"}}}'
    assert main(["explain", "vggt-tiny", *TINY, "--plan", plan, "--strict"]) == 0
    table = capsys.readouterr().out
    assert [f"aggregator.global_blocks.{layer}.attn" in table for layer in range(5)] == [True] * 4 + [False]
    assert table.count("scope: frame") == 2
    assert "2 × 11 (5 special)" in table
    assert "frame_blocks" not in table


def test_explain_json_under_autocast_and_symbolic_sizes(capsys):
    plan = '{"layers": {"0-9": {"scope": "frame"}}}'
    argv = ["explain", "pi3-tiny", *TINY, "--plan", plan, "--dtype", "bf16", "--dynamic", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert {
        "model",
        "unmet",
        "plan",
        "family",
        "rows",
        "regions",
        "notes",
        "dynamic",
        "observed",
        "attention_left",
    } == set(found)
    rewritten = [row for row in found["rows"] if row["axes"]]
    assert [row["path"] for row in rewritten] == ["decoder.1.attn", "decoder.3.attn"]
    assert {row["dtype"] for row in rewritten} == {"bfloat16"}
    assert found["dynamic"]
    assert found["unmet"][0].startswith("layers 2-9: no such layer")


def test_explain_strict_fails_on_a_layer_that_is_missing(capsys):
    argv = ["explain", "pi3-tiny", *TINY, "--plan", '{"layers": {"7": {"scope": "frame"}}}', "--every", "--strict"]
    assert main(argv) == 1
    seen = capsys.readouterr()
    assert "decoder.0.attn" in seen.out
    assert "layer 7: no such layer" in seen.err
    assert seen.err.count("\n") == 1


def test_explain_strict_fails_on_a_share_of_the_depth_that_stays_dense(capsys):
    plan = '{"layers": {"0-100%": {"scope": "frame"}}, "min_tokens": 100000}'
    assert main(["explain", "pi3-tiny", *TINY, "--plan", plan, "--strict"]) == 1
    assert "layer 1 (decoder.3.attn): fewer tokens than min_tokens=100000" in capsys.readouterr().err


def test_explain_takes_a_factory(capsys, monkeypatch, tmp_path):
    (tmp_path / "a_users_module.py").write_text(
        "from vggt_compile.models import pi3\ndef build(): return pi3('tiny')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["explain", "a_users_module:build", *TINY]) == 0
    assert "decoder.1.attn" in capsys.readouterr().out


def test_doctor_examines_this_machine(capsys):
    code = main(["doctor", "--quick", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (not found["ok"])
    checks = {check["name"]: check for check in found["checks"]}
    assert {"python", "torch", "triton", "vggt_compile", "c++ compiler", "backend name", "cpu"} <= set(checks)
    assert checks["torch"]["found"] == torch.__version__
    assert all(check["fix"] for check in checks.values() if check["status"] != "ok")
    assert main(["doctor", "--quick"]) == code
    assert "c++ compiler" in capsys.readouterr().out


def test_doctor_fails_on_what_is_required_and_names_the_fix(capsys, monkeypatch):
    broken = doctor.Check("c++ compiler", "missing", "none was found", "apt-get install g++")
    monkeypatch.setattr(doctor, "_compiler", lambda: broken)
    assert main(["doctor", "--quick"]) == 1
    assert "apt-get install g++" in capsys.readouterr().out
    assert "apt-get install g++" in fails(capsys, "demo", "--out", "/nonexistent")


def test_random_weights_let_attention_act_and_a_checkpoint_is_loaded_as_it_is(tmp_path):
    device = torch.device("cpu")
    first = subject.named("pi3-tiny", device, seed=3)
    assert first.weights is None
    assert first.model.decoder[0].ls1.gamma.eq(1).all()
    torch.save(first.model.state_dict(), tmp_path / "w.pt")
    second = subject.named("pi3-tiny", device, seed=4, checkpoint=str(tmp_path / "w.pt"))
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(tensor.is_meta for tensor in second.model.state_dict().values())
