"""Dense prediction head: tokens of four layers, fused from coarse to fine into one map a frame (DPT, arXiv:2103.13413).

The submodules carry the names of the released checkpoints (`scratch.refinenet1.resConfUnit2` and so on).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggt_compile.models.layers import at_least_fp32

POSITION_GAIN = 0.1
POSITION_BASE = 100.0
LAST_CHANNELS = 32


@dataclass(frozen=True)
class DPTConfig:
    """Sizes of a dense head. The defaults are those of VGGT-1B."""

    layers: tuple[int, int, int, int] = (4, 11, 17, 23)
    """Trunk layers that it reads, counted from 0, shallow to deep."""
    channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    """Channels of each layer's map before fusion, multiples of 4."""
    features: int = 256
    """Channels of the fused map, a multiple of 8."""
    chunk: int | None = 8
    """Frames a pass in eager mode, which bounds memory; None takes all at once. A compiled head takes all at once."""


class DPTHead(nn.Module):
    """Reads tokens `[B, S, P, dim]` of four layers and predicts `out` channels a pixel.

    Attributes:
        chunk: frames a pass in eager mode, see `DPTConfig.chunk`. A graph takes all at once: a loop over frames would
            pin their number. For long compiled runs compile the trunk alone; it already returns only what is read. An
            export of this package has a loop in the graph, where `chunk` is not None.
    """

    def __init__(self, config: DPTConfig, dim: int, patch_size: int, out: int) -> None:
        super().__init__()
        self.patch_size, self.chunk = patch_size, config.chunk
        first, second, _, fourth = config.channels
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in config.channels)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(first, first, kernel_size=4, stride=4),
                nn.ConvTranspose2d(second, second, kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(fourth, fourth, kernel_size=3, stride=2, padding=1),
            )
        )
        self.scratch = Fusion(config, out)

    def forward(self, layers: Sequence[Tensor], image_size: tuple[int, int], special: int) -> Tensor:
        """Tokens of the four layers, each `[B, S, P, dim]` with `special` leading tokens → `[B, S, H, W, out]`.

        Raw: the activations are the model's. `image_size` is (H, W) in pixels.
        """
        frames = layers[0].shape[1]
        if torch.compiler.is_compiling() or self.chunk is None:
            return self.predict(layers, image_size, special)
        starts = range(0, frames, self.chunk)
        parts = [self.predict([t[:, i : i + self.chunk] for t in layers], image_size, special) for i in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def predict(self, layers: Sequence[Tensor], image_size: tuple[int, int], special: int) -> Tensor:
        """One pass over all given frames; shapes as in `forward`."""
        batch, frames = layers[0].shape[:2]
        maps = []
        for tokens, project, resize in zip(layers, self.projects, self.resize_layers, strict=True):
            x = project(self.as_map(tokens[:, :, special:], image_size))
            maps.append(resize(x + position_map(x, image_size)))
        x = F.interpolate(self.scratch(maps), size=image_size, mode="bilinear", align_corners=True)
        x = self.scratch.output_conv2(x + position_map(x, image_size))
        return at_least_fp32(x).permute(0, 2, 3, 1).unflatten(0, (batch, frames))

    def as_map(self, tokens: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Normalised patch tokens `[B, S, h·w, C]` as images `[B·S, C, h, w]`."""
        height, width = (side // self.patch_size for side in image_size)
        x = self.norm(tokens.flatten(0, 1).to(self.norm.weight.dtype))
        return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """Four maps, fine to coarse, into one of the finest size times two, and the layers that read it out."""

    def __init__(self, config: DPTConfig, out: int) -> None:
        super().__init__()
        features = config.features
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = (
            nn.Conv2d(channels, features, 3, padding=1, bias=False) for channels in config.channels
        )
        self.refinenet1 = FusionBlock(features)
        self.refinenet2 = FusionBlock(features)
        self.refinenet3 = FusionBlock(features)
        self.refinenet4 = FusionBlock(features, skip=False)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, LAST_CHANNELS, 3, padding=1), nn.ReLU(), nn.Conv2d(LAST_CHANNELS, out, 1)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """`[N, channels[i], h_i, w_i]` for i = 0..3 → `[N, features/2, 2·h_0, 2·w_0]`."""
        first, second = self.layer1_rn(maps[0]), self.layer2_rn(maps[1])
        third, fourth = self.layer3_rn(maps[2]), self.layer4_rn(maps[3])
        x = self.refinenet4(fourth, None, third.shape[2:])
        x = self.refinenet3(x, third, second.shape[2:])
        x = self.refinenet2(x, second, first.shape[2:])
        x = self.refinenet1(x, first, (2 * first.shape[2], 2 * first.shape[3]))
        return self.output_conv1(x)


class FusionBlock(nn.Module):
    """Adds the skip map, refines, and resizes to `size`, all in `[N, features, h, w]`."""

    def __init__(self, features: int, skip: bool = True) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        if skip:
            self.resConfUnit1 = ResidualConv(features)
        self.resConfUnit2 = ResidualConv(features)

    def forward(self, x: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = F.interpolate(self.resConfUnit2(x), size=tuple(size), mode="bilinear", align_corners=True)
        return self.out_conv(x)


class ResidualConv(nn.Module):
    """Two 3×3 convolutions around a ReLU, added to the *rectified* input.

    The released weights were trained with in-place ReLUs, so what their shortcut carried was already rectified.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return x + self.conv2(self.conv1(x).relu())


def position_map(like: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Sines of pixel position for a map shaped as `like` `[N, C, h, w]`: `[1, C, h, w]`.

    Coordinates are pixel centres in units of half the image diagonal, so they tell the aspect ratio. The first half of
    the channels sees columns, the second rows; neither sees both, so each is computed for one line and spread.
    """
    channels, height, width = like.shape[1:]
    diagonal = (image_size[0] ** 2 + image_size[1] ** 2) ** 0.5
    columns = sines(width, image_size[1] / diagonal, channels // 2, like.device)[:, None, :]
    rows = sines(height, image_size[0] / diagonal, channels // 2, like.device)[:, :, None]
    both = torch.cat((columns.expand(-1, height, -1), rows.expand(-1, -1, width)))
    return (both * POSITION_GAIN).to(like.dtype)[None]


def sines(count: int, span: float, channels: int, device: torch.device) -> Tensor:
    """Sine and cosine of `count` cell centres between −span and span, at frequencies 1..1/100: `[channels, count]`."""
    centres = (2 * torch.arange(count, device=device) + 1 - count).float() * (span / count)
    steps = torch.arange(channels // 2, device=device).float() / (channels // 2)
    angles = POSITION_BASE ** (-steps[:, None]) * centres
    return torch.cat((angles.sin(), angles.cos()))
