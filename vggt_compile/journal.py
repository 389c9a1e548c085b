"""Results on disk, one JSON line each, so that a run that was cut short goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vggt_compile.errors import BadInput


class Key(NamedTuple):
    """What one result is of."""

    plan: str
    frames: int
    scene: str
    seed: int


class Journal:
    """Rows by key in a file whose first line holds the settings that all of them depend on.

    Raises:
        BadInput: the file is of other settings, is no journal, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.rows = path, dict[Key, dict[str, Any]]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]
            if not whole:
                whole = [json.dumps({"settings": settings}) + "\n"]
            # A line without its end is what an interrupted run left.
            if whole != lines:
                path.write_text("".join(whole))
        except OSError as error:
            raise BadInput(f"--work {path}: {error.strerror}") from error
        header, *rows = [_parsed(path, line) for line in whole]
        _compare(path, header.get("settings", {}), json.loads(json.dumps(settings)))
        for row in rows:
            self.rows[_key(row)] = row

    def get(self, key: Key, plan: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a key, None where it is still to be made; BadInput where a plan of that name was another one."""
        row = self.rows.get(key)
        if row is not None and row["policy"] != json.loads(json.dumps(plan)):
            raise BadInput(
                f"--work {self.path}: the plan {key.plan!r} was {json.dumps(row['policy'])} there and is "
                f"{json.dumps(plan)} now; give it another name, as NAME={{…}}, or take another file"
            )
        return row

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[_key(row)] = row


def _key(row: Mapping[str, Any]) -> Key:
    return Key(row["plan"], row["frames"], row["scene"], row["seed"])


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if "settings" not in found:
            _key(found)
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--work {path} is not a file of this bench: {line[:60]!r}; take another") from error
    return found


def _compare(path: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if names:
        told = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in names)
        raise BadInput(f"--work {path} holds results of other settings: {told}; take another file or those settings")
