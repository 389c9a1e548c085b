"""A small alternating model for `module:callable` on the command line."""

from alternating import build
from framed import SPEC
from torch import nn


def model() -> nn.Module:
    return build(SPEC)
