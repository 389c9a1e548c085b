"""AdamW, a schedule that a run may be longer than, averaged weights, and gradients of several workers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def adamw(parameters: list[Tensor], rate: float, decay: float) -> torch.optim.AdamW:
    """Weight decay on matrices and kernels only."""
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=parameters[0].is_cuda)


def schedule(step: int, steps: int, warmup: int, fall: float) -> float:
    """Share of the peak rate: linear warm-up, constant, then down to zero as 1 − √x over the last `fall` of the run."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    start = steps * (1 - fall)
    falling = 1 - min(1.0, max(0.0, (step - start) / max(1.0, steps - start))) ** 0.5
    return rising * max(falling, 1e-3)


class Average:
    """Exponential moving average of the weights, which is what is judged and shipped."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        self.keep, self.seen = keep, 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.seen += 1
        keep = min(self.keep, (1 + self.seen) / (10 + self.seen))  # forget the random start quickly
        torch._foreach_lerp_(list(self.weights.values()), [p.detach() for p in model.parameters()], 1 - keep)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with the averaged ones; twice is as before."""
        for name, parameter in model.named_parameters():
            mine = self.weights[name].clone()
            self.weights[name].copy_(parameter)
            parameter.copy_(mine)


@torch.no_grad()
def settle_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Average gradients over all workers and shorten them to norm `limit`; the norm before, without a host sync.

    A gradient that is not finite becomes zero, so one bad step does not end a run.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(flat, torch.distributed.ReduceOp.AVG)
    norm = flat.norm()
    flat = torch.where(norm.isfinite(), flat * (limit / norm).clamp(max=1), 0.0)
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    return norm
