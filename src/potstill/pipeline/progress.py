"""What the user sees while a stage works: a bar on a terminal, plain log lines elsewhere.

Refuses to flood a log: a line every ten seconds, and nothing for what takes less than two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Meter", "metered"]

_log = logging.getLogger("potstill")
_QUIET_SECONDS, _LINE_SECONDS = 2.0, 10.0


class Meter:
    """Counts work done towards a total; `advance` is all that a stage needs."""

    def __init__(self, what: str, total: float, unit: str, shown: tuple[Progress, TaskID] | None) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done, self._shown = 0.0, shown
        self._began = self._lined = time.monotonic()
        self._skipped = 0.0

    def skip(self, amount: float) -> None:
        """Work found done already (by an earlier, interrupted run): moves the bar, not the rate."""
        self.done += amount
        self._skipped += amount
        if self._shown:
            self._shown[0].update(self._shown[1], completed=self.done)

    def advance(self, amount: float, note: str = "") -> None:
        """`amount` more units are done; `note` says how it goes, for example `loss 1.42`."""
        self.done += amount
        text = " · ".join(part for part in (f"{_short(self.rate)} {self.unit}/s", note) if part)
        if self._shown:
            self._shown[0].update(self._shown[1], completed=self.done, note=text)
        elif time.monotonic() - self._lined >= _LINE_SECONDS:
            self._lined = time.monotonic()
            left = (self.total - self.done) / max(self.rate, 1e-9)
            _log.info("%s: %.0f %% · %s · %s left", self.what, 100 * self.done / self.total, text, _clock(left))

    @property
    def rate(self) -> float:
        """Units a second since this process took the work up."""
        return (self.done - self._skipped) / max(time.monotonic() - self._began, 1e-9)

    def finish(self) -> None:
        """Say how long it took, if it took long enough to be noticed."""
        seconds = time.monotonic() - self._began
        if not self._shown and seconds >= _QUIET_SECONDS:
            _log.info("%s: done in %s · %s %s/s", self.what, _clock(seconds), _short(self.rate), self.unit)


@contextmanager
def metered(what: str, total: float, unit: str) -> Iterator[Meter]:
    """A meter for `total` units of work; its bar goes away when the work is done."""
    console = Console(stderr=True)
    bar: Any = nullcontext()
    if console.is_terminal:
        bar = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
    with bar as progress:
        shown = None if progress is None else (progress, progress.add_task(what, total=max(total, 1e-9), note=""))
        meter = Meter(what, max(total, 1e-9), unit, shown)
        yield meter
        meter.finish()


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
