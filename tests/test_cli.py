"""The command line: bad input is one line and exit code 1, JSON is JSON, and the numbers are what they say."""

import json
import math
import types
import warnings

import numpy
import pytest
import torch
from PIL import Image

from vggt_compile.__main__ import COMMANDS, main
from vggt_compile.backend import Options, reported_rewrite
from vggt_compile.cli import doctor, subject
from vggt_compile.cli.compare import camera_centres, compare, deviation, quantities
from vggt_compile.cli.images import find, fit, load_folder, read
from vggt_compile.cli.options import nearest_size, read_plan
from vggt_compile.errors import BadInput, PlanError

PATCH = 14
TINY = ("--frames", "2", "--size", "28", "42")


@pytest.fixture
def folder(tmp_path):
    """Saves images by name: `folder("1.png", (height, width))`; its path is `folder.path`."""

    def save(name, size=(28, 42), value=128):
        Image.new("RGB", size[::-1], (value,) * 3).save(tmp_path / name)

    save.path = tmp_path
    return save


def fails(capsys, *argv):
    """The one line that a failing call prints."""
    assert main(argv) == 1
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith("vggt_compile: error: ")
    assert all(other.startswith(("building ", "rendering ")) for other in progress)
    return line


def demo_fails(capsys, folder, *argv):
    return fails(capsys, "demo", "--images", str(folder.path), "--out", str(folder.path / "out"), *argv)


# Bad input


def test_a_missing_folder_is_named(capsys, tmp_path):
    assert "no such folder" in fails(capsys, "demo", "--images", str(tmp_path / "none"), "--out", str(tmp_path))


def test_an_empty_folder_is_an_error(capsys, folder):
    assert "no images" in demo_fails(capsys, folder)


def test_one_image_is_an_error(capsys, folder):
    folder("a.png")
    assert "one image (a.png), but it takes two or more" in demo_fails(capsys, folder)


def test_an_unreadable_image_is_named(capsys, folder):
    folder("a.png")
    (folder.path / "b.png").write_bytes((folder.path / "a.png").read_bytes()[:40])
    assert "cannot read the image" in (line := demo_fails(capsys, folder))
    assert "b.png" in line


def test_text_named_as_an_image_is_an_error(capsys, folder):
    folder("a.png")
    (folder.path / "b.jpg").write_text("not an image")
    assert "b.jpg" in demo_fails(capsys, folder)


def test_sizes_that_do_not_fit_say_what_resize_does(capsys, folder):
    folder("a.png", (30, 50))
    folder("b.png", (30, 50))
    assert "a.png is 30×50 (height × width), no multiple of the 14 px patch" in (line := demo_fails(capsys, folder))
    assert "--resize would make it 28×56" in line


def test_photographs_are_pointed_to_the_scale_of_training(capsys, folder):
    folder("a.jpg", (1000, 1500))
    folder("b.jpg", (1000, 1500))
    assert "--size 350 518 --resize" in demo_fails(capsys, folder)


def test_mixed_sizes_are_an_error_with_the_way_out(capsys, folder):
    folder("a.png", (28, 42))
    folder("b.png", (42, 28))
    for flags in ((), ("--resize",)):
        assert "a.png is 28×42 (height × width), b.png is 42×28" in (line := demo_fails(capsys, folder, *flags))
        assert "`--size 28 42 --resize`" in line


def test_images_of_another_size_than_asked_for_are_an_error(capsys, folder):
    folder("a.png")
    folder("b.png")
    assert "not the --size 56 84; --resize would make it 56×84" in demo_fails(capsys, folder, "--size", "56", "84")


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


# Images


def test_names_sort_as_people_count(folder):
    for name in ("10.png", "2.png", "b1.png", "1.png"):
        folder(name)
    assert [path.name for path in find(folder.path)[0]] == ["1.png", "2.png", "10.png", "b1.png"]


def test_other_files_are_ignored_with_a_note(folder):
    folder("a.png")
    folder("b.PNG")
    (folder.path / "notes.txt").touch()
    frames = load_folder(folder.path, PATCH)
    assert frames.names == ["a.png", "b.PNG"]
    assert frames.notes == ["ignored what is no image: notes.txt"]


def test_pixels_arrive_as_they_are(folder):
    folder("a.png", value=0)
    folder("b.png", value=51)
    images = load_folder(folder.path, PATCH).images
    assert images.shape == (1, 2, 3, 28, 42)
    assert images.dtype == torch.float32
    assert images[0, 0].eq(0).all()
    assert images[0, 1].eq(51 / 255).all()


def test_limit_takes_the_first(folder):
    for i in range(4):
        folder(f"{i}.png")
    frames = load_folder(folder.path, PATCH, limit=3)
    assert frames.names == ["0.png", "1.png", "2.png"]
    assert frames.notes == ["took the first 3 of 4 images"]


def test_resize_goes_to_the_nearest_multiple_and_says_so(folder):
    folder("a.png", (30, 50))
    folder("b.png", (30, 50))
    frames = load_folder(folder.path, PATCH, resize=True)
    assert frames.images.shape[-2:] == (28, 56)
    assert frames.notes == ["resized 2 images from 30×50 to 28×56"]


def test_size_and_resize_bring_mixed_sizes_together(folder):
    folder("a.png", (28, 42))
    folder("b.png", (42, 28))
    assert load_folder(folder.path, PATCH, size=(56, 56), resize=True).images.shape[-2:] == (56, 56)


def test_nearest_size_is_a_multiple_and_never_empty():
    assert nearest_size((1, 20), PATCH) == (14, 14)
    assert nearest_size((392, 518), PATCH) == (392, 518)


def test_fit_without_resize_keeps_what_fits():
    assert fit(["a", "b"], [(28, 42)] * 2, PATCH, None, False) == (28, 42)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    Image.new("RGB", (42, 28)).save(tmp_path / "a.jpg", exif=exif)
    assert read(tmp_path / "a.jpg").size == (28, 42)


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, rgb):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    image = read(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == rgb


def test_sixteen_bits_keep_their_brightness(tmp_path):
    Image.fromarray(numpy.full((4, 4), 100 * 256, dtype=numpy.uint16)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").getpixel((0, 0)) == (100, 100, 100)


# Comparison


def test_deviation_is_exact_on_numbers_made_by_hand():
    found = deviation(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([3.0, 4.0, 0.0]))
    assert found.relative == 1 / 5
    assert found.largest == 1 / 4


def test_deviation_at_its_limits(monkeypatch):
    zero, one = torch.zeros(3), torch.ones(3)
    assert deviation(one, one).to_dict() == {"relative": 0.0, "largest": 0.0}
    assert deviation(zero, zero).relative == 0.0
    assert deviation(one, zero).relative == math.inf
    assert math.isnan(deviation(torch.full((3,), math.nan), one).largest)
    monkeypatch.setattr("vggt_compile.cli.compare.CHUNK", 2)
    assert deviation(torch.tensor([3.0, 4.0, 1.0]), torch.tensor([3.0, 4.0, 0.0])).relative == 1 / 5
    with pytest.raises(ValueError, match="shapes differ"):
        deviation(zero, zero[:2])


def test_both_families_are_compared_under_the_same_names():
    shape = (1, 2, 4, 4)
    poses = torch.eye(4).expand(1, 2, 4, 4)
    points = torch.rand(*shape, 3)
    pi3 = {"camera_poses": poses, "local_points": points, "points": points, "conf": torch.rand(*shape, 1)}
    vggt = {
        "pose_enc": torch.rand(1, 2, 9),
        "depth": torch.rand(*shape, 1),
        "depth_conf": torch.rand(shape),
        "world_points": points,
    }
    assert set(compare(pi3, pi3)) == set(compare(vggt, vggt)) == {"camera", "depth", "points", "confidence"}
    assert quantities(pi3)["depth"].equal(points[..., 2])
    assert compare({**vggt, "depth": vggt["depth"] * 1.5}, vggt)["depth"].relative == pytest.approx(0.5, rel=1e-6)
    with pytest.raises(BadInput, match="neither an output of VGGT nor"):
        quantities({"logits": points})


def test_camera_centres_of_both_families_agree():
    turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    centre = torch.tensor([1.0, 2.0, 3.0])
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = turn.T, centre  # camera to world
    half = math.sqrt(0.5)
    encoding = torch.cat((-(turn @ centre), torch.tensor([0.0, 0.0, half, half, 1.0, 1.0])))
    assert camera_centres({"camera_poses": pose}, (28, 28)).tolist() == [1, 2, 3]
    torch.testing.assert_close(camera_centres({"pose_enc": encoding}, (28, 28)), centre)
    assert camera_centres({"depth": pose}, (28, 28)) is None


# Commands


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
    assert "g2f (default)" in capsys.readouterr().out
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"dense", "g2f"} <= {recipe["name"] for recipe in listed["recipes"]}
    assert set(listed["recipes"][0]) == {"name", "summary", "source", "plan"}
    assert listed["default"] == "g2f"


def test_a_plan_is_a_name_a_file_or_json(tmp_path):
    text = '{"layers": {"0": {"scope": "frame"}}}'
    (tmp_path / "mine.json").write_text(text)
    assert read_plan(text) == read_plan(str(tmp_path / "mine.json"))
    assert read_plan(None).name == "g2f"
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
    assert {"model", "unmet", "plan", "family", "rows", "notes", "dynamic", "attention_left"} == set(found)
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
    assert sum(bool(row["axes"]) for row in result["report"]["rows"]) == {"pi3-tiny": 1, "vggt-tiny": 2}[model]
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
