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

from tabulate import tabulate

from vggt_compile.bench import bars, length
from vggt_compile.bench.parts import PARTS
from vggt_compile.errors import BadInput, UnknownName
from vggt_compile.recipes import recipes
from vggt_compile.registry import methods, regions

PHASES = ("cold", "warm")
TOGETHER = "together"
MODELS = {"vggt": "VGGT-1B", "pi3": "π³", "fastvggt": "FastVGGT's own code"}
VARIANTS = ("eager", "compile", "dense", "g2f")
"""What `make bench` runs."""
SPARSE = {
    f"sparse-{percent}": {"layers": {"*": {"blocks": {"method": "predict", "keep": (100 - percent) / 100}}}}
    for percent in (25, 50, 75, 90)
}
"""Plans in which every patch query leaves out so many percent of the key blocks, whatever the weights are."""


WITHOUT = "@without-"
"""`RECIPE@without-hoist_keys,share_tables`: a plan with these passes switched off."""


def split_variant(name: str) -> tuple[str, str]:
    """Plan or way to run, and what `disabled_passes` is set to."""
    plan, _, off = name.partition(WITHOUT)
    return plan, off


def known_variant(name: str) -> str:
    """The name of a variant; UnknownName says what is close where there is none."""
    plan, off = split_variant(name)
    if plan not in all_variants() or (off and plan in ("eager", "compile")):
        raise UnknownName("variant", plan, all_variants())
    check_passes(off)
    return name


def check_passes(off: str) -> None:
    """UnknownName for what no pass is called."""
    passes = set().union(*(entry.aliases for entry in regions()), *(entry.aliases for entry in methods()))
    for switched in filter(None, off.split(",")):
        if switched not in passes:
            raise UnknownName("pass", switched, passes)


@dataclass(frozen=True)
class Settings:
    """What is measured. `size` is height, width in pixels; `repeats` are warm calls by frame count.

    From `long` frames on the first call is the only one: after a smaller count it compiles nothing. `plans` are more
    variants, by name. With `parts` one more call at each count tells where the time goes. A variant whose turn comes
    after `minutes` is not timed.
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
    failed = []
    for name, process in waiting.items():
        late = time.monotonic() > until and process.poll() is None
        if late:
            process.kill()
        process.communicate(b"your turn\n")
        if process.returncode:
            failed.append(f"{name} ({'late' if late else process.returncode})")
    if failed:
        raise BadInput(f"not timed: {', '.join(failed)}; errors are above, the other variants are on the page")


def compiled(work: Path, name: str) -> Path:
    """What a process leaves when it has compiled and waits for its turn."""
    return work / f"{name}.compiled"


def cold_counts(name: str, settings: Settings) -> list[Sequence[int]]:
    """One list for each process. A count below and one above 24 frames are all the graphs that our backend makes."""
    if name == "compile":
        return warm_counts(name, settings)
    return [(max(n for n in settings.frames if n <= 100), min(settings.frames))]


def small_counts(settings: Settings) -> list[int]:
    """The same two graphs, of counts so small that many processes have room on one GPU."""
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
        "compile_first": small_counts(settings),
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


def write(settings: Settings, work: Path, out: Path, name: str = "model") -> str:
    """JSON with everything and the page made from it, which is returned; `name` is that of both files."""
    rows = {phase: read(work, phase, settings) for phase in PHASES}
    record = {"machine": versions(), "name": name, "settings": asdict(settings), **rows}
    text = page(record)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / f"{name}.md").write_text(text)
    bars.draw(rows["warm"], out / f"{name}-parts.png")
    return text


def read(work: Path, phase: str, settings: Settings) -> list[dict[str, Any]]:
    found = {file.stem.split(".")[1] for file in work.glob(f"{phase}.*.jsonl")}
    order = dict.fromkeys((*all_variants(), *settings.plans, *sorted(split_variant(name)[0] for name in found)))
    names = sorted(found, key=lambda name: (list(order).index(split_variant(name)[0]), name))
    files = [file for name in names for file in sorted(work.glob(f"{phase}.{name}.*.jsonl"), key=_first_count)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _first_count(file: Path) -> int:
    return int(file.stem.split(".")[2].split("-")[0])


def all_variants() -> tuple[str, ...]:
    """Eager, plain `torch.compile`, every recipe, and the plans of `SPARSE`."""
    return tuple(dict.fromkeys((*VARIANTS, *recipes(), *SPARSE)))


def versions() -> dict[str, str]:
    import torch
    import triton

    import vggt_compile

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "python": sys.version.split()[0],
        "vggt_compile": vggt_compile.__version__,
    }


def page(record: dict[str, Any]) -> str:
    """The Markdown page of a record: what was run, seconds and memory, compile times, deviation, notes by hand."""
    machine, settings, rows = record["machine"], record["settings"], {phase: record[phase] for phase in PHASES}
    model = MODELS[settings.get("model", "vggt")]
    source = f"unmodified upstream {model}" if settings["upstream"] else f"{model} as written here"
    height, width = settings["size"]
    setting = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join(
        [
            f"# A whole model: {model}\n",
            f"{source}, random weights, all heads but tracking, {height}×{width} pixels, bf16 autocast.",
            f"{setting}.",
            "Frames are a dynamic dimension in every compiled variant. Made by `python -m vggt_compile bench`.\n",
            "`eager` is the model as it comes (cuDNN attention), `compile` plain `torch.compile`, `dense` this backend",
            "with nothing rewritten, `sparse-…` a plan whose patch queries leave out so many percent of the key blocks",
            "in every global layer, time to choose them included; other names are [recipes](../recipes.md).",
            *_about_passes(rows),
            *plans_section(settings),
            "## Seconds and peak memory, warm\n",
            speed_table(rows["warm"]),
            *parts_section(record),
            *length_section(rows["warm"]),
            "\n## First call: tracing, compiling, running\n",
            "Cold: all caches empty, the variants compile side by side. Warm, where there are such rows: a new process",
            "on the caches of the first, which reads code from disk. Rows of a variant are in the order of the calls",
            "in one process, but plain `compile`, which compiles again for every count, has a process for each. In",
            "ours, counts below 24 frames and the others are two graphs; a count that an earlier graph serves shows",
            "its running time only.\n",
            compile_table(rows),
            *deviation_section(rows["warm"]),
            *(f"\n{note}" for note in record.get("notes", ())),
            "",
        ]
    )


def _about_passes(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    off = any(WITHOUT in row["variant"] for measured in rows.values() for row in measured)
    return ["`…@without-…` is a recipe with these [passes](../passes.md) switched off.\n"] if off else [""]


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Speed is over eager, or over dense where eager did not run."""
    base = "eager" if any(row["variant"] == "eager" for row in rows) else "dense"
    seconds = {row["frames"]: row.get("warm_s") for row in rows if row["variant"] == base}
    table = []
    for row in sorted(rows, key=lambda r: r["frames"]):
        if "warm_s" not in row:
            table.append((row["frames"], row["variant"], "out of memory", "", "", row["graphs"]))
            continue
        before = seconds.get(row["frames"])
        ratio = f"{before / row['warm_s']:.2f}×" if before else ""
        table.append(
            (row["frames"], row["variant"], f"{row['warm_s']:.3f}", ratio, f"{row['peak_gib']:.1f}", row["graphs"])
        )
    headers = ("frames", "variant", "seconds", f"speed-up over {base}", "peak GiB", "graphs so far")
    return tabulate(table, headers, tablefmt="github", disable_numparse=True)


def parts_section(record: dict[str, Any]) -> list[str]:
    """Seconds on the GPU by part; nothing where no row has them."""
    rows = sorted((row for row in record["warm"] if "parts" in row), key=lambda row: row["frames"])
    if not rows:
        return []
    table = [(row["frames"], row["variant"], *(f"{row['parts'][part]:.3f}" for part in PARTS)) for row in rows]
    return [
        "\n## Where the time goes\n",
        "Seconds of kernels in one more call under a profiler, by what launched them.\n",
        tabulate(table, ("frames", "variant", *PARTS), tablefmt="github", disable_numparse=True),
        f"\n![Seconds by part]({record['name']}-parts.png)",
    ]


def length_section(rows: list[dict[str, Any]]) -> list[str]:
    """How many frames fit on which card; nothing where too few counts were measured."""
    found = length.table(rows)
    about = (
        "A line through the measured peaks, and the frames at which it reaches what a card has, less "
        f"{length.RESERVE:g} GiB.\nUp to the largest count above it is measured; beyond it is this model."
    )
    return ["\n## How many frames fit\n", about, "", found] if found else []


def plans_section(settings: dict[str, Any]) -> list[str]:
    """The variants that are no recipes, as one would write them."""
    plans = {
        name: {key: part for key, part in plan.items() if part} for name, plan in settings.get("plans", {}).items()
    }
    return ["", *(f"- `{name}`: `{json.dumps(plan)}`" for name, plan in plans.items()), ""] if plans else []


def compile_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """First calls in the order in which they were made; a count served by an earlier graph shows its running time."""
    table = [
        (phase, row["variant"], row["frames"], f"{row['first_s']:.0f}")
        for phase, measured in rows.items()
        for row in measured
        if row["variant"] != "eager" and "first_s" in row
    ]
    return tabulate(table, ("caches", "variant", "frames", "first call, s"), tablefmt="github", disable_numparse=True)


def deviation_section(rows: list[dict[str, Any]]) -> list[str]:
    """How far the outputs are from those of eager, where it ran."""
    table = [
        (r["variant"], r["frames"], *(f"{value:.1e}" for value in r["deviation"].values()))
        for r in rows
        if r.get("deviation")
    ]
    if not table:
        return []
    return [
        "\n## Deviation from eager, ‖a − b‖ / ‖b‖\n",
        "Of bf16 runs with random weights: for `dense` this is rounding, for `g2f` the price of the rewrite on",
        "untrained weights, which says nothing about trained ones.\n",
        tabulate(table, ("variant", "frames", "camera", "depth", "points"), tablefmt="github", disable_numparse=True),
    ]
