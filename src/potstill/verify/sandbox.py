"""Trying foreign Python code where it can do no harm, and knowing whether it ended. Refuses to try it elsewhere.

The walls are built by `jail`, in a process of their own; what runs within is `trial`. Where this machine permits
neither of the jail's means, nothing is run.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from potstill.errors import RunError
from potstill.verify.jail import DISK_BYTES, FILE_BYTES, FILES, LANDLOCK_ABI, THREADS
from potstill.verify.syscalls import ARCHITECTURES
from potstill.verify.trial import WORD_BYTES

__all__ = ["Means", "Outcome", "describe_sandbox", "sandbox_means", "try_code"]

Means = Literal["namespaces", "landlock"]
Ending = Literal["passed", "unusable", "stopped", "processor", "wall"]

_TAIL = 8192
_PATIENCE_S = 0.5
_USERS = 30_000
"""Code is tried as one of so many users from this number on, where potstill is root: nobody's, by custom."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial ended.

    ending   `passed`: answer and tests ran to their end; `unusable`: the tests are not Python; `stopped`: it ended
             earlier; `processor`, `wall`: a limit of time was reached
    output   the end of what it wrote, at most 8 kB
    seconds  wall time, the building of the walls included
    """

    ending: Ending
    output: str
    seconds: float


def try_code(
    answer: str, tests: str, *, cpu_s: float, wall_s: float, memory_mb: int, means: Means | None = None
) -> Outcome:
    """Run `answer`, then `tests` in the same module, behind walls: no network, no files, no processes, limits.

    `cpu_s` of processor time is rounded up to whole seconds; after `wall_s` everything is killed. Raises RunError where
    the walls cannot be built.
    """
    words = secrets.token_bytes(2 * WORD_BYTES)
    code = answer.encode("utf-8", "replace")
    order = _order(cpu_s=cpu_s, memory_mb=memory_mb, means=means or sandbox_means())
    began = time.monotonic()
    with tempfile.TemporaryFile() as source, tempfile.TemporaryDirectory(prefix="potstill-trial-") as home:
        Path(home).chmod(0o755)
        source.write(words + b"%d\n" % len(code) + code + tests.encode("utf-8", "replace"))
        source.seek(0)
        said, output, status = _run_jail({**order, "home": home}, source.fileno(), began + wall_s)
    if not said.startswith(b"+") and status is not None:
        raise RunError(
            f"generate.verify.kind=code: the sandbox could not be set up ({_last_line(output)}). {_advice()}"
        )
    ending = _ending(said, status, words)
    return Outcome(ending, output.decode("utf-8", "replace"), time.monotonic() - began)


@lru_cache(maxsize=1)
def sandbox_means() -> Means:
    """By which means foreign code can be shut in here. Raises RunError where there are none, and says why."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        raise RunError(
            f"generate.verify.kind=code: got {platform.system()} on {platform.machine()}; foreign code can be shut in "
            f"on Linux on {' or '.join(ARCHITECTURES)} only. Run the recipe there, for example in a container."
        )
    reasons = []
    for means in ("namespaces", "landlock"):
        try:
            if try_code("", "", cpu_s=5, wall_s=30, memory_mb=256, means=means).ending == "passed":
                return means
        except RunError as error:
            reasons.append(f"{means}: {error}")
    raise RunError("; ".join(reasons) or f"generate.verify.kind=code: the sandbox does not answer. {_advice()}")


def describe_sandbox() -> dict[str, str]:
    """Protections that are in force for code under trial: {what: by which means}. Raises as `sandbox_means`."""
    files = {
        "namespaces": f"an own file tree: libraries to read, {DISK_BYTES >> 20} MiB in memory to write",
        "landlock": "Landlock: libraries to read, nothing to write; names and sizes of other files can be asked for",
    }
    alone = {"namespaces": "own process, network and IPC namespaces; ", "landlock": ""}
    means = sandbox_means()
    user = "a user that owns nothing; " if os.geteuid() == 0 else ""
    return {
        "means": means,
        "files": files[means],
        "network": f"{alone[means]}no sockets (seccomp)",
        "processes": f"one process, at most {THREADS} threads; no signals to others, no ptrace (seccomp)",
        "privileges": f"{user}no_new_privs; no mounts, namespaces, modes, owners (seccomp)",
        "limits": f"processor, wall, address space; {FILE_BYTES >> 20} MiB a file, {FILES} open files, no core",
    }


def _advice() -> str:
    return (
        "Allow user namespaces, run as root with CAP_SYS_ADMIN, or use Linux with Landlock "
        f"{LANDLOCK_ABI} (6.2 or later) and an interpreter that other users may read."
    )


def _order(*, cpu_s: float, memory_mb: int, means: Means) -> dict[str, object]:
    root = os.geteuid() == 0
    return {
        "means": means,
        "cpu_s": max(1, -int(-cpu_s // 1)),
        "memory_bytes": memory_mb << 20,
        "user": _USERS + os.getpid() % _USERS if root else None,
        "others": 0 if root else _own_threads(),
        "trial": _trial_source(),
    }


@lru_cache(maxsize=1)
def _trial_source() -> str:
    return Path(__file__).with_name("trial.py").read_text(encoding="utf-8")


def _own_threads() -> int:
    """Threads that this user has already: the limit on them counts all of a user's."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == os.geteuid():
                count += len(list((process / "task").iterdir()))
        except OSError:  # it has ended meanwhile
            continue
    return count


def _run_jail(order: dict[str, object], source: int, deadline: float) -> tuple[bytes, bytes, int | None]:
    """What came by the result pipe, the end of the output, and the exit status; None where it had to be killed."""
    words = [os.path.realpath(sys.executable), "-I", "-S", "-B", str(Path(__file__).with_name("jail.py"))]
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with os.fdopen(reader, "rb") as result:
        try:
            process = subprocess.Popen(
                [*words, json.dumps({**order, "result": writer})],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(writer)
        with process:
            try:
                tail, status = _watch(process, deadline)
            finally:
                _stop(process, softly=order["means"] == "namespaces")
        return result.read(_TAIL) or b"", tail, status


def _watch(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, int | None]:
    """Read what it writes, keep the end, and wait for it until the deadline."""
    tail = b""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                break
            tail = (tail + part)[-_TAIL:]
            if time.monotonic() > deadline:
                return tail, None
    try:
        return tail, process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return tail, None


def _stop(process: subprocess.Popen[bytes], *, softly: bool) -> None:
    """End it, with all that it has started; where these are in a namespace, it sees to that itself."""
    if softly:
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.kill()
    process.wait()


def _ending(said: bytes, status: int | None, words: bytes) -> Ending:
    """The word counts only where nothing else was said."""
    if said == b"+" + words[:WORD_BYTES]:
        return "passed"
    if said == b"+" + words[WORD_BYTES:]:
        return "unusable"
    if status is None:
        return "wall"
    return "processor" if abs(status) % 128 in (signal.SIGXCPU, signal.SIGKILL) else "stopped"


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
