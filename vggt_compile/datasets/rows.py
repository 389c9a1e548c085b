"""Text files of one row a line; an error names the file, the line and what would help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vggt_compile.errors import BadInput
from vggt_compile.models.pose import quaternion_to_matrix


@dataclass(frozen=True)
class Row:
    """The words of one line, and where it is."""

    path: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    def numbers(self, start: int, stop: int) -> list[float]:
        """Words `start` to `stop` as finite numbers, or BadInput."""
        try:
            found = [float(word) for word in self.words[start:stop]]
        except ValueError as error:
            raise BadInput(f"{self}: {error}; correct or remove the line") from error
        if not all(map(math.isfinite, found)):
            raise BadInput(f"{self}: NaN or infinity among {self.words[start:stop]}; remove the line (or the frame)")
        return found

    def whole(self, column: int) -> int:
        """One word as a whole number, or BadInput."""
        try:
            return int(self.words[column])
        except ValueError as error:
            raise BadInput(f"{self}: {self.words[column]!r} is no whole number; correct the line") from error

    def expect(self, names: str) -> Row:
        """This row, if it has one word for each of the names; BadInput otherwise."""
        columns = names.split()
        if len(self.words) != len(columns):
            raise BadInput(f"{self}: expected {len(columns)} columns ({names}), found {len(self.words)}")
        return self


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file, or BadInput."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(f"no file {path}; it should hold {what}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path} as text: {error}; it should hold {what}") from error


def read_rows(path: Path, what: str) -> list[Row]:
    """The rows of a file, without empty lines and # comments; BadInput where there is none."""
    lines = enumerate(read_lines(path, what), 1)
    rows = [Row(path, number, tuple(line.split())) for number, line in lines if not is_comment(line)]
    if not rows:
        raise BadInput(f"{path}: no rows; it should hold {what}")
    return rows


def is_comment(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def rotation(row: Row, xyzw: Sequence[float]) -> Tensor:
    """The rotation `[3, 3]` of a quaternion of any length but 0, or BadInput."""
    quaternion = torch.tensor(xyzw, dtype=torch.float64)
    if not quaternion.norm() > 1e-6:
        raise BadInput(f"{row}: a quaternion of zero length is no rotation; remove the line, or export the poses again")
    return quaternion_to_matrix(quaternion)
