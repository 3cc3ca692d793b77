from __future__ import annotations

import math
import random
import re
import time
import unicodedata
from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import similar
from potstill.data.similar import (
    Deduplicated,
    NearDuplicates,
    effective_size,
    hash_grams,
    hash_words,
    locate_words,
    remove_near_duplicates,
    remove_semantic_duplicates,
)
from potstill.errors import MissingExtra

WORDS = st.lists(
    st.sampled_from(["a", "b", "the", "caf\u00e9", "12", "\u092d\u093e\u0937\u093e", "\u6211"]), max_size=12
)


def shingles(text, length=3):
    """An independent reading: tuples of words that are plain ASCII."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[place : place + length]) for place in range(max(1, len(words) - length + 1))}


def similarity(first, second):
    return len(shingles(first) & shingles(second)) / len(shingles(first) | shingles(second))


def random_words(count, rng):
    return [f"w{rng.randrange(50_000)}" for _ in range(count)]


def nearly(words, changed, rng):
    copy = list(words)
    for place in rng.sample(range(len(copy)), changed):
        copy[place] = f"x{rng.randrange(50_000)}"
    return copy


@given(WORDS, st.sampled_from([" ", "\n\t", ", ", "! ", " -- ", "_", "\u3000"]))
def test_case_punctuation_white_space_and_unicode_forms_change_no_word(words, space):
    plain = hash_words(" ".join(words)).tolist()
    assert hash_words(space.join(words)).tolist() == plain
    assert hash_words(unicodedata.normalize("NFD", " ".join(words)).upper()).tolist() == plain


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("Don\u2019t stop\u2014now", "dont stop now"),
        ("it costs 1,000,000.50", "it costs 1000000 50"),
        ("1,23 and 4,5678", "1 23 and 4 5678"),
        ("exam\u00adple zero\u200bwidth\ufeff", "example zerowidth"),
        ("\uff21\uff22\uff23 \ufb01ve", "ABC five"),
        ("Stra\u00dfe", "STRASSE"),
        ("\u6211\u7231\u5317\u4eac", "\u6211 \u7231 \u5317 \u4eac"),
        ("\u0e20\u0e32\u0e29\u0e32", "\u0e20 \u0e32 \u0e29 \u0e32"),
        ("**bold** snake_case", "bold snake case"),
        ("\u200b \u2014 ?!", ""),
    ],
)
def test_words_are_what_a_reader_would_call_words(written, words):
    assert hash_words(written).tolist() == hash_words(words).tolist()


def test_hashes_are_of_the_bytes_and_so_alike_in_every_process():
    digest = blake2b(b"word", digest_size=8).digest()
    assert hash_words("Word").tolist() == [int.from_bytes(digest, "little")]
    assert hash_grams(hash_words("a b c d"), 3).tolist() == [13672513117470659344, 3045791198286527661]


@given(st.text(max_size=60))
def test_every_word_stands_where_it_is_said_to_stand(text):
    words, spans = locate_words(text)
    assert words.tolist() == hash_words(text).tolist()
    for word, (start, stop) in zip(words.tolist(), spans.tolist(), strict=True):
        assert 0 <= start < stop <= len(text)
        assert word in hash_words(text[start:stop]).tolist()
    assert np.all(np.diff(spans[:, 0]) >= 0)


@given(st.lists(st.sampled_from("abc"), max_size=20), st.integers(1, 6))
def test_grams_are_equal_exactly_where_the_words_are(letters, length):
    grams = hash_grams(hash_words(" ".join(letters)), length).tolist()
    if len(letters) < length:
        assert len(grams) == bool(letters)
        return
    tuples = [tuple(letters[place : place + length]) for place in range(len(letters) - length + 1)]
    assert [grams.index(gram) for gram in grams] == [tuples.index(gram) for gram in tuples]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_planted_duplicates_just_above_the_threshold_are_found(threshold):
    rng, seen = random.Random(7), NearDuplicates(threshold)
    least, found, planted = min(threshold + 0.05, (1 + threshold) / 2), 0, 0
    for number in range(1500):
        words = random_words(rng.randrange(40, 160), rng)
        copy = nearly(words, rng.randrange(0, len(words) // 8), rng)
        if not least <= similarity(" ".join(words), " ".join(copy)) <= least + 0.04:
            continue
        planted += 1
        assert seen.add(f"{number}", " ".join(words)) is None
        found += seen.add(f"copy {number}", " ".join(copy)) == f"{number}"
    assert planted >= 100
    assert found >= 0.99 * planted


def test_nothing_is_removed_that_is_not_as_similar_as_the_threshold():
    rng = random.Random(3)
    first = [random_words(40, rng) for _ in range(20)]
    texts = [" ".join(nearly(rng.choice(first), rng.randrange(0, 9), rng)) for _ in range(300)]
    found = remove_near_duplicates(texts, 0.7)
    assert len(found.pairs) > 50
    assert all(similarity(texts[gone], texts[stays]) >= 0.7 for gone, stays in found.pairs)
    assert sorted([*found.kept, *(gone for gone, _ in found.pairs)]) == list(range(300))
    assert {stays for _, stays in found.pairs} <= set(found.kept)


def test_a_similarity_of_exactly_the_threshold_is_enough():
    assert NearDuplicates(0.56)._most_similar(np.arange(25, dtype=np.uint64), []) is None
    assert similar.jaccard(np.arange(25, dtype=np.uint64), np.arange(14, dtype=np.uint64), at_least=14 / 25) == 14 / 25
    words = [f"w{number}" for number in range(12)]
    seen = NearDuplicates(0.8)  # 10 shingles, of which 8 are shared with a text of 8: 0.8
    assert seen.add("long", " ".join(words)) is None
    assert seen.add("short", " ".join(words[:10])) == "long"


def test_the_most_similar_text_is_named_and_of_equals_the_earliest():
    seen = NearDuplicates(0.3)
    base = [f"w{number}" for number in range(20)]
    assert seen.add("far", " ".join(base[:10] + [f"y{number}" for number in range(12)])) is None
    assert seen.add("near", " ".join([*base[6:], "z"])) is None
    assert seen.add("copy", " ".join(base)) == "near"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Hello!", "hello", True),
        ("Hello", "Hello there", False),
        ("good day", "Good, day.", True),
        ("good day", "day good", False),
        ("What is 3 + 4?", "What is 3 - 4?", False),
        ("What is 3 \u2212 4?", "what is 3 - 4", True),
        ("3 * 4", "3 / 4", False),
        ("", "  \n", True),
        ("", "?", False),
        ("\U0001f44d", "\U0001f44d ", True),
        ("\U0001f44d", "\U0001f44e", False),
    ],
)
def test_short_texts_are_compared_word_by_word_and_texts_without_words_as_they_are(first, second, same):
    seen = NearDuplicates(0.8)
    assert seen.add("first", first) is None
    assert seen.add("second", second) == ("first" if same else None)
    assert len(seen) == 2 - same


def test_the_same_texts_give_the_same_answer_again():
    rng = random.Random(5)
    texts = [" ".join(rng.choice("abcdefgh") for _ in range(20)) for _ in range(200)]
    assert remove_near_duplicates(texts, 0.5) == remove_near_duplicates(texts, 0.5)
    assert remove_near_duplicates([]) == Deduplicated((), ())


@pytest.mark.parametrize(("threshold", "shingle"), [(0.0, 3), (1.1, 3), (float("nan"), 3), (0.8, 0)])
def test_thresholds_without_meaning_are_refused(threshold, shingle):
    with pytest.raises(ValueError, match="needs 0 < threshold"):
        NearDuplicates(threshold, shingle=shingle)


def test_the_effective_size_counts_clusters_and_distinct_shingles():
    texts = ["one two three four", "One, two, three, four!", "five six seven eight"]
    size = effective_size(texts, 0.8)
    assert (size.texts, size.clusters, size.distinct) == (3, 2, 4 / 6)
    assert math.isnan(effective_size([]).distinct)


def test_hostile_texts_of_a_megabyte_are_read_in_time():
    started = time.process_time()
    for text in (
        "a'" * 500_000,
        "1,000" * 200_000,
        "\u0301" * 300_000,
        "x" * 1_000_000,
        "= " * 100_000,
        " -" * 100_000,
    ):
        hash_words(text, signs=True)
    assert time.process_time() - started < 10


class Lengths:
    """An encoder for which texts of one length mean the same."""

    def encode(self, inputs, **settings):
        return np.eye(20, dtype=np.float32)[[len(text) for text in inputs]]


def test_of_texts_that_mean_the_same_the_first_stays():
    pytest.importorskip("semhash")
    found = remove_semantic_duplicates(["aaa", "b", "ccc", "aaa", "dd", "e"], 0.9, Lengths())
    assert found == Deduplicated((0, 1, 4), ((2, 0), (3, 0), (5, 1)))
    assert remove_semantic_duplicates([], 0.9, Lengths()) == Deduplicated((), ())


def test_without_semhash_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(similar, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "potstill\[semantic\]"'):
        remove_semantic_duplicates(["a"], 0.9, Lengths())
