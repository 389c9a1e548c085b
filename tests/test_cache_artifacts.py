"""What one process compiled, another need not: caches travel as bytes, and are right there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_run import Trunk, images, trunk
from torch import Tensor
from torch._dynamo.package import DiskDynamoCache
from torch._dynamo.utils import counters
from torch._inductor.runtime.autotune_cache import AutotuneCache

from vggt_compile import caches, vggt_sparse

PLAN = {"layers": {"0": {"scope": "frame"}}}


def compiled_anew(folder: Path, monkeypatch: pytest.MonkeyPatch, plan: object = PLAN) -> tuple[torch.Tensor, int, int]:
    """The output in what looks like a new process with its own folder of caches; hits and misses of the outermost."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        out = torch.compile(trunk(), backend=vggt_sparse, options={"plan": plan})(images())
    seen = counters["aot_autograd"]
    return out, seen["autograd_cache_hit"], seen["autograd_cache_miss"]


def test_caches_travel_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *seen = compiled_anew(tmp_path / "one", monkeypatch)
    assert seen == [0, 1]
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "two"))
    assert torch.compiler.load_cache_artifacts(saved[0]) is not None
    second, *seen = compiled_anew(tmp_path / "two", monkeypatch)
    assert seen == [1, 0]
    assert torch.equal(first, second)


def test_caches_of_other_sources_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *_ = compiled_anew(tmp_path / "one", monkeypatch)
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "two"))
    torch.compiler.load_cache_artifacts(saved[0])
    monkeypatch.setattr("vggt_compile.caches.source_hash", lambda: "edited")
    second, *seen = compiled_anew(tmp_path / "two", monkeypatch)
    assert seen == [0, 1]
    assert torch.equal(first, second)


def test_graphs_found_by_their_functions_name_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would give them to a process with another plan."""
    kept_there = DiskDynamoCache(str(tmp_path / "dynamo"))
    monkeypatch.setattr(kept_there, "path_prefix", lambda: str(tmp_path / "dynamo"))
    monkeypatch.setattr("torch._dynamo.package.DynamoCache", kept_there)
    monkeypatch.setattr("torch._dynamo.precompile_context.DynamoCache", kept_there)
    with torch._dynamo.config.patch(caching_precompile=True):
        framed, *_ = compiled_anew(tmp_path, monkeypatch)
        torch.compiler.save_cache_artifacts()
        dense, *_ = compiled_anew(tmp_path, monkeypatch, {})
    assert not torch.equal(framed, dense)
    assert torch.equal(dense, compiled_anew(tmp_path, monkeypatch, {})[0])


def test_inside_a_compile_a_tuned_kernel_is_where_others_leave_it(tmp_path: Path) -> None:
    """Processes that compile kernels know nothing of the compile they work for."""

    def place() -> object:
        found = AutotuneCache.create({}, str(tmp_path / "kernel.py"), "configurations")
        assert found is not None
        assert found.local_cache is not None
        return found.local_cache[1]

    outside = place()
    with caches.told():
        assert place() == outside


class Switching(Trunk):
    """A trunk between a part under autocast and one without, whatever is around, as the heads of published models."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(depth=4)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            x = x @ x.mT @ x
        x = super().forward(x.float())
        with torch.autocast("cpu", enabled=False):
            return x.float() @ x.float().mT


def kept(outline: bool = False, **given: Any) -> tuple[Tensor, int, int]:
    """What is compiled in what looks like a new process; hits and misses of the outermost cache."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Switching(**given).eval().requires_grad_(False)
    with torch.inference_mode():
        out = torch.compile(model, backend=vggt_sparse, options={"plan": PLAN, "outline": outline})(images())
    seen = counters["aot_autograd"]
    assert not seen["autograd_cache_bypass"]
    return out, seen["autograd_cache_hit"], seen["autograd_cache_miss"]


@pytest.mark.parametrize("outline", [False, True])
def test_a_model_that_switches_autocast_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outline: bool) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first, *seen = kept(outline)
    assert seen == [0, 1]
    second, *seen = kept(outline)
    assert seen == [1, 0]
    assert torch.equal(first, second)


def test_another_autocast_is_another_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the model, where it is in the graph, and around it, where only the compile sees it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    kept()
    assert kept(dtype=torch.float16)[1:] == (0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept()[1:] == (0, 1)
    with torch.autocast("cpu", torch.float16):
        assert kept()[1:] == (0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept()[1:] == (1, 0)


TUNED = """
import sys, torch
from modelutils import images, tiny
from torch._dynamo.utils import compilation_time_metrics
from torch._inductor.async_compile import AsyncCompile
from vggt_compile import vggt_sparse
from vggt_compile.models import vggt
AsyncCompile.wait_pool_ready()  # so that processes of the pool compile kernels, not this one
with torch.inference_mode():
    torch.compile(tiny(vggt).cuda(), backend=vggt_sparse)(images(1, 8, 3, 112, 112).cuda())
print(len(compilation_time_metrics.get("CachingAutotuner.benchmark_all_configs", ())))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are tuned for a CUDA device")
def test_a_second_process_does_not_try_out_again_how_to_cut_kernels(tmp_path: Path) -> None:
    around = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def tries() -> int:
        done = subprocess.run([sys.executable, "-c", TUNED], env=around, check=True, capture_output=True, timeout=600)
        return int(done.stdout.split()[-1])

    assert tries() > 0
    assert tries() == 0
