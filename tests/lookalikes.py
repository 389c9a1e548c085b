"""Classes that stand in the way of tracing, as the published models have them, and some that only look so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TableRotary(nn.Module):
    """Two-dimensional rotary embedding from a table as long as the largest position."""

    def __init__(self, frequency: float = 100.0, scaling: float = 1.0) -> None:
        super().__init__()
        self.base_frequency, self.scaling_factor = frequency, scaling
        self.tables: dict = {}

    def table(self, dim: int, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (dim, length, device, dtype)
        if key not in self.tables:
            inverse = 1.0 / (self.base_frequency ** (torch.arange(0, dim, 2, device=device).float() / dim))
            angles = torch.einsum("i,j->ij", torch.arange(length, device=device, dtype=inverse.dtype), inverse)
            angles = torch.cat((angles.to(dtype), angles.to(dtype)), -1)
            self.tables[key] = (angles.cos().to(dtype), angles.sin().to(dtype))
        return self.tables[key]

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def along(self, tokens: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (F.embedding(positions, table)[:, None] for table in (cos, sin))
        return tokens * cos + self.turn(tokens) * sin

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        dim = tokens.size(-1) // 2
        cos, sin = self.table(dim, int(positions.max()) + 1, tokens.device, tokens.dtype)
        rows, columns = tokens.chunk(2, dim=-1)
        rows = self.along(rows, positions[..., 0], cos, sin)
        columns = self.along(columns, positions[..., 1], cos, sin)
        return torch.cat((rows, columns), -1)


class ScaledRotary(TableRotary):
    """A fork whose scaling matters: not what the traceable form computes."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        dim = tokens.size(-1) // 2
        cos, sin = self.table(dim, int(positions.max()) + 1, tokens.device, tokens.dtype)
        rows, columns = (tokens * self.scaling_factor).chunk(2, dim=-1)
        rows = self.along(rows, positions[..., 0], cos, sin)
        columns = self.along(columns, positions[..., 1], cos, sin)
        return torch.cat((rows, columns), -1)


class SwappedRotary(TableRotary):
    """A fork that turns the first half with the column."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        dim = tokens.size(-1) // 2
        cos, sin = self.table(dim, int(positions.max()) + 1, tokens.device, tokens.dtype)
        rows, columns = tokens.chunk(2, dim=-1)
        rows = self.along(rows, positions[..., 1], cos, sin)
        columns = self.along(columns, positions[..., 0], cos, sin)
        return torch.cat((rows, columns), -1)


class Positions:
    """Grid positions, kept for the next call."""

    def __init__(self) -> None:
        self.kept: dict = {}

    def __call__(self, batch: int, height: int, width: int, device: torch.device) -> Tensor:
        if (height, width) not in self.kept:
            rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
            self.kept[height, width] = torch.cartesian_prod(rows, columns)
        kept = self.kept[height, width]
        return kept.view(1, height * width, 2).expand(batch, -1, -1).clone()


class ColumnsFirst:
    """A fork that lists columns first."""

    def __init__(self) -> None:
        self.kept: dict = {}

    def __call__(self, batch: int, height: int, width: int, device: torch.device) -> Tensor:
        grid = torch.cartesian_prod(torch.arange(width, device=device), torch.arange(height, device=device))
        return grid.view(1, height * width, 2).expand(batch, -1, -1).clone()


class Head(nn.Module):
    """A dense head that works on chunks of frames."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Linear(3, 2)
        self.mix = nn.Linear(4, 1)

    def forward(self, tokens: list[Tensor], images: Tensor, patch_start_idx: int, frames_chunk_size: int = 8) -> Tensor:
        frames = images.shape[1]
        if frames_chunk_size is None or frames_chunk_size >= frames:
            return self.some(tokens, images, patch_start_idx)
        parts = []
        for start in range(0, frames, frames_chunk_size):
            end = min(start + frames_chunk_size, frames)
            parts.append(self.some(tokens, images, patch_start_idx, start, end))
        return torch.cat(parts, dim=1)

    def some(
        self, tokens: list[Tensor], images: Tensor, skip: int, start: int | None = None, end: int | None = None
    ) -> Tensor:
        if start is not None and end is not None:
            images, tokens = images[:, start:end], [t[:, start:end] for t in tokens]
        scale = self.mix(tokens[0][:, :, skip:].mean(2))[..., None, None]
        return self.colours(images.movedim(2, -1)).movedim(-1, 2) * scale


class Attributes(dict):
    """A dictionary read by attributes, with state of its own out of their way."""

    def __init__(self, given: dict | None = None) -> None:
        object.__setattr__(self, "closed", False)
        for key, value in (given or {}).items():
            self[key] = value

    def __setitem__(self, name: str, value: object) -> None:
        if object.__getattribute__(self, "closed"):
            raise KeyError(name)
        super(Attributes, self).__setitem__(name, value)  # noqa: UP008

    def __setattr__(self, name: str, value: object) -> None:
        self[name] = value

    def __getattr__(self, name: str) -> object:
        return self[name]


class FlatHead(nn.Module):
    """A dense head that works on chunks of batch times frames and returns a dictionary class."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 1)

    def forward(
        self, feats: list[tuple[Tensor, ...]], H: int, W: int, patch_start_idx: int, chunk_size: int = 8
    ) -> Attributes:
        batch, frames, tokens, width = feats[0][0].shape
        flat = [feat[0].reshape(batch * frames, tokens, width) for feat in feats]
        if chunk_size is None or chunk_size >= frames:
            depth = self.mix(flat[0][:, patch_start_idx:])
        else:
            starts = range(0, batch * frames, chunk_size)
            depth = torch.cat([self.mix(flat[0][i : i + chunk_size, patch_start_idx:]) for i in starts])
        out = Attributes({"depth": depth.reshape(batch, frames, H, W)})
        out.confidence = out.depth.exp()
        return out


class Log:
    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, text: str) -> None:
        self.said.append(text)
        print(text)


LOG = Log()


class Talks(nn.Module):
    """A model that calls a home-made logger which prints."""

    def forward(self, x: Tensor) -> Tensor:
        LOG.info("forward")
        return x * 2


class AsksForLocals(nn.Module):
    """A forward that asks which names are bound."""

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        if double:
            factor = 2.0
        if "factor" in locals():
            x = x * factor
            del factor
        return x + 1 if "factor" not in locals() else x


class TalksToCuda(nn.Module):
    """A loop that synchronises and frees memory, and a choice by what the GPU can do."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        for _ in range(2):
            if x.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            x = x * 2
        return x.to(dtype)


class Trunk(nn.Module):
    """Rotary embedding and positions at work."""

    def __init__(self, rotary: nn.Module | None = None) -> None:
        super().__init__()
        self.rotary, self.positions = rotary or TableRotary(), Positions()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        positions = self.positions(x.shape[0], height, width, x.device)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(self.rotary(q, positions), self.rotary(k, positions), v)
        return out.transpose(1, 2).flatten(2)
