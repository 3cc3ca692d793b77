"""Which verifier a recipe asks for, and answers graded by it.

Refuses a file of the recipe that is not there, before anything is asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill import verify
from potstill.errors import RecipeError
from potstill.recipes.generate import Generate, TaskPrompts
from potstill.recipes.verify import (
    CodeVerifier,
    FunctionVerifier,
    GymVerifier,
    LabelVerifier,
    MathVerifier,
    RegexVerifier,
    SchemaVerifier,
)
from potstill.verify import Verdict, Verifier, verify_all

__all__ = ["UNASKED", "Grader", "opened_grader"]

UNASKED = Verdict(True, "nobody verifies")


class Grader:
    """Grades answers, by as many processes as there are cores where that pays; without a verifier all are right."""

    def __init__(self, verifier: Verifier | None, workers: int = 1) -> None:
        """`workers` answers are verified at once."""
        self._verifier, self._workers = verifier, workers

    def grade(self, answers: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Verdict]:
        """A verdict on each (answer, row), in order. Raises DataError where a row lacks the column it is judged by."""
        if self._verifier is None:
            return [UNASKED] * len(answers)
        return list(verify_all(self._verifier, answers, self._workers))

    def close(self) -> None:
        """End the verifier's processes."""
        if self._verifier is not None:
            self._verifier.close()


def opened_grader(spec: Generate) -> Grader:
    """The grader of this recipe; close it after use. Raises RecipeError where its verifier cannot be made."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Grader(_verifier(spec), cores or 1)


def _verifier(spec: Generate) -> Verifier | None:
    match spec.verify:
        case None:
            return None
        case MathVerifier(answer=answer, timeout_s=timeout_s):
            return verify.math_verifier(answer=answer, timeout_s=timeout_s)
        case CodeVerifier(tests=tests, timeout_s=timeout_s, memory_mb=memory_mb):
            return verify.code_verifier(tests=tests, timeout_s=timeout_s, memory_mb=memory_mb)
        case SchemaVerifier(file=file):
            return verify.schema_verifier(schema=_read_schema(file))
        case LabelVerifier(labels=labels, answer=answer):
            return verify.label_verifier(labels=labels, answer=answer)
        case RegexVerifier(pattern=pattern):
            return verify.pattern_verifier(pattern=pattern)
        case FunctionVerifier(file=file, name=name, timeout_s=timeout_s):
            return verify.function_verifier(file=file, name=name, timeout_s=timeout_s)
        case GymVerifier(pattern=pattern, threshold=threshold):
            if not isinstance(spec.prompts, TaskPrompts):
                raise RecipeError(
                    f"generate.verify.kind: reasoning_gym judges problems of its own, but generate.prompts.kind="
                    f"{spec.prompts.kind}. Use prompts of kind reasoning_gym, or another verifier."
                )
            own = spec.prompts
            return verify.gym_verifier(task=own.task, settings=own.settings, pattern=pattern, threshold=threshold)


def _read_schema(file: str) -> Mapping[str, Any]:
    try:
        found: Any = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"generate.verify.file: {file} is no JSON ({error}). Give a JSON Schema.") from None
    if not isinstance(found, dict):
        raise RecipeError(f"generate.verify.file: {file} holds no object. Give a JSON Schema.")
    return found
