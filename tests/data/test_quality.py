from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data.quality import (
    JUDGE_TEMPLATE,
    WRITING_SYSTEMS,
    Flaw,
    Rules,
    judge_text,
    order_swapped,
    read_preference,
    repetition_of,
    win_share,
    writing_systems,
)
from potstill.errors import DataError

THOUGHT = "First add the tens, then the ones.\n\nThat makes forty two."
REFUSAL = "I am sorry, but I cannot help with that."


@pytest.mark.parametrize(
    ("content", "reasoning", "rules", "flaw"),
    [
        ("42", "", Rules(), None),
        ("42", THOUGHT, Rules(), None),
        (REFUSAL, "", Rules(language="latin"), None),
        (" \n\t", THOUGHT, Rules(min_words=0), Flaw.EMPTY),
        ("?!", "", Rules(), Flaw.SHORT),
        ("one two", "", Rules(min_words=3), Flaw.SHORT),
        ("one two three", "", Rules(min_words=3, max_words=3), None),
        ("one two three", "four", Rules(max_words=3), Flaw.LONG),
        ("\u6211\u7231\u5317\u4eac", "", Rules(max_words=3), Flaw.LONG),
        ("\u042d\u0442\u043e \u043e\u0442\u0432\u0435\u0442", "", Rules(language="latin"), Flaw.LANGUAGE),
        ("\u042d\u0442\u043e \u043e\u0442\u0432\u0435\u0442", "", Rules(language="cyrillic"), None),
        ("The answer", "\u56e0\u4e3a\u8fd9\u662f\u5bf9\u7684", Rules(language="latin"), Flaw.LANGUAGE),
        ("\u03b1 + \u03b2 = \u03b3", "", Rules(language="latin"), None),
        ("42", "", Rules(language="latin"), None),
        ("\u6771\u4eac\u306b\u884c\u304f\u30ab\u30fc", "", Rules(language="japanese"), None),
        ("\u6771\u4eac\u306b\u884c\u304f", "", Rules(language="han"), Flaw.LANGUAGE),
        ("so it goes on " * 5, "", Rules(), Flaw.REPETITION),
        ("42", "wait, let me check " * 10, Rules(), Flaw.REPETITION),
        ("so it goes on " * 5, "", Rules(repetition=1.0), None),
        ("ok\n" * 10, "", Rules(repetition=1.0), Flaw.LOOP),
        ("ok\n" * 9, "", Rules(repetition=1.0), None),
        ("ha" + "!" * 100, "", Rules(), Flaw.LOOP),
        ("title\n" + "-" * 80 + "\ntext", "", Rules(), None),
        ("42", "Let me see.\n```python\nprint(42)\n```", Rules(code_in_reasoning=False), Flaw.CODE),
        ("```python\nprint(42)\n```", THOUGHT, Rules(code_in_reasoning=False), None),
        ("42", "Let me see.\n```python\nprint(42)\n```", Rules(), None),
        ("42", THOUGHT, Rules(max_paragraph_words=6), Flaw.PARAGRAPH),
        ("42", THOUGHT, Rules(max_paragraph_words=7), None),
        ("one two three four", "", Rules(max_paragraph_words=2), None),
        ("42", "one two\n \t\nthree", Rules(max_paragraph_words=2), None),
    ],
)
def test_an_answer_is_dropped_under_the_rule_that_it_breaks(content, reasoning, rules, flaw):
    assert judge_text(content, reasoning, rules) is flaw


@given(st.text(max_size=80), st.text(max_size=80))
def test_without_rules_only_what_says_nothing_or_repeats_itself_is_dropped(content, reasoning):
    lenient = Rules(min_words=0, repetition=1.0)
    assert judge_text(content, reasoning, lenient) is (None if content.strip() else Flaw.EMPTY)


@given(st.lists(st.sampled_from("ab"), max_size=30))
def test_repetition_is_the_share_of_4_grams_that_stood_there_before(words):
    grams = [tuple(words[place : place + 4]) for place in range(len(words) - 3)]
    if grams:
        assert repetition_of(" ".join(words)) == 1 - len(set(grams)) / len(grams)
    else:
        assert repetition_of(" ".join(words)) == 0.0


def test_letters_are_counted_by_writing_system_whatever_their_form():
    assert writing_systems(
        "ab \uff21 \ufb01 \u041c\u0438 \u4f60 \u3053 \u30ab\u30fc \uc548 \u03b1\u03b2 \u03c0 1!"
    ) == {
        "latin": 4,
        "cyrillic": 2,
        "han": 1,
        "hiragana": 1,
        "katakana": 2,
        "hangul": 1,
        "greek": 2,
    }
    assert all(Rules(language=name) for name in WRITING_SYSTEMS)


def test_a_writing_system_that_nobody_knows_is_refused_with_those_that_are_known():
    with pytest.raises(DataError, match=r"quality\.language=english is no writing system\. Use one of .*latin"):
        Rules(language="english")


def test_both_orders_are_asked_and_braces_in_what_is_filled_in_stay():
    once, swapped = order_swapped("{first}?", "{second}", "{0} \\1", "{prompt} {first} {second} {other}")
    assert once == "{first}? {second} {0} \\1 {other}"
    assert swapped == "{first}? {0} \\1 {second} {other}"
    assert order_swapped("p", "x", "y") == order_swapped("p", "y", "x")[::-1]
    assert "FIRST, SECOND" in JUDGE_TEMPLATE


def test_a_template_without_a_place_for_what_is_asked_is_refused():
    with pytest.raises(DataError, match=r"judge\.template lacks \{first\}, \{second\}\."):
        order_swapped("p", "x", "y", "{prompt}")


@pytest.mark.parametrize(
    ("answer", "preference"),
    [
        ("FIRST", "first"),
        ("  **Second.**\n", "second"),
        ("The second is longer.\nI prefer the first answer.", "first"),
        ("Verdict: [[A]]", "first"),
        ("Both are fine.\n\n2", "second"),
        ("B\n```", "second"),
        ("TIE", None),
        ("", None),
        ("The first is better than the second", None),
        ("first, second", None),
        ("A or B", None),
        ("1 2", None),
        ("not the first", None),
        ("It is worse than the first", None),
        ("This is plan A", None),
        ("I cannot choose", None),
    ],
)
def test_a_verdict_is_read_only_where_it_is_clear(answer, preference):
    assert read_preference(answer) == preference


PREFERENCES = st.sampled_from(["first", "second", None])


def test_a_comparison_counts_only_if_both_orders_agree():
    assert win_share([("first", "second")]) == 1.0
    assert win_share([("second", "first")]) == 0.0
    assert win_share([("first", "first")]) == win_share([("first", None)]) == win_share([(None, None)]) == 0.5
    with pytest.raises(ValueError, match="needs at least one"):
        win_share([])


@given(st.lists(st.tuples(PREFERENCES, PREFERENCES), min_size=1))
def test_what_one_answer_wins_the_other_loses(comparisons):
    turned = {"first": "second", "second": "first", None: None}
    others = [(turned[once], turned[swapped]) for once, swapped in comparisons]
    assert win_share(comparisons) + win_share(others) == pytest.approx(1.0)
