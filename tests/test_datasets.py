"""A rendered scene, written in each public layout, is read back as it was; what is wrong in a folder is named."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import write_colmap, write_seven_scenes, write_tum
from PIL import Image

from vggt_compile.datasets import load, read, read_colmap, read_seven_scenes, read_tum
from vggt_compile.datasets.rows import Row
from vggt_compile.datasets.tum import TOLERANCE, associate
from vggt_compile.errors import BadInput
from vggt_compile.scenes import Views, render, unproject

SIZE = (42, 56)
FRAMES = 12
WRITERS = {"tum": write_tum, "seven_scenes": write_seven_scenes, "colmap": write_colmap}
READERS = {"tum": read_tum, "seven_scenes": read_seven_scenes, "colmap": read_colmap}
# Half of the last digit, through a rotation and a centre a few metres away; COLMAP keeps the digits of the scene.
POSE_ERROR = {"tum": 1e-3, "seven_scenes": 1e-5, "colmap": 1e-6}
DEPTH_ERROR = {"tum": 0.5 / 5000, "seven_scenes": 0.5 / 1000}

layouts = pytest.mark.parametrize("layout", WRITERS)


@pytest.fixture(scope="session")
def views() -> Views:
    return render(seed=3, frames=FRAMES, size=SIZE, trajectory="walk", kind="indoor")


@pytest.fixture(scope="session")
def written(views: Views, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for name, write in WRITERS.items():
        write(views, folder / name)
    return folder


@pytest.fixture
def place(views: Views, tmp_path: Path) -> Callable[[str], Path]:
    """A folder in a layout, to break; two frames."""
    few = Views(**{name: tensor[:, :2] for name, tensor in vars(views).items()})

    def make(layout: str) -> Path:
        WRITERS[layout](few, tmp_path / layout)
        return tmp_path / layout

    return make


@layouts
def test_a_scene_comes_back_as_it_was_written(layout: str, views: Views, written: Path) -> None:
    posed = read(written / layout)
    assert len(posed) == FRAMES
    assert (posed.extrinsics - views.extrinsics[0]).abs().max() < POSE_ERROR[layout]
    frames = load(posed, size=max(SIZE))
    assert (frames.images - views.images[0]).abs().max() <= 0.5 / 255 + 1e-6
    if layout == "colmap":
        assert posed.intrinsics is not None
        assert posed.sizes == (SIZE,) * FRAMES
        assert torch.equal(posed.intrinsics.float(), views.intrinsics[0])
        assert frames.depth is None
    else:
        assert posed.intrinsics is frames.intrinsics is None
        assert frames.depth is not None
        assert (frames.depth - views.depth[0]).abs().max() <= DEPTH_ERROR[layout] + 1e-6
        points = unproject(frames.depth, views.intrinsics[0], frames.extrinsics)
        assert (points - views.world_points[0]).abs().max() < 20 * POSE_ERROR[layout] + 3 * DEPTH_ERROR[layout]


@layouts
def test_the_layout_is_told_from_the_files(layout: str, written: Path) -> None:
    ours, direct = read(written / layout), READERS[layout](written / layout)
    assert (ours.images, ours.depths, ours.depth_unit) == (direct.images, direct.depths, direct.depth_unit)
    assert torch.equal(ours.extrinsics, direct.extrinsics)


@pytest.mark.parametrize(
    ("layout", "images", "poses"),
    [
        ("tum", "rgb.txt", "groundtruth.txt"),
        ("seven_scenes", ".", "."),
        ("colmap", "images", "sparse/0"),
        ("colmap", "images", "sparse/0/images.txt"),
    ],
)
def test_images_and_poses_may_lie_elsewhere(layout: str, images: str, poses: str, written: Path) -> None:
    folder = written / layout
    start = folder if layout == "tum" else written / "nowhere"  # TUM's lists name files below the folder
    posed = read(start, images=folder / images, poses=folder / poses)
    assert posed.images == read(folder).images


def test_frames_are_taken_by_number(written: Path) -> None:
    for layout in WRITERS:
        posed = read(written / layout)
        taken = posed.take([4, 1])
        assert taken.images == (posed.images[4], posed.images[1])
        assert torch.equal(taken.extrinsics, posed.extrinsics[[4, 1]])
        assert (taken.depths is None) == (layout == "colmap")
        assert len(load(taken, 28, 14).images) == 2


@pytest.mark.parametrize(("size", "expected"), [(28, (28, 28)), (84, (56, 84)), (112, (84, 112))])
def test_the_longer_side_gets_the_size_and_cameras_follow(
    size: int, expected: tuple[int, int], views: Views, written: Path
) -> None:
    frames = load(read(written / "colmap"), size, patch=28)
    assert frames.images.shape == (FRAMES, 3, *expected)
    assert frames.intrinsics is not None
    ratio = torch.tensor([expected[1] / SIZE[1], expected[0] / SIZE[0], 1.0])
    assert torch.allclose(frames.intrinsics, ratio[:, None] * views.intrinsics[0])
    assert load(read(written / "tum"), size, patch=28).depth.shape == (FRAMES, *expected)  # type: ignore[union-attr]


def test_depth_takes_the_nearest_pixel_and_unknown_is_zero(place: Callable[[str], Path]) -> None:
    folder = place("seven_scenes")
    raw = np.full(SIZE, 2000, np.uint16)
    raw[:, 28:] = 65535
    raw[:20] = 0
    Image.fromarray(raw).save(folder / "frame-000000.depth.png")
    depth = load(read(folder), 84).depth
    assert depth is not None
    assert depth[0].unique().tolist() == [0.0, 2.0]
    assert (depth[0, 32:, :42] == 2).all()
    assert (depth[0, :, 42:] == 0).all()


def test_tum_keeps_the_frames_that_have_a_pose_and_a_depth(place: Callable[[str], Path]) -> None:
    folder = place("tum")
    (folder / "depth.txt").write_text("\n".join((folder / "depth.txt").read_text().splitlines()[:2]))
    assert len(read(folder)) == 1
    (folder / "depth.txt").unlink()
    posed = read(folder)
    assert len(posed) == 2
    assert posed.depths is None


times = st.lists(st.integers(0, 400), min_size=1, max_size=30).map(lambda ms: [m / 1000 for m in ms])


@given(times, times)
def test_rows_are_matched_with_the_nearest_time(ours: list[float], theirs: list[float]) -> None:
    rows, others = ([Row(Path("list"), i, (f"{t}", "x")) for i, t in enumerate(each)] for each in (ours, theirs))
    found = {row.line: float(other.words[0]) for row, other in associate(rows, [others])}
    for i, when in enumerate(ours):
        nearest = min(abs(when - other) for other in theirs)
        assert (i in found) == (nearest <= TOLERANCE)
        assert i not in found or abs(found[i] - when) == nearest


@pytest.mark.parametrize(
    ("row", "focal"),
    [
        ("1 SIMPLE_PINHOLE 56 42 50 28 21", (50, 50)),
        ("1 SIMPLE_RADIAL 56 42 50 28 21 0", (50, 50)),
        ("1 PINHOLE 56 42 50 60 28 21", (50, 60)),
    ],
)
def test_camera_models_without_distortion(row: str, focal: tuple[int, int], place: Callable[[str], Path]) -> None:
    folder = place("colmap")
    (folder / "sparse/0/cameras.txt").write_text(f"{row}\n2 PINHOLE 56 42 1 1 1 1\n")
    intrinsics = read(folder).intrinsics
    assert intrinsics is not None
    assert intrinsics[0].tolist() == [[focal[0], 0, 28], [0, focal[1], 21], [0, 0, 1]]


GONE = None
WHOLE = 0
WRONG = [
    # layout, file, line, what stands there, what comes instead, the complaint
    ("tum", "groundtruth.txt", GONE, "", "", "no file .*groundtruth.txt; it should hold rows of: timestamp tx"),
    ("tum", "rgb.txt", GONE, "", "", "no file .*rgb.txt; it should hold"),
    ("tum", "groundtruth.txt", WHOLE, r"(?m)^\d.*$", "", "groundtruth.txt: no rows"),
    ("tum", "groundtruth.txt", 3, r" \S+$", "", r"groundtruth.txt:3: expected 8 columns \(timestamp .* qw\), found 7"),
    ("tum", "groundtruth.txt", 3, r"( \S+){4}$", " 0 0 0 0", "groundtruth.txt:3: a quaternion of zero length"),
    ("tum", "groundtruth.txt", 3, r"\S+$", "x", "groundtruth.txt:3: could not convert .* correct or remove the line"),
    ("tum", "groundtruth.txt", 3, r"\S+$", "nan", "groundtruth.txt:3: NaN or infinity"),
    (
        "tum",
        "groundtruth.txt",
        WHOLE,
        r"(?m)^1305",
        "2305",
        "no timestamps within 0.02 s .*groundtruth.txt has 2305031102",
    ),
    ("tum", "rgb.txt", 3, r"\S+$", "rgb/other.png", "rgb.txt:3: no file .*rgb/other.png; unpack it below"),
    ("tum", "rgb.txt", 3, r"$", " more", r"rgb.txt:3: expected 2 columns \(timestamp filename\), found 3"),
    ("seven_scenes", "frame-000001.pose.txt", GONE, "", "", "000001.color.png: no file .*pose.txt; unpack it again"),
    ("seven_scenes", "frame-000001.depth.png", GONE, "", "", "000001.color.png: no file .*depth.png; unpack it again"),
    ("seven_scenes", "frame-000001.pose.txt", 4, r"\S+\s*$", "", "pose.txt:4: expected 4 columns .* found 3"),
    ("seven_scenes", "frame-000001.pose.txt", WHOLE, r"\n.*\n$", "", "pose.txt: expected 4 rows of a 4 × 4 .* found 3"),
    (
        "seven_scenes",
        "frame-000001.pose.txt",
        1,
        r"^\s*\S+",
        "5",
        "pose.txt: not a rigid transform .* remove the frame",
    ),
    ("seven_scenes", "frame-000001.pose.txt", 1, r"^\s*\S+", "-inf", "pose.txt:1: NaN or infinity"),
    ("colmap", "sparse/0/cameras.txt", GONE, "", "", "no file .*cameras.txt; it should hold rows of: CAMERA_ID"),
    ("colmap", "sparse/0/cameras.txt", 3, "PINHOLE", "OPENCV", "cameras.txt:3: camera model 'OPENCV' is not one of"),
    (
        "colmap",
        "sparse/0/cameras.txt",
        3,
        "P.*$",
        "SIMPLE_RADIAL 56 42 50 28 21 0.1",
        "txt:3: radial distortion k = 0.1",
    ),
    ("colmap", "sparse/0/cameras.txt", 3, r" \S+$", "", "cameras.txt:3: expected 8 columns .* found 7"),
    ("colmap", "sparse/0/cameras.txt", 3, r"^2 ", "7 ", "images.txt:2: camera 2 is not in"),
    ("colmap", "sparse/0/cameras.txt", 3, r"^2 ", "two ", "cameras.txt:3: 'two' is no whole number"),
    ("colmap", "sparse/0/images.txt", 4, r" \d view 0.png", "", "images.txt:4: expected 10 columns .* found 8"),
    ("colmap", "sparse/0/images.txt", 4, r"^1( \S+){4}", "1 0 0 0 0", "images.txt:4: a quaternion of zero length"),
    ("colmap", "sparse/0/images.txt", WHOLE, r"(?s).+", "", "images.txt: no images"),
    ("colmap", "images/view 0.png", GONE, "", "", "images.txt:4: no file .*view 0.png; name the folder of the images"),
]


@pytest.mark.parametrize(("layout", "name", "line", "pattern", "text", "message"), WRONG)
def test_what_is_wrong_is_named_with_its_file_and_line(
    layout: str, name: str, line: int | None, pattern: str, text: str, message: str, place: Callable[[str], Path]
) -> None:
    folder = place(layout)
    path = folder / name
    if line is GONE:
        path.unlink()
    elif line == WHOLE:
        path.write_text(re.sub(pattern, text, path.read_text()))
    else:
        lines = path.read_text().splitlines()
        lines[line - 1] = re.sub(pattern, text, lines[line - 1], count=1)
        path.write_text("\n".join(lines) + "\n")
    with pytest.raises(BadInput, match=message):
        READERS[layout](folder)


def test_a_folder_of_no_layout_says_what_was_looked_for(place: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file or folder"):
        read(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"TUM has rgb.txt and groundtruth.txt, 7-Scenes frame-000000.pose.txt, COLMAP"):
        read(tmp_path / "empty")
    with pytest.raises(BadInput, match="name the folder of one sequence"):
        read_seven_scenes(tmp_path / "empty")
    place("seven_scenes")
    with pytest.raises(BadInput, match=r"7-Scenes sequences; name one, such as .*seven_scenes"):
        read(tmp_path)
    (tmp_path / "empty/images.bin").touch()
    with pytest.raises(BadInput, match="colmap model_converter --input_path"):
        read(tmp_path / "empty")


def test_images_that_do_not_fit_are_named(place: Callable[[str], Path]) -> None:
    folder = place("colmap")
    with pytest.raises(BadInput, match="size 500 is no multiple of the 14 px patch; the nearest is 504"):
        load(read(folder), 500)
    with pytest.raises(BadInput, match="no frames"):
        load(read(folder).take([]))
    Image.new("RGB", (30, 30)).save(folder / "images/view 1.png")
    with pytest.raises(BadInput, match=r"view 1.png is 30×30 \(height × width\), .*view 0.png is 42×56"):
        load(read(folder))
    with pytest.raises(BadInput, match=r"view 1.png is 30×30 .* its camera is 42×56"):
        load(read(folder).take([1]))
    (folder / "images/view 1.png").write_text("no image")
    with pytest.raises(BadInput, match=r"cannot read the image .*view 1.png"):
        load(read(folder))
    depth = place("seven_scenes")
    Image.new("RGB", (56, 42)).save(depth / "frame-000000.depth.png")
    with pytest.raises(BadInput, match=r"depth.png: a depth image has 16 bits in one channel, this one is RGB"):
        load(read(depth))


def test_without_pillow_cameras_are_read_and_loading_names_the_extra(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    posed = read(written / "tum")
    with pytest.raises(BadInput, match=r"pip install 'vggt_compile\[demo\]'"):
        load(posed)
