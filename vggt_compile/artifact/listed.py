"""The list of weights in a library, as tables.

Torch writes eleven statements for each weight, 15,000 for VGGT-1B: half of all C++ there is, and of the time that g++
takes for it. As tables they are data. Before, it compares the name of each weight with that of every other one, made
anew each time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor.codegen import cpp_wrapper_cpu
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

STATEMENT = re.compile(r" *constants_info_\[(\d+)\]\.(\w+) = (.*);")


@contextmanager
def in_tables() -> Iterator[None]:
    """Compiles inside the block write what they say of weights in a table for each field."""
    write = CppWrapperCpu.codegen_model_constructor

    def codegen_model_constructor(writer: Any) -> None:
        before = len(writer.prefix._lines)
        write(writer)
        writer.prefix._lines[before:] = tables(writer.prefix._lines[before:])

    with (
        mock.patch.object(CppWrapperCpu, "codegen_model_constructor", codegen_model_constructor),
        mock.patch.object(cpp_wrapper_cpu, "normalize_name", functools.cache(cpp_wrapper_cpu.normalize_name)),
    ):
        yield


def tables(lines: list[Any]) -> list[Any]:
    """The same code: fields that every weight has are tables, in the place of the last statement."""
    found = [STATEMENT.fullmatch(line) if isinstance(line, str) else None for line in lines]
    fields: dict[str, list[str]] = {}
    for one in filter(None, found):
        fields.setdefault(one[2], []).append(one[3])
    count = len(fields.get("name", ()))
    written = {field: values for field, values in fields.items() if len(values) == count}
    left = [line for line, one in zip(lines, found, strict=True) if one is None or one[2] not in written]
    if not count:
        return left
    end = max(index for index, one in enumerate(found) if one is not None) + 1 - (len(lines) - len(left))
    return [*left[:end], *(line for field, values in written.items() for line in _table(field, values)), *left[end:]]


def _table(field: str, values: list[str]) -> Iterator[str]:
    yield f"    {{ static const {_type(field, values[0])} values[] = {{"
    yield from (f"        {value}," for value in values)
    yield f"    }}; for (size_t i = 0; i < {len(values)}; ++i) constants_info_[i].{field} = values[i]; }}"


def _type(field: str, value: str) -> str:
    if value.startswith("{"):
        return "std::initializer_list<int64_t>"
    return "char* const" if value.startswith('"') else f"decltype(constants_info_[0].{field})"
