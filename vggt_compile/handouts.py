"""Values that a graph gives beside those of the model: they go to whoever listens, and Dynamo gets the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Receiver = Callable[[Tensor], None]


def handing_out(compiled: Callable[..., Any], receivers: Sequence[Receiver]) -> Callable[..., Any]:
    """A graph whose last outputs are for `receivers`, one each, as what Dynamo expects: without them."""
    if not receivers:
        return compiled

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        for receive, found in zip(receivers, outputs[-len(receivers) :], strict=True):
            receive(found)
        return outputs[: -len(receivers)]

    return run
