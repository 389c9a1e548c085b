"""A library of an artifact, opened on a device, with the weights that it was not packed with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten, treespec_loads


def opened(library: Path, device: torch.device) -> Any:
    """torch's own package loader does the same, but does not give away the weights that it has loaded."""
    if device.type == "cpu":
        return torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    return torch._C._aoti.AOTIModelContainerRunnerCuda(str(library), 1, str(device), str(library.parent))


def give(runner: Any, constants: Mapping[str, Tensor]) -> None:
    """Have a library read these tensors, which are not copied."""
    names = runner.get_constant_names_to_original_fqns()
    runner.update_constant_buffer({key: constants[name] for key, name in names.items()}, False, True, True)


def answer(runner: Any, images: Tensor) -> Any:
    """What the model would give, in its own nest of tuples and dictionaries.

    A library reads images in the order of their dimensions, whatever their strides are, and nothing checks them.
    """
    with torch.no_grad():
        return tree_unflatten(runner.run([images.contiguous()]), treespec_loads(runner.get_call_spec()[1]))
