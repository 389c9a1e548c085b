"""Check versions, devices, compilers and the entry point, and give the command that fixes what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from vggt_compile.errors import BadInput

HELP = "versions, devices, what is missing and how to fix it"
TORCH = (2, 11)


@dataclass(frozen=True)
class Check:
    """Attributes:
    status: "ok", "missing" (nothing works without it) or "optional" (absent, and needed for some things only).
    found: a version, a device's name, or what is wrong.
    fix: the command or the step that helps, empty where all is well.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="skip the trial compilation, which takes some seconds")


def run(args: argparse.Namespace) -> int:
    checks = list(examine(quick=args.quick))
    missing = any(check.status == "missing" for check in checks)
    if args.json:
        print(json.dumps({"ok": not missing, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        from tabulate import tabulate

        print(tabulate([(c.name, c.status, c.found, c.fix) for c in checks], headers=("", "", "found", "to fix")))
    return int(missing)


def examine(*, quick: bool = False) -> Iterator[Check]:
    import vggt_compile

    yield Check("vggt_compile", "ok", vggt_compile.__version__)
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield _torch()
    for name in ("tabulate", "networkx", "safetensors"):
        yield _package(name, "missing", f"pip install {name}")
    for name in ("numpy", "pillow", "matplotlib"):
        yield _package(name, "optional", "pip install 'vggt_compile[demo]'")
    yield from _devices()
    yield _triton()
    compiler = _compiler()
    yield compiler
    yield _entry_point()
    if not quick and compiler.status == "ok":
        yield _trial()


def check_compiler() -> None:
    """BadInput where Inductor has no C++ compiler, with the command that installs one."""
    compiler = _compiler()
    if compiler.status != "ok":
        raise BadInput(f"torch.compile needs a C++ compiler, and {compiler.found}: {compiler.fix}")


def _package(name: str, absent: str, fix: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, absent, "not installed", fix)


def _torch() -> Check:
    import torch

    numbers = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if numbers >= TORCH:
        return Check("torch", "ok", torch.__version__)
    wanted = ".".join(map(str, TORCH))
    return Check("torch", "missing", f"{torch.__version__}, older than {wanted}", f"pip install -U 'torch>={wanted}'")


def _devices() -> Iterator[Check]:
    import torch

    yield Check("cpu", "ok", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        yield Check(f"gpu {index}", "ok", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        fix = "with an NVIDIA GPU: install torch for CUDA, https://pytorch.org/get-started/locally"
        yield Check("gpu", "optional", "none: torch is built without CUDA", fix)
    else:
        fix = "with an NVIDIA GPU: install its driver, until nvidia-smi lists it"
        yield Check("gpu", "optional", f"none seen by torch for CUDA {torch.version.cuda}", fix)


def _triton() -> Check:
    import torch

    absent = "missing" if torch.cuda.is_available() else "optional"
    return _package("triton", absent, "pip install triton")


def _compiler() -> Check:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return Check("c++ compiler", "ok", get_cpp_compiler())
    except InvalidCxxCompiler:
        return Check("c++ compiler", "missing", "none was found", "apt-get install g++, or set CXX to one")


def _entry_point() -> Check:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="vggt_sparse")
    if points:
        return Check("backend name", "ok", "backend='vggt_sparse'")
    fix = "pip install -e . in the checkout, or pass backend=vggt_compile.vggt_sparse"
    return Check("backend name", "optional", "not installed, so 'vggt_sparse' is no known name", fix)


def _trial() -> Check:
    """Compile a few operations with Inductor on the best device, as a plan would be."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(0, 1, 64, device=device)
    try:
        torch.compile(lambda x: (x.sin() + 1).cumsum(0), backend="inductor")(x)
    except Exception as error:  # whatever the tool chain says is the answer
        line = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
        return Check("trial compilation", "missing", line, "TORCHDYNAMO_VERBOSE=1 shows all of it")
    return Check("trial compilation", "ok", f"works on {device}")
