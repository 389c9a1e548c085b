"""Which layout a folder has, told from its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vggt_compile.datasets.colmap import PLACES, find_model, read_colmap
from vggt_compile.datasets.posed import PosedImages
from vggt_compile.datasets.seven_scenes import POSE, read_seven_scenes
from vggt_compile.datasets.tum import read_tum
from vggt_compile.errors import BadInput

Reader = Callable[[str | Path, str | Path | None, str | Path | None], PosedImages]


def read(path: str | Path, images: str | Path | None = None, poses: str | Path | None = None) -> PosedImages:
    """A posed image folder in any layout that this package knows.

    Args:
        path: the folder of a recording.
        images: where its images are, if not where the layout has them: a folder, or for TUM a list such as rgb.txt.
        poses: where its cameras are: a file of TUM poses, a folder of .pose.txt files, or that of a COLMAP text model.

    Raises:
        BadInput: the layout is none of those known, or its reader found an error.
    """
    return layout(Path(poses or path))(path, images, poses)


def layout(place: Path) -> Reader:
    """The reader for the poses at a place, or BadInput that says what would have been found."""
    if find_model(place):
        return read_colmap
    if place.is_file() or (place / "groundtruth.txt").is_file() or (place / "rgb.txt").is_file():
        return read_tum
    if any(place.glob(f"*{POSE}")):
        return read_seven_scenes
    if not place.exists():
        raise BadInput(f"no file or folder {place}")
    raise BadInput(f"{place}: no layout that is known: {hint(place)}")


def hint(place: Path) -> str:
    """What to do about a folder of no known layout."""
    model = next((place / below for below in PLACES if (place / below / "images.bin").is_file()), None)
    if model:
        return (
            "a binary COLMAP model; make it text: "
            f"`colmap model_converter --input_path {model} --output_path {model} --output_type TXT`"
        )
    sequences = sorted({path.parent for path in place.glob(f"*/*{POSE}")})
    if sequences:
        return f"its folders are 7-Scenes sequences; name one, such as {sequences[0]}"
    return f"TUM has rgb.txt and groundtruth.txt, 7-Scenes frame-000000{POSE}, COLMAP cameras.txt and images.txt"
