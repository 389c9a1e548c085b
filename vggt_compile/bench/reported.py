"""A model that is run, and what its graphs leave of its attention, which reports know for any number of frames."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vggt_compile.errors import BadInput
from vggt_compile.report import Report, collect_reports


class Reported:
    """A way to run a model, and for each call that compiled a report on all graphs that it made."""

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        self._call, self.reports = call, list[Report]()

    def __call__(self, images: Tensor) -> Any:
        with collect_reports() as made:
            outputs = self._call(images)
        if made:
            self.reports.append(Report(rows=[row for report in made for row in report.rows]))
        return outputs

    def attention_left(self, frames: int) -> dict[str, Any]:
        """For a row, of the newest graphs that serve so many frames: the share, and whether it is the least.

        Nothing where no plan ran.
        """
        for report in reversed(self.reports):
            with contextlib.suppress(BadInput):
                least = {"attention_at_least": True} if any(row.at_least for row in report.rows) else {}
                return {"attention_left": report.attention_left(frames), **least}
        return {}
