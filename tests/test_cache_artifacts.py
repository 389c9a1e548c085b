"""What one process compiled, another need not: caches travel as bytes, and are right there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_run import images, trunk
from torch._dynamo.utils import counters

from vggt_compile import vggt_sparse

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
    monkeypatch.setattr("vggt_compile.backend.source_hash", lambda: "edited")
    second, *seen = compiled_anew(tmp_path / "two", monkeypatch)
    assert seen == [0, 1]
    assert torch.equal(first, second)
