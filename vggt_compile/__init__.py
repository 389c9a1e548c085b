"""Speed for feed-forward 3D reconstruction models: a torch.compile backend for the VGGT family.

    torch.compile(model, backend="vggt_sparse", options={"plan": "turbo"})

Names are imported when they are first used, so importing the package costs nothing and needs no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_compile.artifact.build import export as export
    from vggt_compile.artifact.load import load as load
    from vggt_compile.auto.find import find_plan as find_plan
    from vggt_compile.backend import vggt_sparse as vggt_sparse
    from vggt_compile.densities import Densities as Densities
    from vggt_compile.densities import collect_densities as collect_densities
    from vggt_compile.dry_run import explain as explain
    from vggt_compile.families.trace import prepare as prepare
    from vggt_compile.families.trace import unprepare as unprepare
    from vggt_compile.once import compile_once as compile_once
    from vggt_compile.plan import Plan as Plan
    from vggt_compile.probes import Probes as Probes
    from vggt_compile.probes import collect_probes as collect_probes
    from vggt_compile.report import Report as Report
    from vggt_compile.report import collect_reports as collect_reports

__version__ = "0.1.0"

_HOMES = {
    "vggt_sparse": "backend",
    "compile_once": "once",
    "explain": "dry_run",
    "export": "artifact.build",
    "find_plan": "auto.find",
    "load": "artifact.load",
    "Densities": "densities",
    "collect_densities": "densities",
    "prepare": "families.trace",
    "unprepare": "families.trace",
    "Plan": "plan",
    "Probes": "probes",
    "collect_probes": "probes",
    "Report": "report",
    "collect_reports": "report",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
