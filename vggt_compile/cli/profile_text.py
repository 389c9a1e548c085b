"""Profiles and predictions in words and tables: for a terminal, and as a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from vggt_compile.analysis.changes import Change
from vggt_compile.analysis.mixed import Mixed
from vggt_compile.analysis.prediction import Prediction
from vggt_compile.analysis.profile import Point, Profile

COLUMNS = {
    "logit_scale": "logit\nscale",
    "entropy": "entropy\n/ log n",
    "to_itself": "to\nitself",
    "attention_effective_rank": "eff. rank\nof A",
    "attention_stable_rank": "stable\nrank",
    "attention_sigma_ratio": "σ2 / σ1",
    "across_frames": "across\nframes",
    "blocks_95": "blocks\nfor 95 %",
    "token_effective_rank": "eff. rank\nof JX",
    "cosine": "cosine",
    "residual_ratio": "‖JX‖\n/ ‖X‖",
    "nearest_cosine": "nearest\ncosine",
    "token_length": "length\nof token",
    "step": "step Δt",
    "contraction": "D̂ of A",
    "residual_contraction": "D̂ with\nresidual",
    "value_contraction": "D̂ of\nvalues",
}
"""What the table shows of all that the JSON has."""
COMPARED = {
    "cosine": "cosine",
    "cosine_by_scale": "cosine,\nβ by scale",
    "cosine_fitted": "cosine,\nfitted pace",
    "next_cosine": "cosine from\nlayer before",
    "residual_ratio": "‖JX‖ / ‖X‖",
    "residual_contraction": "D̂ with\nresidual",
    "entropy": "entropy\n/ log n",
    "attention_stable_rank": "stable\nrank",
    "attention_sigma_ratio": "σ2 / σ1",
    "to_itself": "to itself",
}
KEY = (
    "Measured → predicted, = where they agree within the interval over scenes. Cosines and ‖JX‖ / ‖X‖ are predicted "
    "from the first layer's cosine; steps are measured, and so is the temperature, by the share that a token gives "
    "itself where it was measured, else by the logit scale. D is the share that leaves a token, of all tokens and of "
    "the keys that the plan leaves it."
)


def text(
    profiles: Sequence[Profile],
    predictions: Sequence[Prediction],
    compared: Sequence[Change],
    title: str,
    *,
    page: bool = False,
) -> str:
    """All of it; `page` is Markdown."""
    style = "github" if page else "simple"
    parts = [f"# {title}" if page else title, KEY]
    for found, prediction in zip(profiles, predictions, strict=True):
        name = f"{found.plan}, {found.frames} frames, {found.tokens} tokens, {found.rewritten} layers rewritten"
        parts += [f"## {name}" if page else name, _measured(found, style), *_listed("note", found.notes, page)]
        parts += [*_predicted(prediction, style), *_listed("note", prediction.notes, page)]
        parts += [_factors(prediction), *_listed("theory", prediction.misfits, page)]
    if compared:
        parts += ["## Changes" if page else "changes", _changes(compared, style)]
    return "\n\n".join(part for part in parts if part)


def _measured(found: Profile, style: str) -> str:
    shown = {name: header for name, header in COLUMNS.items() if name in found.quantities}
    curves = {name: found.curve(name) for name in shown}
    rows = [(str(layer), *(_cell(curves[name].get(layer)) for name in shown)) for layer in found.layers]
    return _table(rows, ("layer", *shown.values()), style)


def _predicted(found: Prediction, style: str) -> list[str]:
    """A row for each layer where anything is predicted."""
    shown = {name: header for name, header in COMPARED.items() if name in found.lines}
    lines = {name: {line.layer: line for line in found.lines[name]} for name in shown}
    mixing = {one.layer: one for one in next(iter(found.mixed.values()), ())}
    rows = [
        (str(layer), *(_pair(lines[name].get(layer)) for name in shown), *_mixing(mixing.get(layer)))
        for layer in sorted({layer for entries in lines.values() for layer in entries} | set(mixing))
    ]
    headers = ("layer", *shown.values(), "D of all", "keys", "D of keys", "keys that\nsaturate")
    return [_table(rows, headers, style)] if rows else []


def _pair(line: Any) -> str:
    if line is None:
        return ""
    return f"{line.measured:.3g} {'=' if line.fits else '→'} {line.predicted:.3g}"


def _mixing(one: Mixed | None) -> tuple[str, ...]:
    if one is None:
        return ("",) * 4
    return (f"{one.mixing:.4f}", f"{one.keys:.0f}", f"{one.kept:.4f}", f"{one.saturates:.0f}")


def _factors(found: Prediction) -> str:
    parts = []
    for name, (value, span) in found.factors.items():
        ends = "" if span is None else f" ({span[0]:.3g} to {span[1]:.3g})"
        parts.append(f"{name} {value:.3g}{ends}")
    if found.explained is not None:
        parts.append(f"the fitted pace explains {found.explained:.0%} of the variance of log(1 − ρ)")
    return f"fitted: {'; '.join(parts)}" if parts else ""


def _listed(kind: str, entries: Sequence[str], page: bool) -> list[str]:
    if page:
        return ["\n".join(f"- {kind}: {entry}" for entry in entries)] if entries else []
    return ["\n".join(f"{kind}: {entry}" for entry in entries)] if entries else []


def _changes(compared: Sequence[Change], style: str) -> str:
    names = list(dict.fromkeys(name for found in compared for name in found.quantities))
    rows = [(found.of, found.against, *(_signed(found.quantities.get(name)) for name in names)) for found in compared]
    table = _table(rows, ("change of", "against", *(COLUMNS[name] for name in names)), style)
    return f"means over layers, ± standard error over scenes\n\n{table}"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str], style: str) -> str:
    if style == "github":
        headers = [header.replace("\n", " ") for header in headers]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def _signed(point: Point | None) -> str:
    if point is None:
        return ""
    return f"{point.value:+.2g}" + ("" if math.isnan(point.error) else f" ± {point.error:.1g}")


def _cell(point: Point | None) -> str:
    return "" if point is None else f"{point.value:.3g}"
