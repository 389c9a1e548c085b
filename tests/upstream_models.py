"""Small instances of the published models, unmodified: their own classes with fewer layers and channels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from upstream import importable, modules


def vggt() -> nn.Module:
    """VGGT: 4 frame + 4 global blocks, 128 channels, convolutional patch embedding."""
    return _vggt_of()


def fastvggt() -> nn.Module:
    """The FastVGGT fork with `merging=None`. It names the device "cuda" in its forward, so it runs on a GPU only."""
    return _vggt_of(depth=24, merging=None)


def _vggt_of(depth: int = 4, **options) -> nn.Module:
    model, aggregator = modules("vggt.models.vggt", "vggt.models.aggregator")
    net = model.VGGT.__new__(model.VGGT)
    nn.Module.__init__(net)
    net.aggregator = aggregator.Aggregator(embed_dim=128, depth=depth, num_heads=2, patch_embed="conv", **options)
    net.camera_head = model.CameraHead(dim_in=256, num_heads=2, trunk_depth=2)
    dpt = {"features": 16, "out_channels": [8, 8, 8, 8], "intermediate_layer_idx": [0, 1, 2, 3]}
    net.point_head = model.DPTHead(256, output_dim=4, activation="inv_log", conf_activation="expp1", **dpt)
    net.depth_head = model.DPTHead(256, output_dim=2, activation="exp", conf_activation="expp1", **dpt)
    net.track_head = None
    for name, off in {"merging": None, "vis_attn_map": False}.items():  # FastVGGT's switches
        if options:
            setattr(net, name, off)
    return _awake(net)


def pi3() -> nn.Module:
    """π³: encoder of 2 blocks, decoder of 6 (3 global), 128 channels."""
    model, vit = modules("pi3.models.pi3", "pi3.models.dinov2.models.vision_transformer")
    net = model.Pi3.__new__(model.Pi3)
    nn.Module.__init__(net)
    net.patch_size = 14
    net.encoder = vit.DinoVisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=1.0, block_chunks=0,
        block_fn=vit.Block, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0,
    )  # fmt: skip
    del net.encoder.mask_token
    net.pos_type, net.rope, net.position_getter = "rope100", model.RoPE2D(freq=100.0), model.PositionGetter()
    block = {"mlp_ratio": 4, "qkv_bias": True, "norm_layer": nn.LayerNorm, "init_values": 0.01, "qk_norm": True,
             "attn_class": model.FlashAttentionRope, "rope": net.rope}  # fmt: skip
    net.decoder = nn.ModuleList([model.BlockRope(dim=128, num_heads=2, **block) for _ in range(6)])
    net.dec_embed_dim, net.patch_start_idx = 128, 5
    net.register_token = nn.Parameter(torch.randn(1, 1, 5, 128))
    head = {"in_dim": 256, "dec_embed_dim": 64, "dec_num_heads": 1, "depth": 1, "rope": net.rope}
    net.point_decoder, net.conf_decoder = (model.TransformerDecoder(out_dim=64, **head) for _ in range(2))
    net.camera_decoder = model.TransformerDecoder(out_dim=32, **head)
    net.point_head = model.LinearPts3d(patch_size=14, dec_embed_dim=64, output_dim=3)
    net.conf_head = model.LinearPts3d(patch_size=14, dec_embed_dim=64, output_dim=1)
    net.camera_head = model.CameraHead(dim=32)
    net.register_buffer("image_mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
    net.register_buffer("image_std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
    return _awake(net)


def omega() -> nn.Module:
    """VGGT-Ω: 6 frame + 6 inter-frame blocks of which one sees special tokens only, 17 special tokens, patch 16."""
    model, aggregator, heads = modules(
        "vggt_omega.models.vggt_omega", "vggt_omega.models.aggregator", "vggt_omega.models.heads"
    )
    net = model.VGGTOmega.__new__(model.VGGTOmega)
    nn.Module.__init__(net)
    build = aggregator._build_patch_embed
    aggregator._build_patch_embed = lambda patch_size, embed_dim: aggregator.DinoVisionTransformer(
        img_size=64, patch_size=patch_size, embed_dim=embed_dim, depth=2, num_heads=2, ffn_ratio=4, qkv_bias=True,
        layerscale_init=1e-5, n_storage_tokens=4, mask_k_bias=True, pos_embed_rope_dtype="fp32",
        pos_embed_rope_normalize_coords="max",
    )  # fmt: skip
    try:
        net.aggregator = aggregator.Aggregator(
            embed_dim=128, depth=6, num_heads=2, register_attention_block_indices=[2], cached_layer_indices=(1, 2, 3, 5)
        )
    finally:
        aggregator._build_patch_embed = build
    net.camera_head = heads.CameraHead(dim_in=256)
    net.dense_head = None
    net.text_alignment_head = None
    for name, buffer in net.named_buffers():
        if name.endswith("bias_mask"):  # NaN until a checkpoint is loaded: ones for q and v, zeros for k
            buffer.fill_(1.0)
            buffer[len(buffer) // 3 : 2 * len(buffer) // 3] = 0.0
    return _awake(net)


def da3() -> nn.Module:
    """Depth Anything 3: one ViT of 8 blocks that alternates from block 4 on, dual DPT head, camera decoder."""
    model, vit, dino, dualdpt, cam_dec = modules(
        "depth_anything_3.model.da3",
        "depth_anything_3.model.dinov2.vision_transformer",
        "depth_anything_3.model.dinov2.dinov2",
        "depth_anything_3.model.dualdpt",
        "depth_anything_3.model.cam_dec",
    )
    backbone = dino.DinoV2.__new__(dino.DinoV2)
    nn.Module.__init__(backbone)
    backbone.out_layers = [1, 3, 5, 7]
    backbone.pretrained = vit.DinoVisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=8, num_heads=2, ffn_layer="mlp", alt_start=4,
        qknorm_start=4, rope_start=4, cat_token=True,
    )  # fmt: skip
    head = dualdpt.DualDPT(dim_in=256, output_dim=2, features=16, out_channels=[8, 8, 8, 8])
    return _awake(model.DepthAnything3Net(backbone, head, cam_dec=cam_dec.CameraDec(dim_in=256), cam_enc=nn.Identity()))


def _awake(net: nn.Module) -> nn.Module:
    """Random weights large enough that every block matters: fresh LayerScale and special tokens are almost zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("gamma"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return net.eval()


CHECKOUT = {"vggt": "vggt", "pi3": "Pi3", "omega": "vggt-omega", "da3": "Depth-Anything-3", "fastvggt": "FastVGGT"}
BUILD: dict[str, Callable[[], nn.Module]] = {"vggt": vggt, "pi3": pi3, "omega": omega, "da3": da3, "fastvggt": fastvggt}
PATCH = {"vggt": 14, "pi3": 14, "omega": 16, "da3": 14, "fastvggt": 14}

SPECIAL = {"vggt": 5, "pi3": 5, "omega": 17, "da3": 1}
SITES = {
    "vggt": {"global": 4, "frame": 4, "other": 8},  # the camera head: 2 blocks, 4 iterations
    "pi3": {"global": 3, "frame": 8, "other": 0},  # encoder 2, decoder 3, three heads of one block
    "omega": {"global": 5, "frame": 8, "other": 5},  # one block of special tokens, camera head of 4
    "da3": {"global": 2, "frame": 6, "other": 0},
    "fastvggt": {"global": 24, "frame": 24, "other": 8},
}


@contextlib.contextmanager
def model(name: str) -> Iterator[nn.Module]:
    """A small instance of a published model in evaluation mode; usable within the block. Always the same weights."""
    with importable(CHECKOUT[name]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = BUILD[name]()
        yield net


def scene(name: str, batch: int = 1, frames: int = 3, grid: tuple[int, int] = (3, 4)) -> Tensor:
    patch, generator = PATCH[name], torch.Generator().manual_seed(0)
    return torch.rand(batch, frames, 3, grid[0] * patch, grid[1] * patch, generator=generator)


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in nested outputs; Depth Anything 3 has a dictionary class of its own."""
    if isinstance(outputs, Tensor):
        return [outputs]
    inner = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (list, tuple)) else ()
    return [tensor for value in inner for tensor in tensors(value)]


def same_bits(left: Any, right: Any) -> bool:
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    assert pairs
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
