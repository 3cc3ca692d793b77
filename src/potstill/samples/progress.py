"""A line in the log for work that keeps somebody waiting.

Refuses: to speak of work that is done within two seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PATIENCE_S", "tell_if_slow"]

PATIENCE_S = 2.0
"""Seconds of silence that need no explanation."""

logger = logging.getLogger(__name__)


@contextmanager
def tell_if_slow(work: str) -> Iterator[None]:
    """Log `work` once it has taken two seconds, and the seconds that it took when it is done."""
    start = time.monotonic()
    timer = threading.Timer(PATIENCE_S, logger.info, args=("%s ...", work))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        seconds = time.monotonic() - start
        if seconds >= PATIENCE_S:
            logger.info("%s took %.0f s", work, seconds)
