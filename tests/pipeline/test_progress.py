from __future__ import annotations

import io
import logging
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from potstill.pipeline import progress
from potstill.pipeline.progress import metered


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that stands still until `now` is moved."""
    held = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: held.now))
    return held


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_log_gets_a_line_every_ten_seconds_with_rate_note_and_remaining_time(clock, caplog):
    caplog.set_level(logging.INFO)
    with metered("train student", 1000, "tokens") as meter:
        for _ in range(20):
            clock.now += 1
            meter.advance(10, "loss 1.42")
        clock.now += 1
    assert lines(caplog) == [
        "train student: 10 % · 10 tokens/s · loss 1.42 · 1:30 left",
        "train student: 20 % · 10 tokens/s · loss 1.42 · 1:20 left",
        "train student: done in 0:21 · 9.5 tokens/s · loss 1.42",
    ]


def test_short_work_is_not_mentioned(clock, caplog):
    caplog.set_level(logging.INFO)
    with metered("prepare", 3, "documents") as meter:
        clock.now += 1.9
        meter.advance(3)
    assert lines(caplog) == []


def test_work_of_unknown_length_has_no_share_and_no_end(clock, caplog):
    caplog.set_level(logging.INFO)
    with metered("prepare", None, "documents") as meter:
        clock.now += 10
        meter.advance(50)
    assert lines(caplog)[0] == "prepare: 50 documents · 5 documents/s"


def test_what_an_earlier_run_did_counts_as_done_but_not_as_speed(clock, caplog):
    caplog.set_level(logging.INFO)
    with metered("train", 100, "tokens") as meter:
        meter.skip(80)
        clock.now += 10
        meter.advance(10)
    assert lines(caplog)[0] == "train: 90 % · 1 tokens/s · 0:10 left"


def test_failed_work_does_not_say_that_it_is_done(clock, caplog):
    caplog.set_level(logging.INFO)

    def work():
        with metered("train", 1, "tokens"):
            clock.now += 60
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert lines(caplog) == []


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, False), (0.3, True)])
def test_a_terminal_shows_a_bar_for_work_that_lasts(monkeypatch, seconds, shown):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120))
    with metered("evaluate", 4, "rows") as meter:
        meter.advance(1, "teacher")
        time.sleep(seconds)
        meter.advance(1, "student")
    assert ("evaluate" in screen.getvalue()) == shown
    assert ("student" in screen.getvalue()) == shown
