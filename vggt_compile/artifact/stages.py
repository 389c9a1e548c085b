"""What an export is at, told as it goes on: it takes minutes, most of them inside torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vggt_compile.artifact.request import Span

log = logging.getLogger(__name__)


class Stages:
    """The stages of one graph.

    Attributes:
        seconds: how long each stage took.
    """

    def __init__(self, span: Span) -> None:
        self.span, self.seconds = span, dict[str, float]()

    def continued(self, span: Span) -> Stages:
        """The stages of a graph that goes on from here."""
        stages = Stages(span)
        stages.seconds.update(self.seconds)
        return stages

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is inside the block, logged at level INFO when it begins and when it ends."""
        log.info("%s: %s …", self.span, name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
        log.info("%s: %s took %.1f s", self.span, name, self.seconds[name])
