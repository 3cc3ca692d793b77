"""What makes an answer right. Refuses a dotted path to a function: it takes a file and a name, checked beforehand."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from potstill.recipes.numbers import Count, Positive
from potstill.recipes.part import Part

__all__ = [
    "CodeVerifier",
    "FunctionVerifier",
    "GymVerifier",
    "LabelVerifier",
    "MathVerifier",
    "RegexVerifier",
    "SchemaVerifier",
    "Verifier",
]


class MathVerifier(Part):
    """The answer is mathematically equal to the row's (math-verify, in a process of its own)."""

    kind: Literal["math"]
    answer: str = "answer"
    """Column of the right answer."""
    timeout_s: Positive = 5.0
    """A comparison that takes longer is unknown, not wrong."""


class GymVerifier(Part):
    """The judge of the reasoning-gym task that the prompts are of."""

    kind: Literal["reasoning_gym"]
    pattern: str | None = None
    r"""Regular expression whose first group is the answer (the last match counts); null: what is in the last \boxed{},
    else follows the last "answer is" or "answer:" in its line, else the last line, from its last ": " on."""
    threshold: Positive = 1.0
    """Least score that counts as right."""


class CodeVerifier(Part):
    """The code in the answer passes the row's tests, in a process without network and with limits."""

    kind: Literal["code"]
    tests: str = "tests"
    """Column of Python code that raises where the answer is wrong; it runs after the answer's code."""
    timeout_s: Positive = 10.0
    """Of processor time, and (twice as much) of wall time."""
    memory_mb: Count = 512
    """Of address space."""


class SchemaVerifier(Part):
    """The answer is JSON that fits a JSON Schema."""

    kind: Literal["json_schema"]
    file: str
    """A file with the schema."""


class LabelVerifier(Part):
    """The answer is one of these labels; where the row has one, that one."""

    kind: Literal["label"]
    labels: Annotated[list[str], Field(min_length=1)]
    """The labels."""
    answer: str | None = None
    """Column of the right label; null where any of them will do."""


class RegexVerifier(Part):
    """The whole answer fits a regular expression."""

    kind: Literal["regex"]
    pattern: str
    """The expression."""


class FunctionVerifier(Part):
    """A function of yours: `def right(answer: str, row: dict) -> bool | None`; None is unknown."""

    kind: Literal["function"]
    file: str
    """A Python file."""
    name: str = "right"
    """The function in it."""
    columns: list[str] = Field([])
    """Columns that it asks for, beside those that the template names."""
    timeout_s: Positive = 10.0
    """A call that takes longer is unknown."""


Verifier = Annotated[
    MathVerifier | GymVerifier | CodeVerifier | SchemaVerifier | LabelVerifier | RegexVerifier | FunctionVerifier,
    Field(discriminator="kind"),
]
