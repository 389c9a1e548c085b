"""The published models with attention that leaves nothing out: every global site of every family is ours to compute."""

from __future__ import annotations

import pytest
import torch
import upstream_models
from harness import Capture
from upstream_models import SITES, scene, tensors

from vggt_compile import explain
from vggt_compile.families import trace
from vggt_compile.ops import hopper
from vggt_compile.recipes import resolve

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LAYERS = resolve("exact").to_json()["layers"]


@pytest.mark.parametrize("name", ["vggt", "pi3", "omega", "da3"])
def test_every_family_keeps_its_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the kernel takes every site as it lies in memory; in float32, the definition, none changes."""
    monkeypatch.setattr(hopper, "here", lambda device: True)
    with upstream_models.model(name) as net, torch.no_grad():
        trace.arm()
        x, plan = scene(name), {"layers": LAYERS}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = explain(net, x, plan=plan, strict=True)
        assert [row.implementation for row in report.rewritten] == ["hopper"] * SITES[name]["global"]
        monkeypatch.setattr(hopper, "suits", lambda operands: True)
        torch._dynamo.reset()
        trace.arm()
        capture = Capture(plan=plan, strict=True)
        outputs = torch.compile(net, backend=capture, dynamic=False)(x)
        assert len(capture.report.rewritten) == SITES[name]["global"]
        for got, want in zip(tensors(outputs), tensors(net(x)), strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()  # softmax over all keys, summed in another order
