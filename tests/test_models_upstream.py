"""Our models against the published ones: the same parameters, and the same numbers from the same parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from modelutils import images, randomized, worst
from torch import nn
from torch.overrides import TorchFunctionMode
from upstream import imported

from vggt_compile.models import CameraConfig, DPTConfig, Pi3, VGGTConfig, ViTConfig, pi3, vggt
from vggt_compile.models.pose import Cameras, decode_pose, encode_pose

pytestmark = pytest.mark.upstream

TOLERANCE = 1e-4
VIT = ViTConfig(depth=2, heads=2, registers=3, grid=5)
GRIDS = {"square": (4, 56, 56), "odd": (3, 42, 70), "portrait": (2, 98, 42), "native": (1, 70, 70)}


class LinspaceOnCPU(TorchFunctionMode):
    """DINOv2's constructor reads its drop-path rates back as numbers, which the meta device cannot give."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def vggt_modules() -> Iterator[list[ModuleType]]:
    names = ("models.vggt", "models.aggregator", "heads.camera_head", "heads.dpt_head", "layers.vision_transformer")
    with imported("vggt", *(f"vggt.{name}" for name in names)) as modules:
        yield modules


@pytest.fixture(scope="module")
def pi3_modules() -> Iterator[list[ModuleType]]:
    names = ("pi3", "dinov2.models.vision_transformer", "layers.block", "layers.attention", "layers.transformer_head")
    names += ("layers.camera_head", "layers.pos_embed")
    with imported("Pi3", *(f"pi3.models.{name}" for name in names)) as modules:
        yield modules


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def norms(model: nn.Module) -> dict[str, float]:
    """ε of each layer norm: too small a difference for a comparison of outputs to see."""
    return {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"), LinspaceOnCPU():
        return build()


def without_track(modules: list[ModuleType]) -> Callable[[], nn.Module]:
    return functools.partial(modules[0].VGGT, enable_track=False)


def test_vggt_1b_has_the_released_keys_and_shapes(vggt_modules: list[ModuleType]) -> None:
    full, published, own = (on_meta(b) for b in (vggt_modules[0].VGGT, without_track(vggt_modules), vggt))
    assert {key.split(".")[0] for key in full.state_dict().keys() - own.state_dict().keys()} == {"track_head"}
    assert shapes(own) == shapes(published)
    assert norms(own) == norms(published)


def test_vggt_1b_loads_the_released_key_set_strictly(vggt_modules: list[ModuleType]) -> None:
    released = on_meta(vggt_modules[0].VGGT).state_dict()
    assert on_meta(vggt).load_state_dict(released, strict=True, assign=True) == ([], [])


def test_pi3_large_has_the_released_keys_and_shapes(pi3_modules: list[ModuleType]) -> None:
    published, own = on_meta(pi3_modules[0].Pi3), on_meta(pi3)
    assert shapes(own) == shapes(published)
    assert norms(own) == norms(published)


def small_vggt(encoder: Any) -> VGGTConfig:
    return VGGTConfig(
        embed_dim=64,
        depth=5,
        heads=2,
        registers=4,
        encoder=encoder,
        camera=CameraConfig(depth=2, heads=4),
        dpt=DPTConfig(layers=(0, 1, 3, 4), channels=(8, 12, 16, 20), features=16, chunk=None),
    )


def upstream_small_vggt(modules: Any, encoder: Any) -> nn.Module:
    """The published classes in the sizes of `small_vggt`; their own constructor knows ViT-L only."""
    published, aggregator, camera, dpt, vit = modules
    config = small_vggt(encoder)
    model = published.VGGT.__new__(published.VGGT)
    nn.Module.__init__(model)
    model.aggregator = aggregator.Aggregator(
        img_size=70, embed_dim=config.embed_dim, depth=config.depth, num_heads=config.heads, patch_embed="conv"
    )
    if encoder != "conv":
        model.aggregator.patch_embed = vit.DinoVisionTransformer(
            img_size=14 * encoder.grid,
            patch_size=14,
            embed_dim=config.embed_dim,
            depth=encoder.depth,
            num_heads=encoder.heads,
            init_values=1.0,
            block_chunks=0,
            num_register_tokens=encoder.registers,
            interpolate_antialias=True,
            interpolate_offset=0.0,
            block_fn=functools.partial(vit.Block, attn_class=vit.MemEffAttention),
        )
    width = 2 * config.embed_dim
    model.camera_head = camera.CameraHead(width, trunk_depth=config.camera.depth, num_heads=config.camera.heads)
    sizes = {
        "features": config.dpt.features,
        "out_channels": list(config.dpt.channels),
        "intermediate_layer_idx": list(config.dpt.layers),
    }
    model.point_head = dpt.DPTHead(width, output_dim=4, activation="inv_log", **sizes)
    model.depth_head = dpt.DPTHead(width, output_dim=2, activation="exp", **sizes)
    model.track_head = None
    return model


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("encoder", [VIT, "conv"], ids=["vit", "conv"])
@torch.no_grad()
def test_vggt_equals_upstream(vggt_modules: list[ModuleType], encoder: Any, grid: tuple[int, int, int]) -> None:
    frames, height, width = grid
    x = images(2, frames, 3, height, width)
    theirs = randomized(upstream_small_vggt(vggt_modules, encoder))
    ours = vggt(small_vggt(encoder)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert worst(ours(x), theirs(x)) <= TOLERANCE


def upstream_small_pi3(modules: Any, config: Any) -> nn.Module:
    """The published classes in the sizes of `config`; their own constructor knows ViT-L only."""
    published, vit, block, attention, readout, camera, positions = modules
    model = published.Pi3.__new__(published.Pi3)
    nn.Module.__init__(model)
    model.encoder = vit.DinoVisionTransformer(
        img_size=14 * config.encoder.grid,
        patch_size=14,
        embed_dim=config.embed_dim,
        depth=config.encoder.depth,
        num_heads=config.encoder.heads,
        mlp_ratio=config.encoder.mlp_ratio,
        init_values=1.0,
        block_chunks=0,
        num_register_tokens=config.encoder.registers,
        interpolate_antialias=True,
        interpolate_offset=0.0,
    )
    del model.encoder.mask_token
    model.patch_size, model.patch_start_idx, model.dec_embed_dim = 14, config.registers, config.embed_dim
    model.pos_type, model.rope = "rope100", positions.RoPE2D(freq=100.0)
    model.position_getter = positions.PositionGetter()
    model.decoder = nn.ModuleList(
        block.BlockRope(
            dim=config.embed_dim,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            init_values=0.01,
            qk_norm=True,
            ffn_layer=published.Mlp,
            attn_class=attention.FlashAttentionRope,
            rope=model.rope,
        )
        for _ in range(config.depth)
    )
    model.register_token = nn.Parameter(torch.zeros(1, 1, config.registers, config.embed_dim))
    for name, out in (("point", config.readout_dim), ("conf", config.readout_dim), ("camera", config.camera_dim)):
        decoder = readout.TransformerDecoder(
            in_dim=2 * config.embed_dim,
            out_dim=out,
            dec_embed_dim=config.readout_dim,
            depth=config.readout_depth,
            dec_num_heads=config.readout_heads,
            mlp_ratio=config.mlp_ratio,
            rope=model.rope,
        )
        setattr(model, f"{name}_decoder", decoder)
    model.point_head = readout.LinearPts3d(14, config.readout_dim, output_dim=3)
    model.conf_head = readout.LinearPts3d(14, config.readout_dim, output_dim=1)
    model.camera_head = camera.CameraHead(config.camera_dim)
    for name in ("image_mean", "image_std"):
        model.register_buffer(name, getattr(Pi3(config), name))
    return model


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@torch.no_grad()
def test_pi3_equals_upstream(pi3_modules: list[ModuleType], grid: tuple[int, int, int]) -> None:
    frames, height, width = grid
    x = images(2, frames, 3, height, width)
    ours = pi3("tiny", encoder=VIT, depth=6).eval()
    theirs = randomized(upstream_small_pi3(pi3_modules, ours.config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert worst(ours(x), theirs(x)) <= TOLERANCE


def fill(model: nn.Module, buffers: dict[str, torch.Tensor]) -> nn.Module:
    """Memory and random values for a model built on the meta device: about the spread of a trained one."""
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.02, generator=generator)
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.add_(0.3 if name.endswith("gamma") else 1.0)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return model


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.mark.slow
@torch.no_grad()
def test_vggt_1b_equals_upstream(vggt_modules: list[ModuleType]) -> None:
    x = images(1, 2, 3, 112, 154)
    statistics = {"aggregator._resnet_mean": MEAN[:, None, None], "aggregator._resnet_std": STD[:, None, None]}
    theirs = fill(on_meta(without_track(vggt_modules)), statistics)
    ours = on_meta(vggt).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert worst(ours(x), theirs(x)) <= TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_pi3_large_equals_upstream(pi3_modules: list[ModuleType]) -> None:
    x = images(1, 2, 3, 112, 154)
    statistics = {"image_mean": MEAN[:, None, None], "image_std": STD[:, None, None]}
    theirs = fill(on_meta(pi3_modules[0].Pi3), statistics)
    ours = on_meta(pi3).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert worst(ours(x), theirs(x)) <= TOLERANCE


def test_pose_encoding_equals_upstream() -> None:
    encoding = torch.randn(2, 50, 9, generator=torch.Generator().manual_seed(0))
    encoding[..., 7:] = encoding[..., 7:].abs().clamp(0.2, 2.5)
    cameras = decode_pose(encoding, (392, 518))
    with imported("vggt", "vggt.utils.pose_enc") as (module,):
        extrinsics, intrinsics = module.pose_encoding_to_extri_intri(encoding, (392, 518))
        again = module.extri_intri_to_pose_encoding(extrinsics, intrinsics, (392, 518))
    torch.testing.assert_close(cameras, Cameras(extrinsics, intrinsics))
    torch.testing.assert_close(encode_pose(cameras, (392, 518)), again)
