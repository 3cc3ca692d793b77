from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data import decontaminate
from potstill.data.decontaminate import Leak

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
GENERIC = [
    "Once upon a time, in a land far away, there lived a king who had three sons and one daughter.",
    "In accordance with the terms and conditions set forth in this agreement, the parties hereby agree as follows.",
    "As far as I am concerned, at the end of the day it is up to you whether or not you would like to go.",
    "How many of them did she sell altogether?",
    "in April and May",
    "What is the capital of Italy?",
]


def protected(*texts, **settings):
    tests = decontaminate.TestText(**settings)
    for number, text in enumerate(texts):
        tests.add("tests", str(number), text)
    return tests


def random_words(count, rng):
    return [f"w{rng.randrange(100_000)}" for _ in range(count)]


SLIGHT_CHANGES = {
    "case": str.upper,
    "punctuation": lambda text: text.replace(",", ";").replace("?", "").replace(" and", " -- (and)"),
    "white space": lambda text: "\n\n".join(text.split()),
    "full width": lambda text: "".join(
        chr(ord(letter) + 0xFEE0) if letter.isascii() and letter.isalnum() else letter for letter in text
    ),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "soft hyphens": lambda text: text.replace("lt", "l\u00adt").replace("li", "l\u200bi"),
    "markup": lambda text: f"**{text.replace(' in ', ' _in_ ')}**",
}


@pytest.mark.parametrize("change", SLIGHT_CHANGES.values(), ids=SLIGHT_CHANGES)
@pytest.mark.parametrize("text", [QUESTION, "What is the tallest caf\u00e9 in the old city of Li\u00e8ge, Belgium?"])
def test_planted_leaks_are_found_however_they_are_written(text, change):
    tests = protected("Something else altogether, that nobody has asked about in this place so far", text)
    leak = tests.find(f"Here is a puzzle for you. {change(text)} Think about it, then answer.")
    assert (leak.source, leak.id, leak.kind) == ("tests", "1", "ngram")
    assert leak.words == len(text.replace(" -- ", " ").split())
    assert leak.matched.rstrip("*?") == change(text).strip("*?")
    assert tests.matched == {("tests", "1")}


def test_every_one_of_many_planted_leaks_is_found():
    rng = random.Random(2)
    texts = [random_words(rng.randrange(13, 60), rng) for _ in range(300)]
    tests = protected(*map(" ".join, texts))
    for number, words in enumerate(texts):
        start = rng.randrange(len(words) - 12)
        around = random_words(30, rng)
        leak = tests.find(", ".join(around[:15] + words[start : start + 13] + around[15:]))
        assert (leak.id, leak.words, leak.matched) == (str(number), 13, ", ".join(words[start : start + 13]))
    assert tests.find(" ".join(random_words(2000, rng))) is None


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=12), max_size=5),
    st.lists(st.sampled_from("abcdef"), max_size=20),
)
def test_runs_of_words_are_found_exactly_where_all_pairs_would_find_them(texts, words):
    def grams(words):
        return {tuple(words[place : place + 4]) for place in range(len(words) - 3)}

    tests = protected(*map(" ".join, texts), ngram=4, similarity=1.0)
    leak = tests.find(" ".join(words))
    sharing = {("tests", str(number)) for number, text in enumerate(texts) if grams(text) & grams(words)}
    assert sharing <= tests.matched
    assert (leak is not None and leak.kind == "ngram") == bool(sharing)
    if sharing:
        assert ("tests", leak.id) in sharing
        assert grams(leak.matched.split()) <= grams(texts[int(leak.id)])
        assert leak.words == len(leak.matched.split()) >= 4


def test_the_longest_run_is_shown_and_every_test_text_that_shares_one_is_counted():
    tests = protected(QUESTION, QUESTION.split(",")[0] + " at the fair by the sea", "Nothing of this kind")
    leak = tests.find("He read: " + QUESTION.rsplit(" ", 4)[0])
    assert (leak.id, leak.words) == ("0", 27)
    leak = protected("one two three four five six seven eight nine ten", ngram=4).find("two three four five six")
    assert leak == Leak("tests", "0", "two three four five six", 5, "ngram")
    assert len(tests) == 3
    tests.find("Natalia sold clips to 48 of her friends in April at the fair by the sea")
    assert tests.matched == {("tests", "0"), ("tests", "1")}


def test_short_test_texts_are_found_whole_or_nearly_so_and_not_in_passing():
    tests = protected("What is the capital of France?", "Name the largest of all planets in our solar system", "Yes.")
    assert tests.find("what is the capital of FRANCE").kind == "similar"
    assert tests.find("Yes") == Leak("tests", "2", "Yes", 1, "similar")
    assert tests.find("Yes, of course; that is what they say") is None
    assert tests.find("What is the capital of Spain?") is None
    embedded = tests.find("I was asked to name the largest of all planets in our solar system, and could not.")
    assert (embedded.id, embedded.words, embedded.kind) == ("1", 10, "ngram")
    assert embedded.matched == "name the largest of all planets in our solar system"
    near = tests.find("Please name the largest of all planets in our solar system")
    assert (near.id, near.matched) == ("1", "name the largest of all planets in our solar system")


def test_a_long_test_text_with_a_word_changed_here_and_there_is_similar():
    words = QUESTION.split()
    words[8], words[18] = "June", "ribbons"
    leak = protected(QUESTION, similarity=0.6).find(" ".join(words))
    assert (leak.id, leak.kind) == ("0", "similar")


def test_common_phrases_are_no_alarm():
    tests = protected(QUESTION, *(f"{text} {number}" for number, text in enumerate(GENERIC[:2])))
    assert [text for text in GENERIC[2:] if tests.find(text)] == []
    assert tests.matched == frozenset()


BOILERPLATE = (
    "Read the following passage with care, then answer the question below in one single word and nothing else."
)


def test_what_stands_in_very_many_test_texts_is_no_alarm_but_what_follows_it_is():
    rng = random.Random(1)
    own = [" ".join(random_words(20, rng)) for _ in range(40)]
    tests = protected(*(f"{BOILERPLATE} {text}" for text in own))
    assert tests.find(f"{BOILERPLATE} {' '.join(random_words(20, rng))}") is None
    assert tests.find(f"{BOILERPLATE} {own[3]}").matched == own[3]
    assert tests.find(own[4]).id == "4"


def test_a_phrase_of_few_test_texts_is_an_alarm_and_that_of_very_many_is_none():
    rng = random.Random(4)
    others = [" ".join(random_words(20, rng)) for _ in range(290)]
    few = protected(*others, *(f"{number} {BOILERPLATE}" for number in range(5)))
    many = protected(*others, *(f"{number} {BOILERPLATE}" for number in range(10)))
    assert few.find(f"Listen: {BOILERPLATE}").words == 18
    assert many.find(f"Listen: {BOILERPLATE}") is None


def test_in_few_test_texts_nothing_is_common_and_copies_make_nothing_common():
    assert protected(*([QUESTION] * 50)).find(QUESTION).words == 31
    assert protected(*(f"{BOILERPLATE} {number}" for number in range(3))).find(BOILERPLATE) is not None


def test_a_prompt_template_is_left_out_and_what_it_is_filled_with_is_not():
    template = "Solve this problem, and think step by step: {prompt}\nGive the result in a box, with nothing after it."
    tests = protected(*(template.format(prompt=f"{n} + {n + 7}") for n in range(4)))
    tests.ignore(template)
    assert tests.find(template.format(prompt="99 + 1")) is None
    assert tests.find(template.format(prompt="2 + 9")) == Leak("tests", "2", "2 + 9", 2, "similar")
    ten = " ".join(f"w{n}" for n in range(10))
    tests.add("more", "0", template.format(prompt=ten))
    assert tests.find(f"He said {ten} and then he went away again without a word").source == "more"


def test_texts_without_words_are_never_found():
    tests = protected("", "?!", "...")
    assert tests.find("") is tests.find("?!") is decontaminate.TestText().find("anything") is None


@pytest.mark.parametrize("settings", [{"ngram": 3}, {"similarity": 0.0}, {"similarity": 1.5}, {"frequent": -0.1}])
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match="needs ngram >= 4"):
        decontaminate.TestText(**settings)
