r"""Mathematical answers: equal in value to the row's, by math-verify. Refuses to wait for an expression that explodes.

Numbers, fractions, sets, intervals, units and \boxed{} are math-verify's to read (Kydlicek (2025),
github.com/huggingface/Math-Verify); of a row's answer, what stands after the last "####" counts (Cobbe et al. (2021),
arXiv:2110.14168).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from potstill.errors import MissingExtra
from potstill.verify.verdict import Row, Verdict, Verifier, cell_of
from potstill.verify.worker import Workers

__all__ = ["make_comparison", "math_verifier"]

MEMORY_MB = 4096
TAIL = 20_000
"""Characters of an answer that are read, from its end."""

_BOXED = r"\boxed"
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What sympy raises over expressions that it cannot compare."""
_DELIMITED = re.compile(r"\$.*\$|\\boxed|\\\(|\\\[", re.DOTALL)
_QUANTITY = re.compile(r"[$€£]?\s*[-+]?[\d.,]+\s*%?(\s+(?!(pi|sqrt|sin|cos|tan|log|ln)\b)[A-Za-z]{2,}[\w\s./^]*)?\.?")


def math_verifier(*, answer: str = "answer", timeout_s: float = 5.0) -> Verifier:
    """The answer has the value of the row's column `answer`. What takes longer than `timeout_s` is unknown.

    Unknown, too, where the row's answer is no mathematics and not repeated word for word. Raises MissingExtra without
    math-verify, DataError for a row without an answer.
    """
    workers = Workers(make_comparison, {}, timeout_s=timeout_s, memory_mb=MEMORY_MB)

    def judge(text: str, row: Row) -> Verdict:
        gold = str(cell_of(row, answer, "generate.verify.answer")).rpartition("####")[2].strip()
        reply = workers.ask(gold[-TAIL:], text[-TAIL:])
        return Verdict(None, reply.failure) if reply.failure else Verdict(**reply.value)

    return Verifier(judge, workers.close)


def make_comparison() -> Callable[[str, str], dict[str, Any]]:
    """A function of (right answer, answer) that gives the fields of a verdict. Raises MissingExtra."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise MissingExtra('generate.verify.kind=math needs math-verify: pip install "potstill[math]"') from None
    logging.disable(logging.CRITICAL)

    def read(text: str) -> list[Any]:
        # Its own time-out is a signal, which does not reach into C; the process is killed instead.
        found: list[Any] = parse(text, parsing_timeout=None)
        return found

    def equal(wanted: list[Any], found: list[Any]) -> bool:
        return bool(verify(wanted, found, timeout_seconds=None, raise_on_error=True))

    def compare(gold: str, answer: str) -> dict[str, Any]:
        if gold == answer.strip():
            return {"right": True, "extracted": gold}
        try:
            wanted, found = _read_gold(gold, read), read(answer)
            right = equal(wanted, found)
            if not right and answer.count(_BOXED) > 1:
                # All boxes together were read as a set; whoever corrects itself means the last one.
                found = read(answer[answer.rindex(_BOXED) :])
                right = equal(wanted, found)
        except _UNREADABLE as error:
            return {"right": None, "reason": f"could not be compared: {type(error).__name__}"}
        return _judge(right, wanted, found)

    return compare


def _read_gold(gold: str, read: Callable[[str], list[Any]]) -> list[Any]:
    """A bare formula is LaTeX without its dollar signs; a number with a word is not."""
    if _DELIMITED.search(gold) or _QUANTITY.fullmatch(gold):
        return read(gold)
    found = read(f"${gold}$")
    return found if _has_value(found) else read(gold)


def _has_value(found: list[Any]) -> bool:
    return any(not isinstance(part, str) for part in found)


def _judge(right: bool, wanted: list[Any], found: list[Any]) -> dict[str, Any]:
    extracted = next((part for part in reversed(found) if isinstance(part, str)), "")
    if right:
        return {"right": True, "extracted": extracted}
    if not _has_value(wanted):
        return {"right": None, "reason": "the row's answer is no mathematics", "extracted": extracted}
    if not found:
        return {"right": False, "reason": "no answer found"}
    return {"right": False, "reason": "another value", "extracted": extracted}
