"""Look into a model's attention before choosing a plan: `analyze blocks` at how attention lies in blocks of keys."""

from __future__ import annotations

import argparse

from vggt_compile.cli import blocks

HELP = "where the attention of a trained model lies, and what a method would see of it"


def arguments(parser: argparse.ArgumentParser) -> None:
    forms = parser.add_subparsers(metavar="FORM", required=True)
    for name, module in (("blocks", blocks),):
        sub = forms.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON on stdout only")
        sub.set_defaults(form=module.run)


def run(args: argparse.Namespace) -> int:
    code: int = args.form(args)
    return code
