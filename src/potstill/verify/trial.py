"""What runs in the jail: the answer's code, then the row's tests, then the word that only this order can say.

The three are one chain of calls in C, of which no Python frame, name or attribute knows: code under trial finds neither
the tests nor the word, and leaving early in any way skips the word. Refuses such code the ways of looking for objects
that have no name (gc, ctypes, made-up byte code). Runs as a program in an interpreter of its own, without packages.
"""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections import deque
from collections.abc import Iterator
from functools import partial
from operator import call
from typing import Any

__all__ = ["WORD_BYTES", "begin"]

WORD_BYTES = 16
_RESULT = 3
_HIDDEN = frozenset({"gc.get_objects", "gc.get_referrers", "gc.get_referents", "code.__new__"})
_MODULES = frozenset({"_testcapi", "_testinternalcapi", "_testlimitedcapi"})


def begin() -> Iterator[object]:
    """The chain, not yet run; that it will be is said by a `+`.

    Standard input holds two words, the size of the answer's code, the code, and the tests. The first word is said when
    everything has run; the second one at once, where the tests are not Python.
    """
    os.write(_RESULT, b"+")
    with open(0, "rb", closefd=False) as source:
        passed, unusable, size = source.read(WORD_BYTES), source.read(WORD_BYTES), int(source.readline())
        answer, tests = source.read(size), source.read()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        checks = compile(tests, "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        os.write(_RESULT, unusable)
        raise
    if b"asyncio" in answer + tests or b"mock" in answer + tests:
        import asyncio  # noqa: F401  (it makes up byte code as it is imported)
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    sys.addaudithook(_keep_hidden)
    code = compile(answer, "answer.py", "exec", dont_inherit=True)
    steps: tuple[partial[Any], ...] = (
        partial(exec, code, vars(module)),
        # What the answer made of the built-in functions is not what the tests call.
        partial(vars(builtins).update, dict(vars(builtins))),
        partial(vars(module).__setitem__, "__builtins__", builtins),
        partial(exec, checks, vars(module)),
        partial(os.write, _RESULT, passed),
        partial(os._exit, 0),
    )
    return map(call, steps)


def _keep_hidden(event: str, arguments: tuple[object, ...]) -> None:
    if event in _HIDDEN or event.startswith("ctypes.") or (event == "import" and arguments[0] in _MODULES):
        raise PermissionError(f"{event} is not allowed in code under trial")


if __name__ == "__main__":
    deque(begin(), 0)
