"""What runs in the jail: the answer's code, then the row's tests, then the word that only this order can say.

The three are one chain of calls in C, of which no Python frame, name or attribute knows: code under trial finds neither
the tests nor the word, and leaving early in any way skips the word. Refuses such code the ways of looking for objects
that have no name (gc, ctypes, made-up byte code, other interpreters), and of moving in code that runs (tracing). Runs
as a program in an interpreter of its own, without packages.
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
_FROZEN = frozenset({"importlib.machinery", "importlib.util", "ntpath", "runpy", "site", "stat", "zipimport"})


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
    _load_modules(answer + b"\n" + tests)
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


def _load_modules(code: bytes) -> None:
    """Import what the code will, as long as compiled files may be read: later, modules are compiled from their source.

    Built-in and frozen modules are made by functions that take any name, or any byte code: these go, once all are here.
    """
    named = {b"asyncio"} if b"mock" in code or b"asyncio" in code else set[bytes]()
    for line in code.splitlines():
        first, *others = line.replace(b",", b" ").split() or [b""]
        named |= {word for word in others if first in (b"import", b"from")}
    own = {name for name in sys.builtin_module_names if not name.startswith(("xx", "_xx", "_test"))}
    usual = {name for name in (word.decode("utf-8", "replace") for word in named) if _is_usual(name)}
    for name in sorted({*_FROZEN, *own, *usual}):
        try:
            exec(f"import {name}", {})
        except (ImportError, OSError, SyntaxError):  # the code under trial will be told
            continue
    sys.implementation.cache_tag = None  # type: ignore[assignment]
    loader = sys.modules["_imp"]
    for name in ("create_builtin", "get_frozen_object"):
        delattr(loader, name)


def _is_usual(name: str) -> bool:
    """Whether it names a module of the standard library that does nothing but define."""
    parts = name.split(".")
    library = sys.stdlib_module_names - {"antigravity", "this"}
    return parts[0] in library and all(part.isidentifier() and not part.startswith("_") for part in parts)


def _keep_hidden(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: raises where code under trial would look for what is hidden, or move in code that runs.

    All that it goes by is written in it, for names and cells could be given other values.
    """
    denied = event in {
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
        "code.__new__",
        "marshal.load",
        "marshal.loads",
        "sys.settrace",
        "sys.setprofile",
        "sys.monitoring.register_callback",
        "sys._current_frames",
        "sys._current_exceptions",
        "sys.addaudithook",
        "sys.remote_exec",
        "cpython.PyInterpreterState_New",
    }
    if event == "import":
        # A library can be loaded under any name, of which the last part says what is looked for in it.
        denied = f"{arguments[0]}".rpartition(".")[2] in {"_testcapi", "_testinternalcapi", "_testlimitedcapi"}
    elif event == "object.__setattr__":
        denied = arguments[1] == "__code__"
    if denied or event.startswith("ctypes."):
        raise PermissionError(f"{event} is not allowed in code under trial")


if __name__ == "__main__":
    deque(begin(), 0)
