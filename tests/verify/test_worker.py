from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from potstill.errors import MissingExtra, RunError
from potstill.verify.worker import Workers

DOING = '''
import os, sys, time
from potstill.errors import MissingExtra

def doer():
    """A function that does as it is told, in its process."""
    calls = []

    def do(what, value=None):
        calls.append(what)
        match what:
            case "count":
                return len(calls)
            case "pid":
                return os.getpid()
            case "print":
                print("x" * 100_000)
                return value
            case "sleep":
                time.sleep(60)
            case "power":
                return str(10 ** (10**10))
            case "raise":
                raise KeyError(value)
            case "leave":
                sys.exit(value)
            case "memory":
                return len(bytearray(10 << 30))
        return value

    return do


def missing():
    raise MissingExtra("install it")


def broken():
    raise ZeroDivisionError("at the start")
'''


@pytest.fixture(autouse=True)
def doing(monkeypatch, tmp_path):
    """A module that processes find under its name, as they find those of potstill."""
    (tmp_path / "doing.py").write_text(DOING, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "doing", raising=False)
    yield importlib.import_module("doing")
    monkeypatch.delitem(sys.modules, "doing")


@pytest.fixture
def workers(doing):
    made = Workers(doing.doer, {}, timeout_s=1.0, memory_mb=2048)
    yield made
    made.close()


def test_one_process_serves_many_calls_and_what_it_prints_is_no_reply(workers):
    assert [workers.ask("print", number).value for number in range(3)] == [0, 1, 2]
    assert workers.ask("count").value == 4


@pytest.mark.parametrize("what", ["sleep", "power"])
def test_a_call_that_takes_too_long_is_given_up_and_the_next_one_answered(workers, what):
    old = workers.ask("pid").value
    began = time.monotonic()
    reply = workers.ask(what)
    assert (reply.value, reply.failure, reply.crashed) == (None, "took longer than 1 s", False)
    assert time.monotonic() - began < 3.0
    assert not psutil.pid_exists(old)
    assert workers.ask("echo", "on").value == "on"


def test_an_exception_is_told_with_its_line_and_the_next_call_is_answered(workers):
    reply = workers.ask("raise", "this")
    assert reply.crashed
    assert "doing.py:" in reply.failure
    assert "KeyError: 'this'" in reply.failure
    assert workers.ask("echo", 1).value == 1


def test_a_process_that_leaves_is_noticed(workers):
    assert workers.ask("leave", 3).failure == "its process ended (exit status 3)"
    assert workers.ask("echo", 1).value == 1


def test_memory_is_limited(workers):
    assert "MemoryError" in workers.ask("memory").failure


def test_a_process_killed_between_calls_is_replaced_unnoticed(workers):
    os.kill(workers.ask("pid").value, signal.SIGKILL)
    time.sleep(0.1)
    assert workers.ask("echo", 1).value == 1


def test_after_closing_there_is_no_process_and_no_call(doing):
    workers = Workers(doing.doer, {}, timeout_s=5.0)
    pid = workers.ask("pid").value
    workers.close()
    assert not psutil.pid_exists(pid)
    with pytest.raises(ValueError, match="closed"):
        workers.ask("pid")


def test_what_goes_wrong_at_the_start_is_raised_here(doing):
    with pytest.raises(MissingExtra, match=r"^install it$"):
        Workers(doing.missing, {}, timeout_s=1.0)
    with pytest.raises(RunError, match=r"doing.py:\d+: ZeroDivisionError: at the start"):
        Workers(doing.broken, {}, timeout_s=1.0)


def test_processes_end_with_their_owner(tmp_path):
    program = (
        "import os, time\nfrom doing import doer\nfrom potstill.verify.worker import Workers\n"
        "workers = Workers(doer, {}, timeout_s=1.0)\nprint(workers.ask('pid').value, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        owner.kill()
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail(f"{pid} is still there")
