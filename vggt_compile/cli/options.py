"""Arguments that several commands share, and what their text means."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from vggt_compile.errors import BadInput, PlanError

if TYPE_CHECKING:
    import torch

    from vggt_compile.plan import Plan

PLAN_HELP = "a recipe's name (see `recipes`), the path of a JSON file, or JSON; without it the default recipe"


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", metavar="PLAN", help=PLAN_HELP)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 means autocast (default: fp32)")


def add_size(parser: argparse.ArgumentParser, *, default: str) -> None:
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help=f"pixels (default: {default})")


def read_plan(text: str | None) -> Plan:
    """The plan that `--plan` means; PlanError says what is wrong with it."""
    from vggt_compile.recipes import resolve

    if text is None or not text.lstrip().startswith("{"):
        return resolve(text)
    try:
        return resolve(json.loads(text))
    except json.JSONDecodeError as error:
        raise PlanError(f"--plan is not JSON: {error}") from error


def read_device(name: str) -> torch.device:
    """The device that `--device` means; `auto` is the first GPU where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda, but torch sees no GPU; `python -m vggt_compile doctor` says what is missing")
    return torch.device(name)


def check_frames(frames: int) -> int:
    if frames < 2:
        raise BadInput(f"--frames {frames}: attention between frames needs two or more")
    return frames


def check_size(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """A size that divides into patches, or BadInput with the nearest one that does."""
    height, width = size
    near = nearest_size(size, patch)
    if size != near:
        raise BadInput(
            f"--size {height} {width} is not a multiple of the {patch} px patch; nearest: --size {near[0]} {near[1]}"
        )
    return size


def nearest_size(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Both sides rounded to the nearest multiple of the patch, at least one patch."""
    height, width = (max(1, round(side / patch)) * patch for side in size)
    return height, width
