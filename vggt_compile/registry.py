"""What can be added from outside: methods of an axis, families, and measures. Built-in ones register in the same way.

A package adds its own by naming a module under the entry-point group `vggt_compile.extensions`; importing that module
registers what it decorates.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal

from torch.fx import Graph

from vggt_compile.errors import PlanError, UnknownName
from vggt_compile.site import AttentionState, Lowered, Outcome, Scope, Skip

AXES = ("scope", "tokens", "keys", "blocks")
"""The order in which the axes act on an attention."""

REGIONS = ("hoist_keys", "sink_unmerge", "share_tables")
"""The order in which passes over regions act on a graph, after all its attentions are rewritten."""

IDENTITY = {"scope": "global"}
"""Names that a plan may write where an axis stays as the model has it."""

BUILT_IN = ("vggt_compile.passes", "vggt_compile.families", "vggt_compile.measures")
"""Packages whose modules register themselves."""

Transform = Callable[..., AttentionState | Skip]

Place = tuple[Scope, int | None]
"""Scope and layer of one attention module."""


class Optioned:
    """Something with a function `run` whose keyword-only parameters are options of the plan language.

    Their names, annotations and defaults are the names, types and defaults that users see, and the docstring of the
    function is the help text.
    """

    name: str
    run: Callable[..., Any]

    @property
    def where(self) -> str:
        """How messages call it."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        return " ".join((inspect.getdoc(self.run) or "").partition("\n\n")[0].split())

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        signature = inspect.signature(self.run, eval_str=True)
        return {n: p for n, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of a use of this function, given ones over defaults; PlanError names what is wrong."""
        for name in given:
            if name not in self.parameters:
                raise UnknownName(f"parameter of {self.where}", name, self.parameters)
        missing = [n for n, p in self.parameters.items() if p.default is p.empty and n not in given]
        if missing:
            raise PlanError(f"{self.where} needs {', '.join(missing)}")
        for name, value in given.items():
            _check_type(f"{name!r} of {self.where}", value, self.parameters[name].annotation)
        return {n: given.get(n, p.default) for n, p in self.parameters.items()}


@dataclass(frozen=True)
class Method(Optioned):
    """One way to act on an axis: `run(site, state, edit, **parameters)`."""

    axis: str
    name: str
    run: Transform

    @property
    def where(self) -> str:
        return f"method {self.name!r} of axis {self.axis!r}"

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.run) or "").partition("\n")[0]

    @property
    def aliases(self) -> set[str]:
        """Names under which it can be switched off: its axis, its name in plans, and that of its function."""
        return {self.axis, self.name, getattr(self.run, "__name__", self.name)}


@dataclass(frozen=True)
class Measure(Optioned):
    """Something that a plan can ask to be measured at every attention over frames.

    Attributes:
        run: the definition, in PyTorch.
        quantities: names of what it gives.
        reads: which of the tensors and sizes around an attention it takes, in order.
        operator: `run` as a graph calls it.
    """

    name: str
    run: Callable[..., Any]
    quantities: tuple[str, ...]
    reads: tuple[str, ...]
    operator: Callable[..., Any]

    @property
    def where(self) -> str:
        return f"measure {self.name!r}"


@dataclass(frozen=True)
class RegionPass:
    """A change of what lies around rewritten attentions: `run(graph, lowered, edit)` tells its Outcome."""

    name: str
    run: Callable[[Graph, Sequence[Lowered], Any], Outcome]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.run) or "").partition("\n")[0]

    @property
    def aliases(self) -> set[str]:
        """Names under which it can be switched off: its own, and that of all of them."""
        return {self.name, "regions"}


@dataclass(frozen=True, repr=False)
class Range:
    """What a number of the plan language may be, ends included: `Annotated[float, Range(0, 1)]`."""

    low: float
    high: float = math.inf

    def check(self, what: str, value: float) -> None:
        if not self.low <= value <= self.high:
            near = self.high if value > self.high else self.low
            raise PlanError(f"{what} must {self._lie}, not {value!r}; the nearest is {near:g}")

    def __repr__(self) -> str:
        return f"Range({self.low:g}, {self.high:g})"

    def __str__(self) -> str:
        return f"{self.low:g} or more" if self.high == math.inf else f"{self.low:g} … {self.high:g}"

    @property
    def _lie(self) -> str:
        return f"be {self}" if self.high == math.inf else f"lie in {self}"


def plain_type(annotation: Any) -> Any:
    """The type under an annotation: int for `Annotated[int, Range(1)]`."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


Share = Annotated[float, Range(0, 1)]
Stride = Annotated[int, Range(1)]
Limit = Annotated[int, Range(0)]


def _check_type(what: str, value: Any, annotation: Any) -> None:
    kind, of = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        _check_type(what, value, of[0])
        of[1].check(what, value)
        return
    if kind is Literal:
        if value not in of:
            raise UnknownName(f"value for {what}:", value, map(str, of))
        return
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(of):
            raise PlanError(f"{what} must be a list of {len(of)} values, not {value!r}")
        for entry, wanted in zip(value, of, strict=True):
            _check_type(what, entry, wanted)
        return
    wanted = {float: (int, float)}.get(annotation, annotation)
    if annotation is not inspect.Parameter.empty and (
        not isinstance(value, wanted) or (isinstance(value, bool) and annotation is not bool)
    ):
        raise PlanError(f"{what} must be {getattr(annotation, '__name__', annotation)}, not {value!r}")


@dataclass(frozen=True)
class Family:
    """What we know of one model family from the paths of its attention modules.

    Attributes:
        name: as in reports and in the `families` part of a plan.
        blocks: finds the attention modules of the trunk by their path; the first family that finds one in a graph
            speaks for the graph.
        place: a match of `blocks` → (scope, layer) where the path alone tells, else None. A scope is a claim: it holds
            only where shapes agree. Layers count the family's global attentions from 0.
        special: tokens per frame that are not patches, for graphs that do not hold the patch embedding.
    """

    name: str
    blocks: re.Pattern[str]
    place: Callable[[re.Match[str]], Place | None]
    special: int | None = None

    def knows(self, path: str) -> bool:
        return self.blocks.search(path) is not None

    def claim(self, path: str) -> Place | None:
        match = self.blocks.search(path)
        return self.place(match) if match else None


_methods: dict[tuple[str, str], Method] = {}
_regions: dict[str, RegionPass] = {}
_families: dict[str, Family] = {}
_measures: dict[str, Measure] = {}


def method(axis: str, name: str) -> Callable[[Transform], Transform]:
    """Register a function as a method of an axis; its plan form is `{axis: name}` or `{axis: {"method": name, …}}`."""
    if axis not in AXES:
        raise UnknownName("axis", axis, AXES)

    def register(run: Transform) -> Transform:
        known = _methods.get((axis, name))
        if known is not None and known.run.__module__ != run.__module__:
            raise PlanError(f"method {name!r} of axis {axis!r} is already registered by {known.run.__module__}")
        _methods[axis, name] = Method(axis, name, run)
        return run

    return register


def region(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Register a function as the pass over regions of its name."""
    if run.__name__ not in REGIONS:
        raise UnknownName("pass over regions", run.__name__, REGIONS)
    _regions[run.__name__] = RegionPass(run.__name__, run)
    return run


def family(entry: Family) -> Family:
    """Register a model family; the first one that places a path of a graph speaks for the graph."""
    _families[entry.name] = entry
    return entry


def add_measure(entry: Measure) -> Measure:
    """Register a measure under its name; `vggt_compile.measures.operator.measure` makes one of a function."""
    known = _measures.get(entry.name)
    if known is not None and known.run.__module__ != entry.run.__module__:
        raise PlanError(f"measure {entry.name!r} is already registered by {known.run.__module__}")
    _measures[entry.name] = entry
    return entry


def find_measure(name: str) -> Measure:
    _load()
    if name not in _measures:
        raise UnknownName("measure", name, _measures)
    return _measures[name]


def measures() -> list[Measure]:
    """Every measure, by name."""
    _load()
    return sorted(_measures.values(), key=lambda m: m.name)


def find_method(axis: str, name: str) -> Method:
    _load()
    if (axis, name) not in _methods:
        known = [n for a, n in _methods if a == axis]
        raise UnknownName(f"method of axis {axis!r}", name, [*known, IDENTITY[axis]] if axis in IDENTITY else known)
    return _methods[axis, name]


def methods() -> list[Method]:
    """Every method, in the order in which axes act."""
    _load()
    return sorted(_methods.values(), key=lambda m: (AXES.index(m.axis), m.name))


def regions() -> list[RegionPass]:
    """Every pass over regions, in the order in which they act."""
    _load()
    return sorted(_regions.values(), key=lambda entry: REGIONS.index(entry.name))


def families() -> list[Family]:
    _load()
    return list(_families.values())


def packages() -> set[str]:
    """Top-level packages that registered a method or a measure: this one, and those of extensions."""
    return {m.run.__module__.partition(".")[0] for m in (*methods(), *measures())}


@functools.cache
def _load() -> None:
    for package in BUILT_IN:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(info.name)
    for point in entry_points(group="vggt_compile.extensions"):
        point.load()
