"""A plan maps global layers to policies; a policy is one setting on each of the four axes.

The same language in Python, JSON and on the command line:

    {"layers": {"0-8": {"scope": "frame"}}, "min_tokens": 8192}

`layers` keys are one index, a range, an open range ("9-"), a share of the depth ("0-37.5%"), a comma list, or "*". A
setting is the name of a method, or a dictionary with "method" and its parameters. `families` holds layers that replace
`layers` for one model family. `probe` lists what is measured at every attention over frames: names of measures, or
dictionaries with "measure" and its parameters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vggt_compile.errors import PlanError, UnknownName
from vggt_compile.registry import AXES, IDENTITY, find_measure, find_method
from vggt_compile.registry import families as registered_families

MOST_LAYERS = 10_000
"""Far more than any model has; a range is a set of indices somewhere, so it must not be as long as one likes."""

KEYS = ("layers", "families", "min_tokens", "probe")
"""Of a plan."""

_RANGE = re.compile(r"(\d+)(?:(-)(\d+)?)?")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class Setting:
    """One method of one axis with all its parameters."""

    method: str
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def read(cls, axis: str, value: object) -> Setting | None:
        if value is None:
            return None
        given = dict(value) if isinstance(value, Mapping) else {"method": value}
        name = given.pop("method", None)
        if not isinstance(name, str):
            raise PlanError(f"axis {axis!r} wants the name of a method or a dictionary with 'method', not {value!r}")
        if name == IDENTITY.get(axis):
            if given:
                raise UnknownName(f"parameter of method {name!r} of axis {axis!r}", next(iter(given)), ())
            return None
        return cls.of(name, find_method(axis, name).check(given))

    @classmethod
    def of(cls, name: str, checked: Mapping[str, Any]) -> Setting:
        return cls(name, tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in sorted(checked.items())))

    def to_json(self, key: str = "method") -> object:
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in self.parameters}
        return {key: self.method, **plain} if plain else self.method


@dataclass(frozen=True)
class Policy:
    """What happens to one attention: a setting for each axis, None where the axis stays as the model has it."""

    scope: Setting | None = None
    tokens: Setting | None = None
    keys: Setting | None = None
    blocks: Setting | None = None

    @classmethod
    def read(cls, value: object) -> Policy:
        if not isinstance(value, Mapping):
            raise PlanError(f"a policy is a dictionary from axis to setting, not {value!r}")
        for axis in value:
            if axis not in AXES:
                raise UnknownName("axis", axis, AXES)
        return cls(**{axis: Setting.read(axis, setting) for axis, setting in value.items()})

    def settings(self) -> Iterator[tuple[str, Setting]]:
        """The axes that act, in the order in which they act."""
        for entry in fields(self):
            setting = getattr(self, entry.name)
            if setting is not None:
                yield entry.name, setting

    @property
    def dense(self) -> bool:
        return not any(True for _ in self.settings())

    @property
    def leaves_out(self) -> bool:
        """Whether it asks for anything but the model's own attention, whoever computes that."""
        return any((axis, setting.method) != ("blocks", "all") for axis, setting in self.settings())

    def to_json(self) -> dict[str, object]:
        return {axis: setting.to_json() for axis, setting in self.settings()}


@dataclass(frozen=True)
class Layers:
    """A set of global layers as written in a plan: closed ranges, at most one open one, and shares of the depth.

    A share from a to b percent of n layers begins at layer a·n/100 and ends before b·n/100, both rounded, so that
    shares which meet leave no layer out. It names none until `at` has been told n.
    """

    ranges: tuple[tuple[int, int | None], ...]
    shares: tuple[tuple[float, float], ...] = ()

    @classmethod
    def read(cls, text: object) -> Layers:
        parts = ["0-"] if text == "*" else [part.strip() for part in str(text).split(",")]
        shares = tuple(cls._read_share(part) for part in parts if part.endswith("%"))
        return cls(tuple(cls._read_range(part) for part in parts if not part.endswith("%")), shares)

    @staticmethod
    def _read_share(text: str) -> tuple[float, float]:
        match = _SHARE.fullmatch(text)
        if match is None or not float(match[1]) < float(match[2]) <= 100:
            raise PlanError(f"{text!r} is not a share of the layers (write two percentages that rise, as '0-37.5%')")
        return float(match[1]), float(match[2])

    def at(self, depth: int) -> Layers:
        """The same layers by their index in a model with so many."""
        ends = [(math.floor(a * depth / 100 + 0.5), math.floor(b * depth / 100 + 0.5)) for a, b in self.shares]
        return Layers((*self.ranges, *((first, end - 1) for first, end in ends if first < end)))

    @staticmethod
    def _read_range(text: str) -> tuple[int, int | None]:
        match = _RANGE.fullmatch(text)
        if match is None:
            numbers = re.findall(r"\d+", text)[:2]
            near = f"; did you mean {'-'.join(numbers)!r}?" if numbers else ""
            raise PlanError(f"{text!r} is not a range of layers{near} (write '3', '0-8', '9-', '0,2,4-6' or '*')")
        first, dash, last = int(match[1]), match[2], match[3]
        if last is not None and int(last) < first:
            raise PlanError(f"the range of layers {text!r} is empty; did you mean '{last}-{first}'?")
        if max(first, int(last or 0)) >= MOST_LAYERS:
            near = f"{first}-" if first < MOST_LAYERS else "0-"
            raise PlanError(f"{text!r} names layers beyond {MOST_LAYERS - 1}; for all up to the last write {near!r}")
        return first, (int(last) if last is not None else None if dash else first)

    def __contains__(self, layer: int) -> bool:
        return any(first <= layer and (last is None or layer <= last) for first, last in self.ranges)

    def overlap(self, other: Layers) -> int | None:
        """The first layer that both name, None where they are disjoint."""
        starts = sorted(first for first, _ in (*self.ranges, *other.ranges))
        return next((layer for layer in starts if layer in self and layer in other), None)

    def closed(self) -> set[int]:
        """Layers that are named one by one: those of open ranges count only from their first one."""
        return {layer for first, last in self.ranges for layer in range(first, (first if last is None else last) + 1)}

    def __str__(self) -> str:
        def one(first: int, last: int | None) -> str:
            return f"{first}-" if last is None else str(first) if first == last else f"{first}-{last}"

        return ",".join((*(one(*entry) for entry in self.ranges), *(f"{a:g}-{b:g}%" for a, b in self.shares)))


Rules = tuple[tuple[Layers, Policy], ...]


def _read_rules(value: object) -> Rules:
    if not isinstance(value, Mapping):
        raise PlanError(f"layers is a dictionary from a range of layers to a policy, not {value!r}")
    return _disjoint(tuple((Layers.read(layers), Policy.read(policy)) for layers, policy in value.items()))


def _disjoint(rules: Rules) -> Rules:
    for i, (layers, _) in enumerate(rules):
        for other, _ in rules[:i]:
            shared = layers.overlap(other)
            if shared is not None:
                raise PlanError(f"layer {shared} is named by both {str(other)!r} and {str(layers)!r}; name it once")
    return rules


def read_probe(value: object) -> tuple[Setting, ...]:
    """Measures with their parameters; PlanError where one is unknown, or there twice."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise PlanError(f"probe is a list of measures, not {value!r}")
    found: list[Setting] = []
    for entry in value:
        given = dict(entry) if isinstance(entry, Mapping) else {"measure": entry}
        name = given.pop("measure", None)
        if not isinstance(name, str):
            raise PlanError(f"probe wants names of measures or dictionaries with 'measure', not {entry!r}")
        if any(name == other.method for other in found):
            raise PlanError(f"probe names the measure {name!r} twice; name it once")
        found.append(Setting.of(name, find_measure(name).check(given)))
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    """Policies for the global layers of a model.

    Attributes:
        rules: layers and their policy; layers that no rule names stay dense.
        families: rules that replace `rules` for one model family, by its name.
        min_tokens: sites with fewer tokens (frames × tokens per frame) stay dense. Under dynamic shapes the comparison
            becomes a guard, so one model compiles at most twice for it; an export has one graph where it can, or two.
        probe: measures of every attention over frames, which runs hand out to `collect_probes`.
        name: of the recipe, for reports.
    """

    rules: Rules = ()
    families: tuple[tuple[str, Rules], ...] = ()
    min_tokens: int = 0
    probe: tuple[Setting, ...] = ()
    name: str = field(default="custom", compare=False)

    @classmethod
    def read(cls, value: object, name: str = "custom") -> Plan:
        """A plan from a dictionary. PlanError names the nearest valid word for an unknown one."""
        if not isinstance(value, Mapping):
            raise PlanError(f"a plan is a dictionary, not {value!r}")
        for key in value:
            if key not in KEYS:
                raise UnknownName("key of a plan", key, KEYS)
        min_tokens = value.get("min_tokens", 0)
        if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or min_tokens < 0:
            raise PlanError(f"min_tokens must be a number of tokens, 0 or more, not {min_tokens!r}")
        families = value.get("families", {})
        if not isinstance(families, Mapping):
            raise PlanError(f"families is a dictionary from a family's name to layers, not {families!r}")
        for family in families:
            if family not in (known := ["generic", *(entry.name for entry in registered_families())]):
                raise UnknownName("family", family, known)
        by_family = tuple((family, _read_rules(rules)) for family, rules in families.items())
        return cls(
            _read_rules(value.get("layers", {})), by_family, min_tokens, read_probe(value.get("probe", ())), name
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """A plan from a JSON file."""
        try:
            text = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error.strerror}") from error
        except ValueError as error:  # neither JSON nor text
            raise PlanError(f"the plan {str(path)!r} is not JSON: {error}") from error
        return cls.read(text, name=Path(path).stem)

    def at(self, depth: int) -> Plan:
        """The plan for a model with so many global layers: shares of the depth become indices.

        Raises:
            PlanError: two rules name one layer of such a model.
        """

        def placed(rules: Rules) -> Rules:
            return _disjoint(tuple((layers.at(depth), policy) for layers, policy in rules))

        families = tuple((family, placed(rules)) for family, rules in self.families)
        return replace(self, rules=placed(self.rules), families=families)

    def rules_for(self, family: str) -> Rules:
        return dict(self.families).get(family, self.rules)

    def policy(self, layer: int, family: str = "generic") -> Policy:
        return next((policy for layers, policy in self.rules_for(family) if layer in layers), Policy())

    @property
    def dense(self) -> bool:
        """Whether nothing is to be rewritten, whatever the model."""
        every = (self.rules, *(rules for _, rules in self.families))
        return all(policy.dense for rules in every for _, policy in rules)

    def to_json(self) -> dict[str, object]:
        """The plan as a JSON-ready dictionary; `Plan.read` gives it back."""

        def table(rules: Rules) -> dict[str, object]:
            return {str(layers): policy.to_json() for layers, policy in rules}

        families = {family: table(rules) for family, rules in self.families}
        probe = [setting.to_json("measure") for setting in self.probe]
        return {"layers": table(self.rules), "families": families, "min_tokens": self.min_tokens, "probe": probe}
