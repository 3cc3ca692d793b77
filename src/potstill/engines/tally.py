"""What asking came to: counts, tokens and money. Refuses to hide a request: each is in exactly one of the counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from potstill.engines.ledger import Spend

__all__ = ["Tally", "TallyCounter"]

StoppedBy = Literal["", "budget", "interrupt"]


@dataclass(frozen=True, slots=True)
class Tally:
    """What one `ask` came to.

    asked            requests that were passed in: repeated + answered_before + answered + quarantined + given_up + left
    repeated         the same as another of them
    answered_before  an answer was in the ledger
    answered         asked now
    quarantined      by reason: answers that cannot be used; they stay in the ledger
    given_up         by reason: no answer; the next run asks them again
    left             not asked, because of `stopped_by`
    retried          by reason: attempts that were repeated
    served           by name: models that answered, earlier answers included
    tokens, usd      what was spent now, at its worst case where nobody knows; usd is None where a price is unknown
    """

    asked: int = 0
    repeated: int = 0
    answered_before: int = 0
    answered: int = 0
    quarantined: Mapping[str, int] = field(default_factory=dict)
    given_up: Mapping[str, int] = field(default_factory=dict)
    left: int = 0
    retried: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    usd: float | None = 0.0
    seconds: float = 0.0
    stopped_by: StoppedBy = ""

    def plus(self, other: Tally) -> Tally:
        """Both together, for what was asked one after the other."""
        return Tally(
            asked=self.asked + other.asked,
            repeated=self.repeated + other.repeated,
            answered_before=self.answered_before + other.answered_before,
            answered=self.answered + other.answered,
            quarantined=dict(Counter(self.quarantined) + Counter(other.quarantined)),
            given_up=dict(Counter(self.given_up) + Counter(other.given_up)),
            left=self.left + other.left,
            retried=dict(Counter(self.retried) + Counter(other.retried)),
            served=dict(Counter(self.served) + Counter(other.served)),
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            usd=None if self.usd is None or other.usd is None else self.usd + other.usd,
            stopped_by=self.stopped_by or other.stopped_by,
        )

    def remarks(self) -> tuple[str, ...]:
        """Lines that a report must not leave out."""
        lines = []
        if len(self.served) > 1:
            names = ", ".join(f"{name or 'without a name'} ({count:,})" for name, count in self.served.items())
            lines.append(f"The endpoint changed the model that answers: {names}.")
        if self.stopped_by == "budget":
            lines.append(f"The budget was used up: {self.left:,} of {self.asked:,} requests were not asked.")
        for what, counts in (("could not be used", self.quarantined), ("got no answer", self.given_up)):
            if counts:
                reasons = ", ".join(f"{reason} ({count:,})" for reason, count in counts.items())
                lines.append(f"{sum(counts.values()):,} of {self.asked:,} requests {what}: {reasons}.")
        return tuple(lines)


class TallyCounter:
    """Counts while the asking goes on; `tally` is what it has come to."""

    def __init__(self, asked: int) -> None:
        """`asked` requests were passed in."""
        self.asked = asked
        self.repeated = self.answered_before = self.answered = self.tokens = self.picousd = 0
        self.is_priced = True
        self.quarantined: Counter[str] = Counter()
        self.given_up: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.stopped_by: StoppedBy = ""
        self._began = time.monotonic()

    @property
    def done(self) -> int:
        """Requests about which nothing more will be known in this call."""
        ended = self.repeated + self.answered_before + self.answered
        return ended + self.quarantined.total() + self.given_up.total()

    def spend(self, spent: Spend) -> None:
        """An attempt has ended."""
        self.tokens += spent.input_tokens + spent.output_tokens
        self.picousd += spent.picousd or 0
        self.is_priced = self.is_priced and spent.picousd is not None

    def tally(self) -> Tally:
        """The counts, the most frequent reasons first."""
        quarantined, given_up, retried, served = (
            dict(counts.most_common()) for counts in (self.quarantined, self.given_up, self.retried, self.served)
        )
        return Tally(
            asked=self.asked,
            repeated=self.repeated,
            answered_before=self.answered_before,
            answered=self.answered,
            quarantined=quarantined,
            given_up=given_up,
            left=self.asked - self.done,
            retried=retried,
            served=served,
            tokens=self.tokens,
            usd=self.picousd / 1e12 if self.is_priced else None,
            seconds=time.monotonic() - self._began,
            stopped_by=self.stopped_by,
        )
