"""What each process of `bench.export` does: it prints results as JSON lines, the first one when it can be called.

A stage that is to be timed with the machine to itself waits for a line before it times anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

Args = argparse.Namespace
Run = Callable[[Tensor], Any]
FEW = 32
"""Frames up to which counts are run before a compile waits for its turn: larger ones have the graph of these."""


def export(args: Args) -> None:
    import vggt_compile
    from vggt_compile.recipes import read_named

    model, images = load_model(args), torch.zeros(1, 4, 3, *args.size, device=args.device)
    path, start = args.work / "model.pt2", time.perf_counter()
    given = {"plan": read_named(args.plan)[1], "frames": tuple(args.range), "precision": args.precision}
    made = vggt_compile.export(model, images, **given, outline_heads=args.outline_heads, path=path)
    entries = {str(entry.span): entry.report["attention_left"] for entry in made.entries}
    say(seconds=time.perf_counter() - start, bytes=path.stat().st_size, attention_left=entries)
    say(stages={str(entry.span): entry.seconds for entry in made.entries}, clocks=clocks())
    say(architecture=made.architecture, torch=made.torch, vggt_compile=made.vggt_compile)


def artifact(args: Args) -> None:
    """Loading begins with the package, as it does for a user; torch is imported already and knows the device."""
    torch.zeros(1, device=args.device)
    start = time.perf_counter()
    import vggt_compile

    run = vggt_compile.load(args.work / "model.pt2")
    loaded = time.perf_counter()
    run(pictures(args, min(args.frames)))
    synchronize(args)
    say(load_s=loaded - start, first_answer_s=time.perf_counter() - start)
    time_all(run, args)


def jit(args: Args, outline: bool = False, heads: bool = False, warm: bool = False) -> None:
    """The same plan through torch.compile."""
    first_calls(compiled(args, outline, heads), args, warm)


def compiled(args: Args, outline: bool, heads: bool) -> Run:
    from vggt_compile import vggt_sparse
    from vggt_compile.recipes import read_named

    options = cast(Any, {"plan": read_named(args.plan)[1], "outline": outline, "outline_heads": heads})
    return cast(Run, torch.compile(load_model(args), backend=vggt_sparse, options=options))


def both(args: Args) -> None:
    """Artifacts and the compile that users have, called in turn in one process; on a GPU their kernels as well."""
    import vggt_compile
    from vggt_compile.bench.kinds import by_kind
    from vggt_compile.bench.parts import profiled

    run = compiled(args, outline=True, heads=True)

    def call_compiled(images: Tensor) -> None:
        with under_autocast(args):
            run(images)

    runs: dict[str, Run] = {path.stem: vggt_compile.load(path) for path in args.also}
    runs |= {"artifact": vggt_compile.load(args.work / "model.pt2"), "compile": call_compiled}
    sys.stdin.readline()
    for frames in args.frames:
        images, at = pictures(args, frames), str(frames)
        for call in runs.values():
            call(images)
        times = in_turn(runs, images, args)
        say(steady_s={at: {name: statistics.median(taken) for name, taken in times.items()}})
        say(calls={at: len(times["artifact"])})
        if args.device.startswith("cuda"):
            say(gpu={at: {name: by_kind(profiled(partial(call, images))) for name, call in runs.items()}})


def in_turn(runs: Mapping[str, Run], images: Tensor, args: Args) -> dict[str, list[float]]:
    """Seconds of calls, each as often as the others, up to fifteen times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + args.patience * len(runs)
    while not times["artifact"] or (time.perf_counter() < end and len(times["artifact"]) < 15):
        for name, call in runs.items():
            times[name].append(seconds(call, images, args))
    return times


def once(args: Args, warm: bool = False) -> None:
    """The same through a file of graphs, which a second process neither traces nor compiles."""
    import vggt_compile
    from vggt_compile.recipes import read_named

    run = vggt_compile.compile_once(load_model(args), args.work / "graphs", {"plan": read_named(args.plan)[1]})
    first_calls(run, args, warm)


def first_calls(run: Run, args: Args, warm: bool) -> None:
    """Under the autocast that the artifact has inside; all is timed later, unless this is a second process."""
    with under_autocast(args):
        start = time.perf_counter()
        run(pictures(args, min(args.frames)))
        synchronize(args)
        say(first_answer_s=time.perf_counter() - start, caches=cache_counts(), clocks=clocks())
        if not warm:
            for frames in (n for n in args.frames if n <= FEW):  # more graphs, while others compile too
                run(pictures(args, frames))
            time_all(run, args)


@contextmanager
def under_autocast(args: Args) -> Iterator[None]:
    """As a model is called whose artifact has the autocast inside."""
    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.precision != "fp32"):
        yield


STAGES: dict[str, Callable[[Args], None]] = {
    "export": export,
    "artifact": artifact,
    "both": both,
    "jit": jit,
    "outline": lambda args: jit(args, outline=True),
    "heads": lambda args: jit(args, outline=True, heads=True),
    "once": once,
    "jit-again": lambda args: jit(args, warm=True),
    "outline-again": lambda args: jit(args, outline=True, warm=True),
    "heads-again": lambda args: jit(args, outline=True, heads=True, warm=True),
    "once-again": lambda args: once(args, warm=True),
}


def say(**results: Any) -> None:
    print(json.dumps(results), flush=True)


def load_model(args: Args) -> nn.Module:
    """With random weights, seeded."""
    torch.manual_seed(0)
    if args.upstream:
        from vggt_compile.bench.worker import load

        return load({"model": args.model, "upstream": args.upstream})
    from vggt_compile import models

    given = {"outputs": tuple(args.outputs)} if args.outputs else {}
    return getattr(models, args.model)(args.preset, **given).eval().to(args.device)


def pictures(args: Args, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, frames, 3, *args.size, generator=generator).to(args.device)
    torch._dynamo.maybe_mark_dynamic(images, 1)  # for the compile, as in the other benchmarks
    return images


def time_all(run: Run, args: Args) -> None:
    """Median seconds of a call for each frame count; the first counts only if it took long and compiled nothing."""
    from vggt_compile.bench.worker import BRIEF, graphs

    sys.stdin.readline()
    for frames in args.frames:
        images, known = pictures(args, frames), graphs()
        first = seconds(run, images, args)
        times = [first] if first > BRIEF and graphs() == known else [seconds(run, images, args)]
        while len(times) < 5 and sum(times) < args.patience:
            times.append(seconds(run, images, args))
        say(steady_s={str(frames): statistics.median(times)}, calls={str(frames): len(times)})


def seconds(run: Run, images: Tensor, args: Args) -> float:
    synchronize(args)
    start = time.perf_counter()
    run(images)
    synchronize(args)
    return time.perf_counter() - start


def synchronize(args: Args) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def clocks() -> dict[str, dict[str, float]]:
    """What PyTorch's own clocks took for its stages, from a second on; those of sub-graphs may lie in one another."""
    found = torch._dynamo.utils.compilation_time_metrics.items()
    read = {name: {"calls": len(s), "longest_s": max(s), "seconds": sum(s)} for name, s in found}
    return {name: one for name, one in read.items() if one["seconds"] >= 1}


def cache_counts() -> dict[str, int]:
    """What AOTAutograd's cache, the outermost one, found."""
    return {name: n for name, n in torch._dynamo.utils.counters["aot_autograd"].items() if "autograd_cache" in name}
