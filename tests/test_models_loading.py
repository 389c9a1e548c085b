"""A model is built from a name and loaded from a checkpoint, or the refusal says what does not fit."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from modelutils import both, images, tiny, worst
from torch import Tensor, nn

from vggt_compile.models import CheckpointError, Pi3Config, VGGTConfig, load_checkpoint, pi3, vggt


@pytest.mark.parametrize(
    ("build", "name", "nearest"),
    [(vggt, "1B", "1b"), (vggt, "smal", "small"), (pi3, "Larg", "large"), (pi3, "tini", "tiny")],
)
def test_an_unknown_name_is_refused_with_the_nearest(build: Callable[..., nn.Module], name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"no model named '{name}'.*did you mean '{nearest}'"):
        build(name)


@pytest.mark.parametrize(
    "fields",
    [{"embed_dim": 66}, {"outputs": ("camera", "track")}, {"depth": 3}, {"heads": 3}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_config_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        vggt("tiny", **fields)


def test_pi3_blocks_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="depth=3"):
        pi3("tiny", depth=3)


def released(model: nn.Module) -> dict[str, Tensor]:
    """A state dict as it is released: with a track head."""
    return dict(
        model.state_dict(), **{"track_head.tracker.weight": torch.zeros(2), "track_head.norm.bias": torch.zeros(3)}
    )


def test_track_head_is_ignored_and_said(caplog: pytest.LogCaptureFixture) -> None:
    source, model = tiny(vggt), vggt("tiny")
    with caplog.at_level(logging.WARNING, "vggt_compile"):
        assert model.load_state_dict(released(source), strict=True) == ([], [])
    assert caplog.messages == ["ignored 2 tensors of track_head, which this model does not have"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_track_head_is_ignored_below_a_prefix() -> None:
    wrapped = nn.ModuleDict({"net": vggt("tiny")})
    state = {f"net.{key}": value for key, value in released(tiny(vggt)).items()}
    assert wrapped.load_state_dict(state, strict=True) == ([], [])


def test_other_unknown_keys_are_errors() -> None:
    model = vggt("tiny")
    with pytest.raises(RuntimeError, match="tracker_head"):
        model.load_state_dict({**model.state_dict(), "tracker_head.weight": torch.zeros(1)})


def test_heads_switched_off_are_ignored_too(caplog: pytest.LogCaptureFixture) -> None:
    model = vggt("tiny", outputs=("depth",))
    with caplog.at_level(logging.WARNING, "vggt_compile"):
        model.load_state_dict(released(tiny(vggt)), strict=True)
    assert "of camera_head, point_head, track_head," in caplog.text


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "wrapped.pt"])
@both
@torch.no_grad()
def test_load_checkpoint(build: Callable[..., nn.Module], suffix: str, tmp_path: Path) -> None:
    source = tiny(build)
    state = released(source) if build is vggt else source.state_dict()
    path = tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": state} if suffix == "wrapped.pt" else state, path)

    with torch.device("meta"):
        empty = build("tiny").eval()
    x = images(1, 2, 3, 42, 56)
    for model in (build("tiny").eval(), empty):
        record = load_checkpoint(model, path)
        assert record.path == path
        assert record.tensors == len(source.state_dict())
        assert set(record.ignored) == state.keys() - source.state_dict().keys()
        assert worst(model(x), source(x)) == 0


def test_a_checkpoint_of_another_model_is_refused_with_its_differences(tmp_path: Path) -> None:
    state = dict(tiny(vggt).state_dict())
    del state["aggregator.camera_token"]
    state["aggregator.extra"] = torch.zeros(1)
    state["depth_head.norm.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "model.pt")
    model = vggt("tiny")
    before = random.Random(0).choice(list(model.parameters())).clone()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "model.pt")
    message = str(caught.value)
    assert "1 missing: aggregator.camera_token" in message
    assert "1 unknown: aggregator.extra" in message
    assert "depth_head.norm.bias (7,), not (128,)" in message
    assert torch.equal(before, random.Random(0).choice(list(model.parameters())))


def test_configs_are_frozen_and_hashable() -> None:
    assert len({VGGTConfig(), VGGTConfig(), VGGTConfig(depth=36)}) == 2
    assert len({Pi3Config(), Pi3Config()}) == 1
