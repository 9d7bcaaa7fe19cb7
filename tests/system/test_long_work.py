"""Long work says how far it is, and short work says nothing."""

from __future__ import annotations

import io
import time

import pytest

from posttrain.system.long_work import LongWork


def test_short_work_is_silent_and_long_work_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    work = LongWork("texts", 2000, stream=stream)
    for pieces in (500, 500, 200, 800):  # after 1, 6, 7 and 12 seconds
        work.count(pieces)
    assert stream.getvalue() == "texts: 1,000 of 2,000, 6 s left\n"  # nothing is said of work that has just ended


def test_the_time_left_rests_on_work_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions that run at the same time end late: the first of 64 says nothing about the others."""
    stream, clock = io.StringIO(), iter([0.0, 10.0, 20.0, 20.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    work = LongWork("completions", 100, 36, stream=stream)
    work.count()  # after 10 seconds
    work.count(14)  # after 20 seconds
    work.batch_ended()
    work.count()  # after 30 seconds: at 15 in 20 seconds the whole takes 85
    assert stream.getvalue().splitlines() == [
        "completions: 37 of 100",
        "completions: 51 of 100",
        "completions: 52 of 100, 55 s left",
    ]


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    LongWork("texts", 10, stream=stream, quiet=0.0).count()
    assert stream.getvalue() == ""
