"""A bench of accuracy that ends in seconds: a tiny π³, images of 4×4 patches, two plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from modelutils import randomized

from vggt_compile.bench.accuracy.cases import Rendered
from vggt_compile.bench.accuracy.plans import read_plans
from vggt_compile.bench.accuracy.run import Bench, measure
from vggt_compile.journal import Journal
from vggt_compile.models import pi3
from vggt_compile.scenes import HELD_OUT_SEEDS, Views, render

SIZE = 56


def video() -> Views:
    """Four frames of a scene that no model was trained on."""
    return render(HELD_OUT_SEEDS[0], 4, (SIZE, SIZE), "video")


def tiny(**changes: Any) -> Bench:
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "model": randomized(pi3("tiny")),
        "name": "pi3-tiny",
        "weights": "none",
        "source": Rendered(("orbit/indoor",), 1, SIZE),
        "frames": (2,),
        "plans": read_plans("dense,frame only"),
    }
    return Bench(**(given | changes))


def done(bench: Bench, path: Path) -> list[dict[str, Any]]:
    return list(measure(bench, Journal(path, bench.settings()), lambda _: None))
