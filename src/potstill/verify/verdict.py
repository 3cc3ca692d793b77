"""What is said of an answer, and who says it. Refuses to call an answer wrong that could not be judged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from potstill.errors import DataError

__all__ = ["Row", "Verdict", "Verifier", "cell_of", "verify_all"]

Row = Mapping[str, Any]
_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of an answer.

    right      whether it is; None where that is unknown: out of time, or not judged for another reason
    reason     why, in one line, where it is not right; may quote the answer's program and is then not to be trusted
    score      of scorers that give one
    extracted  what was taken for the answer
    """

    right: bool | None
    reason: str = ""
    score: float | None = None
    extracted: str = ""


class Verifier:
    """Says of an answer to a row whether it is right. May be called from several threads; close it after use."""

    def __init__(self, judge: Callable[[str, Row], Verdict], close: Callable[[], None] | None = None) -> None:
        """`judge` answers; `close` ends processes that it needs."""
        self._judge, self._close = judge, close

    def __call__(self, answer: str, row: Row) -> Verdict:
        """The verdict. Raises DataError where the row lacks what it is to be compared with."""
        return self._judge(answer, row)

    def close(self) -> None:
        """End its processes; it may be called no more."""
        if self._close is not None:
            self._close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def verify_all(verifier: Verifier, answers: Iterable[tuple[str, Row]], workers: int = 1) -> Iterator[Verdict]:
    """Verdicts in the order of the answers, by so many workers at once; few answers are read ahead.

    Raises ValueError for less than one worker, and what the verifier raises.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: needs at least 1")
    if workers == 1:
        yield from (verifier(answer, row) for answer, row in answers)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="verify")
    try:
        waiting: deque[Future[Verdict]] = deque()
        for answer, row in answers:
            waiting.append(pool.submit(verifier, answer, row))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def cell_of(row: Row, column: str, key: str) -> Any:
    """What the row has in a column. Raises DataError, naming the recipe's `key`, where it has nothing there."""
    value = row.get(column)
    if value is None:
        name = f"row {row['id']}" if "id" in row else "a row"
        raise DataError(
            f"{key}: {name} has nothing in the column {column!r}; it has {', '.join(map(str, row)) or 'no columns'}. "
            f"Fill it in, or name the right column as {key}."
        )
    return value
