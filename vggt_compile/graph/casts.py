"""What autocast does at an operation, asked of autocast itself, is said by casts of operands or by a stated dtype.

The operation runs on fake operands, with autocast as around it and, with what is thought to say the same, without. Both
runs must come to the same operations on the same values in the same dtypes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from vggt_compile.graph.enclosing import Autocast
from vggt_compile.graph.trial import NOTHING, Call, Casts, Trial, dtypes, tensors


class Unclear(Exception):
    """No cast of an operand and no dtype says what autocast does at an operation."""


def casts_at(function: OpOverload, operands: Sequence[Any], call: Call, regions: Sequence[Autocast]) -> Casts:
    """What stands for autocast where `function(*call(operands))` runs inside the regions, outermost first.

    Raises:
        Unclear: nothing that is known to.
    """
    seen: dict[Hashable, int] = {}
    off = [Autocast(device, None, False, None) for device in {region.device for region in regions}]
    try:
        want = Trial(function, operands, call, regions, seen)
    except Exception as error:
        raise Unclear(f"{function} does not run on fake operands: {error}") from error
    for casts in _candidates(function, operands, call, want):
        try:
            if Trial(function, operands, call, off, seen, casts).did == want.did:
                return casts._replace(gives=dtypes(want.given))
        except Exception:  # dtypes that do not fit without casts
            continue
    raise Unclear(f"autocast does at {function} what no cast of an operand does")


def _candidates(function: OpOverload, operands: Sequence[Any], call: Call, want: Trial) -> Iterator[Casts]:
    """Autocast casts all that it casts at one operation to one dtype. Other casts of `want` are the operation's own."""
    same = len({operand.dtype for operand in tensors(operands) if operand.is_floating_point()}) < 2
    if same:
        yield NOTHING
    for dtype in dict.fromkeys(want.cast.values()):
        yield Casts({index: to for index, to in want.cast.items() if to == dtype}, {})
    if not same:  # tried late, as a failure on fake operands is logged
        yield NOTHING
    names = [argument.name for argument in function._schema.arguments]
    args, kwargs = call(operands)
    free = "dtype" in names and names.index("dtype") >= len(args) and kwargs.get("dtype") is None
    if free and isinstance(want.given, Tensor):
        yield Casts({}, {"dtype": want.given.dtype})
