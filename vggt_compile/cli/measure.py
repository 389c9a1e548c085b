"""Times and memory of one way to run a model: the first call with its compilation, then the median of warm calls."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggt_compile.errors import VggtCompileError


@dataclass(frozen=True)
class Run:
    """Attributes:
    first_s: the first call, which compiles; warm_s: median of the calls after it.
    peak_bytes: of one warm call; None where the system does not tell. On a GPU all that torch had allocated, weights
        included; on a CPU the growth of resident memory over its state before the call.
    output: the model's tensors, on the CPU.
    """

    name: str
    first_s: float
    warm_s: float
    peak_bytes: int | None
    output: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("name", "first_s", "warm_s", "peak_bytes")}


def measure(name: str, call: Callable[[], Mapping[str, Any]], device: torch.device, repeats: int = 3) -> Run:
    """Run `call` once cold and `repeats` times warm."""
    try:
        first_s, _ = timed(call, device)
        before = start_peak(device)
        times = [timed(call, device)[0]]
        peak = read_peak(device, before)
        times += [timed(call, device)[0] for _ in range(repeats - 2)]
        last, output = timed(call, device)
    except torch.OutOfMemoryError as error:
        raise VggtCompileError(f"{name} ran out of GPU memory; try fewer --frames or a smaller --size") from error
    tensors = {key: value.cpu() for key, value in output.items() if isinstance(value, Tensor) and key != "images"}
    return Run(name, first_s, statistics.median([*times, last]), peak, tensors)


def timed(call: Callable[[], Mapping[str, Any]], device: torch.device) -> tuple[float, Mapping[str, Any]]:
    synchronize(device)
    start = time.perf_counter()
    output = call()
    synchronize(device)
    return time.perf_counter() - start, output


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> int | None:
    """Forget earlier peaks, for compiling has used more than running ever will; what to subtract from the next one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return resident()


def read_peak(device: torch.device, before: int | None) -> int | None:
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")
    return None if peak is None or before is None else max(0, peak - before)


def resident(line: str = "VmRSS") -> int | None:
    """Resident memory of this process in bytes, now (VmRSS) or at its peak (VmHWM); None without Linux's /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{line}:\s*(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
