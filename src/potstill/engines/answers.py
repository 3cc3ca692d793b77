"""Answers that lie in a ledger, as a sequence. Refuses to hold more than the one that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast, overload

from potstill.engines.completions import BadAnswer
from potstill.types import Completion, Request

__all__ = ["Answers"]

Answer = Completion | None


class Answers:
    """The answers to `requests`, in order: each is looked up when it is indexed, and read by today's rules."""

    def __init__(
        self,
        requests: Sequence[Request],
        find: Callable[[Request], bytes | None],
        parse: Callable[[bytes, Request], Completion],
    ) -> None:
        """`find` gives the answer to a request as it came, `parse` reads it; both are asked for one at a time."""
        self._requests, self._find, self._parse = requests, find, parse

    def as_sequence(self) -> Sequence[Answer]:
        """Itself: it has all that a sequence has."""
        return cast("Sequence[Answer]", self)

    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Answer]: ...
    def __getitem__(self, index: int | slice) -> Answer | Sequence[Answer]:
        if isinstance(index, slice):
            return Answers(self._requests[index], self._find, self._parse).as_sequence()
        request = self._requests[index]
        raw = self._find(request)
        if raw is None:
            return None
        try:
            return self._parse(raw, request)
        except BadAnswer:
            return None

    def __iter__(self) -> Iterator[Answer]:
        return (self[number] for number in range(len(self)))

    def __reversed__(self) -> Iterator[Answer]:
        return (self[number] for number in reversed(range(len(self))))

    def __contains__(self, answer: object) -> bool:
        return any(answer == other for other in self)

    def index(self, answer: object) -> int:
        """Number of the first answer like that. Raises ValueError where there is none."""
        for number, other in enumerate(self):
            if answer == other:
                return number
        raise ValueError("no such answer")

    def count(self, answer: object) -> int:
        """How many are like that."""
        return sum(answer == other for other in self)


Sequence.register(Answers)
