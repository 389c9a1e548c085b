"""A run's log as a picture: losses over steps, and held-out geometry at ten frames."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOT_LOSSES = {"step", "seconds", "frames", "gradient", "held_out"}


def draw_curves(log: Path, picture: Path) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    judged = [row for row in rows if "held_out" in row]
    figure, (losses, poses, depth) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for name in (key for key in rows[0] if key not in NOT_LOSSES):
        losses.plot([row["step"] for row in rows], smoothed([row[name] for row in rows]), label=name)
    losses.set(title="training loss (running mean)", xlabel="step")
    losses.set_yscale("symlog", linthresh=0.1)  # a confident model's losses are negative
    for axis, metric in ((poses, "AUC@30"), (depth, "AbsRel")):
        for trajectory in judged[0]["held_out"] if judged else ():
            values = [row["held_out"][trajectory][metric] for row in judged]
            axis.plot([row["step"] for row in judged], values, marker=".", label=trajectory)
        axis.set(title=f"{metric}, held-out scenes, 10 frames", xlabel="step")
    for axis in (losses, poses, depth):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential running mean."""
    means = values[:1]
    for value in values[1:]:
        means.append(keep * means[-1] + (1 - keep) * value)
    return means
