"""`export`, `inspect` and `run` on the command line: one file goes through all three."""

import json
from pathlib import Path

import pytest
import torch
from commandline import fails

from vggt_compile.__main__ import main


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("export", "vggt-tiny", "--frames", "many"), "a number, or two as in 3-64"),
        (("export", "vggt-tiny", "--frames", "9-3", "--size", "28", "42"), "frames is a number from 1 on"),
        (("export", "vggt-tiny", "--size", "30", "42"), "nearest: --size 28 42"),
        (("export", "vggt-tiny", "--size", "28", "42", "--out", "model.bin"), "ends in .pt2"),
        (("export", "vggt-tinny"), "did you mean 'vggt-tiny'?"),
        (("inspect", "no_such.pt2"), "no_such.pt2: cannot be read"),
        (("run", "no_such.pt2", "--images", "."), "no_such.pt2: cannot be read"),
        (("run", "no_such.pt2"), "--images"),
    ],
)
def test_bad_arguments_are_one_line(capsys, argv, part):
    assert part in fails(capsys, *argv)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_file_goes_through_all_three(capsys, folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = str(tmp_path / "model.pt2")
    plan = json.dumps({"layers": {"*": {"scope": "frame"}}})
    size = ("--size", "4", "6")
    assert (
        main(["export", "exported:model", "--frames", "3", *size, "--plan", plan, "--out", path, "--device", "cpu"])
        == 0
    )
    told = capsys.readouterr()
    assert "2 of 4 attentions rewritten" in told.out
    assert "s compile" in told.out
    assert "3 frames of 4×6: compile took" in told.err
    assert main(["inspect", path, "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["verified"], said["precision"], said["entries"][0]["span"]["frames"]) == (True, "fp32", [3, 3])
    for name in ("1.png", "2.png", "3.png"):
        folder(name, (4, 6))
    out = tmp_path / "out.pt"
    assert main(["run", path, "--images", str(folder.path), "--out", str(out)]) == 0
    assert "3 images answered" in capsys.readouterr().out
    assert torch.load(out).isfinite().all()
    assert "frames from 3 to 3, not 2" in fails(capsys, "run", path, "--images", str(folder.path), "--frames", "2")
