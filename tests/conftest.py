"""Every test starts with an empty Dynamo; reset forgets compile-start callbacks, so the shims are armed by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

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
