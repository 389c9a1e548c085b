"""The parser of every command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from vggt_compile.errors import BadInput


class Parser(argparse.ArgumentParser):
    """Reports bad arguments as any other bad input: one line and exit code 1.

    Attributes:
        forms: names of the forms of a command, of which the first may be left out.
    """

    forms: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see `{self.prog} --help`)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if self.forms and args and args[0] not in (*self.forms, "-h", "--help"):
            args = [self.forms[0], *args]
        return super().parse_known_args(args, namespace)
