"""Answers compared with each other by a judge that may favour a place."""

from __future__ import annotations

import re

from potstill.engines import ScriptedAuthor
from potstill.pipeline.preference import preferred
from potstill.recipes.cleaning import Judge

GROUPS = [("How long?", ["a", "bbb", "cc"]), ("Alone?", ["only"]), ("None?", [])]


def read(question: str) -> tuple[str, str]:
    first, second = re.findall(r"answer\]\n(.*)\n", question)
    return first, second


def judge(decide):
    return ScriptedAuthor(lambda request: decide(*read(request.messages[0]["content"]))).ask


def test_the_answers_that_win_stay_and_an_answer_without_rivals_does():
    longer = judge(lambda first, second: "FIRST" if len(first) > len(second) else "SECOND")
    assert preferred(GROUPS, longer, Judge(least=0.9)) == [[1], [0], []]
    assert preferred(GROUPS, longer, Judge(least=0.5)) == [[1, 2], [0], []]


def test_a_judge_that_always_prefers_the_first_place_decides_nothing():
    biased = judge(lambda first, second: "FIRST")
    assert preferred(GROUPS, biased, Judge(least=0.5)) == [[0, 1, 2], [0], []]
    assert preferred(GROUPS, biased, Judge(least=0.6)) == [[], [0], []]


def test_an_answer_that_did_not_come_is_a_tie():
    silent = ScriptedAuthor(lambda request: None).ask
    assert preferred(GROUPS, silent, Judge(least=0.5)) == [[0, 1, 2], [0], []]


def test_each_pair_is_asked_in_both_orders():
    author = ScriptedAuthor(lambda request: "TIE")
    preferred(GROUPS, author.ask, Judge())
    pairs = [read(request.messages[0]["content"]) for request in author.asked]
    assert len(pairs) == 6
    assert {tuple(sorted(pair)) for pair in pairs} == {("a", "bbb"), ("a", "cc"), ("bbb", "cc")}
    assert all((second, first) in pairs for first, second in pairs)
