"""While something is compiled no collection goes through all objects; afterwards all is as it was."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cache_run import images, trunk

from vggt_compile import vggt_sparse
from vggt_compile.garbage import few_collections


def full_collections() -> int:
    return gc.get_stats()[2]["collections"]


def make_garbage() -> None:
    """Lists that hold themselves, as many as make some full collections where these are due early."""
    kept = []
    for _ in range(20_000):
        loop: list[Any] = []
        loop.append(loop)
        kept.append([loop])


@pytest.fixture(autouse=True)
def _soon() -> Any:
    """Collections are due early; what there was before counts for none of them."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.collect()  # a full one is due when new objects are a quarter of what the last one left
    gc.set_threshold(100, 2, 2)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_full_collections_wait_until_the_block_is_left() -> None:
    known = full_collections()
    make_garbage()
    assert full_collections() > known
    known = full_collections()
    with few_collections():
        make_garbage()
    assert full_collections() == known
    make_garbage()
    assert full_collections() > known


def test_what_fails_leaves_nothing_behind() -> None:
    with pytest.raises(KeyError), few_collections():
        raise KeyError
    assert gc.get_threshold() == (100, 2, 2)


def test_a_compile_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as inductor

    counts = []

    def compile_fx(gm: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        known = full_collections()
        make_garbage()
        counts.append(full_collections() - known)
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(trunk(), backend=vggt_sparse)(images())
    assert counts == [0]
    assert gc.get_threshold() == (100, 2, 2)
