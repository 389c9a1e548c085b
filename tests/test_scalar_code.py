"""Beside a GPU nothing is asked of the CPU, and nothing of that is left afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor import cpu_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode

from vggt_compile.graph.scalar_code import AS_THEY_ARE, scalar_beside_a_gpu


@pytest.fixture
def on_gpu() -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(1, device="cuda")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often Inductor would find out what the CPU can do."""
    times: list[int] = []

    def valid_vec_isa_list() -> list[Any]:
        times.append(1)
        return []

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", valid_vec_isa_list)
    return times


def test_nothing_is_found_out_beside_a_gpu(on_gpu: torch.Tensor, asked: list[int]) -> None:
    with torch._inductor.config.patch(dict.fromkeys(AS_THEY_ARE, True)):
        with scalar_beside_a_gpu([3, on_gpu]):
            assert not cpu_vec_isa.pick_vec_isa()
            assert not any(torch._inductor.config.get_config_copy()[name] for name in AS_THEY_ARE)
        assert all(torch._inductor.config.get_config_copy()[name] for name in AS_THEY_ARE)
    assert asked == []


def test_on_a_cpu_it_is(asked: list[int]) -> None:
    with scalar_beside_a_gpu([torch.empty(1)]):
        cpu_vec_isa.pick_vec_isa()
    assert asked == [1]


def test_afterwards_inductor_knows_what_it_knew(on_gpu: torch.Tensor) -> None:
    before = list(map(str, cpu_vec_isa.valid_vec_isa_list()))
    with scalar_beside_a_gpu([on_gpu]):
        assert cpu_vec_isa.valid_vec_isa_list() == []
    assert list(map(str, cpu_vec_isa.valid_vec_isa_list())) == before
