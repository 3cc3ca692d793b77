"""The teacher as a judge of its own answers: every two answers to a prompt are compared, in both orders.

Refuses to let the order decide: a comparison counts only where both orders agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from potstill.data.quality import JUDGE_TEMPLATE, Preference, order_swapped, read_preference, win_share
from potstill.data.synthesize import Ask
from potstill.recipes.cleaning import Judge
from potstill.types import Completion, Request

__all__ = ["preferred"]

VERDICT_TOKENS = 256
"""Of a judge's answer: a word, or a few lines before it."""


def preferred(
    groups: Sequence[tuple[str, Sequence[str]]], ask: Ask, rule: Judge, *, users: Sequence[str] = ()
) -> list[list[int]]:
    """For each (prompt, answers) the places of answers that win `rule.least` of their comparisons with the others.

    An answer without rivals stays. `users` say whose data each prompt is. Raises DataError for a template that lacks
    one of {prompt}, {first}, {second}.
    """
    template = rule.template or JUDGE_TEMPLATE
    pairs = [
        (number, first, second)
        for number, (_, answers) in enumerate(groups)
        for first, second in combinations(range(len(answers)), 2)
    ]
    questions = [
        _request(question, users[number] if users else "")
        for number, first, second in pairs
        for question in order_swapped(groups[number][0], groups[number][1][first], groups[number][1][second], template)
    ]
    told = iter(ask(questions) if questions else ())
    compared: dict[int, list[_Compared]] = {number: [] for number in range(len(groups))}
    for number, first, second in pairs:
        compared[number].append(((first, second), (_read(next(told)), _read(next(told)))))
    return [
        [place for place in range(len(answers)) if _share(place, compared[number]) >= rule.least]
        for number, (_, answers) in enumerate(groups)
    ]


Preferences = tuple[Preference | None, Preference | None]


_Compared = tuple[tuple[int, int], Preferences]
"""Places of two answers, and what the judge says of them in this order and in the other."""


def _share(place: int, own: Sequence[_Compared]) -> float:
    """The share of comparisons that the answer wins: of those in which it stood second, seen from there."""
    from_first = [verdict for (first, _), verdict in own if first == place]
    from_second = [(swapped, straight) for (_, second), (straight, swapped) in own if second == place]
    compared = [*from_first, *from_second]
    return win_share(compared) if compared else 1.0


def _request(question: str, user: str) -> Request:
    asked = ({"role": "user", "content": question},)
    return Request(messages=asked, max_tokens=VERDICT_TOKENS, temperature=0.0, user=user)


def _read(answer: Completion | None) -> Preference | None:
    return None if answer is None else read_preference(answer.text)
