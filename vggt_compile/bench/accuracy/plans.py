"""Which plans the bench runs, as its command line names them, and those that show what each layer matters."""

from __future__ import annotations

from vggt_compile.errors import PlanError
from vggt_compile.plan import Plan
from vggt_compile.recipes import read_named, recipes, resolve

FRAME_ONLY = "frame only"
"""No frame sees another, which a bench worth its name must punish."""


def _everywhere(name: str, policy: dict[str, object]) -> Plan:
    return Plan.read({"layers": {"*": policy}}, name)


# Blocks have the size that the recipes use, 128 queries by 64 keys: of ten frames of 16·16 patches a query block reads
# 10 of 40 key blocks. Smaller blocks make it easy for chance, because random lists are drawn evenly over the sequence:
# at 64 by 16 they hold one row of patches of every four, a thinned copy of every frame (measured in docs/accuracy.md).
CONTROLS = {
    plan.name: plan
    for plan in (
        _everywhere(FRAME_ONLY, {"scope": "frame"}),
        _everywhere("random blocks", {"blocks": {"method": "random", "keep": 0.25}}),
        _everywhere("predicted blocks", {"blocks": {"method": "predict", "keep": 0.25}}),
    )
}
"""Plans that tell what the bench can tell: what is lost without other frames, and what choosing blocks is worth."""


def read_plans(text: str | None) -> dict[str, Plan]:
    """Comma-separated plans by name, `dense` first; without text all recipes and controls.

    Each is the name of a recipe or a control, the path of a JSON file or JSON, the last two also as NAME=….

    Raises:
        PlanError: a plan that cannot be meant, or two of one name.
    """
    parts = split(text) if text is not None else [*recipes(), *CONTROLS]
    found = {"dense": resolve("dense")}
    for part in parts:
        name, plan = _read(part)
        if found.setdefault(name, plan) != plan:
            raise PlanError(f"two plans are named {name!r}; name one of them otherwise: NAME={{…}}")
    return found


def split(text: str) -> list[str]:
    """Parts between commas that stand outside of braces and brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _read(text: str) -> tuple[str, Plan]:
    return (text, CONTROLS[text]) if text in CONTROLS else read_named(text)


def layer_plans(layers: int) -> dict[str, Plan]:
    """Dense, each of so many global layers alone inside frames, and all of them."""
    single = {f"layer {i}": Plan.read({"layers": {str(i): {"scope": "frame"}}}, f"layer {i}") for i in range(layers)}
    return {"dense": resolve("dense")} | single | {FRAME_ONLY: CONTROLS[FRAME_ONLY]}
