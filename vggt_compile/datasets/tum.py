"""TUM RGB-D: rgb.txt, depth.txt and groundtruth.txt, whose rows belong together by nearest time.

https://cvg.cit.tum.de/data/datasets/rgbd-dataset/file_formats
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import torch

from vggt_compile.datasets.posed import PosedImages, existing, invert
from vggt_compile.datasets.rows import Row, read_rows, rotation
from vggt_compile.errors import BadInput

TOLERANCE = 0.02
"""Seconds between an image and its pose or depth, as in the dataset's own association."""
DEPTH_UNIT = 1 / 5000
FILE = "timestamp filename"
POSE = "timestamp tx ty tz qx qy qz qw"


def read_tum(path: str | Path, images: str | Path | None = None, poses: str | Path | None = None) -> PosedImages:
    """The images that have a pose, and a depth where there is a depth.txt, within 0.02 s.

    Args:
        path: the folder that the lists' file names start from.
        images: the list of images; `rgb.txt` of the folder by default.
        poses: rows of time, centre and quaternion, camera → world; `groundtruth.txt` of the folder by default.

    The layout has no intrinsics: the dataset's page gives them, one set for each of its cameras.

    Raises:
        BadInput: a file is missing, a row is not as the format has it, or no times agree.
    """
    folder, depth = Path(path), Path(path, "depth.txt")
    rgb = listed(Path(images) if images else folder / "rgb.txt")
    truth = read_rows(Path(poses) if poses else folder / "groundtruth.txt", f"rows of: {POSE}")
    lists = [[row.expect(POSE) for row in truth]] + ([listed(depth)] if depth.is_file() else [])
    together = list(associate(rgb, lists))
    if not together:
        raise BadInput(no_overlap([rgb, *lists]))
    colours, found, *depths = zip(*together, strict=True)
    values = [row.numbers(1, 8) for row in found]
    turns = torch.stack([rotation(row, value[3:]) for row, value in zip(found, values, strict=True)])
    return PosedImages(
        tuple(file(folder, row) for row in colours),
        invert(turns, turns.new_tensor([value[:3] for value in values])),
        depths=tuple(file(folder, row) for row in depths[0]) if depths else None,
        depth_unit=DEPTH_UNIT,
    )


def listed(path: Path) -> list[Row]:
    """The rows of a list of files."""
    return [row.expect(FILE) for row in read_rows(path, f"rows of: {FILE}")]


def file(folder: Path, row: Row) -> Path:
    """The file that a row names."""
    return existing(folder / row.words[1], row, f"unpack it below {folder}, or remove the line")


def time(row: Row) -> float:
    return row.numbers(0, 1)[0]


def associate(rows: Sequence[Row], lists: Sequence[Sequence[Row]]) -> Iterator[list[Row]]:
    """Each row that has a near one in every list, with those."""
    ordered = [sorted(((time(other), other) for other in others), key=itemgetter(0)) for others in lists]
    for row in rows:
        near = [match(row, others) for others in ordered]
        found = [other for other in near if other is not None]
        if len(found) == len(lists):
            yield [row, *found]


def match(row: Row, others: Sequence[tuple[float, Row]]) -> Row | None:
    """The row of `others`, which are in order of time, that is nearest in time, if it is near enough."""
    when = time(row)
    after = bisect.bisect_left(others, when, key=itemgetter(0))
    near = min(others[max(0, after - 1) : after + 1], key=lambda pair: abs(pair[0] - when))
    return near[1] if abs(near[0] - when) <= TOLERANCE else None


def no_overlap(lists: Sequence[Sequence[Row]]) -> str:
    """Why no image has all it needs, with the times of each list."""
    spans = []
    for rows in lists:
        times = [time(row) for row in rows]
        spans.append(f"{rows[0].path} has {min(times):.4f} to {max(times):.4f}")
    return (
        f"no timestamps within {TOLERANCE} s of each other: {', '.join(spans)}; the files must be of one recording and "
        "have times in seconds"
    )
