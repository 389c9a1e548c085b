"""List the published methods that a plan can name, with what their papers report and what was measured here."""

from __future__ import annotations

import argparse
import json

HELP = "the recipes that --plan can name"


def arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from vggt_compile.bench.measured import measured
    from vggt_compile.recipes import DEFAULT, recipes

    known = {recipe: measured(recipe) for recipe in recipes().values()}
    if args.json:
        rows = [
            {"name": r.name, "summary": r.summary, "source": r.source, "published": r.published, "measured": ours}
            | {"plan": r.plan.to_json()}
            for r, ours in known.items()
        ]
        print(json.dumps({"default": DEFAULT, "recipes": rows}, indent=2))
        return 0
    table = [
        (f"{r.name} (default)" if r.name == DEFAULT else r.name, r.summary, r.source, r.published, "\n".join(ours))
        for r, ours in known.items()
    ]
    headers = ("recipe", "what it does", "source", "published", "measured here")
    print(tabulate(table, headers=headers, maxcolwidths=[None, 45, 25, 35, 35]))
    return 0
