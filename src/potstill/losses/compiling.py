"""torch.compile where it works, the same function uncompiled where it does not. Refuses to trust names on the path."""

from __future__ import annotations

import functools
import logging
import subprocess
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch

__all__ = ["KERNELS", "can_compile", "compile_varying", "worth_compiling"]

KERNELS = 64
"""Kernels of one sort that are remembered; one's own functions, made anew for every call, must not pile up."""

WORTH_COMPILING = 1 << 24
"""Logits a call must have for compilation to be worth its seconds."""

_log = logging.getLogger(__name__)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile works here, tried once on a trivial function.

    It wants a C++ compiler with Python's headers for a CPU, and Triton for a GPU; names on the path prove neither.
    Where it fails one log line says why, and all runs uncompiled, with the same numbers to float32 rounding.
    """
    try:
        torch.compile(lambda x: x + 1.0)(torch.zeros(4, device=device_type))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.info("torch.compile does not work here (%s): running uncompiled, which is slower", reason[:200])
        return False
    return True


def compile_varying(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function compiled for shapes that vary; plain from then on where the compiler gives up, which is logged.

    Nothing may have been computed when it does, so one's own divergence may use what the compiler does not know.
    """
    plain = cast(FunctionType, function)
    # Variants are counted by code object, and past a small number of them torch runs uncompiled without a word: every
    # kernel gets a code object of its own.
    plain = FunctionType(
        plain.__code__.replace(co_name=name), plain.__globals__, name, plain.__defaults__, plain.__closure__
    )
    fast, gave_up = torch.compile(plain, dynamic=True), False

    @functools.wraps(plain)
    def call(*arguments: Any) -> Any:
        nonlocal gave_up
        if not gave_up:
            try:
                return fast(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                gave_up = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                _log.warning("torch.compile gave up on %s (%s): running it uncompiled", name, reason[:200])
        return plain(*arguments)

    return call


def worth_compiling(logits: int, device_type: str) -> bool:
    """Whether a call with so many logits is large enough, and a compiler is here."""
    return logits >= WORTH_COMPILING and can_compile(device_type)
