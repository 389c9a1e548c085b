"""Train a small VGGT or π³ on procedural scenes, rendered as it goes.

    python examples/training/train.py --model vggt-small --out runs/vggt --steps 40000
    torchrun --nproc-per-node 4 examples/training/train.py --model vggt-small --out runs/vggt --steps 10000

A run goes on where its folder left off; `--minutes` ends it early and whole. In its folder it leaves
`weights.safetensors` (averaged weights, half precision), `checkpoint.pt` (everything), `log.jsonl` and `curves.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from curriculum import Curriculum, stream
from curves import draw_curves
from forward import forward
from gauge import settle_lengths
from judge import judge
from losses import pi3_loss, vggt_loss
from matching import Matching
from optimizer import Average, adamw, schedule, settle_gradients
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transfer import take_trunk

from vggt_compile.models import pi3, vggt
from vggt_compile.models.layers import Block

CLOCK_EVERY = 20
MATCHING = 0.2
MODELS = {"vggt": (vggt, vggt_loss), "pi3": (pi3, pi3_loss)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt-small", help="vggt-small, pi3-small or their tiny forms")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--init", type=Path, help="weights to start from instead of random ones")
    parser.add_argument("--trunk", type=Path, help="weights of a π³ of the same width, for the trunk of a VGGT")
    parser.add_argument("--steps", type=int, default=40000, help="length of the whole run; the rate falls at its end")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, to be resumed")
    parser.add_argument("--images", type=int, default=192, help="images a step and worker, a multiple of 48 is best")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=500, help="steps over which the rate rises")
    parser.add_argument("--fall", type=float, default=0.25, help="share of the run over which the rate falls to zero")
    parser.add_argument("--curriculum", type=int, default=4000, help="steps until long sequences are common")
    parser.add_argument("--average", type=float, default=0.999, help="what the moving average keeps each step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--judge-every", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if args.trunk and not args.model.startswith("vggt"):
        parser.error("--trunk fills the trunk of a VGGT; a π³ starts from whole weights, --init")
    return args


class Run:
    """A model with everything that changes while it learns."""

    def __init__(self, args: argparse.Namespace, worker: int, device: torch.device) -> None:
        self.args, self.worker, self.device = args, worker, device
        family, _, preset = args.model.partition("-")
        build, self.loss = MODELS[family]
        torch.manual_seed(args.seed)
        self.model: Any = build(preset)
        if args.init:
            state = {name: tensor.float() for name, tensor in load_file(args.init).items()}
            self.model.load_state_dict(state)
        if args.trunk:
            take_trunk(self.model, load_file(args.trunk))
        self.model.to(device).train()
        self.matching = Matching(self.model).to(device)
        if args.compile:
            compile_parts(self.model)
        self.parameters = [*self.model.parameters(), *self.matching.parameters()]
        self.optimizer = adamw(self.parameters, args.rate, 0.05)
        self.average = Average(self.model, args.average)
        self.step = 0
        if self.checkpoint.exists():
            self.load(torch.load(self.checkpoint, map_location=device, weights_only=True))

    @property
    def checkpoint(self) -> Path:
        return self.args.out / "checkpoint.pt"

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.matching.load_state_dict(state["matching"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.weights, self.average.seen = state["average"], state["seen"]
        self.step = state["step"]

    def save(self) -> None:
        """All state, and the averaged weights for use; a run that is killed while saving keeps its last state."""
        state = {
            "model": self.model.state_dict(),
            "matching": self.matching.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights,
            "seen": self.average.seen,
            "step": self.step,
        }
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)
        weights = self.model.state_dict() | self.average.weights
        save_file({n: t.half().contiguous() for n, t in weights.items()}, self.args.out / "weights.safetensors")

    def learn(self, views: Any) -> Mapping[str, Tensor]:
        """One step on rendered views; the losses before it."""
        dice = random.Random(self.step)
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs, mapped = forward(self.model, views, dice)
        losses = self.loss(outputs, views, mapped)
        losses["matching"] = self.matching(views, dice)
        losses["total"] = losses["total"] + MATCHING * losses["matching"]
        losses["total"].backward()
        norm = settle_gradients(self.parameters, 1.0)
        share = schedule(self.step, self.args.steps, self.args.warmup, self.args.fall)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model)
        self.step += 1
        return {name: loss.detach() for name, loss in losses.items()} | {"gradient": norm}

    def judged(self) -> dict[str, Any]:
        """Held-out geometry of the averaged weights."""
        self.average.swap(self.model)
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # its shapes occur nowhere else
                return judge(self.model, tuple(self.args.size), self.device)
        finally:
            self.model.train()
            self.average.swap(self.model)


def compile_parts(model: nn.Module) -> None:
    """Block by block: all blocks share one graph for each shape, which takes seconds to compile and not minutes."""
    torch._dynamo.config.recompile_limit = 32
    for module in model.modules():
        if isinstance(module, Block) or type(module).__name__ == "DPTHead":
            module.forward = torch.compile(module.forward)  # hooks stay outside


def train(run: Run) -> None:
    args = run.args
    first = run.step
    start = time.perf_counter()
    curriculum = Curriculum(args.seed, args.images, tuple(args.size), args.curriculum, args.compile)
    if args.compile:
        curriculum.warm_up(run.worker, run.device)
    log = (args.out / "log.jsonl").open("a") if run.worker == 0 else None
    since, told = time.perf_counter(), first
    bar = tqdm(total=args.steps, initial=first, disable=run.worker != 0, mininterval=5)
    for views in stream(curriculum, first, run.worker, run.device):
        losses = run.learn(views)
        bar.update()
        late = run.step % CLOCK_EVERY == 0 and out_of_time(start, args.minutes, run.device)
        is_last = run.step >= args.steps or late
        if log and (run.step % args.log_every == 0 or is_last):
            row: dict[str, Any] = {"step": run.step, **{n: round(float(v), 5) for n, v in losses.items()}}
            now = time.perf_counter()
            row["seconds"] = round((now - since) / (run.step - told), 4)
            row["frames"] = views.images.shape[1]
            if run.step % args.judge_every == 0 or is_last:
                row["held_out"] = run.judged()
                tqdm.write(json.dumps(row), file=sys.stderr)
            since, told = time.perf_counter(), run.step
            print(json.dumps(row), file=log, flush=True)
            bar.set_postfix({"loss": row["total"]})
        if is_last:
            break
    bar.close()
    if run.worker == 0:
        run.save()
        if args.model.startswith("pi3"):
            settle_lengths(args.out / "weights.safetensors", args.model.partition("-")[2], curriculum, run.device)
        draw_curves(args.out / "log.jsonl", args.out / "curves.png")


def out_of_time(start: float, minutes: float, device: torch.device) -> bool:
    """Whether time is up, by the first worker's clock."""
    late = time.perf_counter() - start > 60 * minutes
    if not torch.distributed.is_initialized():
        return late
    said = torch.tensor(float(late), device=device)
    torch.distributed.broadcast(said, 0)
    return bool(said)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    worker, device = 0, torch.device(args.device)
    if "LOCAL_RANK" in os.environ:
        torch.distributed.init_process_group()
        worker, device = torch.distributed.get_rank(), torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    run = Run(args, worker, device)
    train(run)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
