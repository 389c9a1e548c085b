"""What is begun runs once, beside whoever begins it, and says what failed to whoever asks."""

from __future__ import annotations

import threading

import pytest

from vggt_compile.artifact.later import Later


def test_it_runs_once_in_a_thread_of_its_own() -> None:
    ran, go = [], threading.Event()

    def run() -> int:
        go.wait(10)
        ran.append(threading.get_ident())
        return 7

    later = Later(run)
    later.begin()
    later.begin()
    assert not ran
    go.set()
    assert (later.result(), later.result()) == (7, 7)
    assert len(ran) == 1
    assert ran != [threading.get_ident()]


def test_who_asks_need_not_begin() -> None:
    assert Later(lambda: "asked").result() == "asked"


def test_what_fails_is_said_to_each_who_asks() -> None:
    later = Later(lambda: 1 / 0)
    later.begin()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            later.result()
