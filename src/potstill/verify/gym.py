"""Answers to reasoning-gym problems, scored by their own task. Refuses a task that the library does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from potstill.errors import DataError, MissingExtra, RecipeError
from potstill.verify.extract import final_answer
from potstill.verify.pattern import check_pattern
from potstill.verify.verdict import Row, Verdict, Verifier
from potstill.verify.worker import Workers

__all__ = ["gym_verifier", "make_scorer"]

TIMEOUT_S = 10.0
MEMORY_MB = 8192


def gym_verifier(
    *,
    task: str,
    settings: Mapping[str, Any],
    pattern: str | None = None,
    threshold: float = 1.0,
    entry: str = "entry",
    timeout_s: float = TIMEOUT_S,
) -> Verifier:
    """The task's score of the answer reaches `threshold`; the score, of the library, is usually 0 to 1.

    The row, or its column `entry`, is the problem as the library made it: question, answer, metadata. The answer is the
    first group of `pattern` (the last match counts), or what `final_answer` finds. Raises RecipeError for an unknown
    task, settings or pattern, MissingExtra without reasoning-gym, DataError for a row without an entry.
    """
    if pattern is not None and check_pattern(pattern, "generate.verify.pattern").groups < 1:
        raise RecipeError(f"generate.verify.pattern: {pattern!r} has no group. Put ( ) around the answer.")
    given = {"task": task, "settings": dict(settings), "pattern": pattern}
    workers = Workers(make_scorer, given, timeout_s=timeout_s, memory_mb=MEMORY_MB)

    def judge(answer: str, row: Row) -> Verdict:
        problem = row.get(entry, row)
        if not isinstance(problem, Mapping) or not {"answer", "metadata"} <= set(problem):
            raise DataError(f"generate.prompts: a row's {entry} is no problem of reasoning-gym (answer, metadata).")
        reply = workers.ask(answer, dict(problem))
        if reply.failure:
            return Verdict(None, reply.failure)
        extracted, score = reply.value
        if extracted is None:
            return Verdict(False, "no answer found", 0.0)
        right = score >= threshold
        return Verdict(right, "" if right else f"scored {score:g}", score, extracted)

    return Verifier(judge, workers.close)


def make_scorer(
    task: str, settings: Mapping[str, Any], pattern: str | None
) -> Callable[[str, Mapping[str, Any]], tuple[str | None, float]]:
    """A function of (answer, problem) that gives what it took for the answer and its score. Raises as above."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise MissingExtra(
            'generate.verify.kind=reasoning_gym needs reasoning-gym: pip install "potstill[reasoning]"'
        ) from None
    if task not in DATASETS:
        raise RecipeError(f"generate.prompts.task: reasoning-gym has no task {task!r}; it has {', '.join(DATASETS)}.")
    try:
        judge = create_dataset(task, size=1, seed=0, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f"generate.prompts.settings: {task} does not take {dict(settings)}: {error}.") from None
    expression = None if pattern is None else check_pattern(pattern, "generate.verify.pattern")

    def score(answer: str, problem: Mapping[str, Any]) -> tuple[str | None, float]:
        if expression is None:
            found: str | None = final_answer(answer) or None
        else:
            matches = list(expression.finditer(answer))
            found = matches[-1][1] if matches else None
        return found, float(judge.score_answer(found, dict(problem))) if found else 0.0

    return score
