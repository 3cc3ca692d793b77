"""Answers judged by a function of the user's, in a process of its own. Refuses a file without that function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potstill.errors import RecipeError, RunError
from potstill.verify.verdict import Row, Verdict, Verifier
from potstill.verify.worker import Workers

__all__ = ["function_verifier", "make_function"]


def function_verifier(*, file: str, name: str = "right", timeout_s: float = 10.0) -> Verifier:
    """`name(answer, row)` of the Python file `file` gives True, False, or None for unknown.

    It is the user's own code: it runs with the user's rights, one call at a time in a process. Where it raises at the
    very first row, so does this (RecipeError with file and line); later such a row is unknown, as is one that takes
    longer than `timeout_s`. Raises RecipeError for a file that cannot be loaded or has no such function.
    """
    try:
        workers = Workers(make_function, {"file": file, "name": name}, timeout_s=timeout_s)
    except RunError as error:
        raise RecipeError(f"generate.verify.file: {file} cannot be loaded: {error}. Mend it.") from None
    judged = False

    def judge(answer: str, row: Row) -> Verdict:
        nonlocal judged
        reply = workers.ask(answer, dict(row))
        if reply.crashed and not judged:
            raise RecipeError(
                f"generate.verify.name: {name} raised at the first row: {reply.failure}. Mend the function."
            )
        judged = True
        if reply.failure:
            return Verdict(None, reply.failure)
        reason = {True: "", False: f"{name} says no", None: f"{name} does not know"}[reply.value]
        return Verdict(reply.value, reason)

    return Verifier(judge, workers.close)


def make_function(file: str, name: str) -> Callable[[str, dict[str, Any]], bool | None]:
    """The function, checked at every call to give True, False or None. Raises RecipeError as `function_verifier`."""
    if not Path(file).is_file():
        raise RecipeError(f"generate.verify.file: {file} is not there. Name a Python file, relative to the recipe.")
    spec = importlib.util.spec_from_file_location("verify_function", file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"generate.verify.file: {file} is no Python file. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(
            f"generate.verify.name: {file} has no function {name!r}. Write `def {name}(answer, row)` in it."
        )

    def judge(answer: str, row: dict[str, Any]) -> bool | None:
        value = function(answer, row)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} gave {value!r:.80}: needs True, False or None")
        return value

    return judge
