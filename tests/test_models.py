"""The reference models on their own: shapes, symmetries, traces, precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modelutils import BUILDERS, both, images, tensors, tiny, worst
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vggt_compile.models import DPTConfig, pi3, vggt
from vggt_compile.models.dpt import DPTHead
from vggt_compile.models.layers import Attention

ROUNDING = 1e-5  # of fp32 sums taken in another order, relative


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


@torch.no_grad()
def test_dense_heads_are_loops_in_a_compile() -> None:
    """Dynamo of torch 2.11 says of each trace that it is an export, where they see all frames at once."""
    model, found = tiny(vggt), []
    set_chunk(model, 8)

    def backend(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(node for node in gm.graph.nodes if str(node.target) == "scan")
        return gm.forward

    torch.compile(model, backend=backend)(images(1, 30, 3, 28, 42))
    assert len(found) == sum(isinstance(module, DPTHead) for module in model.modules()) == 2


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
