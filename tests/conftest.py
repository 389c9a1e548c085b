"""Every test starts with an empty Dynamo; reset forgets compile-start callbacks, so the shims are armed by hand.

And the fixtures that several files use.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    from vggt_compile.families import trace

    torch._dynamo.reset()
    trace.arm()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="vggt_compile: ")
        yield
    torch._dynamo.reset()


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Saves images by name: `folder("1.png", (height, width))`; its path is `folder.path`."""
    from PIL import Image

    def save(name: str, size: tuple[int, int] = (28, 42), value: int = 128) -> None:
        Image.new("RGB", size[::-1], (value,) * 3).save(tmp_path / name)

    save.path = tmp_path
    return save
