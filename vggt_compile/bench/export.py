"""An artifact of a whole model: seconds to export, to load and to the first answer, size, time against a compile.

    python -m vggt_compile.bench.export --plan faster_vggt-75 --outputs camera --out docs/benchmarks/export.json
    python -m vggt_compile.bench.export --quick     # a tiny model on a CPU: whether it works

Each stage is a process of its own, so that nothing is warm that would be cold for a user. Export and compiles, which
wait for one core each, run side by side, or with `--in-turn` one after the other; what is timed has the machine to
itself. Results are written as they come: a stage that fails, or for which no time is left, takes no other one along.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vggt_compile.bench.turns import alone

BESIDE = ("export", "jit", "outline", "heads", "once")
AFTER = ("artifact", "both", "jit-again", "outline-again", "heads-again", "once-again")
COMPILES = ("heads", "once", "outline", "jit")
"""Stages that call compiled code, what users have first."""
CACHES = {name: name.removesuffix("-again") for name in AFTER if name.endswith("-again")} | {"both": "heads"}
PLACES = ("argv", "stage", "work", "also", "out")
"""Settings that are no part of what is found."""
QUICK = ["--device", "cpu", "--preset", "tiny", "--precision", "fp32", "--outputs", "camera", "--plan", "g2f"]
QUICK += ["--frames", "3", "5", "--range", "3", "8", "--size", "28", "42", "--patience", "0"]


def main(argv: list[str] | None = None) -> None:
    args = read(sys.argv[1:] if argv is None else argv)
    if args.stage:
        from vggt_compile.bench.export_stages import STAGES

        STAGES[args.stage](args)
        return
    bench = Bench(args)
    try:
        for names in together([name for name in BESIDE if name not in args.skip], args.in_turn):
            for stage in (beside := [Stage(bench, name) for name in names]):
                stage.wait_for_first()
            for stage in beside:
                with alone():
                    stage.finish()
        for name in AFTER:
            if name not in args.skip:
                with alone():
                    Stage(bench, name).finish()
    finally:
        bench.close()
    print(args.out.read_text())


def together(names: list[str], in_turn: bool) -> list[list[str]]:
    """Which stages compile at a time."""
    return [[name] for name in names] if in_turn else [names]


def read(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model on a CPU; what follows changes that")
    parser.add_argument("--model", choices=("vggt", "pi3"), default="vggt")
    parser.add_argument("--preset", default="1b", help="of the model written here (default: 1b)")
    parser.add_argument(
        "--upstream", default="", metavar="DIR", help="its checkout, in place of the model written here"
    )
    parser.add_argument("--outputs", nargs="*", default=[], help="of the model written here; all unless given")
    parser.add_argument("--plan", default="g2f", help="a recipe, JSON file or JSON (default: g2f)")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 32, 100, 300, 500], metavar="N", help="to time")
    parser.add_argument("--range", type=int, nargs=2, default=[3, 500], metavar=("A", "B"), help="to export for")
    parser.add_argument("--size", type=int, nargs=2, default=[392, 518], metavar=("H", "W"))
    parser.add_argument("--precision", choices=("fp32", "autocast", "bf16"), default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--outline-heads", action="store_true", help="in the export; stages `outline` and `heads` differ by it"
    )
    parser.add_argument("--patience", type=float, default=5.0, metavar="S", help="to spend on one time, about")
    parser.add_argument(
        "--also", type=Path, nargs="*", default=[], metavar="FILE", help="artifacts that stage `both` calls as well"
    )
    parser.add_argument("--in-turn", action="store_true", help="compile with no other compile beside")
    parser.add_argument("--limit", type=float, default=560.0, metavar="S", help="for everything (default: 560)")
    parser.add_argument("--work", type=Path, help="folder for the artifact and caches; kept")
    parser.add_argument("--skip", nargs="*", choices=(*BESIDE, *AFTER), default=[], help="stages to leave out")
    parser.add_argument("--out", type=Path, default=Path("export.json"))
    parser.add_argument("--stage", choices=(*BESIDE, *AFTER), help=argparse.SUPPRESS)
    argv = [*QUICK, *argv] if "--quick" in argv else argv
    args = parser.parse_args(argv)
    names = ["artifact", "compile", *(path.stem for path in args.also)]
    if len(set(names)) < len(names):
        parser.error(f"--also: files go by their names without .pt2, and two are alike: {', '.join(names)}")
    args.work = args.work or Path(tempfile.mkdtemp(prefix="vggt_compile-export-"))
    args.work = args.work.resolve()  # caches lie in it, and Inductor runs the C++ compiler in another folder
    args.work.mkdir(parents=True, exist_ok=True)
    args.argv = [*argv, "--work", str(args.work)]
    return args


class Bench:
    """What has been found, written anew with each line of a stage, and the time that is left."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end = args, time.monotonic() + args.limit
        self.found: dict[str, dict[str, Any]] = {}
        self.running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def note(self, stage: str, results: dict[str, Any]) -> None:
        with self._lock:
            known = self.found.setdefault(stage, {})
            for name, value in results.items():
                known[name] = known.get(name, {}) | value if isinstance(value, dict) else value
            settings = {name: value for name, value in vars(self.args).items() if name not in PLACES}
            content = {"settings": settings, **self.found, "over_jit": over_jit(self.found)}
            self.args.out.write_text(json.dumps(content, indent=2, default=str) + "\n")

    def close(self) -> None:
        for process in self.running:
            process.kill()


class Stage:
    """A process with caches of its own, unless it is there to use those of another."""

    def __init__(self, bench: Bench, name: str) -> None:
        args = bench.args
        print(f"{name} …", file=sys.stderr, flush=True)
        self.bench, self.name, self._first = bench, name, threading.Event()
        caches = args.work / f"cache-{CACHES.get(name, name)}"
        folders = {variable: str(caches / variable) for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        command = [sys.executable, "-m", "vggt_compile.bench.export", *args.argv, "--stage", name]
        self._log = (args.work / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | folders,
        )
        bench.running.append(self.process)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.bench.note(self.name, json.loads(line))
                self._first.set()
        self._first.set()

    def wait_for_first(self) -> None:
        self._first.wait(self.bench.left())

    def finish(self) -> None:
        """Let it time what it has made. What it says when it fails, or that it is too late, is noted."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.close()
        try:
            failed = self.process.wait(self.bench.left()) != 0
            why = Path(self._log.name).read_text().strip().rpartition("\n")[2] if failed else None
        except subprocess.TimeoutExpired:
            self.process.kill()
            why = f"no time left of {self.bench.args.limit:.0f} s"
        self._reader.join()
        if why is not None:
            self.bench.note(self.name, {"failed": why.replace(f"{self.bench.args.work}/", "")})


def over_jit(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """An artifact over the compile that users have, or where that was not timed, the next best."""
    compiled: Mapping[str, float] = next(
        (found[name]["steady_s"] for name in COMPILES if "steady_s" in found.get(name, {})), {}
    )
    timed = found.get("artifact", {}).get("steady_s", {})
    return {n: seconds / compiled[n] for n, seconds in timed.items() if n in compiled}


if __name__ == "__main__":
    main()
