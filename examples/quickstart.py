"""Compile a small VGGT with a plan on a rendered scene, on any machine: what the plan did, and how much it changed.

    python examples/quickstart.py

The weights are random, so the geometry means nothing; the report and the comparison do. Nearly all of the time is
Inductor's, a minute or two on two CPU cores; a second run finds its cache warm.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

import vggt_compile
from vggt_compile.models import vggt
from vggt_compile.scenes import render

PLAN = {"layers": {"0-1": {"scope": "frame"}}}
"""The first two of four global layers attend inside their frame."""


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of the deviation from the mean."""
    return float((got - want).norm() / (want - want.mean()).norm())


def main() -> None:
    torch.manual_seed(0)
    images = render(seed=0, frames=4, size=(56, 56)).images  # [1, 4, 3, 56, 56] in 0..1
    model = vggt("tiny", outputs=("camera",), layer_scale=0.5).eval()
    # After `pip install`, backend="vggt_sparse" names the same function.
    fast = torch.compile(model, backend=vggt_compile.vggt_sparse, options={"plan": PLAN, "strict": True})

    with torch.inference_mode():
        dense = model(images)
        print("compiling …", flush=True)
        start = time.perf_counter()
        with vggt_compile.collect_reports() as reports:
            sparse = fast(images)
        print(f"first call, with compilation: {time.perf_counter() - start:.0f} s\n")

    print(reports[0])
    difference = relative_difference(sparse["pose_enc"], dense["pose_enc"])
    print(f"\nrelative difference of the cameras to those of the dense model: {difference:.2e}")


if __name__ == "__main__":
    main()
