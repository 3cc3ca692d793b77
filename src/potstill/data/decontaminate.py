"""Whether a text shares words with what the student is tested on, and with which test text.

Refuses to raise the alarm over phrases that stand in very many test texts, and over those that the caller names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from potstill.data.similar import Hashes, hash_grams, hash_words, locate_words

__all__ = ["Leak", "TestText"]

Flags = NDArray[np.bool_]
Places = NDArray[np.int64]

_SHORTEST_RUN = 8
"""Brown et al. (2020), app. C: between 8 and 13 words in a row, as the length of test texts allows."""
_SHINGLE = 3
_SHORTEST_PHRASE = 3
_FEW = 5
_PLACEHOLDER = re.compile(r"\{\w*\}")


@dataclass(frozen=True, slots=True)
class Leak:
    """What a text shares with a test text.

    source, id  of the test text
    matched     the shared words, as they stand in the text that was looked at
    words       how many they are
    kind        `ngram`: they stand in a row, and any `ngram` of them in a row in the test text, too; `similar`: as
                wholes the two are nearly equal, and these are the words from the first to the last that they share
    """

    source: str
    id: str
    matched: str
    words: int
    kind: Literal["ngram", "similar"]


@dataclass(frozen=True, slots=True)
class _Postings:
    """Which test texts hold a hash: `hashes_P` sorted, and beside each the number of a test text."""

    hashes_P: Hashes
    owners_P: Places

    def find(self, hashes: Hashes) -> tuple[Places, Places]:
        """(place in `hashes`, number of a test text that holds it), int64, for all that any holds."""
        low = np.searchsorted(self.hashes_P, hashes, side="left")
        counts = np.searchsorted(self.hashes_P, hashes, side="right") - low
        places = np.repeat(np.arange(len(hashes)), counts)
        offsets = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        return places, self.owners_P[low[places] + offsets]


@dataclass(frozen=True, slots=True)
class _Index:
    """What is looked for, once all test texts are known."""

    phrases: Hashes
    """Sorted hashes of `ngram` words in a row that stand in very many test texts."""
    grams: dict[int, _Postings]
    """By length in words."""
    shingles: _Postings
    sizes: Places
    """Distinct shingles of each test text."""


class TestText:
    """The texts that a student will be tested on, none of which it may learn from.

    A text leaks a test text that shares `ngram` words in a row with it (Brown et al., 2020, arXiv:2005.14165, app. C);
    that has 8 words or more but not `ngram`, and stands in it from end to end; or whose set of word 3-shingles, as a
    whole, has a Jaccard similarity >= `similarity` with its own. Words are those of `similar.hash_words`: neither case
    nor punctuation nor white space counts. Left out on both sides are phrases that were named to `ignore`, and `ngram`
    words in a row that stand in more than 5, and more than a share of `frequent`, of different test texts. The first
    `find` after an `add` indexes all of them anew: add them first.
    """

    def __init__(self, ngram: int = 13, similarity: float = 0.7, *, frequent: float = 0.01) -> None:
        """Raises ValueError unless ngram >= 4, 0 < similarity <= 1 and 0 <= frequent <= 1."""
        if ngram < 4 or not 0.0 < similarity <= 1.0 or not 0.0 <= frequent <= 1.0:
            raise ValueError(
                f"decontaminate: ngram={ngram}, similarity={similarity}, frequent={frequent}: needs ngram >= 4, "
                "similarity in (0, 1], frequent in [0, 1]"
            )
        self._ngram, self._similarity, self._frequent = ngram, similarity, frequent
        self._names: list[tuple[str, str]] = []
        self._words: list[Hashes] = []
        self._ignored: dict[int, set[int]] = {}
        self._matched: set[tuple[str, str]] = set()
        self._index: _Index | None = None

    def __len__(self) -> int:
        """Number of test texts."""
        return len(self._names)

    @property
    def matched(self) -> frozenset[tuple[str, str]]:
        """(source, id) of every test text that any text looked at has leaked, so that scores can leave them out."""
        return frozenset(self._matched)

    def add(self, source: str, id: str, text: str) -> None:
        """Protect a test text. One without words is counted and never found."""
        self._names.append((source, id))
        self._words.append(hash_words(text))
        self._index = None

    def ignore(self, text: str) -> None:
        """Leave out this phrase, or those between the {placeholders} of a template; any of fewer than 3 words stays."""
        for phrase in map(hash_words, _PLACEHOLDER.split(text)):
            if len(phrase) >= _SHORTEST_PHRASE:
                self._ignored.setdefault(len(phrase), set()).update(hash_grams(phrase, len(phrase)).tolist())
        self._index = None

    def find(self, text: str) -> Leak | None:
        """The test text that shares the longest run of words with `text`, else the most similar; None for neither."""
        index = self._index = self._index or self._settle()
        words, spans = locate_words(text)
        usable = self._usable(words, index.phrases)
        runs = [self._longest_run(words, usable, length, index) for length in index.grams]
        similar = self._most_similar(words, usable, index)
        found = max(filter(None, runs), default=None, key=lambda hit: hit[2] - hit[1]) or similar
        if found is None:
            return None
        owner, start, stop = found
        matched = text[spans[start, 0] : spans[stop - 1, 1]]
        return Leak(*self._names[owner], matched, stop - start, "similar" if found is similar else "ngram")

    def _settle(self) -> _Index:
        phrases = self._frequent_phrases()
        usable = [self._usable(words, phrases) for words in self._words]
        grams: dict[int, list[tuple[int, Hashes]]] = {}
        for owner, (words, flags) in enumerate(zip(self._words, usable, strict=True)):
            length = min(self._ngram, _longest_stretch(flags))
            if length >= min(_SHORTEST_RUN, self._ngram):
                grams.setdefault(length, []).append((owner, _grams(words, flags, length)[1]))
        shingles = [
            (owner, hash_grams(words[flags], _SHINGLE))
            for owner, (words, flags) in enumerate(zip(self._words, usable, strict=True))
        ]
        sizes = np.array([len(np.unique(hashes)) for _, hashes in shingles], dtype=np.int64)
        return _Index(
            phrases, {length: _postings(found) for length, found in grams.items()}, _postings(shingles), sizes
        )

    def _frequent_phrases(self) -> Hashes:
        """Copies of a test text do not make its words common."""
        different = {words.tobytes(): words for words in self._words}.values()
        held = [np.unique(_grams(words, self._usable(words), self._ngram)[1]) for words in different]
        if not held:
            return np.empty(0, dtype=np.uint64)
        hashes, counts = np.unique(np.concatenate(held), return_counts=True)
        return hashes[counts > max(_FEW, self._frequent * len(held))]

    def _usable(self, words: Hashes, phrases: Hashes | None = None) -> Flags:
        """Which words stand in no phrase that is left out, bool [W]."""
        usable = np.ones(len(words), dtype=np.bool_)
        for length, hashes in self._ignored.items():
            if length <= len(words):
                _strike(usable, hash_grams(words, length), np.array(sorted(hashes), dtype=np.uint64), length)
        if phrases is not None and len(phrases) and len(words) >= self._ngram:
            _strike(usable, hash_grams(words, self._ngram), phrases, self._ngram)
        return usable

    def _longest_run(self, words: Hashes, usable: Flags, length: int, index: _Index) -> tuple[int, int, int] | None:
        """(test text, first word, end) of the longest run of words shared with any test text by grams of `length`."""
        starts, hashes = _grams(words, usable, length)
        places, owners = index.grams[length].find(hashes)
        if not len(owners):
            return None
        self._matched.update(self._names[owner] for owner in np.unique(owners).tolist())
        order = np.lexsort((starts[places], owners))
        starts, owners = starts[places][order], owners[order]
        begins = np.flatnonzero(np.r_[True, (np.diff(owners) != 0) | (np.diff(starts) != 1)])
        ends = np.r_[begins[1:], len(starts)] - 1
        longest = int(np.argmax(starts[ends] - starts[begins]))
        return int(owners[begins[longest]]), int(starts[begins[longest]]), int(starts[ends[longest]]) + length

    def _most_similar(self, words: Hashes, usable: Flags, index: _Index) -> tuple[int, int, int] | None:
        """(test text, first shared word, end) of the most similar test text, where one is similar enough."""
        left = np.flatnonzero(usable)
        hashes = hash_grams(words[left], _SHINGLE)
        different = np.unique(hashes)
        _, holders = index.shingles.find(different)
        owners, shared = np.unique(holders, return_counts=True)
        alike = shared / (len(different) + index.sizes[owners] - shared)
        self._matched.update(self._names[owner] for owner in owners[alike >= self._similarity].tolist())
        if not len(alike) or alike.max() < self._similarity:
            return None
        owner = int(owners[np.argmax(alike)])
        places, holders = index.shingles.find(hashes)
        at = places[holders == owner]
        return owner, int(left[at[0]]), int(left[min(int(at[-1]) + _SHINGLE, len(left)) - 1]) + 1


def _grams(words: Hashes, usable: Flags, length: int) -> tuple[Places, Hashes]:
    """Starts and hashes of all `length` usable words in a row."""
    if len(words) < length:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64)
    sums = np.r_[0, np.cumsum(usable)]
    starts = np.flatnonzero(sums[length:] - sums[:-length] == length)
    return starts, hash_grams(words, length)[starts]


def _longest_stretch(usable: Flags) -> int:
    """Most usable words in a row."""
    breaks = np.flatnonzero(~np.r_[False, usable, False])
    return int(np.diff(breaks).max()) - 1


def _strike(usable: Flags, hashes: Hashes, phrases: Hashes, length: int) -> None:
    """Clear the flags of the `length` words of every gram that is among `phrases`."""
    for start in np.flatnonzero(np.isin(hashes, phrases)):
        usable[start : start + length] = False


def _postings(owned: Iterable[tuple[int, Hashes]]) -> _Postings:
    """Each hash once for each owner, sorted."""
    owned = [(owner, np.unique(hashes)) for owner, hashes in owned]
    owners = np.repeat([owner for owner, _ in owned], [len(hashes) for _, hashes in owned]).astype(np.int64)
    hashes = np.concatenate([np.empty(0, dtype=np.uint64), *(hashes for _, hashes in owned)])
    order = np.lexsort((owners, hashes))
    return _Postings(hashes[order], owners[order])
