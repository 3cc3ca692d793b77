"""Which of a prompt's samples are kept, and how hard the prompts were. Refuses to count what is unknown as wrong."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from potstill.verify.verdict import Verdict

__all__ = ["Difficulty", "choose", "pass_at_k"]

Rule = Literal["all", "shortest", "distinct"]

BINS = 10
SHINGLE = 5
"""Words that are compared at a time."""


class Difficulty:
    """How hard prompts were for who answered them, prompt by prompt. Shares are of samples whose verdict is known.

    histogram      number of prompts by share of right samples: 10 bins of equal width, the last one with 1.0
    never_solved   ids of prompts whose known samples are all wrong
    never_known    ids of prompts without a known verdict
    right, wrong, unknown   samples
    """

    def __init__(self) -> None:
        self.histogram = [0] * BINS
        self.never_solved: list[str] = []
        self.never_known: list[str] = []
        self.right = self.wrong = self.unknown = 0
        self._prompts: Counter[tuple[int, int]] = Counter()
        """By known and right samples, the number of prompts: small, however many they are."""

    def add(self, name: str, verdicts: Sequence[Verdict]) -> None:
        """The verdicts on the samples of one more prompt, by its id."""
        told = Counter(verdict.right for verdict in verdicts)
        self.right, self.wrong, self.unknown = (
            count + told[right] for right, count in ((True, self.right), (False, self.wrong), (None, self.unknown))
        )
        n, c = told[True] + told[False], told[True]
        if not n:
            self.never_known.append(name)
            return
        self._prompts[n, c] += 1
        self.histogram[min(BINS - 1, BINS * c // n)] += 1
        if not c:
            self.never_solved.append(name)

    def pass_at(self) -> dict[int, float]:
        """By k = 1, 2, 4, ... the chance that one of k samples is right: the mean over prompts with k known samples.

        As far as any prompt goes; see `pass_at_k`.
        """
        largest = max((n for n, _ in self._prompts), default=0)
        means = {}
        for k in (1 << power for power in range(largest.bit_length())):
            counts = {found: count for found, count in self._prompts.items() if found[0] >= k}
            right = math.fsum(count * pass_at_k(n, c, k) for (n, c), count in counts.items())
            means[k] = right / sum(counts.values())
        return means


def choose(samples: Sequence[tuple[str, Verdict]], *, rule: Rule = "all", most: int | None = None) -> tuple[int, ...]:
    """Which right samples of one prompt to keep, by index; `most` of them at most. Equal ones are kept once.

    all       in order
    shortest  of fewest characters first
    distinct  the first one, then again and again the one that is least like those chosen: whose largest Jaccard
              similarity |A n B| / |A u B| of word 5-shingles to any of them is smallest

    Ties go to the earlier one. Raises ValueError for `most` below 1. Yuan et al. (2023), arXiv:2308.01825.
    """
    if most is not None and most < 1:
        raise ValueError(f"most={most}: needs at least 1, or None for all")
    first: dict[str, int] = {}
    for index, (text, verdict) in enumerate(samples):
        if verdict.right:
            first.setdefault(" ".join(text.split()), index)
    candidates = list(first.values())
    if rule == "shortest":
        candidates.sort(key=lambda index: len(samples[index][0]))
    elif rule == "distinct":
        candidates = _farthest({index: samples[index][0] for index in candidates}, most)
    return tuple(candidates[:most])


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k samples is right, from n samples of which c are; unbiased.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n. Chen et al. (2021), arXiv:2107.03374, eq. 1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, c={c}, k={k}: needs 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _farthest(texts: Mapping[int, str], most: int | None) -> list[int]:
    """Greedy: each next one is as far as can be from those before it."""
    left = {index: _shingles(text) for index, text in texts.items()}
    nearest = dict.fromkeys(left, 0.0)
    chosen: list[int] = []
    while left and (most is None or len(chosen) < most):
        index = min(left, key=lambda other: (nearest[other], other))
        taken = left.pop(index)
        chosen.append(index)
        for other, shingles in left.items():
            nearest[other] = max(nearest[other], _jaccard(taken, shingles))
    return chosen


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def _jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)
