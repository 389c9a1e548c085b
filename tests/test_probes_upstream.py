"""Probes on unmodified published models: every global attention is measured, and outputs keep their bits."""

from __future__ import annotations

import pytest
import torch
import upstream_models
from upstream_models import SITES, same_bits, scene

from vggt_compile import Plan, collect_probes, collect_reports, registry
from vggt_compile.analysis.profile import profile
from vggt_compile.backend import vggt_sparse_eager
from vggt_compile.errors import BadInput
from vggt_compile.families import trace

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

EVERY = [entry.name for entry in registry.measures()]


@pytest.mark.parametrize("name", ["vggt", "pi3", "omega", "da3"])
def test_every_global_attention_is_measured(name: str) -> None:
    with upstream_models.model(name) as net, torch.no_grad():
        trace.arm()
        x, found = scene(name, 1, 3), []
        for probe in ([], EVERY):
            torch._dynamo.reset()
            trace.arm()
            compiled = torch.compile(net, backend=vggt_sparse_eager, dynamic=False, options={"plan": {"probe": probe}})
            with collect_probes() as probes, collect_reports() as reports:
                found.append(compiled(x))
    assert same_bits(*found)
    quantities = sum(len(entry.quantities) for entry in registry.measures())
    assert len(probes.layers) == SITES[name]["global"]
    assert len(probes.rows) == SITES[name]["global"] * quantities
    assert not any("not measured" in note for report in reports for note in report.notes)
    for layer in probes.layers.values():
        assert 0 < layer["entropy"].value <= 1
        assert layer["step"].value > 0
        assert -1 <= layer["cosine"].value <= 1


def test_activations_of_fresh_weights_that_are_not_numbers_are_an_error() -> None:
    """VGGT-Ω masks the bias of its encoder's keys by a buffer that is NaN until a checkpoint is loaded."""
    with upstream_models.model("omega") as net:
        trace.arm()
        for name, buffer in net.named_buffers():
            if name.endswith("bias_mask"):
                buffer.fill_(torch.nan)
        with pytest.raises(BadInput, match=r"activations at layer 0 .* are not numbers.* VGGT-Ω among them"):
            profile(net, [scene("omega", 1, 3)], Plan(), ["cosine", "entropy"])
