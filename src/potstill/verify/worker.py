"""Calls that may hang, eat memory or crash, made in processes that can be killed. Refuses to wait longer than told.

Such a process starts once, by making its function, and serves many calls. It ends when its owner closes it, when a call
takes too long, and by itself when its owner is gone. It is no sandbox: it runs trusted code on untrusted text.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO

from potstill import errors

__all__ = ["Reply", "Workers", "serve"]

START_S = 120.0
"""Longest start of a process: imports of large libraries on a busy machine."""
_GRACE_S = 5.0
"""After its time for a call and this, a process whose owner is gone ends itself."""
_SIZE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call came to: a value, or in one line why there is none (`crashed`: it raised, or ended its process)."""

    value: Any = None
    failure: str = ""
    crashed: bool = False


class Workers:
    """One function in as many processes as there are callers at once.

    `make(**settings)` gives the function, in the process; it must be importable by name. What the function takes must
    pickle; what it gives must be JSON. Raises what `make` raises of potstill's errors, RunError for anything else.
    """

    def __init__(
        self,
        make: Callable[..., Callable[..., Any]],
        settings: Mapping[str, Any],
        *,
        timeout_s: float,
        memory_mb: int | None = None,
    ) -> None:
        """`timeout_s` is of one call, wall time; `memory_mb` of address space, None for no limit."""
        self._first = pickle.dumps((make, dict(settings), timeout_s, memory_mb))
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[subprocess.Popen[bytes]] = [self._start()]

    def ask(self, *arguments: Any) -> Reply:
        """Call the function once. A process that does not answer in time is killed; the next call starts another."""
        process = self._take()
        answered = False
        try:
            _send(process.stdin, pickle.dumps(arguments))
            answer = _receive(process, time.monotonic() + self._timeout_s)
            answered = "value" in answer
        except TimeoutError:
            return Reply(failure=f"took longer than {self._timeout_s:g} s")
        except (BrokenPipeError, EOFError):
            return Reply(failure=f"its process ended ({_ending(_end(process, patience_s=2.0))})", crashed=True)
        finally:
            if not answered:
                _end(process)
        if not answered:
            return Reply(failure=answer["failure"], crashed=True)
        self._give_back(process)
        return Reply(answer["value"])

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
        for process in idle:
            _end(process)

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise ValueError("these workers are closed")
            while self._idle:
                process = self._idle.pop()
                if process.poll() is None:
                    return process
                _end(process)
        return self._start()

    def _give_back(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(process)
                return
        _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        # Not multiprocessing: its spawn runs the caller's main module again.
        command = [sys.executable, "-P", "-c", "from potstill.verify.worker import serve; serve()"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        answer: dict[str, Any] = {}
        try:
            _send(process.stdin, self._first)
            answer = _receive(process, time.monotonic() + START_S)
        except (TimeoutError, BrokenPipeError, EOFError):
            raise errors.RunError(
                f"verify: a process for judging answers did not start within {START_S:g} s ({_ending(_end(process))}). "
                f"Try `{sys.executable} -c 'import potstill.verify'` by hand."
            ) from None
        finally:
            if "value" not in answer:
                _end(process)
        if "failure" in answer:
            raise getattr(errors, answer["kind"], errors.RunError)(answer["failure"])
        return process


def serve() -> None:
    """Be such a process: make the function, then answer calls from standard input until it closes."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What the function prints must not reach the replies.
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    sys.excepthook = lambda kind, error, trace: _confess(sink, kind, error, trace)
    make, settings, timeout_s, memory_mb = pickle.loads(_read(source))
    if memory_mb is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, hard))
    function = make(**settings)
    _say(sink, {"value": None})
    while request := _read(source):
        # An alarm ends the process wherever it is, in C as well; nobody may be left to kill it.
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)
        value = function(*pickle.loads(request))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _say(sink, {"value": value})


def _confess(sink: BinaryIO, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last reply of a process: what was raised, and in which line. potstill's own errors say that themselves."""
    told = isinstance(error, errors.PotstillError)
    place = "" if told else _place(error, trace)
    words = " ".join(str(error).split())[:400]
    _say(sink, {"failure": f"{words}" if told else f"{place}{kind.__name__}: {words}", "kind": kind.__name__})


def _place(error: BaseException, trace: TracebackType | None) -> str:
    """`file:line: `, the innermost that belongs to no installed package."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    frames = traceback.extract_tb(trace)
    own = [frame for frame in frames if not frame.filename.startswith((sys.prefix, sys.base_prefix, "<"))] or frames
    return f"{own[-1].filename}:{own[-1].lineno}: " if own else ""


def _say(sink: BinaryIO, reply: Mapping[str, Any]) -> None:
    data = json.dumps(reply).encode()
    sink.write(_SIZE.pack(len(data)) + data)
    sink.flush()


def _read(source: BinaryIO) -> bytes:
    """The next request; empty at the end."""
    head = source.read(_SIZE.size)
    return source.read(_SIZE.unpack(head)[0]) if len(head) == _SIZE.size else b""


def _send(sink: Any, data: bytes) -> None:
    sink.write(_SIZE.pack(len(data)) + data)
    sink.flush()


def _receive(process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
    """One reply. Raises TimeoutError at the deadline, EOFError where the process has ended."""
    assert process.stdout is not None
    data, wanted = b"", _SIZE.size
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(data) < wanted:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                raise EOFError
            data += part
            if len(data) >= _SIZE.size:
                wanted = _SIZE.size + _SIZE.unpack(data[: _SIZE.size])[0]
    answer: dict[str, Any] = json.loads(data[_SIZE.size :])
    return answer


def _end(process: subprocess.Popen[bytes], *, patience_s: float = 0.0) -> int:
    """Kill it if it does not end by itself, and leave neither a zombie nor a pipe. Its exit status."""
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except BrokenPipeError:  # what was not yet sent, nobody will read
            continue
    return process.returncode


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"
