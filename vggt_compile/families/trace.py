"""Arming: while Dynamo or export traces, recognised methods take their traceable form; eager calls keep their bits.

The published models look up rotary angles in a table as long as the largest position, and keep that table and the patch
positions in Python dictionaries. The first breaks the graph inside every attention, the second leaves tensors of the
trace behind in the model. What else stands in the way is in `vggt_compile.families.shims`.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator

from torch import nn

from vggt_compile.families.shim import Shim
from vggt_compile.families.shims import recognise

log = logging.getLogger(__name__)

_armed: dict[tuple[type, str], Shim] = {}
_examined: weakref.WeakSet[type] = weakref.WeakSet()
_prepared: weakref.WeakKeyDictionary[nn.Module, list[Shim]] = weakref.WeakKeyDictionary()


def arm() -> list[Shim]:
    """Wrap every method in this process that is recognised and not wrapped yet; returns the new shims."""
    return [shim for cls in _subclasses(nn.Module) if cls not in _examined for shim in _examine(cls)]


def prepare(model: nn.Module) -> list[Shim]:
    """Make one model traceable, for `torch.export` or a backend other than ours.

    Our own backend does this by itself at every compile. Wrapping acts on the classes that the model uses: eager calls
    of other models of the same class keep their bits, and their traces become clean as well.

    Returns the shims in force for this model, an empty list where nothing needed one. Undo with `unprepare`.
    """
    used = {base for module in model.modules() for base in type(module).__mro__}
    used |= {type(value) for module in model.modules() for value in vars(module).values()}
    _examined.difference_update(used)
    arm()
    _prepared[model] = [shim for shim in _armed.values() if shim.owner in used]
    return list(_prepared[model])


def unprepare(model: nn.Module) -> None:
    """Restore the classes of a prepared model, unless another prepared model still uses them."""
    used = _prepared.pop(model, [])
    kept = {shim.name for shims in _prepared.values() for shim in shims}
    for shim in used:
        if shim.name not in kept and (shim.owner, shim.method) in _armed:
            del _armed[shim.owner, shim.method]
            setattr(shim.owner, shim.method, shim.original)
            _examined.discard(shim.owner)


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[list[Shim]]:
    """A model is prepared inside the block; behind it every class is as it was before."""
    wrapped, known = set(_armed), _prepared.get(model)
    examined = set(_examined)
    try:
        yield prepare(model)
    finally:
        if known is None:
            _prepared.pop(model, None)
        for owner, method in set(_armed) - wrapped:
            setattr(owner, method, _armed.pop((owner, method)).original)
            _examined.discard(owner)
        for cls in set(_examined) - examined:
            _examined.discard(cls)  # it may name a class that was restored


def _examine(cls: type) -> Iterator[Shim]:
    _examined.add(cls)
    for shim in recognise(cls):
        if (shim.owner, shim.method) not in _armed:
            _armed[shim.owner, shim.method] = shim
            setattr(shim.owner, shim.method, shim.wrapped())
            log.info("traceable: %s (%s)", shim.name, shim.what)
            yield shim


def _subclasses(cls: type) -> Iterator[type]:
    direct: list[type] = cls.__subclasses__()
    for sub in direct:
        yield sub
        yield from _subclasses(sub)
