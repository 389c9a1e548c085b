"""What a layer may become: policies on every axis, from mild to strong, and merges whose keys are thinned as well."""

from __future__ import annotations

from typing import Any

from vggt_compile.plan import Plan, Policy
from vggt_compile.report import spans

DENSE = "dense"


def candidates(family: str) -> dict[str, Policy]:
    """Policies by name, the dense one first; VGGT's first frame, to which coordinates refer, stays whole."""
    anchored = family != "pi3"
    written: dict[str, Any] = {DENSE: {}}
    strides = {"1x2": (1, 2), "2x2": (2, 2), "2x3": (2, 3), "3x3": (3, 3)}
    written |= {f"keys {name}": {"keys": _grid(anchored, stride)} for name, stride in strides.items()}
    written |= {f"keys of frames /{n}": {"keys": _grid(anchored, (1, 1), n)} for n in (2, 4)}
    written |= {"keys 2x2 of frames /2": {"keys": _grid(anchored, (2, 2), 2)}}
    written |= {f"merge {ratio:g}": {"tokens": _merge(anchored, ratio)} for ratio in (0.5, 0.9)}
    written |= {
        f"merge 0.9 + keys {name}": {"tokens": _merge(anchored, 0.9), "keys": _grid(False, strides[name])}
        for name in ("1x2", "2x2")
    }
    written |= {f"blocks {keep:g}": {"blocks": {"method": "predict", "keep": keep}} for keep in (0.5, 0.25, 0.1)}
    written |= {"frame": {"scope": "frame"}}
    return {name: Policy.read(policy) for name, policy in written.items()}


def everywhere(name: str, policy: Policy) -> Plan:
    """One policy in all global layers."""
    return Plan.read({"layers": {"*": policy.to_json()}}, name)


def composed(policies: dict[int, Policy], name: str) -> Plan:
    """A plan from a policy for each layer; layers of one policy share a rule, dense ones have none."""
    rules: dict[str, list[int]] = {}
    known = {}
    for layer, policy in sorted(policies.items()):
        if not policy.dense:
            rules.setdefault(key := str(policy), []).append(layer)
            known[key] = policy
    layers = {spans(set(found)): known[key].to_json() for key, found in rules.items()}
    return Plan.read({"layers": layers}, name)


def _grid(keep_first_frame: bool, stride: tuple[int, int], frames: int = 1) -> dict[str, Any]:
    setting: dict[str, Any] = {"method": "grid", "stride": stride, "frames": frames}
    return setting | {"keep_first_frame": keep_first_frame}


def _merge(reference: bool, ratio: float) -> dict[str, Any]:
    """FastVGGT's, at a ratio of one's own."""
    setting: dict[str, Any] = {"method": "merge", "ratio": ratio, "cell": (2, 2), "cells": "seeded", "protect": 0.1}
    return setting | {"metric": "input", "reference": reference}
