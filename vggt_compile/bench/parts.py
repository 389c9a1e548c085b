"""Where the GPU's time of one call goes: its kernels under a profiler, told apart by the operator that launched them.

Attention over all frames is told from attention inside frames by the shape of its queries, our kernels by their names.
"""

from __future__ import annotations

import re
from bisect import bisect_right
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
    ("_pool", "_select", "_match", "_means"), CHOOSING
)
"""Kernels of `vggt_compile.ops` by the names under which they are launched; a compiler may number them."""
NUMBER = re.compile(r"_\d+$")
LAUNCH = re.compile(r"cu(da)?(Launch|Mem)")
"""Calls of CUDA's runtime and driver that put work on the GPU."""
GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|cublas", re.IGNORECASE)


class Kernel(NamedTuple):
    """A kernel on the GPU.

    Attributes:
        name: of the kernel.
        milliseconds: how long it ran.
        operator: the attention that launched it, "" where none did.
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
    """Kernels of a profile, those of an attention with its queries' length.

    A kernel has the number of the runtime's call that launched it, and that call lies within the time of its operator.
    The profiler's own links leave out what cuDNN launches. Annotations have bars on the GPU too and are no kernels.
    """
    events = list(events)
    attentions = outermost(event for event in events if _on_cpu(event) and ATTENTION.search(event.name))
    starts = [event.time_range.start for event in attentions]
    launches = {event.id: event.time_range.start for event in events if _on_cpu(event) and LAUNCH.match(event.name)}
    found = []
    for event in events:
        if _on_cpu(event) or event.is_user_annotation:
            continue
        spent, at = event.time_range.elapsed_us() / 1e3, launches.get(event.id, -1.0)
        before = bisect_right(starts, at) - 1
        if before >= 0 and at <= attentions[before].time_range.end:
            by = attentions[before]
            found.append(Kernel(event.name, spent, by.name, _queries(by.name, by.input_shapes)))
        else:
            found.append(Kernel(event.name, spent))
    return found


def outermost(events: Iterable[Any]) -> list[Any]:
    """Events by their start, without those inside another one."""
    found: list[Any] = []
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        if not found or event.time_range.start >= found[-1].time_range.end:
            found.append(event)
    return found


def _on_cpu(event: Any) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CPU)


def _queries(operator: str, shapes: Any) -> int | None:
    """How many queries an attention has, by the first of its inputs."""
    first = shapes[0] if shapes else None
    if first is None or len(first) != 4:
        return None
    return int(first[1] if TOKENS_FIRST.search(operator) else first[2])
