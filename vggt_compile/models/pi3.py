"""π³ (arXiv:2507.13347): permutation-equivariant reconstruction; no frame is special, points are local to their camera.

Parameter names and shapes are those of the released checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_compile.models.camera import RigidHead
from vggt_compile.models.encoder import IMAGENET_MEAN, IMAGENET_STD, ViT, ViTConfig, check_images
from vggt_compile.models.layers import Block, at_least_fp32, init_linear, no_autocast
from vggt_compile.models.rope import Rotation, grid_positions, rotation


@dataclass(frozen=True)
class Pi3Config:
    """Shape of a π³. The defaults are those of the released model."""

    patch_size: int = 14
    """Side of a patch, in pixels; image sides are multiples of it."""
    embed_dim: int = 1024
    """Width of a token in encoder and decoder, a multiple of 4 · `heads`."""
    depth: int = 36
    """Decoder blocks, an even number: even ones see their frame, odd ones all frames."""
    heads: int = 16
    """Attention heads of a decoder block."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over its token width, in the decoder and in the readouts."""
    registers: int = 5
    """Register tokens that precede a frame's patches."""
    rope_base: float = 100.0
    """Base of the rotary frequencies."""
    layer_scale: float = 0.01
    """Initial gain of the decoder's residual branches."""
    encoder: ViTConfig = field(default_factory=ViTConfig)
    """What makes patch tokens of an image."""
    readout_depth: int = 5
    """Blocks between the decoder and each of the three heads; they see their frame."""
    readout_dim: int = 1024
    """Width of a token there, a multiple of 4 · `readout_heads`."""
    readout_heads: int = 16
    """Attention heads there."""
    camera_dim: int = 512
    """Width of the camera head."""

    def __post_init__(self) -> None:
        for dim, heads in ((self.embed_dim, self.heads), (self.readout_dim, self.readout_heads)):
            if dim % (4 * heads):
                raise ValueError(f"a token width of {dim} must be a multiple of 4 · heads = {4 * heads}")
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth={self.depth} must be even: frame and global blocks come in pairs")


class Readout(nn.Module):
    """Transformer that prepares decoder tokens `[N, P, 2·C]` for one head: `[N, P, out]`, frame by frame."""

    def __init__(self, config: Pi3Config, out: int) -> None:
        super().__init__()
        dim = config.readout_dim
        self.projects = nn.Linear(2 * config.embed_dim, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.readout_heads, config.mlp_ratio, eps=1e-6) for _ in range(config.readout_depth)
        )
        self.linear_out = nn.Linear(dim, out)

    def forward(self, tokens: Tensor, angles: Rotation) -> Tensor:
        x = self.projects(tokens)
        for block in self.blocks:
            x = block(x, angles)
        return self.linear_out(x)


class PixelHead(nn.Module):
    """One linear map from a patch token to all pixels of the patch."""

    def __init__(self, dim: int, patch_size: int, out: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, out * patch_size**2)

    def forward(self, tokens: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Patch tokens `[N, h·w, dim]` → `[N, H, W, out]`, at least fp32; `image_size` is (H, W) in pixels."""
        grid = image_size[0] // self.patch_size, image_size[1] // self.patch_size
        x = self.proj(tokens.to(self.proj.weight.dtype)).unflatten(1, grid).permute(0, 3, 1, 2)
        return at_least_fp32(F.pixel_shuffle(x, self.patch_size).permute(0, 2, 3, 1))


class Pi3(nn.Module):
    """Local point maps, confidences and cameras of an unordered set of images.

    Encoder, decoder and readouts follow the caller's autocast; the heads run without it, in their parameters' dtype.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: Pi3Config | None = None) -> None:
        super().__init__()
        self.config = c = config or Pi3Config()
        self.encoder = ViT(c.encoder, c.patch_size, c.embed_dim)
        self.register_token = nn.Parameter(torch.empty(1, 1, c.registers, c.embed_dim))
        self.decoder = nn.ModuleList(
            Block(c.embed_dim, c.heads, c.mlp_ratio, c.layer_scale, qk_norm=True, eps=1e-6) for _ in range(c.depth)
        )
        self.point_decoder, self.conf_decoder = Readout(c, c.readout_dim), Readout(c, c.readout_dim)
        self.camera_decoder = Readout(c, c.camera_dim)
        self.point_head = PixelHead(c.readout_dim, c.patch_size, out=3)
        self.conf_head = PixelHead(c.readout_dim, c.patch_size, out=1)
        self.camera_head = RigidHead(c.camera_dim)
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.apply(init_linear)
        nn.init.trunc_normal_(self.register_token, std=0.02)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Reconstruct a scene.

        Args:
            images: `[S, 3, H, W]` or `[B, S, 3, H, W]`, RGB in 0..1, sides multiples of the patch size.

        Returns:
            - `local_points` `[B, S, H, W, 3]`: in each camera's own frame, x right, y down, z forward, up to scale
            - `points` `[B, S, H, W, 3]`: the same moved by `camera_poses`
            - `camera_poses` `[B, S, 4, 4]`: camera to world
            - `conf` `[B, S, H, W, 1]`: logit of the confidence
        """
        images = check_images(images, self.config.patch_size)
        batch, frames, _, height, width = images.shape
        grid = height // self.config.patch_size, width // self.config.patch_size
        positions = grid_positions(*grid, self.config.registers, images.device)
        angles = rotation(positions, self.config.embed_dim // self.config.heads, self.config.rope_base)
        tokens = self.decode(images, angles)

        head_dim = self.config.readout_dim // self.config.readout_heads
        angles = rotation(positions, head_dim, self.config.rope_base)
        point_tokens, conf_tokens, camera_tokens = (
            readout(tokens, angles)[:, self.config.registers :]
            for readout in (self.point_decoder, self.conf_decoder, self.camera_decoder)
        )
        with no_autocast(images.device):
            local_points = from_ray(self.point_head(point_tokens, (height, width))).unflatten(0, (batch, frames))
            conf = self.conf_head(conf_tokens, (height, width)).unflatten(0, (batch, frames))
            poses = self.camera_head(camera_tokens).unflatten(0, (batch, frames))
            points = torch.einsum("bsij,bshwj->bshwi", poses[..., :3, :3], local_points)
            points = points + poses[..., None, None, :3, 3]
        return {"points": points, "local_points": local_points, "conf": conf, "camera_poses": poses}

    def decode(self, images: Tensor, in_frame: Rotation) -> Tensor:
        """Images `[B, S, 3, H, W]` → the last frame block's and the last global block's tokens, `[B·S, P, 2·C]`."""
        batch, frames = images.shape[:2]
        patches = self.encoder(((images - self.image_mean) / self.image_std).flatten(0, 1))
        registers = self.register_token[0].expand(batch * frames, -1, -1)
        local = tokens = torch.cat((registers, patches), dim=1)
        in_all = in_frame.repeat(frames)
        for layer, block in enumerate(self.decoder):
            if layer % 2 == 0:
                tokens = local = block(tokens, in_frame)
            else:
                tokens = block(tokens.unflatten(0, (batch, frames)).flatten(1, 2), in_all)
                tokens = tokens.unflatten(1, (frames, -1)).flatten(0, 1)
        return torch.cat((local, tokens), dim=-1)


def from_ray(x: Tensor) -> Tensor:
    """(x/z, y/z, log z) → (x, y, z), `[..., 3]`."""
    depth = x[..., 2:].exp()
    return torch.cat((x[..., :2] * depth, depth), dim=-1)
