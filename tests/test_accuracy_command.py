"""`bench accuracy` writes record, page and picture, reads real recordings, and says in one line what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from accuracy_bench import SIZE, video
from layouts import write_colmap, write_seven_scenes, write_tum
from modelutils import randomized

from vggt_compile.__main__ import main
from vggt_compile.bench.accuracy.cases import Recorded
from vggt_compile.bench.accuracy.page import page
from vggt_compile.bench.accuracy.score import METRICS
from vggt_compile.bench.accuracy.statistics import POOLED
from vggt_compile.cli.accuracy import read_frames
from vggt_compile.errors import BadInput
from vggt_compile.models import pi3
from vggt_compile.scenes import Views

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny π³ that were never trained, but act."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(randomized(pi3("tiny")).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def views() -> Views:
    return video()


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["bench", "accuracy", *argv]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("vggt_compile: error: ")
    return line


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
