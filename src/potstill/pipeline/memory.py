"""How much memory this process holds and held. Refuses to guess where the system does not say: then it is 0."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

__all__ = ["keep_freed_memory", "peak_memory_bytes", "release_memory", "reset_peak_memory", "resident_memory_bytes"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Options of glibc's mallopt (malloc.h)."""


def keep_freed_memory() -> None:
    """Let the process keep what it frees for its next tensors, instead of asking the system for every one anew.

    By default glibc maps each large tensor afresh and hands it back when it is freed; touching fresh pages costs a
    tenth of a training step on a CPU. Without effect on other systems, and where glibc's own variables are set.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)


def reset_peak_memory() -> bool:
    """Measures peak memory from now on. False where the system refuses: then it counts from the process's start."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """Largest resident memory of this process since `reset_peak_memory`, in bytes; 0 where it is not to be had."""
    return _status_bytes("VmHWM:") or _peak_since_start()


def resident_memory_bytes() -> int:
    """Memory of this process that is in RAM now, in bytes; 0 where it is not to be had."""
    return _status_bytes("VmRSS:")


def release_memory() -> None:
    """Gives freed memory back to the system, so that it is not counted for what comes next."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def _status_bytes(name: str) -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _peak_since_start() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
