"""One variant of a model in a process of its own: clean caches, clean peak memory, no shims where none belong.

Called by `vggt_compile.bench.model` as `python -m vggt_compile.bench.worker SETTINGS.json`; writes one JSON line for
each frame count to the file of its phase.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggt_compile.bench.model import TOGETHER
from vggt_compile.bench.parts import milliseconds, profiled
from vggt_compile.bench.reported import Reported

BRIEF = 20.0
"""Seconds under which a first call is made once more, whatever the count."""
COMPARED = {
    "vggt": ("pose_enc", "depth", "world_points"),
    "fastvggt": ("pose_enc", "depth", "world_points"),
    "pi3": ("camera_poses", "conf", "local_points"),
}


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model = load(settings)
        run = Reported(variant(settings["variant"], settings["plan"], settings["off"], model))
        if settings["phase"] != TOGETHER:
            write(settings, settings["phase"], (measure(run, frames, settings) for frames in settings["frames"]))
            return
        if settings["variant"] != "eager":
            write(settings, "cold", (first_call(run, frames, settings) for frames in settings["compile_first"]))
        torch.cuda.empty_cache()
        Path(settings["compiled"]).touch()
        sys.stdin.readline()  # until nothing else runs
        rows = (measure(run, frames, settings) for frames in settings["frames"])
        write(settings, "warm", ({key: row[key] for key in row if key != "first_s"} for row in rows))


def write(settings: dict[str, Any], phase: str, rows: Iterable[dict[str, Any]]) -> None:
    with Path(settings["rows"][phase]).open("w") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)


def load(settings: dict[str, Any]) -> nn.Module:
    """Upstream's own model from its checkout, or the one written here; random weights, seeded."""
    torch.manual_seed(0)
    if settings["model"] == "pi3":
        return pi3(settings["upstream"]).eval().cuda()
    if settings["model"] == "fastvggt":
        return fastvggt(settings["upstream"])
    if settings["upstream"]:
        sys.path.insert(0, settings["upstream"])
        upstream = importlib.import_module("vggt.models.vggt")
        return upstream.VGGT(enable_track=False).eval().cuda()
    from vggt_compile.models import vggt

    return vggt("1b").eval().cuda()


def pi3(upstream: str) -> nn.Module:
    if upstream:
        sys.path.insert(0, upstream)
        return importlib.import_module("pi3.models.pi3").Pi3()
    from vggt_compile.models import pi3 as ours

    return ours("large")


def fastvggt(upstream: str) -> nn.Module:
    """The published fork as its evaluation runs it: merging from the first block on, weights in bf16; all our heads."""
    sys.path.insert(0, upstream)
    made = importlib.import_module("vggt.models.vggt").VGGT(enable_point=True, merging=0)
    return made.eval().cuda().to(torch.bfloat16)


def variant(name: str, plan: Any, off: str, model: nn.Module) -> Callable[[Tensor], Any]:
    """`eager`, `compile` (Inductor as it comes), or a plan of ours without the passes in `off`."""
    if name == "eager":
        return model
    if name == "compile":
        return torch.compile(model)
    from vggt_compile import vggt_sparse

    options = {"plan": plan, "strict": name != "dense", "inductor": {"disabled_passes": off}}
    return torch.compile(model, backend=vggt_sparse, options=options)


def measure(run: Reported, frames: int, settings: dict[str, Any]) -> dict[str, Any]:
    """First call, warm median over repeats, peak memory of the warm calls, and deviation from eager where known."""
    images = views(frames, settings)
    height, width = settings["size"]
    row: dict[str, Any] = {"variant": settings["variant"], "frames": frames}
    try:
        torch.cuda.reset_peak_memory_stats()
        known, start = graphs(), time.perf_counter()
        outputs = run(images)
        torch.cuda.synchronize()
        row["first_s"] = time.perf_counter() - start
        row["deviation"] = deviation(outputs, frames, settings)
        row |= run.attention_left(frames)
        del outputs
        # Tensors of more than 2³¹ elements ask for one more graph: such a first call is no measure of running. Of a
        # short one the driver's allocation of memory is some percent.
        repeats = settings["repeats"][str(frames)] or int(graphs() > known or row["first_s"] < BRIEF)
        if repeats:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = [timed(run, images) for _ in range(repeats)] or [row["first_s"]]
        row |= {"warm_s": statistics.median(times), "all_s": times}
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if settings["parts"]:
            seconds = milliseconds(profiled(lambda: run(images)), tokens_of_a_frame(height, width))
            row["parts"] = {part: spent / 1e3 for part, spent in seconds.items()}
    except torch.OutOfMemoryError:
        row["out_of_memory"] = True
    row["graphs"] = graphs()
    return row


def graphs() -> int:
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def first_call(run: Reported, frames: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Tracing, compiling and running, beside other processes that do the same."""
    images = views(frames, settings)
    if settings["compile_for"]:
        torch._dynamo.mark_dynamic(images, 1, hint_override=settings["compile_for"])
    start = time.perf_counter()
    run(images)
    torch.cuda.synchronize()
    return {"variant": settings["variant"], "frames": frames, "first_s": time.perf_counter() - start}


def views(frames: int, settings: dict[str, Any]) -> Tensor:
    """Random images on the GPU; plain torch.compile cannot keep their number dynamic in the heads, so it is a maybe."""
    height, width = settings["size"]
    images = torch.rand(1, frames, 3, height, width, generator=torch.Generator().manual_seed(1)).cuda()
    torch._dynamo.maybe_mark_dynamic(images, 1)
    return images


def tokens_of_a_frame(height: int, width: int) -> int:
    """Patches of 14 pixels, and the five special tokens that both models have."""
    return height // 14 * (width // 14) + 5


def timed(run: Callable[[Tensor], Any], images: Tensor) -> float:
    """Seconds of one call by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(images)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def deviation(outputs: dict[str, Tensor], frames: int, settings: dict[str, Any]) -> dict[str, float] | None:
    """‖a − b‖ / ‖b‖ of each head's output from that of eager, which is written by the eager variant."""
    stored = Path(settings["work"]) / f"eager-{frames}.pt"
    if frames > settings["compare_up_to"]:
        return None
    if settings["variant"] == "eager":
        torch.save({name: outputs[name].cpu() for name in COMPARED[settings["model"]]}, stored)
        return None
    if not stored.exists():
        return None
    reference = torch.load(stored)
    return {n: float((outputs[n].cpu() - r).norm() / r.norm()) for n, r in reference.items()}


if __name__ == "__main__":
    main()
