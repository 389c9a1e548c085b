"""The C++ of a library in two halves, which two processes compile: what a call does, and what is around it.

The second half has the functions that a library is loaded and asked by, which instantiate torch's templates, and the
table of weights. For VGGT-1B they are nearly half of what g++ does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run

FACE, FACE_ENDS = 'extern "C" {\n', '} // extern "C"\n'
HELD, HELD_ENDS = "AOTInductorModel::AOTInductorModel(", "} // namespace torch::aot_inductor\nusing namespace"
ALONE = "namespace {\nclass AOTInductorModelKernels "
SHARED = 'inline namespace shared __attribute__((visibility("hidden"))) {\nclass AOTInductorModelKernels '
"""Both halves have this class: it is the same for them, and for no other library."""


def halves(code: str) -> tuple[str, str] | None:
    """What a call does, and the rest; None where the code is not what torch is known to write."""
    marks = FACE, FACE_ENDS, ALONE, HELD, HELD_ENDS
    places = [code.find(mark) for mark in marks]
    if -1 in places or places != sorted(places):
        return None
    face, face_ends, _, held, held_ends = places
    calls = code[:face] + code[face_ends + len(FACE_ENDS) : held] + code[held_ends:]
    around = code[: held_ends + HELD_ENDS.index("\n") + 1]
    return calls.replace(ALONE, SHARED), around.replace(ALONE, SHARED)


def compiled(parts: Sequence[str], sources: Sequence[Path], build: Sequence[Callable[[], Path]], target: Path) -> None:
    """Compile the parts side by side, and make one object of theirs.

    Args:
        sources: where each part is written.
        build: compile each, and give the path of its object.

    Raises:
        CppCompileError, OSError, CalledProcessError, of parts that are none by themselves.
    """
    for source, part in zip(sources, parts, strict=True):
        source.write_text(part)
    with ThreadPoolExecutor(len(parts)) as beside:
        objects = [made.result() for made in [beside.submit(one) for one in build]]
    run(["ld", "-r", "-o", target, *objects], check=True, capture_output=True)
