"""Calls of the command line in tests."""

from vggt_compile.__main__ import main

TINY = ("--frames", "2", "--size", "28", "42")


def fails(capsys, *argv):
    """The one line that a failing call prints."""
    assert main(argv) == 1
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith("vggt_compile: error: ")
    assert all(other.startswith(("building ", "rendering ")) for other in progress)
    return line
