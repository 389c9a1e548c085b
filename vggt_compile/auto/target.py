"""What a plan is to reach: one of three numbers, as `{"speedup": 4}` or `speedup=4`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vggt_compile.errors import BadInput, UnknownName

BOUNDS = {"speedup": (1.0, float("inf")), "error": (0.0, 1.0), "flops": (0.0, 1.0)}
"""Values lie between, the lower bound excluded.

- speedup: how many times as cheap the attentions over frames are together, at least
- flops: the share of all attention FLOPs of the model that is left, at most, as a report counts it
- error: the measured change of the outputs, at most
"""


@dataclass(frozen=True)
class Target:
    kind: str
    value: float

    @classmethod
    def read(cls, given: object) -> Target:
        if isinstance(given, Target):
            return given
        if isinstance(given, str):
            name, _, number = given.partition("=")
            given = {name.strip(): number}
        if not isinstance(given, Mapping) or len(given) != 1:
            raise BadInput(f"a target is one of {', '.join(BOUNDS)} with a number, as speedup=4, not {given!r}")
        ((kind, number),) = given.items()
        if kind not in BOUNDS:
            raise UnknownName("target", kind, BOUNDS)
        low, high = BOUNDS[kind]
        try:
            value = float(number)
        except (TypeError, ValueError):
            value = float("nan")
        if not low < value <= high or value == float("inf"):
            above = f"above {low:g}" if high == float("inf") else f"above {low:g}, up to {high:g}"
            raise BadInput(f"the target {kind} is a number {above}, not {number!r}")
        return cls(kind, value)

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"
