"""The command line, `python -m vggt_compile COMMAND`: it parses and reports errors; vggt_compile.cli does the work."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

import vggt_compile
from vggt_compile.cli.parser import Parser
from vggt_compile.errors import VggtCompileError

COMMANDS = ("demo", "explain", "plan", "export", "run", "inspect", "recipes", "doctor", "bench", "analyze")
"""Modules of vggt_compile.cli, each with HELP, arguments(parser) and run(args) → exit code."""


def parser() -> Parser:
    top = Parser(prog="python -m vggt_compile", description=vggt_compile.__doc__.partition("\n")[0])
    top.add_argument("--version", action="version", version=f"vggt_compile {vggt_compile.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"vggt_compile.cli.{name}")
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(sub)
        sub.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else")
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 where all is well, 1 with one line on stderr for bad input or a failed check."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser().parse_args(argv)
        return args.run(args)
    except VggtCompileError as error:
        line = " ".join(str(error).split())
        if "--json" in argv:
            print(json.dumps({"error": line}))
        print(f"vggt_compile: error: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
