"""Where the GPU's time of one call goes: its kernels under a profiler, told apart by the operator that launched them.

Attention over all frames is told from attention inside frames by the shape of its queries, our kernels by their names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

GLOBAL, FRAME = "global attention", "frame attention"
CHOOSING, PRODUCTS, REST = "choosing and merging", "matrix products", "the rest"
PARTS = (GLOBAL, FRAME, CHOOSING, PRODUCTS, REST)

ATTENTION = re.compile(r"scaled_dot_product|_flash_attention|_efficient_attention")
TOKENS_FIRST = re.compile(r"_(flash|efficient)_attention_forward")
"""What `scaled_dot_product_…` calls in turn, with queries [B, N, H, D] and not [B, H, N, D]."""
OURS = {"attention_kernel": GLOBAL, "attention_hopper": GLOBAL} | dict.fromkeys(
    ("_select", "_match", "_means"), CHOOSING
)
"""Kernels of `vggt_compile.ops` by the names under which they are launched; a compiler may number them."""
NUMBER = re.compile(r"_\d+$")
GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|cublas", re.IGNORECASE)


class Kernel(NamedTuple):
    """A kernel on the GPU.

    Attributes:
        name: of the kernel.
        milliseconds: how long it ran, once or in all.
        operator: that launched it, "" where the profiler knows none.
        queries: length of the sequences of an attention, None where it is none.
    """

    name: str
    milliseconds: float
    operator: str = ""
    queries: int | None = None


def part_of(kernel: Kernel, per_frame: int) -> str:
    """The part of a model that a kernel belongs to; a sequence of more than `per_frame` tokens is of several frames."""
    if ATTENTION.search(kernel.operator):
        return GLOBAL if kernel.queries is not None and kernel.queries > per_frame else FRAME
    ours = OURS.get(NUMBER.sub("", kernel.name))
    if ours is not None:
        return ours
    return PRODUCTS if GEMM.search(kernel.name) else REST


def milliseconds(kernels: Iterable[Kernel], per_frame: int) -> dict[str, float]:
    """What each of `PARTS` took."""
    found = dict.fromkeys(PARTS, 0.0)
    for kernel in kernels:
        found[part_of(kernel, per_frame)] += kernel.milliseconds
    return found


def profiled(call: Callable[[], Any]) -> list[Kernel]:
    """The kernels of one call, none counted twice."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        call()
        torch.cuda.synchronize()
    return kernels_of(profile.events())


def kernels_of(events: Iterable[Any]) -> list[Kernel]:
    """Kernels of a profile: those that an attention launched with its queries' length, the time of all others by name.

    A profile lists each kernel for itself, and once more with the operator that launched it.
    """
    events = list(events)
    launched = [
        Kernel(kernel.name, kernel.duration / 1e3, event.name, _queries(event.name, event.input_shapes))
        for event in events
        if ATTENTION.search(event.name)
        for kernel in event.kernels
    ]
    left: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            left[event.name] += event.device_time_total / 1e3
    for kernel in launched:
        left[kernel.name] -= kernel.milliseconds
    return launched + [Kernel(name, max(0.0, spent)) for name, spent in left.items()]


def _queries(operator: str, shapes: Any) -> int | None:
    """How many queries an attention has, by the first of its inputs."""
    first = shapes[0] if shapes else None
    if first is None or len(first) != 4:
        return None
    return int(first[1] if TOKENS_FIRST.search(operator) else first[2])
