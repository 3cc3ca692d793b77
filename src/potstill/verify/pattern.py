"""Answers that must fit a regular expression. Refuses to wait for one that backtracks for ever."""

from __future__ import annotations

import re
from collections.abc import Callable

from potstill.errors import RecipeError
from potstill.verify.verdict import Row, Verdict, Verifier
from potstill.verify.worker import Workers

__all__ = ["check_pattern", "make_match", "pattern_verifier"]

TIMEOUT_S = 2.0


def pattern_verifier(*, pattern: str, timeout_s: float = TIMEOUT_S) -> Verifier:
    """The whole answer, without white space around it, fits `pattern`; unknown where that is not seen in `timeout_s`.

    Raises RecipeError for a pattern that is none.
    """
    check_pattern(pattern, "generate.verify.pattern")
    workers = Workers(make_match, {"pattern": pattern}, timeout_s=timeout_s)

    def judge(answer: str, row: Row) -> Verdict:  # noqa: ARG001
        said = answer.strip()
        reply = workers.ask(said)
        if reply.failure:
            return Verdict(None, reply.failure, extracted=said)
        return Verdict(reply.value, "" if reply.value else f"does not fit {pattern}", extracted=said)

    return Verifier(judge, workers.close)


def make_match(pattern: str) -> Callable[[str], bool]:
    """A function that says whether a whole text fits."""
    expression = re.compile(pattern)
    return lambda text: expression.fullmatch(text) is not None


def check_pattern(pattern: str, key: str) -> re.Pattern[str]:
    """The compiled pattern. Raises RecipeError, naming the recipe's `key`, for one that is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"{key}: {pattern!r} is no regular expression: {error}. Mend it.") from None
