"""Every family with every kind of plan as a file that a process without this package runs, and models left clean.

Each case compiles a whole model, so all of them need VGGT_COMPILE_UPSTREAM, those of the models written here too.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import upstream
import upstream_models
from modelutils import images, randomized
from test_artifact_plans import BLOCKS
from test_artifact_upstream import jit, of_the_trace
from torch import Tensor, nn
from upstream_models import same_bits, tensors

import vggt_compile
from vggt_compile.models import pi3, vggt

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(upstream.VARIABLE not in os.environ, reason=f"minutes each; set {upstream.VARIABLE}"),
]
RECIPES = ("avggt", "fastvggt", "turbo")
PLANS: dict[str, Any] = {name: name for name in RECIPES} | {"blocks": {"layers": {"*": BLOCKS}}}
PLANS["few dense"] = PLANS["blocks"] | {"min_tokens": 80}  # three frames of each model are fewer, and eight are more
OURS = {"our-vggt": lambda: vggt("tiny", depth=2, encoder="conv", outputs=("camera",)), "our-pi3": lambda: pi3("tiny")}
COUNTS = [(batch, frames) for batch in (1, 2) for frames in (3, 8, 17, 40)]


@contextlib.contextmanager
def model(name: str) -> Iterator[nn.Module]:
    if name in OURS:
        torch.manual_seed(0)
        yield randomized(OURS[name]())
    else:
        with upstream_models.model(name) as net:
            yield net


def scene(name: str, batch: int, frames: int) -> Tensor:
    return images(batch, frames, 3, 28, 42) if name in OURS else upstream_models.scene(name, batch, frames, (2, 3))


BARE = """
import sys, torch
from torch._inductor import aoti_load_package
run = aoti_load_package({path!r})
torch.save([run(x) for x in torch.load({given!r})], {out!r})
assert not any(name.startswith(("vggt", "pi3")) for name in sys.modules)
"""


def bare(path: Path, scenes: list[Tensor]) -> list[Any]:
    """What a process gives that knows torch alone."""
    given, out = path.with_name("images.pt"), path.with_name("out.pt")
    torch.save(scenes, given)
    code = BARE.format(path=str(path), given=str(given), out=str(out))
    command = [sys.executable, "-I", "-c", code]
    subprocess.run(command, check=True, cwd=path.parent, env={"PATH": os.environ["PATH"]}, timeout=300)
    return torch.load(out)


def close(got: Any, want: Any) -> None:
    for one, other in zip(tensors(got), tensors(want), strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["our-vggt", "our-pi3", "vggt", "pi3", "omega"])
def test_a_file_gives_what_a_compile_gives(name: str, plan: str, tmp_path: Path) -> None:
    with model(name) as net, torch.no_grad():
        untouched, x, path = copy.deepcopy(net), scene(name, 1, 3), tmp_path / "model.pt2"
        made = vggt_compile.export(net, x, plan=PLANS[plan], frames=(3, 64), batch=(1, 2), path=path, strict=True)
        served = sorted(entry.span.frames for entry in made.entries)
        assert (served[0][0], served[-1][1]) == (3, 64)
        assert plan != "few dense" or len(served) == 1
        assert all(below[1] + 1 == above[0] for below, above in itertools.pairwise(served))
        assert of_the_trace(net) == []
        assert same_bits(net(x), untouched(x))
        scenes = [scene(name, batch, frames) for batch, frames in COUNTS]
        run, alone = vggt_compile.load(path), bare(path, scenes)
        for x, out in zip(scenes, alone, strict=True):
            close(out, run(x))
            close(out, jit(net, x, PLANS[plan]))
        pairs = zip(tensors(out), tensors(net(x)), strict=True)
        assert any(float((one - other).norm()) > 1e-3 * float(other.norm()) for one, other in pairs)
