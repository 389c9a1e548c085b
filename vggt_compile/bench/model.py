"""A whole model, several ways to run it, several frame counts: seconds, memory, graphs and compile time.

Two phases. `cold` compiles every variant at once, each with empty caches of its own, and notes the first calls. `warm`
runs one variant after the other in new processes on those caches, so that nothing else is on the GPU while it is timed.
`together` is shorter: the processes that compiled wait for each other, and are then timed one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vggt_compile.bench.turns import alone
from vggt_compile.bench.variants import SPARSE, split_variant
from vggt_compile.errors import BadInput

PHASES = ("cold", "warm")
TOGETHER = "together"
COMPILE_WITH = 128
"""Frames that run where code for many more is made: at 392×518 no recipe treats these otherwise than the many."""
MODELS = {"vggt": "VGGT-1B", "pi3": "π³", "fastvggt": "FastVGGT's own code"}


@dataclass(frozen=True)
class Settings:
    """What is measured. `size` is height, width in pixels; `repeats` are warm calls by frame count.

    From `long` frames on a first call that takes long is the only one: after a smaller count it compiles nothing.
    `plans` are more variants, by name. With `parts` one more call at each count tells where the time goes. A variant
    whose turn comes after `minutes` is not timed. Where variants compile together, small counts are run; the code that
    they make is that for `compile_for` frames if it is not 0: from 672 frames of 392×518 pixels on, VGGT-1B needs
    indices of 64 bits, which a graph made for fewer frames has not.
    """

    upstream: str
    model: str = "vggt"
    frames: tuple[int, ...] = (8, 32, 100, 300)
    size: tuple[int, int] = (392, 518)
    compare_up_to: int = 32
    long: int = 500
    plans: dict[str, Any] = field(default_factory=dict)
    parts: bool = False
    minutes: float = 24 * 60
    compile_for: int = 0

    def repeats(self) -> dict[str, int]:
        return {str(n): 7 if n <= 32 else 3 if n <= 100 else int(n < self.long) for n in self.frames}


def run_phase(phase: str, variants: Sequence[str], settings: Settings, work: Path) -> None:
    if phase == TOGETHER:
        run_together(variants, settings, work)
        return
    if phase == "cold":
        jobs = [(name, counts) for name in variants if name != "eager" for counts in cold_counts(name, settings)]
        for process in [start(phase, name, counts, settings, work) for name, counts in jobs]:
            finish(process)
        return
    for name in variants:
        for counts in warm_counts(name, settings):
            finish(start(phase, name, counts, settings, work))


def run_together(variants: Sequence[str], settings: Settings, work: Path) -> None:
    """All variants compile side by side; then each is timed while the others wait and nothing else runs."""
    until = time.monotonic() + 60 * settings.minutes
    for name in variants:
        compiled(work, name).unlink(missing_ok=True)
    waiting = {name: start(TOGETHER, name, sorted(settings.frames), settings, work) for name in variants}
    while any(one.poll() is None and not compiled(work, name).exists() for name, one in waiting.items()):
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    failed = [why for name, process in waiting.items() if (why := take_turn(name, process, until))]
    if failed:
        raise BadInput(f"not timed: {', '.join(failed)}; errors are above, the other variants are on the page")


def take_turn(name: str, process: subprocess.Popen[bytes], until: float) -> str:
    """Let a process that waits time its variant. Why that failed, "" where it did not."""
    with alone():
        late = time.monotonic() > until and process.poll() is None
        if late:
            process.kill()
        process.communicate(b"your turn\n")
    return f"{name} ({'late' if late else process.returncode})" if process.returncode else ""


def compiled(work: Path, name: str) -> Path:
    """What a process leaves when it has compiled and waits for its turn."""
    return work / f"{name}.compiled"


def cold_counts(name: str, settings: Settings) -> list[Sequence[int]]:
    """One list for each process. A count below and one above 24 frames are all the graphs that our backend makes."""
    if name == "compile":
        return warm_counts(name, settings)
    return [(max(n for n in settings.frames if n <= 100), min(settings.frames))]


def compiling_counts(settings: Settings) -> list[int]:
    """The same two graphs, of counts so small that many processes have room on one GPU."""
    if settings.compile_for:
        return [COMPILE_WITH]
    ordered = sorted(settings.frames)
    return sorted({ordered[0], next((n for n in ordered if n >= 24), ordered[0])}, reverse=True)


def warm_counts(name: str, settings: Settings) -> list[Sequence[int]]:
    """Plain `torch.compile` compiles again for every count, each of which therefore has a process of its own."""
    counts = sorted(settings.frames)
    return [(n,) for n in counts] if name == "compile" else [counts]


def start(phase: str, name: str, frames: Sequence[int], settings: Settings, work: Path) -> subprocess.Popen[bytes]:
    """A worker on one variant; its lines go to `work/phase.variant.frames.jsonl`."""
    job = ".".join((phase, name, "-".join(map(str, frames))))
    told = work / f"{job}.json"
    plan, off = split_variant(name)
    rows = {at: str(work / f"{at}.{name}.{'-'.join(map(str, frames))}.jsonl") for at in PHASES}
    text = asdict(settings) | {
        "variant": name,
        "phase": phase,
        "rows": rows,
        "compile_first": compiling_counts(settings),
        "compiled": str(compiled(work, name)),
        "plan": (SPARSE | settings.plans).get(plan, plan),
        "off": off,
        "frames": frames,
        "repeats": settings.repeats(),
        "work": str(work),
    }
    told.write_text(json.dumps(text))
    caches = {k: str(work / f"cache-{name}" / k) for k in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-m", "vggt_compile.bench.worker", str(told)]
    print(f"{phase}: {name} at {list(frames)} frames", file=sys.stderr, flush=True)
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | caches)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise BadInput(f"the benchmark of {process.args!r} failed with code {process.returncode}; its errors are above")
