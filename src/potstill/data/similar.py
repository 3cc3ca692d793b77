"""Which texts say nearly the same: words, shingles, near duplicates found while texts come in, and how many are left.

Refuses to call texts near duplicates because their sketches are alike: candidates are compared shingle by shingle.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.errors import MissingExtra

__all__ = [
    "Deduplicated",
    "EffectiveSize",
    "NearDuplicates",
    "TextEncoder",
    "effective_size",
    "hash_grams",
    "hash_words",
    "jaccard",
    "locate_words",
    "remove_near_duplicates",
    "remove_semantic_duplicates",
    "shingles_of",
]

Hashes = NDArray[np.uint64]

_LAST_MARK = 0x1F000
"""No combining mark that is written in words stands above it."""
_PERMUTATIONS = 128
_RECALL = 0.995
_AT_ONCE = 4096
_CACHED_LETTERS = 40


def _class_of(*categories: str) -> str:
    """The characters of these Unicode categories, as they stand between the brackets of a regular expression."""
    found = (point for point in range(0x80, _LAST_MARK) if unicodedata.category(chr(point)) in categories)
    return "".join(map(re.escape, map(chr, found)))


# Python's \w knows no combining marks, with which Indic words would fall apart, and no format characters, with which
# "exam<soft hyphen>ple" would.
_MARKS, _INVISIBLE = _class_of("Mn", "Mc", "Me"), _class_of("Cf") + "\ufe00-\ufe0f"
_LETTER = rf"[\w{_MARKS}{_INVISIBLE}]"
_RUN = rf"{_LETTER}++(?:(?:['\u2018\u2019]|(?<=\d),(?=\d{{3}}(?!\d))){_LETTER}++)*+"
_SIGN = r"[+/=<>^%\u00d7\u00f7\u00b1\u221a\u2264\u2265\u2260\u2248]|(?<!\*)\*(?!\*)"
_MINUS = r"(?<=\d)[-\u2212]|[-\u2212](?=\s?\d)|(?<=\s)[-\u2212](?=\s)"
# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces: each letter counts as a word.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORDS = re.compile(_RUN)
_WORDS_AND_SIGNS = re.compile(f"{_RUN}|{_SIGN}|{_MINUS}")
_PIECE = re.compile(rf"[{_SPACELESS}][{_MARKS}]*+|(?:(?![{_SPACELESS}])[\w{_MARKS}])++")
_DROPPED = re.compile(rf"[{_INVISIBLE}'\u2018\u2019\u02bc,]")
_ALIKE = str.maketrans("\u2212\u00d7\u00f7", "-*/")


def hash_words(text: str, *, signs: bool = False) -> Hashes:
    """The words of a text in order as 64-bit hashes, uint64 [W], alike in every process.

    Letters are compared in NFKC and without case; punctuation and white space part words and are left out, apostrophes
    and commas between thousands left out within them; numbers are kept. In scripts without spaces a letter is a word.
    With `signs` those of arithmetic are words too, for "3 + 4" is not "3 - 4".
    """
    pattern = _WORDS_AND_SIGNS if signs else _WORDS
    return np.array(
        [word for run in pattern.findall(text.replace("_", " ")) for word, _, _ in _pieces(run)], dtype=np.uint64
    )


def locate_words(text: str) -> tuple[Hashes, NDArray[np.int64]]:
    """The same words without signs, uint64 [W], and where each begins and ends in `text`, int64 [W, 2]."""
    found = [
        (word, run.start() + start, run.start() + stop)
        for run in _WORDS.finditer(text.replace("_", " "))
        for word, start, stop in _pieces(run[0])
    ]
    places = np.array([place[1:] for place in found], dtype=np.int64).reshape(-1, 2)
    return np.array([word for word, _, _ in found], dtype=np.uint64), places


def hash_grams(words: Hashes, length: int) -> Hashes:
    """A hash for every `length` words in a row, uint64 [W - length + 1]; of fewer words one for all; of none, none."""
    length = min(length, len(words))
    if not length:
        return words
    total = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for place, factor in enumerate(_factors(length)):
        total += words[place : place + len(total)] * factor
    total ^= total >> np.uint64(32)
    return total


def _pieces(run: str) -> tuple[tuple[int, int, int], ...]:
    """The words of letters that stand together: their hashes, and where they stand. Usually there is one."""
    return _known_pieces(run) if len(run) <= _CACHED_LETTERS else _read_pieces(run)


def _read_pieces(run: str) -> tuple[tuple[int, int, int], ...]:
    if run.isascii():
        return ((_hash(run.lower().replace("'", "").replace(",", "")), 0, len(run)),)
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", run).casefold()).translate(_ALIKE)
    clean = _DROPPED.sub("", folded)
    found = list(_PIECE.finditer(clean))
    if not found:
        return ((_hash(clean), 0, len(run)),) if clean else ()
    # Where letters were joined, split or dropped, nobody knows any more which stood where: the words share the run.
    exact = len(clean) == len(run) and len(found) > 1
    return tuple((_hash(word[0]), *(word.span() if exact else (0, len(run)))) for word in found)


_known_pieces = lru_cache(maxsize=1 << 17)(_read_pieces)


def _hash(word: str) -> int:
    return _known_hash(word) if len(word) <= _CACHED_LETTERS else _digest(word)


def _digest(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


_known_hash = lru_cache(maxsize=1 << 17)(_digest)


@lru_cache(maxsize=64)
def _factors(length: int) -> tuple[np.uint64, ...]:
    """Odd and fixed: a sum of words, each times the factor of its place, is another for another order of them."""
    return tuple(np.uint64(_hash(f"factor {place}") | 1) for place in range(length))


class NearDuplicates:
    """Texts so far, none of which is a near duplicate of another. For texts that come one by one.

    Two texts are near duplicates whose Jaccard similarity, |A & B| / |A | B| of their sets of word shingles, reaches
    the threshold (Broder, 1997, "On the resemblance and containment of documents"). Which earlier texts to compare with
    tells MinHash in bands: a pair a little above the threshold (by 0.05, or half way to 1) is found with probability
    >= 0.995, and a pair that is found is confirmed exactly. Texts of fewer words than a shingle has are near duplicates
    if all their words are equal; those without any, if they are equal but for white space. About 7 kB a text kept.
    """

    def __init__(self, threshold: float = 0.8, *, shingle: int = 3, seed: int = 1) -> None:
        """`shingle` is its length in words; `seed` chooses the permutations. Raises ValueError outside (0, 1], >= 1."""
        if not 0.0 < threshold <= 1.0 or shingle < 1:
            raise ValueError(
                f"near duplicates: threshold={threshold}, shingle={shingle}: needs 0 < threshold <= 1 <= shingle"
            )
        # Here, because datasketch brings scipy: two seconds that only those who look for duplicates should wait.
        from datasketch import MinHash, MinHashLSH

        self._threshold, self._shingle = threshold, shingle
        self._blank = MinHash(_PERMUTATIONS, seed=seed, hashfunc=int, scheme="affine64")
        self._bands = MinHashLSH(num_perm=_PERMUTATIONS, params=_bands(threshold))
        self._ids: list[str] = []
        self._shingles: list[Hashes] = []

    def __len__(self) -> int:
        """Number of texts kept."""
        return len(self._ids)

    def add(self, id: str, text: str) -> str | None:
        """The id of the most similar text kept, if this is a near duplicate of it; else None, and this one is kept."""
        shingles = shingles_of(text, self._shingle)
        sketch = self._sketch(shingles)
        similar = self._most_similar(shingles, self._bands.query(sketch))
        if similar is not None:
            return self._ids[similar]
        self._bands.insert(len(self._ids), sketch, check_duplication=False)
        self._ids.append(id)
        self._shingles.append(shingles)
        return None

    def _sketch(self, shingles: Hashes) -> Any:
        sketch = self._blank.copy()
        for start in range(0, len(shingles), _AT_ONCE):  # in parts: a product of all with all permutations may be large
            sketch.update_batch(shingles[start : start + _AT_ONCE].tolist())
        return sketch

    def _most_similar(self, shingles: Hashes, candidates: Iterable[Any]) -> int | None:
        best, found = self._threshold, None
        for candidate in sorted(candidates, reverse=True):  # of equals the earliest comes last, and wins
            similarity = jaccard(shingles, self._shingles[candidate], at_least=best)
            if similarity >= best:
                best, found = similarity, candidate
        return found


def shingles_of(text: str, length: int) -> Hashes:
    """The set of word shingles of a text, sorted, uint64; never empty."""
    words = hash_words(text, signs=True)
    if not len(words):
        words = np.array([_hash("".join(unicodedata.normalize("NFKC", text).split()))], dtype=np.uint64)
    return np.unique(hash_grams(words, length))


def jaccard(first: Hashes, second: Hashes, at_least: float = 0.0) -> float:
    """|A & B| / |A | B| of two sorted sets that are not empty; 0 if it cannot be `at_least` so much by their sizes."""
    if min(len(first), len(second)) / max(len(first), len(second)) < at_least:
        return 0.0
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def _bands(threshold: float) -> tuple[int, int]:
    """Number of bands b, and of rows r in each: the longest with 1 - (1 - s^r)^b >= 0.995 just above the threshold.

    Leskovec et al. (2020), Mining of Massive Datasets, section 3.4.
    """
    similarity = threshold + min(0.05, (1.0 - threshold) / 2)
    return next(
        (bands, rows)
        for rows in range(_PERMUTATIONS // 2, 0, -1)
        for bands in [_PERMUTATIONS // rows]
        if 1.0 - (1.0 - similarity**rows) ** bands >= _RECALL
    )


@dataclass(frozen=True, slots=True)
class Deduplicated:
    """`kept` are places of texts that stay, in order; `pairs` are (place of one that goes, of the one it repeats)."""

    kept: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


def remove_near_duplicates(texts: Iterable[str], threshold: float = 0.8, *, shingle: int = 3) -> Deduplicated:
    """Keep the first of all texts that are near duplicates, as `NearDuplicates` tells them; raises what it raises."""
    seen = NearDuplicates(threshold, shingle=shingle)
    kept: list[int] = []
    pairs: list[tuple[int, int]] = []
    for place, text in enumerate(texts):
        first = seen.add(str(place), text)
        if first is None:
            kept.append(place)
        else:
            pairs.append((place, int(first)))
    return Deduplicated(tuple(kept), tuple(pairs))


@dataclass(frozen=True, slots=True)
class EffectiveSize:
    """How much there is in a collection of texts.

    texts     all of them
    clusters  those that are left when each near duplicate goes
    distinct  distinct word n-grams / word n-grams, in (0, 1]; NaN without any. Li et al. (2016), arXiv:1510.03055,
              "distinct-n". It falls as a collection grows: compare it between collections of one size only.
    """

    texts: int
    clusters: int
    distinct: float


def effective_size(texts: Sequence[str], threshold: float = 0.8, *, shingle: int = 3) -> EffectiveSize:
    """What remains of `texts` without near duplicates, and how varied their shingles are; raises as above."""
    grams = [hash_grams(hash_words(text, signs=True), shingle) for text in texts]
    total = sum(map(len, grams))
    distinct = len(np.unique(np.concatenate(grams))) / total if total else float("nan")
    return EffectiveSize(len(texts), len(remove_near_duplicates(texts, threshold, shingle=shingle).kept), distinct)


class TextEncoder(Protocol):
    """A sentence encoder, such as one of model2vec or sentence-transformers."""

    def encode(self, inputs: Any, **settings: Any) -> NDArray[Any]:
        """A vector for each text of a sequence, [R, D]; no settings are given."""
        ...


def remove_semantic_duplicates(texts: Sequence[str], threshold: float, encoder: TextEncoder) -> Deduplicated:
    """Keep the first of all texts whose vectors have a cosine >= `threshold` with that of a text kept (semhash).

    Every text is compared with every other one: time grows with the square of their number.

    Raises:
        MissingExtra: semhash is not installed.
    """
    if find_spec("semhash") is None:
        raise MissingExtra(
            'generate.cleaning.semantic needs semhash. Run `pip install "potstill[semantic]"`, or set it to null.'
        )
    from semhash import SemHash
    from vicinity import Backend

    if not texts:
        return Deduplicated((), ())
    rows = [{"text": text, "place": str(place)} for place, text in enumerate(texts)]
    # Exact search: an approximate one finds other duplicates when it runs again.
    index = SemHash.from_records(rows, columns=["text"], model=encoder, ann_backend=Backend.BASIC)
    found = index.self_deduplicate(threshold)
    pairs = [(int(gone.record["place"]), int(gone.duplicate_of["place"])) for gone in found.filtered]
    return Deduplicated(tuple(sorted(int(row["place"]) for row in found.selected)), tuple(sorted(pairs)))
