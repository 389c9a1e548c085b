"""The reference models on their own: shapes, symmetries, traces, precision, loading."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from modelutils import images, randomized, tensors, worst
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vggt_compile.models import (
    CheckpointError,
    DPTConfig,
    Pi3Config,
    VGGTConfig,
    ViTConfig,
    load_checkpoint,
    pi3,
    vggt,
)
from vggt_compile.models.camera import nearest_rotation
from vggt_compile.models.dpt import DPTHead
from vggt_compile.models.encoder import ViT
from vggt_compile.models.layers import Attention
from vggt_compile.models.pose import Cameras, decode_pose, encode_pose, matrix_to_quaternion, quaternion_to_matrix
from vggt_compile.models.rope import grid_positions, rotate, rotation

BUILDERS = {"vggt": vggt, "pi3": pi3}
ROUNDING = 1e-5  # of fp32 sums taken in another order, relative
both = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def tiny(build: Callable[..., nn.Module], **overrides: Any) -> Any:
    torch.manual_seed(0)
    return randomized(build("tiny", **overrides))


def shallow(build: Callable[..., nn.Module]) -> Any:
    """The least that still holds every kind of layer: traces with symbolic sizes are slow."""
    if build is pi3:
        return tiny(build, depth=2)
    return tiny(build, depth=2, dpt=DPTConfig(layers=(0, 0, 1, 1), channels=(8, 8, 8, 8), features=8, chunk=None))


def set_chunk(model: nn.Module, frames: int | None) -> None:
    for module in model.modules():
        if isinstance(module, DPTHead):
            module.chunk = frames


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"), [(1, 1, 56, 56), (2, 2, 42, 70), (1, 5, 98, 42), (2, 3, 56, 56)]
)
@torch.no_grad()
def test_outputs_of_any_batch_frames_and_grid(batch: int, frames: int, height: int, width: int) -> None:
    x = images(batch, frames, 3, height, width)
    image, map_ = (batch, frames), (batch, frames, height, width)
    out = tiny(vggt)(x)
    poses = out.pop("pose_enc_list")
    assert len(poses) == 2
    assert poses[-1] is out["pose_enc"]
    assert {key: value.shape for key, value in out.items()} == {
        "pose_enc": (*image, 9),
        "depth": (*map_, 1),
        "depth_conf": map_,
        "world_points": (*map_, 3),
        "world_points_conf": map_,
        "images": x.shape,
    }
    assert {key: value.shape for key, value in tiny(pi3)(x).items()} == {
        "points": (*map_, 3),
        "local_points": (*map_, 3),
        "conf": (*map_, 1),
        "camera_poses": (*image, 4, 4),
    }


@both
@torch.no_grad()
def test_a_scene_without_batch_dimension_is_a_batch_of_one(build: Callable[..., nn.Module]) -> None:
    model, x = tiny(build), images(3, 3, 42, 56)
    assert worst(model(x), model(x[None])) == 0


@both
@pytest.mark.parametrize("shape", [(3, 42, 56), (2, 1, 42, 56), (2, 3, 42, 57), (2, 3, 43, 56)])
def test_images_that_do_not_fit_are_refused(build: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images"):
        tiny(build)(torch.zeros(shape))


@both
@torch.no_grad()
def test_scenes_of_a_batch_do_not_see_each_other(build: Callable[..., nn.Module]) -> None:
    model, x = tiny(build), images(2, 3, 3, 42, 56)
    together, apart = tensors(model(x)), [tensors(model(scene)) for scene in x]
    assert worst(together, {key: torch.cat([out[key] for out in apart]) for key in together}) <= ROUNDING


@both
@torch.no_grad()
def test_only_vggt_has_a_first_frame(build: Callable[..., nn.Module]) -> None:
    model, x = tiny(build), images(1, 4, 3, 42, 56)
    out = tensors(model(x))

    def error(order: list[int]) -> float:
        return worst(model(x[:, order]), {key: value[:, order] for key, value in out.items()})

    assert error([0, 3, 1, 2]) <= ROUNDING
    assert (error([1, 0, 2, 3]) <= ROUNDING) == (build is pi3)


@both
@torch.no_grad()
def test_every_frame_is_seen_by_every_other(build: Callable[..., nn.Module]) -> None:
    model, x = tiny(build), images(1, 3, 3, 42, 56)
    changed = x.clone()
    changed[:, 2] = 1 - changed[:, 2]
    before, after = tensors(model(x)), tensors(model(changed))
    for key in before.keys() - {"images"}:
        moved = (before[key] - after[key])[:, :2].abs().max() / (before[key] - before[key].mean()).abs().max()
        assert moved > 1000 * ROUNDING, key


@both
def test_training_reaches_every_parameter(build: Callable[..., nn.Module]) -> None:
    model = tiny(build).train()
    out = model(images(1, 2, 3, 42, 56))
    assert "images" not in out
    sum(value.square().sum() for value in tensors(out).values()).backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == ({"aggregator.patch_embed.mask_token"} if build is vggt else set())


@torch.no_grad()
def test_frames_a_dense_pass_do_not_change_the_result() -> None:
    model, x = tiny(vggt), images(2, 5, 3, 42, 56)
    whole = model(x)
    passes = []
    model.depth_head.norm.register_forward_hook(lambda module, args, out: passes.append(len(out)))
    set_chunk(model, 2)
    assert worst(model(x), whole) <= ROUNDING
    assert passes == [4] * 8 + [2] * 4


@pytest.mark.parametrize(
    ("outputs", "layers"),
    [(("camera", "depth", "points"), {0, 2, 3, 4, 5}), (("camera",), {5}), (("depth",), {0, 2, 3, 4})],
)
@torch.no_grad()
def test_the_trunk_keeps_only_layers_that_heads_read(outputs: tuple[str, ...], layers: set[int]) -> None:
    dpt = DPTConfig(layers=(0, 2, 3, 4), channels=(8, 8, 8, 8), features=8)
    model = tiny(vggt, depth=6, dpt=dpt, outputs=outputs)
    kept = model.aggregator(images(2, 3, 3, 42, 56))
    assert kept.keys() == layers
    assert {t.shape for t in kept.values()} == {(2, 3, 5 + 12, 128)}


@torch.no_grad()
def test_the_stored_position_grid_is_resampled_to_itself() -> None:
    vit = randomized(ViT(ViTConfig(depth=0, grid=5), patch_size=14, dim=8))
    assert torch.equal(vit.positions(5, 5)[1], vit.pos_embed[:, 1:])
    assert vit.positions(3, 7)[1].shape == (1, 21, 8)


def test_rotated_products_depend_on_the_offset_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 32)
    positions = grid_positions(4, 6, special=2, device=torch.device("cpu"))
    by = rotation(positions, 32, base=100.0)
    q, k = (rotate(x.expand(1, 1, 26, 32), by)[0, 0] for x in (query, key))
    assert torch.equal(q[:2], query.expand(2, 32))
    scores = (q @ k.T)[2:, 2:]
    same = positions[2:, None] - positions[None, 2:]
    for offset in (torch.tensor([0, 0]), torch.tensor([1, -2]), torch.tensor([-3, 5])):
        equal = scores[(same == offset).all(-1)]
        torch.testing.assert_close(equal, equal[:1].expand_as(equal))
    assert scores.std() > 0.1


def test_nearest_rotation() -> None:
    torch.manual_seed(0)
    rotations = quaternion_to_matrix(torch.randn(50, 4))
    torch.testing.assert_close(nearest_rotation(3 * rotations), rotations)
    mirrored = rotations @ torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    for matrices in (mirrored, torch.randn(50, 3, 3)):
        nearest = nearest_rotation(matrices)
        torch.testing.assert_close(nearest @ nearest.mT, torch.eye(3).expand(50, 3, 3))
        torch.testing.assert_close(torch.linalg.det(nearest), torch.ones(50))


def test_pose_round_trip() -> None:
    torch.manual_seed(0)
    encoding = torch.randn(4, 100, 9, dtype=torch.float64)
    encoding[..., 7:] = 0.2 + 2.5 * torch.rand(4, 100, 2)
    cameras = decode_pose(encoding, (392, 518))
    again = encode_pose(cameras, (392, 518))
    quaternion = encoding[..., 3:7] / encoding[..., 3:7].norm(dim=-1, keepdim=True) * encoding[..., 6:7].sign()
    torch.testing.assert_close(again, torch.cat((encoding[..., :3], quaternion, encoding[..., 7:]), dim=-1))
    torch.testing.assert_close(decode_pose(again, (392, 518)), cameras)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_half_turns_keep_their_axis(axis: int) -> None:
    turn = -torch.eye(3)
    turn[axis, axis] = 1
    quaternion = torch.eye(4)[axis]
    torch.testing.assert_close(matrix_to_quaternion(turn).abs(), quaternion)
    torch.testing.assert_close(quaternion_to_matrix(quaternion), turn)


def test_a_decoded_camera_sees_the_image_border_at_half_its_field_of_view() -> None:
    encoding = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.4])
    cameras = decode_pose(encoding, (200, 300))
    assert isinstance(cameras, Cameras)
    ray = torch.stack([torch.tan(torch.tensor(0.7)), torch.tan(torch.tensor(0.5)), torch.tensor(1.0)])
    torch.testing.assert_close(cameras.intrinsics @ ray, torch.tensor([300.0, 200.0, 1.0]))
    torch.testing.assert_close(cameras.extrinsics, torch.eye(3, 4))


@both
@torch.no_grad()
def test_autocast_stops_at_the_heads(build: Callable[..., nn.Module]) -> None:
    model, x = tiny(build), images(1, 3, 3, 42, 56)
    exact = model(x)
    dtypes: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda m, args, out, name=name: dtypes.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    heads = {name for name in dtypes if name.split(".")[0].endswith("_head")}
    assert {dtypes[name] for name in heads} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - heads} == {torch.bfloat16}
    assert {value.dtype for value in tensors(out).values()} == {torch.float32}
    assert 0 < worst(out, exact) < 0.05


@both
@torch.no_grad()
def test_weights_in_bf16_run(build: Callable[..., nn.Module]) -> None:
    x = images(1, 3, 3, 42, 56)
    exact, out = tiny(build)(x), tiny(build).to(torch.bfloat16)(x)
    assert {value.dtype for value in tensors(out).values()} == {torch.float32}
    assert 0 < worst(out, exact) < 0.1


class Attentions:
    """A Dynamo backend that runs the graph as it is and keeps module path and query shape of every attention."""

    def __init__(self) -> None:
        self.graphs = 0
        self.sites: list[tuple[str, torch.Size]] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        for node in gm.graph.nodes:
            if node.target is scaled_dot_product_attention:
                path = list(node.meta["nn_module_stack"].values())[-1][0]
                self.sites.append((path.removeprefix("L['self']."), node.args[0].meta["example_value"].shape))
        return gm.forward


@both
@torch.no_grad()
def test_one_graph_of_any_size_equals_eager_bit_for_bit(build: Callable[..., nn.Module]) -> None:
    model, record = shallow(build), Attentions()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=record)
    # Not three frames: a size that equals the number of colours is taken for the same symbol.
    for shape in ((2, 4, 3, 42, 70), (3, 5, 3, 84, 56)):
        x = images(*shape)
        got, want = tensors(compiled(x)), tensors(model(x))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)
    assert record.graphs == 1

    calls = Counter({name: 1 for name, module in model.named_modules() if isinstance(module, Attention)})
    if build is vggt:
        calls["camera_head.trunk.0.attn"] = model.config.camera.steps
    assert Counter(path for path, _ in record.sites) == calls
    in_all = next(shape for path, shape in record.sites if "global_blocks.1" in path or "decoder.1." in path)
    assert all(isinstance(size, torch.SymInt) for size in (in_all[0], in_all[2]))


@both
@torch.no_grad()
def test_export_with_any_number_of_frames(build: Callable[..., nn.Module]) -> None:
    model, frames = shallow(build), torch.export.Dim("frames", min=3, max=64)
    set_chunk(model, 1)  # a loop over frames, were it traced, would pin their number
    program = torch.export.export(model, (images(1, 4, 3, 42, 56),), dynamic_shapes=({1: frames},))
    set_chunk(model, None)
    for count in (3, 7):
        x = images(1, count, 3, 42, 56)
        assert worst(program.module()(x), model(x)) == 0


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


@both
def test_small_models_stay_small_and_keep_the_head_width(build: Callable[..., nn.Module]) -> None:
    model = build("small")
    assert sum(p.numel() for p in model.parameters()) <= 8_000_000
    assert {m.head_dim for m in model.modules() if isinstance(m, Attention)} == {64}
    assert model(images(1, 2, 3, 224, 224)).keys() >= ({"depth"} if build is vggt else {"points"})


@pytest.mark.parametrize(("build", "millions"), [(vggt, 1190.6), (pi3, 958.7)], ids=BUILDERS)
def test_released_sizes_are_built_on_the_meta_device(build: Callable[..., nn.Module], millions: float) -> None:
    with torch.device("meta"):
        model = build()
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


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
