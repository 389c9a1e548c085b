"""VGGT (arXiv:2503.11651): alternating attention inside each frame and over all frames, read by camera and dense heads.

Parameter names and shapes are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vggt_compile.models.camera import CameraConfig, CameraHead
from vggt_compile.models.checkpoint import drop_absent_heads
from vggt_compile.models.dpt import DPTConfig, DPTHead
from vggt_compile.models.encoder import PatchEmbed, ViT, ViTConfig, check_images, normalize
from vggt_compile.models.layers import Block, init_linear, no_autocast
from vggt_compile.models.rope import grid_positions, rotation

OUTPUTS = ("camera", "depth", "points")


@dataclass(frozen=True)
class VGGTConfig:
    """Shape of a VGGT. The defaults are those of the released VGGT-1B."""

    patch_size: int = 14
    """Side of a patch, in pixels; image sides are multiples of it."""
    embed_dim: int = 1024
    """Width of a token, a multiple of 4 · `heads`."""
    depth: int = 24
    """Frame blocks, and as many global blocks."""
    heads: int = 16
    """Attention heads of a trunk block."""
    mlp_ratio: float = 4.0
    """Hidden width of a trunk block's MLP over `embed_dim`."""
    registers: int = 4
    """Register tokens of a frame; with the camera token they precede its patches."""
    rope_base: float = 100.0
    """Base of the rotary frequencies."""
    layer_scale: float = 0.01
    """Initial gain of the trunk's residual branches."""
    encoder: ViTConfig | Literal["conv"] = field(default_factory=ViTConfig)
    """What makes patch tokens of an image: a DINOv2 ViT, or one convolution."""
    outputs: tuple[str, ...] = OUTPUTS
    """Which heads to build, of "camera", "depth", "points"."""
    camera: CameraConfig = field(default_factory=CameraConfig)
    """Sizes of the camera head."""
    dpt: DPTConfig = field(default_factory=DPTConfig)
    """Sizes of the depth and of the point head, and the trunk layers that they read."""

    def __post_init__(self) -> None:
        if self.embed_dim % (4 * self.heads):
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of 4 · heads = {4 * self.heads}")
        if unknown := set(self.outputs) - set(OUTPUTS):
            raise ValueError(f"outputs={self.outputs}: no {sorted(unknown)}; known are {OUTPUTS}")
        if max(self.read_layers, default=0) >= self.depth:
            raise ValueError(f"the heads read layers {self.read_layers} of a trunk with depth={self.depth}")

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Trunk layers that some head reads, ascending."""
        dense = self.dpt.layers if {"depth", "points"} & set(self.outputs) else ()
        camera = (self.depth - 1,) if "camera" in self.outputs else ()
        return tuple(sorted({*dense, *camera}))


class Aggregator(nn.Module):
    """The trunk: encodes each frame, adds its special tokens, and mixes frames.

    Attributes:
        special: tokens that precede a frame's patches: one camera token, then registers.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        self.config = config
        self.special = 1 + config.registers
        self.patch_embed: nn.Module = (
            PatchEmbed(patch, dim) if config.encoder == "conv" else ViT(config.encoder, patch, dim, mask_token=True)
        )
        self.frame_blocks = nn.ModuleList(self.block() for _ in range(config.depth))
        self.global_blocks = nn.ModuleList(self.block() for _ in range(config.depth))
        # Of each pair, the first frame, whose camera is the origin, takes the first; all others take the second.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.empty(1, 2, config.registers, dim))
        for token in (self.camera_token, self.register_token):
            nn.init.trunc_normal_(token, std=0.02)

    def block(self) -> Block:
        c = self.config
        return Block(c.embed_dim, c.heads, c.mlp_ratio, c.layer_scale, qk_norm=True)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Images `[B, S, 3, H, W]` in 0..1 → for each layer that a head reads, tokens `[B, S, P, 2·C]`.

        P = special + (H/patch)·(W/patch). The first C features left the frame block, the others the global block.
        Layers that nothing reads are not kept: at 24 layers of which 4 are read, that is five sixths of the memory.
        """
        batch, frames, _, height, width = images.shape
        tokens = self.tokens(images)
        grid = height // self.config.patch_size, width // self.config.patch_size
        head_dim = self.config.embed_dim // self.config.heads
        positions = grid_positions(*grid, self.special, images.device)
        in_frame = rotation(positions, head_dim, self.config.rope_base)
        in_all = in_frame.repeat(frames)

        kept = {}
        for layer, (frame_block, global_block) in enumerate(zip(self.frame_blocks, self.global_blocks, strict=True)):
            local = frame_block(tokens.flatten(0, 1), in_frame).unflatten(0, (batch, frames))
            tokens = global_block(local.flatten(1, 2), in_all).unflatten(1, (frames, -1))
            if layer in self.config.read_layers:
                kept[layer] = torch.cat((local, tokens), dim=-1)
        return kept

    def tokens(self, images: Tensor) -> Tensor:
        """Special and patch tokens of `[B, S, 3, H, W]` before the first block: `[B, S, P, C]`."""
        batch, frames = images.shape[:2]
        patches = self.patch_embed(normalize(images).flatten(0, 1)).unflatten(0, (batch, frames))
        pairs = torch.cat((self.camera_token, self.register_token), dim=2)
        # Chosen by a mask, not by cutting off the first of S frames: S − 1 would be one more size to guard on.
        is_first = torch.arange(frames, device=images.device)[:, None, None] == 0
        special = torch.where(is_first, pairs[:, :1], pairs[:, 1:])
        return torch.cat((special.expand(batch, -1, -1, -1), patches), dim=2)


class VGGT(nn.Module):
    """Cameras, depth maps and point maps of a set of images, all in the first camera's frame.

    The trunk follows the caller's autocast; the heads run without it, in their parameters' dtype.
    """

    released_heads = ("camera_head", "depth_head", "point_head", "track_head")
    """Heads that a released checkpoint may hold. Parameters of those that this model lacks are dropped on loading."""

    def __init__(self, config: VGGTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VGGTConfig()
        width = 2 * config.embed_dim
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config.camera, width) if "camera" in config.outputs else None
        self.point_head = DPTHead(config.dpt, width, config.patch_size, out=4) if "points" in config.outputs else None
        self.depth_head = DPTHead(config.dpt, width, config.patch_size, out=2) if "depth" in config.outputs else None
        self.apply(init_linear)
        self.register_load_state_dict_pre_hook(drop_absent_heads)

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Reconstruct a scene.

        Args:
            images: `[S, 3, H, W]` or `[B, S, 3, H, W]`, RGB in 0..1, sides multiples of the patch size.

        Returns:
            - `pose_enc` `[B, S, 9]`: see `pose.decode_pose`; `pose_enc_list`: the same after each refinement step
            - `depth` `[B, S, H, W, 1]`, in the scene's unit; `depth_conf` `[B, S, H, W]`, at least 1
            - `world_points` `[B, S, H, W, 3]`, in the first camera's frame; `world_points_conf` `[B, S, H, W]`
            - `images` `[B, S, 3, H, W]`, outside training only

            without those whose head the model lacks.
        """
        images = check_images(images, self.config.patch_size)
        features = self.aggregator(images)
        size = images.shape[-2], images.shape[-1]
        out = self.cameras(features) | self.maps(features, size)
        if not self.training:
            out["images"] = images
        return out

    def cameras(self, features: dict[int, Tensor]) -> dict[str, Any]:
        """What the camera head makes of the aggregator's tokens, as in `forward`."""
        if self.camera_head is None:
            return {}
        with no_autocast(features[self.config.depth - 1].device):
            poses = self.camera_head(features[self.config.depth - 1][:, :, 0])
        return {"pose_enc_list": poses, "pose_enc": poses[-1]}

    def maps(self, features: dict[int, Tensor], size: tuple[int, int]) -> dict[str, Any]:
        """What the dense heads make of the aggregator's tokens, or of those of some frames; `size` is (H, W)."""
        out: dict[str, Any] = {}
        with no_autocast(next(iter(features.values())).device):
            if self.depth_head is not None:
                raw = self.dense(self.depth_head, features, size)
                out["depth"], out["depth_conf"] = raw[..., :-1].exp(), confidence(raw)
            if self.point_head is not None:
                raw = self.dense(self.point_head, features, size)
                out["world_points"], out["world_points_conf"] = signed_expm1(raw[..., :-1]), confidence(raw)
        return out

    def dense(self, head: DPTHead, features: dict[int, Tensor], size: tuple[int, int]) -> Tensor:
        layers: Sequence[Tensor] = [features[layer] for layer in self.config.dpt.layers]
        return head(layers, size, self.aggregator.special)


def confidence(raw: Tensor) -> Tensor:
    """The last channel as a confidence above 1: `[..., C]` → `[...]`."""
    return 1 + raw[..., -1].exp()


def signed_expm1(x: Tensor) -> Tensor:
    """Inverse of sign(y)·log(1 + |y|), by which points of any distance are regressed."""
    return x.sign() * x.abs().expm1()
