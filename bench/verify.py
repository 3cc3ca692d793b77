"""The judges of answers: programs that try to break out of the sandbox or to forge a pass, and how fast judging is.

Every program of `_escapes` runs by every means that this machine permits. An escape is: it ended as if it had its way,
it passed tests that fail, it changed a file of the caller's, it left a process, or it took longer than its limit and a
second. Refuses to run outside the sandbox.

    python bench/verify.py --json runs/bench/verify.json [--checks 10000]
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from _escapes import ATTEMPTS, FORGERIES, TESTS_THAT_FAIL
from _table import Row, describe_machine, describe_versions, print_rows, write_rows

from potstill.errors import RunError
from potstill.verify import code_verifier, describe_sandbox, math_verifier, verify_all
from potstill.verify.sandbox import Means, try_code

__all__ = ["escapes_of", "main", "surroundings"]

CPU_S, WALL_S, MEMORY_MB = 1.0, 2.0, 256
SLACK_S = 1.0
SECRET = "nobody's business"


def main() -> None:
    """Try everything, write the rows, print the table. Exits with 1 where something escaped."""
    arguments = read_arguments()
    rows: list[Row] = []
    facts = {"sandbox": "; ".join(f"{name}: {text}" for name, text in describe_sandbox().items())}
    escaped: list[str] = []
    tried = 0
    for means in ("namespaces", "landlock"):
        if not works(means):
            facts[means] = "not possible for this user on this machine"
            continue
        found, longest = try_all(means)
        escaped += [f"{name} ({means})" for name in found]
        tried += len(ATTEMPTS) + len(FORGERIES)
        rows.append(Row(f"verify.longest_s.{means}", longest, "s", n=len(ATTEMPTS) + len(FORGERIES)))
    rows.insert(0, Row("verify.escapes", len(escaped), "", n=tried))
    rows += [time_math(arguments.checks), time_code(arguments.trials)]
    limits = f"{CPU_S:g} s of processor, {WALL_S:g} s of wall time, {MEMORY_MB} MB"
    facts |= {"limits": limits, "versions": describe_versions(), "machine": describe_machine()}
    write_rows(rows, arguments.json)
    print_rows("the judges of answers", rows, facts | {"json": str(arguments.json)})
    if escaped:
        raise SystemExit(f"escaped: {', '.join(escaped)}")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Try to break out of the sandbox, and time the judges.")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--checks", type=int, default=10_000, help="short mathematical answers that are judged")
    parser.add_argument("--trials", type=int, default=50, help="short programs that are judged")
    return parser.parse_args()


def works(means: Means) -> bool:
    """Whether this user can build walls by these means here."""
    try:
        return try_code("", "", cpu_s=5, wall_s=30, memory_mb=MEMORY_MB, means=means).ending == "passed"
    except RunError:
        return False


def try_all(means: Means) -> tuple[list[str], float]:
    """Names of what escaped, and the seconds of what took longest."""
    escaped, longest = [], 0.0
    for name in (*ATTEMPTS, *FORGERIES):
        with surroundings() as names:
            faults, seconds = escapes_of(name, names, means)
        escaped += [f"{name}: {', '.join(faults)}"] if faults else []
        longest = max(longest, seconds)
        print(f"{means}: {name}: {', '.join(faults) or 'contained'}, {seconds:.2f} s", file=sys.stderr)
    return escaped, longest


@contextmanager
def surroundings() -> Iterator[dict[str, str]]:
    """What there is to be attacked: a file in a folder, a listening port, this process."""
    with tempfile.TemporaryDirectory(prefix="potstill-attacked-") as folder, socket.create_server(("", 0)) as server:
        secret = Path(folder, "secret.txt")
        secret.write_text(SECRET, encoding="utf-8")
        # Readable for everybody, so that walls are tried and not modes.
        Path(folder).chmod(0o777)
        secret.chmod(0o666)
        port = str(server.getsockname()[1])
        yield {
            "@SECRET@": str(secret),
            "@FOLDER@": folder,
            "@HOME@": str(Path.home() / ".profile"),
            "@PORT@": port,
            "@PID@": str(os.getpid()),
        }


def escapes_of(name: str, names: dict[str, str], means: Means) -> tuple[list[str], float]:
    """What one program got through (nothing, where the sandbox holds), and its seconds."""
    program = ATTEMPTS.get(name) or FORGERIES[name]
    for placeholder, value in names.items():
        program = program.replace(placeholder, value)
    before = set(psutil.pids())
    tests = "" if name in ATTEMPTS else TESTS_THAT_FAIL
    outcome = try_code(program, tests, cpu_s=CPU_S, wall_s=WALL_S, memory_mb=MEMORY_MB, means=means)
    found = {
        "it had its way": outcome.ending == "passed",
        "too long": outcome.seconds > WALL_S + SLACK_S,
        "a process is left": bool(left_over(before)),
        "the file was changed": Path(names["@SECRET@"]).read_text(encoding="utf-8") != SECRET,
        "a file was made": [path.name for path in Path(names["@FOLDER@"]).iterdir()] != ["secret.txt"],
        "its mode was changed": Path(names["@SECRET@"]).stat().st_mode & 0o777 != 0o666,
    }
    return [fault for fault, true in found.items() if true], outcome.seconds


def left_over(before: set[int]) -> list[int]:
    """Processes of a trial that are new since then, and are this one's or nobody's."""
    found = []
    for process in psutil.process_iter():
        try:
            words, parents = process.cmdline(), [parent.pid for parent in process.parents()]
        except psutil.Error:
            continue
        mine = os.getpid() in parents or set(parents) <= {0, 1}
        if mine and process.pid not in before and any("What runs in the jail" in word for word in words):
            found.append(process.pid)
    return found


def time_math(checks: int) -> Row:
    """Seconds for so many short answers by one worker, its start included."""
    answers = ((f"We add. The answer is \\boxed{{{number}}}.", {"answer": str(number % 7)}) for number in range(checks))
    began = time.perf_counter()
    with math_verifier() as verifier:
        count = sum(1 for _ in verify_all(verifier, answers))
    return Row("verify.math_s", time.perf_counter() - began, "s", n=count)


def time_code(trials: int) -> Row:
    """Seconds a short program, one after another."""
    answers = [("```python\ndef add(a, b):\n    return a + b\n```", {"tests": "assert add(1, 2) == 3"})] * trials
    began = time.perf_counter()
    with code_verifier() as verifier:
        assert all(verdict.right for verdict in verify_all(verifier, answers))
    return Row("verify.code_s", (time.perf_counter() - began) / trials, "s", n=trials)


if __name__ == "__main__":
    main()
