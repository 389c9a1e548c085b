"""Beside a GPU nothing is asked of the CPU, and nothing of that is left afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._inductor import cpu_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode

from vggt_compile.graph.scalar_code import scalar_beside_a_gpu


@pytest.fixture
def on_gpu() -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(1, device="cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What instruction sets Inductor tries out; the answer is that they work."""
    tried: list[str] = []

    def check_build(isa: object, code: str) -> bool:
        tried.append(str(isa))
        return True

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", check_build)
    _forget()
    with torch._inductor.config.patch({"cpp.vec_isa_ok": None}):
        yield tried
    _forget()


def _forget() -> None:
    cpu_vec_isa.VecISA._VecISA__bool__impl.cache_clear()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def test_no_instruction_set_is_tried_beside_a_gpu(on_gpu: torch.Tensor, asked: list[str]) -> None:
    with scalar_beside_a_gpu([3, on_gpu]):
        assert not cpu_vec_isa.pick_vec_isa()
    assert asked == []


def test_on_a_cpu_they_are_tried_once(on_gpu: torch.Tensor, asked: list[str]) -> None:
    with scalar_beside_a_gpu([on_gpu]):
        cpu_vec_isa.pick_vec_isa()
    with scalar_beside_a_gpu([torch.empty(1)]):
        found = list(map(str, cpu_vec_isa.valid_vec_isa_list()))
    if not found:
        pytest.skip("no instruction set of this CPU has to be tried")
    tried = len(asked)
    with scalar_beside_a_gpu([on_gpu]):
        assert cpu_vec_isa.valid_vec_isa_list() == []
    assert list(map(str, cpu_vec_isa.valid_vec_isa_list())) == found
    assert len(asked) == tried
