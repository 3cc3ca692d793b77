"""Being asked to stop: Ctrl-C and SIGTERM end the work at once, but a training first finishes its step and saves.

Refuses to swallow a second request: it ends the training at once too, and the last checkpoint is what remains.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from potstill.errors import Interrupted

__all__ = ["Stopping", "stoppable"]

_log = logging.getLogger("potstill")


class Stopping:
    """Whether somebody asked to stop. Without `stoppable` around it, nobody ever does."""

    def __init__(self) -> None:
        self._held = self._asked = False

    def asked(self) -> bool:
        """Whether a request came while requests were held."""
        return self._asked

    @contextmanager
    def held(self) -> Iterator[None]:
        """In this block the first request is only noted: whoever works here asks `asked` when it can stop well."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def receive(self, number: int, _: object = None) -> None:
        """The signal arrived. Raises KeyboardInterrupt unless it is held."""
        if not self._held or self._asked:
            raise KeyboardInterrupt
        self._asked = True
        _log.info("%s: stopping after this step; once more stops at once", signal.Signals(number).name)


@contextmanager
def stoppable() -> Iterator[Stopping]:
    """In this block, Ctrl-C and SIGTERM raise Interrupted, or are held where the work asks for it. Main thread only."""
    stopping = Stopping()
    before = {number: signal.signal(number, stopping.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command continues.") from None
    finally:
        for number, action in before.items():
            signal.signal(number, action)
