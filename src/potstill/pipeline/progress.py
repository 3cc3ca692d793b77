"""What the user sees while a stage works: a bar on a terminal, plain log lines elsewhere.

Refuses to flood a log: a line every ten seconds, and nothing for what takes less than two.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Meter", "metered"]

_log = logging.getLogger("potstill")

QUIET_SECONDS, LINE_SECONDS = 2.0, 10.0


class Meter:
    """Counts work done towards a total, where that is known; `advance` is all that a stage needs."""

    def __init__(self, what: str, total: float | None, unit: str, bar: _Bar | None = None) -> None:
        """`what` names the work, `unit` what is counted; `bar` is drawn on a terminal, without it lines are logged."""
        self.what, self.total, self.unit = what, total, unit
        self.done = self._skipped = 0.0
        self._bar, self._note = bar, ""
        self._began = self._lined = time.monotonic()

    def skip(self, amount: float) -> None:
        """Work found done already (by an earlier, interrupted run): moves the bar, not the rate."""
        self.done += amount
        self._skipped += amount
        if self._bar:
            self._bar.show(self.done, "")

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more units are done; `note` says how it goes, for example `loss 1.42`."""
        self.done += amount
        self._note = note
        if self._bar:
            self._bar.show(self.done, self._text())
        elif time.monotonic() - self._lined >= LINE_SECONDS:
            self._lined = time.monotonic()
            _log.info("%s: %s", self.what, self._line())

    @property
    def rate(self) -> float:
        """Units a second since this process took the work up."""
        return (self.done - self._skipped) / max(time.monotonic() - self._began, 1e-9)

    def finish(self) -> None:
        """Say how long it took, if it took long enough to be noticed."""
        seconds = time.monotonic() - self._began
        if not self._bar and seconds >= QUIET_SECONDS:
            _log.info("%s: done in %s · %s", self.what, _clock(seconds), self._text())

    def _text(self) -> str:
        return " · ".join(part for part in (f"{_short(self.rate)} {self.unit}/s", self._note) if part)

    def _line(self) -> str:
        if not self.total:
            return f"{_short(self.done)} {self.unit} · {self._text()}"
        left = (self.total - self.done) / self.rate if self.rate else math.inf
        ending = f" · {_clock(left)} left" if math.isfinite(left) else ""
        return f"{100 * self.done / self.total:.0f} % · {self._text()}{ending}"


class _Bar:
    """A bar that appears when the work has lasted long enough to be noticed, and goes when it ends."""

    def __init__(self, console: Console, what: str, total: float | None) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %" if total else "{task.completed:,.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._progress.add_task(what, total=total, note="")
        self._timer = threading.Timer(QUIET_SECONDS, self._start)
        self._timer.daemon = True
        self._turn, self._ended = threading.Lock(), False
        self._timer.start()

    def show(self, done: float, note: str) -> None:
        self._progress.update(self._task, completed=done, note=note)

    def end(self) -> None:
        self._timer.cancel()
        with self._turn:
            self._ended = True
            if self._progress.live.is_started:
                self._progress.stop()

    def _start(self) -> None:
        with self._turn:
            if not self._ended:
                self._progress.start()


@contextmanager
def metered(what: str, total: float | None, unit: str) -> Iterator[Meter]:
    """A meter for `total` units of work (None: nobody knows how many), shown where stderr goes."""
    console = Console(stderr=True)
    bar = _Bar(console, what, total) if console.is_terminal else None
    meter = Meter(what, total, unit, bar)
    try:
        yield meter
        meter.finish()
    finally:
        if bar:
            bar.end()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
