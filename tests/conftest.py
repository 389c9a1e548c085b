"""Every test starts with an empty Dynamo; reset forgets compile-start callbacks, so the shims are armed by hand.

Before that, what makes tracing and compiling cheaper and changes no result, and the order of files. After it, fixtures
that several files use.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # A pool of compile processes serves GPUs only, and every process that compiles starts one. Inductor reads this when
    # it is imported, here and in the processes that tests start.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Which vector instructions work, Inductor finds out anew in every process, by one more Python for each sort of them.
# What the processor says it has is believed instead.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch._inductor.config

# Of a compile for symbolic sizes, what chooses the width of vectors is the largest part. Tests get plain loops from
# Inductor but where they ask for `vectors`; processes that tests start, as of the command line, have them too.
torch._inductor.config.cpp.simdlen = 1
# With symbolic sizes, keys of this cache take longer than what it spares.
torch._dynamo.config.fake_tensor_cache_enabled = False
# Dynamo times the guards of each compile, and empties the processor's caches before that. Nobody reads the number.
torch._dynamo.guards.profile_guard_manager = lambda *given: 0.0
# Traces make millions of objects that live for a whole test: most collections find nothing.
torch._dynamo.config.run_gc_after_compile = False
gc.set_threshold(20_000, 10, 10)
# pytest listens to every logger that does not propagate, and where one listens torch writes a trace of each compile.
logging.getLogger("torch.__trace").propagate = True

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Files go in the order below: pytest-xdist would begin with those of most tests, which are not the long ones."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests come first: a long file that begins last leaves all workers but one idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (slow[item.path], tests[item.path]), reverse=True)


def pytest_collection_finish() -> None:
    """What has been imported stays until the end: no collection looks at it meanwhile."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    from vggt_compile.families import trace

    torch._dynamo.reset()
    trace.arm()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="vggt_compile: ")
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def vectors() -> Iterator[None]:
    """Inductor as it comes, which writes vector instructions."""
    with torch._inductor.config.patch({"cpp.simdlen": None}):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Saves images by name: `folder("1.png", (height, width))`; its path is `folder.path`."""
    from PIL import Image

    def save(name: str, size: tuple[int, int] = (28, 42), value: int = 128) -> None:
        Image.new("RGB", size[::-1], (value,) * 3).save(tmp_path / name)

    save.path = tmp_path
    return save
