from __future__ import annotations

import importlib
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from potstill.errors import RunError
from potstill.verify import sandbox
from potstill.verify.sandbox import describe_sandbox, sandbox_means, try_code
from potstill.verify.syscalls import DENIED, seccomp_program

BENCH = Path(__file__).parents[2] / "bench"
LIMITS = {"cpu_s": 1.0, "wall_s": 2.0, "memory_mb": 256}
AMPLE = {"cpu_s": 10.0, "wall_s": 60.0, "memory_mb": 256}

FEW = (
    "fork bomb", "10 GB", "IPv4", "reading a file", "endless loop", "/proc of others", "deleting everything",
    "a new file outside", "killing the caller", "silence", "inherited descriptors", "byte code by marshal",
    "byte code by the import system", "byte code as a frozen module", "tracing at all", "a second interpreter",
)  # fmt: skip
"""Of the attempts, those that always run; all of them do with the bench and with `make test-slow`."""


@pytest.fixture(scope="module", autouse=True)
def walls():
    try:
        sandbox_means()
    except RunError as error:
        pytest.skip(f"no sandbox for this user on this machine: {error}")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture(params=["namespaces", "landlock"])
def means(request):
    try:
        try_code("", "", **AMPLE, means=request.param)
    except RunError as error:
        pytest.skip(f"{request.param} cannot be used by this user on this machine: {error}")
    return request.param


def faults(bench, name, means):
    module = bench("verify")
    with module.surroundings() as names:
        return module.escapes_of(name, names, means)[0]


def test_code_that_is_right_passes_and_code_that_is_wrong_does_not(means):
    ways = {"x = 1": "passed", "x = 2": "stopped", "x = ": "stopped"}
    assert {code: try_code(code, "assert x == 1", **AMPLE, means=means).ending for code in ways} == ways


def test_tests_that_are_not_python_say_nothing_of_the_answer(means):
    assert try_code("x = 1", "assert x ==", **AMPLE, means=means).ending == "unusable"


@pytest.mark.parametrize("name", FEW)
def test_nothing_gets_out(bench, name, means):
    assert faults(bench, name, means) == []


def test_no_forgery_passes(bench):
    forgeries = bench("_escapes").FORGERIES
    quick = (
        "leaving with 0", "saying yes", "no AssertionError", "words in frames", "words in gc", "referrers",
        "tracing past the assertion", "monitoring past the assertion", "another guard", "the guard's code",
    )  # fmt: skip
    assert set(quick) < set(forgeries)
    assert {name: found for name in quick if (found := faults(bench, name, sandbox_means()))} == {}


@pytest.mark.slow
def test_none_of_all_gets_out(bench, means):
    assert bench("verify").try_all(means)[0] == []


def test_what_the_standard_library_offers_works_inside(means):
    code = (
        "import asyncio, collections, dataclasses, decimal, enum, functools, heapq, itertools, json, math, random, re\n"
        "import statistics, string, threading, typing, unittest.mock, logging, tempfile, hashlib, zlib\n"
        "@dataclasses.dataclass\nclass P:\n    x: 'int'\n"
        "async def f(): return P(3).x\n"
        "T = collections.namedtuple('T', 'a')\n"
        "got = []\n"
        "t = threading.Thread(target=got.append, args=(1,)); t.start(); t.join()\n"
    )
    tests = "assert asyncio.run(f()) == 3 and got == [1] and T(1).a == 1\nassert re.search('a', 'ba')"
    outcome = try_code(code, tests, **AMPLE, means=means)
    assert outcome.ending == "passed", outcome.output


def test_modules_that_are_imported_late_or_by_their_names_are_there():
    code = (
        "def names():\n    import csv; import sqlite3\n    return csv, sqlite3\n"
        "import importlib\n"
        "for name in ('datetime', 'email.message', 'ntpath', 'queue', 'runpy', 'site', 'stat', 'zipimport'):\n"
        "    importlib.import_module(name)\n"
        "if True: import dataclasses, fractions; import inspect\n"
    )
    outcome = try_code(code, "assert len(names()) == 2\nimport doctest, this_is_no_module_of_anybody as x", **AMPLE)
    assert outcome.ending == "stopped"
    assert outcome.output.endswith("No module named 'this_is_no_module_of_anybody'\n")


def test_the_main_part_of_a_program_does_not_run():
    assert try_code("if __name__ == '__main__': raise SystemExit(1)", "", **AMPLE).ending == "passed"


def test_an_answer_cannot_replace_the_built_in_functions_of_the_tests():
    code = "import builtins\nbuiltins.len = lambda x: 3\nlen = len"
    assert try_code("import builtins\nbuiltins.len = lambda x: 3", "assert len('') == 3", **AMPLE).ending == "stopped"
    assert try_code(code, "assert len('') == 3", **AMPLE).ending == "passed"  # its own names are its own


def test_processor_time_and_wall_time_are_told_apart():
    busy = try_code("while True: pass", "", cpu_s=1.0, wall_s=60.0, memory_mb=256)
    idle = try_code("import time; time.sleep(60)", "", cpu_s=5.0, wall_s=1.0, memory_mb=256)
    assert (busy.ending, idle.ending) == ("processor", "wall")
    assert idle.seconds < 2.0


def test_output_is_drained_and_only_its_end_is_kept():
    outcome = try_code("for _ in range(4): print('x' * (1 << 20))\nprint('end')", "assert 0", **AMPLE)
    assert outcome.ending == "stopped"
    assert len(outcome.output) <= 8192
    assert outcome.output.endswith("AssertionError\n")


def test_text_that_no_file_could_hold_is_tried_all_the_same():
    assert try_code("x = '\ud800'", "", **AMPLE).ending == "passed"
    assert try_code("x = 1\0", "", **AMPLE).ending == "stopped"


def test_trials_leave_no_descriptor_and_no_child(means):
    count, others = len(list(Path("/proc/self/fd").iterdir())), set(psutil.Process().children())
    for code in ("x = 1", "raise ValueError"):
        try_code(code, "", **AMPLE, means=means)
    assert len(list(Path("/proc/self/fd").iterdir())) == count
    assert set(psutil.Process().children()) <= others  # earlier tests may have left servers of their own


def test_a_trial_ends_with_the_process_that_began_it():
    # A trial that sleeps meets no limit of processor time: nothing but its caller would end it.
    limits = "cpu_s=100, wall_s=300, memory_mb=256"
    code = f"from potstill.verify.sandbox import try_code; try_code('import time; time.sleep(300)', 'pass', {limits})"
    caller = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: len(descendants(caller.pid)) >= 2)
        trials = descendants(caller.pid)
    finally:
        caller.kill()
        caller.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in trials))


def descendants(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def wait_for(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_the_description_names_the_means_that_are_in_force():
    told = describe_sandbox()
    assert told["means"] == sandbox_means()
    assert {"files", "network", "processes", "privileges", "limits"} < set(told)


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    sandbox_means.cache_clear()
    try:
        with pytest.raises(RunError, match="on Linux on"):
            sandbox_means()
    finally:
        monkeypatch.undo()
        sandbox_means.cache_clear()


def run_filter(program: bytes, number: int, argument: int, audit: int = 0xC000003E) -> int:
    """What the kernel's machine would return: classic BPF, the instructions that are used."""
    data = struct.pack("<IIQ6Q", number, audit, 0, argument, *[0] * 5)
    steps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    place = loaded = 0
    while True:
        code, yes, no, k = steps[place]
        place += 1
        if code == 0x20:
            loaded = struct.unpack_from("<I", data, k)[0]
        elif code == 0x06:
            return k
        else:
            true = {0x15: loaded == k, 0x35: loaded >= k, 0x45: bool(loaded & k)}[code]
            place += yes if true else no


@pytest.mark.parametrize(("machine", "audit", "column"), [("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)])
def test_the_filter_denies_what_the_table_says_and_nothing_else(machine, audit, column):
    program, allow, denied = seccomp_program(machine, 77), 0x7FFF0000, 0x00050001
    numbers = {row[column] for row in DENIED.values()} - {None}
    special = {435, *((56, 62, 234, 302) if machine == "x86_64" else (220, 129, 131, 261))}
    assert not numbers & special
    for number in range(600):
        if number not in special:
            wanted = denied if number in numbers else allow
            assert run_filter(program, number, 0, audit) == wanted, number
    kill, clone, prlimit = (62, 56, 302) if machine == "x86_64" else (129, 220, 261)
    assert [run_filter(program, kill, pid, audit) for pid in (77, 1, 0, 2**32 - 1)] == [allow, denied, denied, denied]
    assert [run_filter(program, clone, flags, audit) for flags in (0x10000, 0x11, 0)] == [allow, denied, denied]
    assert [run_filter(program, prlimit, pid, audit) for pid in (0, 77, 1)] == [allow, allow, denied]
    assert run_filter(program, 435, 0, audit) == 0x00050026
    assert run_filter(program, 0, 0, 0x40000003) == 0x80000000  # 32-bit calls
    if machine == "x86_64":
        assert run_filter(program, 0x40000000 + 57, 0) == denied


def test_the_filter_knows_this_machine():
    assert len(seccomp_program(platform.machine(), 1)) % 8 == 0
