"""Launchers of kernels are made before Inductor asks for them one by one, and what fails is said where it is asked."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import LambdaFuture

triton_driver = pytest.importorskip("triton.runtime.driver", reason="needs Triton")
from torch._inductor.runtime.triton_heuristics import TritonCompileResult  # noqa: E402

from vggt_compile.graph.launchers import launchers_side_by_side  # noqa: E402

KERNELS = 3


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launchers made so far; each waits for another one to begin, and the second cannot be made."""
    names: list[str] = []
    abreast = threading.Barrier(KERNELS, timeout=20)

    def launcher_cls(source: str, metadata: str) -> None:
        abreast.wait()
        if source == "source 1":
            raise RuntimeError("no compiler")
        names.append(f"{source}, {metadata}")

    active = SimpleNamespace(launcher_cls=launcher_cls)
    monkeypatch.setattr(triton_driver, "driver", SimpleNamespace(active=active))
    return names


def compiled(index: int) -> Future[Any]:
    result = TritonCompileResult.__new__(TritonCompileResult)
    result.kernel = SimpleNamespace(src=f"source {index}", metadata=f"metadata {index}")  # type: ignore[assignment]
    done: Future[Any] = Future()
    done.set_result((SimpleNamespace(compile_results=[result, "launched by Inductor itself"]), 0))
    return done


@torch._inductor.config.patch(compile_threads=KERNELS)
def test_they_are_there_when_inductor_asks(made: list[str]) -> None:
    scope: dict[str, Any] = {
        f"kernel {index}": LambdaFuture(lambda: tuple(sorted(made)), future=compiled(index)) for index in range(KERNELS)
    }
    scope["of another kind"] = LambdaFuture(lambda: "a module")
    with launchers_side_by_side():
        AsyncCompile().wait(scope)
    wanted = ("source 0, metadata 0", "source 2, metadata 2")
    assert scope == {f"kernel {index}": wanted for index in range(KERNELS)} | {"of another kind": "a module"}


@torch._inductor.config.patch(compile_threads=KERNELS)
def test_a_kernel_that_failed_is_named_by_inductor() -> None:
    failed: Future[Any] = Future()
    failed.set_exception(RuntimeError("it does not fit"))

    def named() -> None:
        raise ValueError("kernel 0: it does not fit")

    with launchers_side_by_side(), pytest.raises(ValueError, match="kernel 0: it does not fit"):
        AsyncCompile().wait({"kernel 0": LambdaFuture(named, future=failed)})
