"""From images to patch tokens: a DINOv2 ViT with registers (arXiv:2304.07193, arXiv:2309.16588), or one convolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_compile.models.layers import Block

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the image encoder; its token width is the model's. The defaults are DINOv2 ViT-L/14 with registers."""

    depth: int = 24
    """Number of blocks."""
    heads: int = 16
    """Attention heads of a block."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over the token width."""
    registers: int = 4
    """Register tokens, dropped at the output."""
    grid: int = 37
    """Side of the square grid that the stored position embedding covers, in patches (37 · 14 px = 518 px)."""
    layer_scale: float = 1.0
    """Initial gain of the residual branches."""


class PatchEmbed(nn.Module):
    """One linear map of each square patch, `[B, 3, H, W]` → `[B, h·w, C]`, rows first."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Encodes each image by itself.

    Args:
        config: depth, heads, registers, and the grid of the stored position embedding.
        patch_size: side of a patch, in pixels.
        dim: width of a token.
        mask_token: hold DINOv2's mask token, which nothing reads here: VGGT's checkpoint has it, π³'s has not.
    """

    def __init__(self, config: ViTConfig, patch_size: int, dim: int, mask_token: bool = False) -> None:
        super().__init__()
        self.grid, self.patch_size = config.grid, patch_size
        self.special = 1 + config.registers
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, config.registers, dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.mlp_ratio, config.layer_scale, eps=1e-6) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for token in (self.cls_token, self.pos_embed, self.register_tokens):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]`, sides multiples of the patch → patch tokens `[B, h·w, C]`."""
        batch, _, height, width = images.shape
        cls_position, patch_positions = self.positions(height // self.patch_size, width // self.patch_size)
        special = torch.cat((self.cls_token + cls_position, self.register_tokens), dim=1)
        patches = self.patch_embed(images) + patch_positions
        x = torch.cat((special.expand(batch, -1, -1), patches), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.special :]

    def positions(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Position embedding of the class token `[1, 1, C]` and of a grid of patches `[1, height·width, C]`.

        Resampled also where the grid is the stored one: that is the identity then, and asking whether it is would pin
        the image size of a traced graph.
        """
        cls_position, stored = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        stored = stored.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(stored.float(), size=(height, width), mode="bicubic", antialias=True)
        return cls_position, resized.flatten(2).transpose(1, 2).to(stored.dtype)


def normalize(images: Tensor) -> Tensor:
    """Images `[..., 3, H, W]` in 0..1 → zero mean and unit variance over ImageNet, channel by channel.

    Scalars, not a buffer: one that no checkpoint holds would stay empty in a model built on the meta device.
    """
    channels = zip(images.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=-3)


def check_images(images: Tensor, patch_size: int) -> Tensor:
    """Images as `[B, S, 3, H, W]`, from `[S, 3, H, W]` or `[B, S, 3, H, W]`.

    Raises:
        ValueError: another rank, another number of channels, or a side that is no multiple of `patch_size` pixels.
    """
    if images.ndim not in (4, 5) or images.shape[-3] != 3:
        raise ValueError(f"images must be [S, 3, H, W] or [B, S, 3, H, W], got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} by {width} px do not divide into patches of {patch_size} px")
    return images if images.ndim == 5 else images[None]
