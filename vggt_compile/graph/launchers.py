"""Triton's launchers of kernels are compiled side by side.

For kernels that go into a library, and for those that a user wrote, Inductor has Triton compile a C function that
launches them, one after the other once all kernels are there: 5 seconds of an export of VGGT-1B. Triton keeps them on
disk, so here they are made beforehand, on as many cores as there are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import LambdaFuture
from torch._inductor.runtime.triton_heuristics import TritonCompileResult

log = logging.getLogger(__name__)


@contextmanager
def launchers_side_by_side() -> Iterator[None]:
    """Compiles inside the block find the launchers of their kernels made."""
    wait = AsyncCompile._wait_futures

    def _wait_futures(self: AsyncCompile, scope: dict[str, Any]) -> None:
        with ThreadPoolExecutor(config.compile_threads) as pool:
            for kernel in _compiled(scope.values()):
                pool.submit(_make_launcher, kernel)
        wait(self, scope)

    with mock.patch.object(AsyncCompile, "_wait_futures", _wait_futures):
        yield


def _compiled(waiting: Iterable[object]) -> Iterator[Any]:
    """Kernels that other processes compile, as they come, of which Triton makes the launcher."""
    limit = getattr(config, "compile_worker_wait_timeout", 0) or None
    for one in waiting:
        if isinstance(one, LambdaFuture) and one.future is not None:
            try:
                autotuner, *_ = one.future.result(timeout=limit)
            except Exception:  # that it failed is said by who waits for it next, with the name of the kernel
                continue
            made = getattr(autotuner, "compile_results", ())
            yield from (result.kernel for result in made if isinstance(result, TritonCompileResult))


def _make_launcher(kernel: Any) -> None:
    """What `CompiledKernel` does of itself when it is launched. If it fails here, it will there, where it is told."""
    from triton.runtime.driver import driver

    try:
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    except Exception:
        log.debug("a launcher could not be made beforehand", exc_info=True)
