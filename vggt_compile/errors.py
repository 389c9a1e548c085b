"""Every error of this package, with its message; a user can act on each without reading our code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class VggtCompileError(Exception):
    """Base of all errors that this package raises on purpose."""


class PlanError(VggtCompileError, ValueError):
    """Options or a plan that cannot be meant: an unknown name or a value outside its range."""


class UnknownName(PlanError):
    """A name that is not known; the message carries the nearest known one."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        known = sorted(map(str, known))
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        listing = ", ".join(known) or "none"
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {listing})")


class NotRewritten(VggtCompileError):
    """Under `strict`, a layer that the plan names was left as it was."""

    def __init__(self, failures: Iterable[str]) -> None:
        lines = "\n  ".join(failures)
        super().__init__(
            "strict: the plan names layers that were not rewritten:\n  "
            f"{lines}\nTake them out of the plan, or drop strict=True and read the report."
        )


class RewriteBug(VggtCompileError, AssertionError):
    """A pass produced a value of another shape, dtype or device than the one that it replaces."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(
            f"the rewrite of {path} changed {what}. This is a bug in vggt_compile: please report it with the plan; "
            "until it is fixed, leave this layer out of the plan."
        )


class BadInput(VggtCompileError, ValueError):
    """Images, folders or arguments that cannot be worked with."""


class ExportFailed(VggtCompileError):
    """One graph cannot serve what was asked of it."""

    def __init__(self, span: str, why: str) -> None:
        super().__init__(
            f"no single graph serves {span}: {why}\nAsk for fewer frame counts, a fixed batch, or another plan."
        )


class WrongCode(ExportFailed):
    """A compiled graph gives other numbers than the program that it was compiled from."""

    def __init__(self, span: str, wrong: Mapping[str, Mapping[str, float]]) -> None:
        found = ", ".join(f"{name} {one['deviation']:.2g} (at most {one['bound']:.2g})" for name, one in wrong.items())
        VggtCompileError.__init__(
            self,
            f"the compiled code of {span} gives other numbers than its program, relative to the norm: {found}\n"
            "Try another torch or plan, or a range of frame counts in place of a fixed one, and please report this "
            "with the plan. check=False (--no-check) writes the file all the same.",
        )


class ArtifactError(VggtCompileError):
    """An artifact cannot be used: `path` and what is wrong in one line."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class NotAnArtifact(ArtifactError):
    """The file is something else, or was written by something else."""


class DamagedArtifact(ArtifactError):
    """The file is cut off, or not what was written."""


class WrongMachine(ArtifactError):
    """The artifact is for another device, architecture, system or version of torch."""


class WrongImages(ArtifactError, ValueError):
    """Images of a size, number, dtype or device that the artifact was not made for."""
