"""The C++ of a library is compiled while its weights are collected, what calls kernels in two halves.

Torch collects all weights before it starts g++, and starts it a second time when that is done. Where no headers are
compiled first, as for a GPU, what g++ is to do is known as soon as the code is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import SubprocessError
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from torch._inductor import codecache, config
from torch._inductor.cpp_builder import CppBuilder, CppTorchDeviceOptions
from torch._inductor.exc import CppCompileError
from torch._inductor.virtualized import V

from vggt_compile.artifact import halves
from vggt_compile.artifact.behind import Flags, Weights
from vggt_compile.artifact.headers import Headers, asked
from vggt_compile.artifact.later import Later

log = logging.getLogger(__name__)

CALLS, KERNELS = "wrapper.cpp", "kernel.cpp"
"""How the names of the two files end: what calls kernels, and kernels for a CPU."""


@contextmanager
def begun_early(headers: Headers, weights: Weights, meanwhile: Iterable[Later[Any]]) -> Iterator[None]:
    """For one compile. Where torch then asks for another command, that one is run as ever.

    Args:
        headers: read as they were compiled, if they are by then.
        weights: taken when the code is written.
        meanwhile: begun then.
    """
    write, build = codecache.write, CppBuilder.build
    begun: dict[str, tuple[str, Future[None]]] = {}
    with ThreadPoolExecutor(2) as beside:

        def written(content: Any, extension: str, *given: Any, **named: Any) -> tuple[str, str]:
            key, path = write(content, extension, *given, **named)
            if extension == CALLS:
                weights.take(V.graph)
                for one in meanwhile:
                    one.begin()
            if extension in (CALLS, KERNELS) and not config.aot_inductor.precompile_headers:
                builder, work = _begun(Path(path), weights.flags, headers, build)
                begun[_target(builder)] = builder.get_command_line(), beside.submit(work)
            return key, path

        def built(builder: CppBuilder) -> None:
            command, made = begun.pop(_target(builder), (None, None))
            if made is not None and command == builder.get_command_line():
                made.result()
                return
            if made is not None:
                made.exception()  # it writes the same file
            build(builder)

        with mock.patch.object(codecache, "write", written), mock.patch.object(CppBuilder, "build", built):
            yield


def _begun(
    path: Path, flags: Flags, headers: Headers, build: Callable[[CppBuilder], None]
) -> tuple[CppBuilder, Callable[[], None]]:
    """What torch is going to make of a file, and what makes it."""
    graph: Any = V.graph
    options = partial(asked, graph.aot_mode, graph.device_type, flags, compile_only=True)
    calls = path.name.endswith(CALLS)
    whole = _builder(path, options(min_optimize=calls))
    parts = halves.halves(path.read_text()) if calls else None
    if parts is None:
        return whole, partial(build, whole)
    folder = TemporaryDirectory(dir=path.parent)
    sources = [Path(folder.name) / f"{path.stem}.half{index}.cpp" for index in range(len(parts))]
    builders = [_builder(source, headers.read_by(options(min_optimize=True))) for source in sources]

    def made(builder: CppBuilder) -> Path:
        build(builder)
        return Path(_target(builder))

    def work() -> None:
        try:
            with folder:
                halves.compiled(parts, sources, [partial(made, one) for one in builders], Path(_target(whole)))
        except (CppCompileError, OSError, SubprocessError):  # what is wrong with the code is said of all of it
            log.info("the code of a library is compiled in one, as its halves are not", exc_info=True)
            build(whole)

    return whole, work


def _target(builder: CppBuilder) -> str:
    return str(builder.get_target_file_path())


def _builder(path: Path, options: CppTorchDeviceOptions) -> CppBuilder:
    return CppBuilder(path.stem, str(path), options, output_dir=str(path.parent))
