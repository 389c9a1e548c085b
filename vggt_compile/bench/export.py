"""An artifact of a whole model: seconds to export, to load and to the first answer, size, time against a compile.

    python -m vggt_compile.bench.export --upstream CHECKOUT --plan faster_vggt-75 --out docs/benchmarks/export.json

Export, artifact and compile each have a process of their own, so that nothing is warm that would be cold for a user.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = ("export", "artifact", "jit")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("vggt", "pi3"), default="vggt")
    parser.add_argument("--upstream", default="", metavar="DIR", help="its checkout; else the model written here")
    parser.add_argument("--plan", default="g2f", help="a recipe's name (default: g2f)")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 100, 300], metavar="N", help="to time")
    parser.add_argument("--range", type=int, nargs=2, default=[3, 500], metavar=("A", "B"), help="to export for")
    parser.add_argument("--size", type=int, nargs=2, default=[392, 518], metavar=("H", "W"))
    parser.add_argument("--precision", choices=("fp32", "autocast", "bf16"), default="autocast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="", help="a smaller model written here, as `tiny`")
    parser.add_argument("--work", type=Path, help="folder for the artifact and caches; kept")
    parser.add_argument("--skip", nargs="*", choices=STAGES, default=[], help="stages that --work has already")
    parser.add_argument("--out", type=Path, default=Path("export.json"))
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.work = args.work or Path(tempfile.mkdtemp(prefix="vggt_compile-export-"))
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage:
        print(json.dumps({"export": export, "artifact": artifact, "jit": jit}[args.stage](args)))
        return
    for stage in STAGES:
        if stage not in args.skip:
            (args.work / f"{stage}.json").write_text(in_a_process(stage, args, sys.argv[1:] if argv is None else argv))
    stages = {stage: json.loads((args.work / f"{stage}.json").read_text()) for stage in STAGES}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    args.out.write_text(json.dumps({"settings": settings, **stages, "over_jit": over_jit(stages)}, indent=2) + "\n")
    print(args.out.read_text())


def in_a_process(stage: str, args: argparse.Namespace, argv: list[str]) -> str:
    """What a stage prints last. Its caches are its own."""
    print(f"{stage} …", file=sys.stderr, flush=True)
    caches = args.work / f"cache-{stage}"
    folders = {name: str(caches / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    command = [sys.executable, "-m", "vggt_compile.bench.export", *argv, "--stage", stage, "--work", str(args.work)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | folders)
    return done.stdout.splitlines()[-1]


def export(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    import vggt_compile

    model = load_model(args)
    images = torch.zeros(1, 4, 3, *args.size, device=args.device)
    path, start = args.work / "model.pt2", time.perf_counter()
    made = vggt_compile.export(
        model, images, plan=args.plan, frames=tuple(args.range), precision=args.precision, path=path
    )
    return {
        "seconds": time.perf_counter() - start,
        "bytes": path.stat().st_size,
        "entries": {entry.name: entry.report["attention_left"] for entry in made.entries},
        "architecture": made.architecture,
        "torch": made.torch,
    }


def artifact(args: argparse.Namespace) -> dict[str, Any]:
    """Loading begins with the package, as it does for a user; torch is imported already."""
    import torch

    torch.zeros(1, device=args.device)
    start = time.perf_counter()
    import vggt_compile

    run = vggt_compile.load(args.work / "model.pt2")
    loaded = time.perf_counter()
    run(pictures(args, min(args.frames)))
    synchronize(args)
    answered = time.perf_counter()
    return {
        "load_s": loaded - start,
        "first_answer_s": answered - start,
        "steady_s": {str(n): steady(run, args, n) for n in args.frames},
    }


def jit(args: argparse.Namespace) -> dict[str, Any]:
    """The same plan through torch.compile, under the autocast that the artifact has inside."""
    import torch

    import vggt_compile

    model = load_model(args)
    run = torch.compile(model, backend=vggt_compile.vggt_sparse, options={"plan": args.plan})
    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.precision != "fp32"):
        start = time.perf_counter()
        run(pictures(args, min(args.frames)))
        synchronize(args)
        first = time.perf_counter() - start
        return {"first_answer_s": first, "steady_s": {str(n): steady(run, args, n) for n in args.frames}}


def load_model(args: argparse.Namespace) -> Any:
    """With random weights, seeded."""
    import torch

    if args.preset:
        from vggt_compile import models

        torch.manual_seed(0)
        return getattr(models, args.model)(args.preset).eval().to(args.device)
    from vggt_compile.bench.worker import load

    return load({"model": args.model, "upstream": args.upstream})


def pictures(args: argparse.Namespace, frames: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1, frames, 3, *args.size, generator=generator).to(args.device)
    torch._dynamo.maybe_mark_dynamic(images, 1)  # for the compile, as in the other benchmarks
    return images


def steady(run: Any, args: argparse.Namespace, frames: int, repeats: int = 5) -> float:
    """Median seconds of a call, after one that is not counted."""
    images, times = pictures(args, frames), []
    for _ in range(repeats + 1):
        synchronize(args)
        start = time.perf_counter()
        run(images)
        synchronize(args)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def synchronize(args: argparse.Namespace) -> None:
    import torch

    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def over_jit(stages: dict[str, Any]) -> dict[str, float]:
    compiled = stages["jit"]["steady_s"]
    return {n: seconds / compiled[n] for n, seconds in stages["artifact"]["steady_s"].items()}


if __name__ == "__main__":
    main()
