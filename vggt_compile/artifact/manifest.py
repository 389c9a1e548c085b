"""What an artifact says of itself, and whether this machine can run it."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import device as Device

from vggt_compile import __version__
from vggt_compile.artifact.archive import MANIFEST, Archive
from vggt_compile.artifact.request import Span
from vggt_compile.errors import DamagedArtifact, NotAnArtifact, WrongMachine

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One graph of the package.

    Attributes:
        own_constants: tensors that this entry has beside those of the first one, whose weights all entries share.
        report: of the rewrite, as `Report.to_dict` gives it.
        check: how far its outputs were from its program's after the compile, see `check`; empty if nobody looked.
        seconds: how long each stage of its export took.
    """

    name: str
    span: Span
    own_constants: tuple[str, ...]
    report: dict[str, Any]
    check: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    vggt_compile, torch, triton: versions that made the artifact; None for a Triton that was not there.
    device: "cpu" or "cuda". architecture: "sm_90", or the vector instructions of a CPU as torch names them.
    platform: system and machine.
    precision: "fp32"; "autocast": bf16 as autocast has it; "bf16": the same numbers, weights kept in bf16.
    plan: as JSON, with the recipe's name under `plan_name`.
    weights: a hash of the model's state dictionary.
    records: a digest for each record of the file.
    """

    vggt_compile: str
    torch: str
    triton: str | None
    device: str
    architecture: str
    platform: str
    precision: str
    plan_name: str
    plan: dict[str, Any]
    weights: str
    entries: tuple[Entry, ...]
    records: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """With a seal over the rest: it tells damage, not forgery."""
        content = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"seal": _seal(content)} | json.loads(content), indent=1)

    @classmethod
    def read(cls, archive: Archive) -> Manifest:
        """NotAnArtifact where there is none or it is of a later format, DamagedArtifact where it is not what it was."""
        if MANIFEST not in archive.names():
            raise NotAnArtifact(archive.path, "is no artifact of vggt_compile: it has no manifest")
        try:
            content = json.loads(bytes(archive.record(MANIFEST)))
            seal = content.pop("seal")
        except (ValueError, KeyError, AttributeError) as error:
            raise DamagedArtifact(archive.path, "is damaged: its manifest cannot be read") from error
        if content.get("format", 0) > FORMAT:
            raise NotAnArtifact(archive.path, f"was written by vggt_compile {content['vggt_compile']}, newer than this")
        if seal != _seal(json.dumps(content, sort_keys=True)):
            raise DamagedArtifact(archive.path, "is damaged: its manifest is not what was written")
        entries = tuple(
            replace(Entry(**entry), span=_span(entry["span"]), own_constants=tuple(entry["own_constants"]))
            for entry in content.pop("entries")
        )
        return cls(**content, entries=entries)

    def check(self, path: object, device: Device) -> None:
        """WrongMachine where this process cannot run the artifact on a device."""
        if _release(torch.__version__) < _release(self.torch):
            raise WrongMachine(path, f"was made with torch {self.torch}, this is {torch.__version__}; update torch")
        if platform_name() != self.platform:
            raise WrongMachine(path, f"was made for {self.platform}, this is {platform_name()}; export it here")
        if device.type != self.device:
            raise WrongMachine(
                path, f"was made for {self.device} and cannot run on {device}; export it on {device.type}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise WrongMachine(path, f"was made for a GPU ({self.architecture}), and torch sees none here")
        here = architecture(device)
        if not _runs(self.architecture, here):
            raise WrongMachine(path, f"was made for {self.architecture}, this device is {here}; export it here")


def platform_name() -> str:
    return f"{sys.platform}-{platform.machine()}"


def architecture(device: torch.device) -> str:
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()


def made_here(device: torch.device) -> dict[str, Any]:
    """The fields of a manifest that tell of this process."""
    import importlib.metadata

    there = importlib.util.find_spec("triton") is not None
    return {
        "vggt_compile": __version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if there else None,
        "device": device.type,
        "architecture": architecture(device),
        "platform": platform_name(),
    }


_VECTORS = ("DEFAULT", "AVX2", "AVX512")


def _runs(made_for: str, here: str) -> bool:
    """Code for fewer vector instructions runs where there are more; code for a GPU runs on its kind alone."""
    if made_for in _VECTORS and here in _VECTORS:
        return _VECTORS.index(made_for) <= _VECTORS.index(here)
    return made_for == here


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _seal(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _span(given: dict[str, Any]) -> Span:
    frames, batch, size = (tuple(given[name]) for name in ("frames", "batch", "size"))
    return Span(frames, batch, size)  # older files also say how their dense heads cut frames
