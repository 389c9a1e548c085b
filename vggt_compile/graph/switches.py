"""What the user of Inductor switched off: our passes listen to the same setting as its own."""

from __future__ import annotations

import torch._inductor.config

DISABLED = "disabled by torch._inductor.config.disabled_passes"
"""The reason that the report gives."""


def disabled_passes() -> set[str]:
    """Names in `torch._inductor.config.disabled_passes`, in lower case."""
    return {name.strip().lower() for name in torch._inductor.config.disabled_passes.split(",")}
