"""Loads checkpoint files, and says what it left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WRAPPERS = ("model", "state_dict")
SHOWN = 8


class CheckpointError(ValueError):
    """A file whose parameters are not those of the model."""


@dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` did."""

    path: Path
    """The file."""
    tensors: int
    """How many parameters and buffers were loaded."""
    ignored: tuple[str, ...]
    """Keys of the file that belong to heads which the model lacks."""


def load_checkpoint(model: nn.Module, path: str | Path) -> Loaded:
    """Load a `.safetensors` file, or one that `torch.save` wrote, into `model`.

    Tensors on the meta device take the file's tensors as they are; others keep their dtype and device. Keys of released
    heads that the model lacks, such as VGGT's track head, are ignored, logged and returned.

    Raises:
        CheckpointError: a key is missing or unknown, or a shape differs; the message lists them.
    """
    path = Path(path)
    state = read_state(path)
    ignored = absent_head_keys(model, state)
    check_state(model, {key: value for key, value in state.items() if key not in ignored}, path)
    on_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(state, assign=on_meta)
    return Loaded(path, len(state) - len(ignored), ignored)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by key, on the CPU; a state dict wrapped as `model` or `state_dict` is found."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in WRAPPERS:
        if isinstance(state.get(name), Mapping):
            state = state[name]
    return dict(state)


def check_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError` unless `state` has the keys and shapes of `model`."""
    own = model.state_dict()
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    problems = {
        "missing": own.keys() - state.keys(),
        "unknown": state.keys() - own.keys(),
        "of another shape": [f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in shapes],
    }
    lines = [f"{len(keys)} {problem}: {summary(keys)}" for problem, keys in problems.items() if keys]
    if lines:
        raise CheckpointError(f"{path} is no checkpoint of this {type(model).__name__}\n  " + "\n  ".join(lines))


def summary(keys: Iterable[str]) -> str:
    """The first few of `keys` in order, and how many more there are."""
    names = sorted(keys)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def absent_head_keys(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Keys of `state` that belong to heads of the released model which `model` does not have."""
    absent = [head for head in getattr(model, "released_heads", ()) if getattr(model, head, None) is None]
    return tuple(key for key in state if key.startswith(tuple(f"{prefix}{head}." for head in absent)))


def drop_absent_heads(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict` that takes such keys out: strict loading then accepts a released checkpoint."""
    dropped = absent_head_keys(model, state, prefix)
    for key in dropped:
        del state[key]
    if dropped:
        heads = sorted({key.removeprefix(prefix).split(".")[0] for key in dropped})
        logger.warning("ignored %d tensors of %s, which this model does not have", len(dropped), ", ".join(heads))
