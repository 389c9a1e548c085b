"""Measure a model: `bench speed` (plain `bench` too) its time on this GPU, `bench accuracy` what plans cost it."""

from __future__ import annotations

import argparse

from vggt_compile.cli import accuracy, speed

HELP = "time a whole model on the GPU, or judge the accuracy of plans; writes the page"


def arguments(parser: argparse.ArgumentParser) -> None:
    speed.arguments(parser)  # plain `bench` is `bench speed`
    forms = parser.add_subparsers(metavar="FORM", required=False)
    for name, module in (("speed", speed), ("accuracy", accuracy)):
        sub = forms.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(sub)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON on stdout only")
        sub.set_defaults(form=module.run)


def run(args: argparse.Namespace) -> int:
    form = getattr(args, "form", speed.run)
    code: int = form(args)
    return code
