"""The ways to run a model by name: eager, plain `torch.compile`, a plan, and a plan with passes switched off."""

from __future__ import annotations

from vggt_compile.errors import UnknownName
from vggt_compile.graph import outline
from vggt_compile.recipes import recipes
from vggt_compile.registry import methods, regions

VARIANTS = ("eager", "compile", "dense", "g2f")
"""What `make bench` runs."""
SPARSE = {
    f"sparse-{percent}": {"layers": {"*": {"blocks": {"method": "predict", "keep": (100 - percent) / 100}}}}
    for percent in (25, 50, 75, 90)
}
"""Plans in which every patch query leaves out so many percent of the key blocks, whatever the weights are."""
WITHOUT = "@without-"
"""`RECIPE@without-hoist_keys,share_tables`: a plan with these passes switched off."""


def all_variants() -> tuple[str, ...]:
    """Eager, plain `torch.compile`, every recipe, and the plans of `SPARSE`."""
    return tuple(dict.fromkeys((*VARIANTS, *recipes(), *SPARSE)))


def split_variant(name: str) -> tuple[str, str]:
    """Plan or way to run, and what `disabled_passes` is set to."""
    plan, _, off = name.partition(WITHOUT)
    return plan, off


def known_variant(name: str) -> str:
    """The name of a variant; UnknownName says what is close where there is none."""
    plan, off = split_variant(name)
    if plan not in all_variants() or (off and plan in ("eager", "compile")):
        raise UnknownName("variant", plan, all_variants())
    check_passes(off)
    return name


def check_passes(off: str) -> None:
    """UnknownName for what no pass is called."""
    passes = outline.NAMES.union(*(entry.aliases for entry in regions()), *(entry.aliases for entry in methods()))
    for switched in filter(None, off.split(",")):
        if switched not in passes:
            raise UnknownName("pass", switched, passes)
