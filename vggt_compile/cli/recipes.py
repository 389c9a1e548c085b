"""List the published methods that a plan can name."""

from __future__ import annotations

import argparse
import json

HELP = "the recipes that --plan can name"


def arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from vggt_compile.recipes import DEFAULT, recipes

    known = recipes().values()
    if args.json:
        rows = [{"name": r.name, "summary": r.summary, "source": r.source, "plan": r.plan.to_json()} for r in known]
        print(json.dumps({"default": DEFAULT, "recipes": rows}, indent=2))
        return 0
    table = [(f"{r.name} (default)" if r.name == DEFAULT else r.name, r.summary, r.source) for r in known]
    print(tabulate(table, headers=("recipe", "what it does", "source"), maxcolwidths=[None, 60, 40]))
    return 0
