"""Look into a model's attention before choosing a plan.

`analyze MODEL` (`analyze profile MODEL` in full) measures how far attention and tokens collapse, layer by layer;
`analyze blocks` how attention lies in blocks of keys.
"""

from __future__ import annotations

import argparse

from vggt_compile.cli import blocks, profile
from vggt_compile.cli.parser import Parser

HELP = "how far attention and tokens of a model collapse, and where its attention lies"
FORMS = {"profile": profile, "blocks": blocks}


def arguments(parser: Parser) -> None:
    parser.forms = tuple(FORMS)
    forms = parser.add_subparsers(metavar="FORM", required=True)
    for name, module in FORMS.items():
        sub = forms.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON on stdout only")
        sub.set_defaults(form=module.run)


def run(args: argparse.Namespace) -> int:
    code: int = args.form(args)
    return code
