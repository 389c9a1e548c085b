"""A file of compiled graphs begins with what they were made of, and is good for nothing else.

One line of JSON, then the graphs one after the other. The line is compared before any graph is read, as reading one
runs what is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

FORMAT = "vggt_compile graphs, 1"
WHOLE_VERSIONS = ("torch", "vggt_compile")
"""Packages that `made_of` speaks for, so that their sources need not be read."""


class Kept:
    """The graphs at `path`, each with the state it was compiled under; none that were not made of `made_of`."""

    def __init__(self, path: str | os.PathLike[str], made_of: Mapping[str, str]) -> None:
        self.path, self.made_of = Path(path), dict(made_of)
        self.graphs: list[tuple[str, bytes]] = []
        self.sources: dict[str, str] = {}
        problem = self._read()
        if problem:
            self.graphs, self.sources = [], {}
            log.warning("%s is written anew: %s", self.path, problem)

    def under(self, state: str) -> list[bytes]:
        return [graph for there, graph in self.graphs if there == state]

    def add(self, state: str, graph: bytes, sources: Mapping[str, str]) -> None:
        """One graph more, made of `sources`: digests by module. The file is there whole or not at all."""
        self.graphs.append((state, graph))
        self.sources |= sources
        graphs = [(there, len(one), _digest(one)) for there, one in self.graphs]
        about = {"format": FORMAT, "made_of": self.made_of, "sources": self.sources, "graphs": graphs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        beside.write_bytes(json.dumps(about).encode() + b"\n" + b"".join(one for _, one in self.graphs))
        os.replace(beside, self.path)

    def drop(self, graph: bytes, why: object) -> None:
        """A graph that turned out to be of no use goes with the next one that is added."""
        log.warning("%s: a graph cannot be used and is compiled anew: %s", self.path, why)
        self.graphs = [one for one in self.graphs if one[1] != graph]

    def _read(self) -> str:
        """Take over what the file has; else what is wrong."""
        if not self.path.exists():
            return ""
        line, _, rest = self.path.read_bytes().partition(b"\n")
        try:
            about = json.loads(line)
            if about["format"] != FORMAT:
                return "it is of another kind"
            for state, length, digest in about["graphs"]:
                graph, rest = rest[:length], rest[length:]
                if _digest(graph) != digest:
                    return "it is cut off or damaged"
                self.graphs.append((state, graph))
            self.sources = dict(about["sources"])
            return _difference(about["made_of"], self.made_of) or _edited(self.sources)
        except (ValueError, KeyError, TypeError):
            return "it is of another kind"


def sources(contents: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What `Kept.add` wants to know of modules, given by name and source."""
    return {name: _digest(text.encode()) for name, text in contents if name.partition(".")[0] not in WHOLE_VERSIONS}


def _difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    for key in sorted({*then, *now}):
        if then.get(key) != now.get(key):
            return f"{key} was {then.get(key)}, and is {now.get(key)}"
    return ""


def _edited(digests: Mapping[str, str]) -> str:
    for name, digest in digests.items():
        text = None
        with contextlib.suppress(ImportError, OSError, TypeError):  # it is gone, or has no source any more
            text = inspect.getsource(importlib.import_module(name))
        if text is None or _digest(text.encode()) != digest:
            return f"the code of {name} is another"
    return ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
