"""Asking an API, against a local server that misbehaves: speed, memory, storms, kills, faults, budgets.

Server and client are processes of their own on the same cores. Refuses to believe the client: what was sent, answered
and paid is what the server has counted.

    python bench/api.py --json runs/bench/api.json [--requests 10000] [--kills 20] [--budgets 100] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from _asking import MAX_TOKENS, PRICE, expected_body  # noqa: E402
from _table import Row, describe_machine, describe_versions, print_rows, write_rows  # noqa: E402
from tests.servers.answers import answer_to, body_key  # noqa: E402

from potstill.types import Usage  # noqa: E402

__all__ = ["main"]

FAULTS = (
    *("http_500", "http_502", "http_429", "http_429_after", "hang", "reset", "truncated_json", "no_choices"),
    *("wrong_model", "invalid_utf8", "too_large", "slow_drip"),
)
FAULT_REQUESTS, FAULT_SHARE = 30, 0.2
STORM_RATE, STORM_BURST = 50.0, 5
"""Requests a second, and a tenth of a second's at once."""
BUDGET_REQUESTS = 30


def main() -> None:
    """Measure all parts, write the rows, print the table."""
    arguments = read_arguments()
    began = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="potstill-bench-") as folder:
        for name in arguments.parts:
            place = Path(folder) / name
            place.mkdir()
            rows += PARTS[name](place, arguments)
    write_rows(rows, arguments.json)
    facts = {"machine": describe_machine(), "versions": describe_versions(), "json": str(arguments.json)}
    facts["minutes"] = f"{(time.perf_counter() - began) / 60:.1f}"
    title = "SMOKE TEST: these numbers mean nothing" if arguments.smoke else "asking an API"
    print_rows(title, rows, facts)


def read_arguments() -> argparse.Namespace:
    """The command line; --smoke makes everything small."""
    parser = argparse.ArgumentParser(description="Measure how an API is asked.")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/api.json"), help="where the rows go")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--requests", type=int, default=10_000, help="of the speed")
    parser.add_argument("--storm", type=int, default=1500, help="requests against a limit of 50 a second")
    parser.add_argument("--killed", type=int, default=5000, help="requests whose process is killed again and again")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--budgets", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="small numbers, to try the bench itself")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.requests, arguments.storm, arguments.killed, arguments.kills, arguments.budgets = 1000, 150, 400, 2, 3
    return arguments


def measure_speed(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Short requests at zero delay; resident memory when 1,000 and when all had ended."""
    with serving() as url:
        said = asking(url, folder / "ledger", arguments.requests)
    rows = [Row("api.requests_per_s", said["tally"]["answered"] / said["seconds"], "1/s", n=arguments.requests)]
    return rows + [
        Row(f"api.memory_{count}", resident / 2**20, "MiB", n=int(count)) for count, resident in said["memory"].items()
    ]


def measure_storm(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """A server that takes 50 requests a second, hardly more at once, and says no more than 429."""
    with serving("--rate", str(STORM_RATE), "--burst", str(STORM_BURST)) as url:
        said = asking(url, folder / "ledger", arguments.storm, "--attempts", "50")
        received = stats(url)["counts"]["received"]
    answered = said["tally"]["answered"]
    return [
        Row("api.storm_rate", answered / said["seconds"] / STORM_RATE, "x", n=arguments.storm),
        Row("api.storm_wasted", (received - answered) / received, "", n=received),
    ]


def measure_kills(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """SIGKILL when the server has had some random number of requests; then the rest, and the data set as if nothing."""
    draw = random.Random(arguments.seed)
    marks = sorted(draw.sample(range(1, arguments.killed), arguments.kills))
    names = {body_key(expected_body(number)): number for number in range(arguments.killed)}
    lost = resent = 0
    known: set[int] = set()
    log = folder / "answered.log"
    with serving("--log", str(log)) as url:
        for mark in marks:
            kill_at(url, mark, [*command_to_ask(url, folder / "ledger", arguments.killed)])
            before, known = known, set(committed(folder / "ledger", names))
            lost += len(before - known)
            resent += count_resent(log, names, before)
        said = asking(url, folder / "ledger", arguments.killed)
        resent += count_resent(log, names, known)
        lost += len(known - set(committed(folder / "ledger", names)))
        whole = asking(url, folder / "whole", arguments.killed)
    return [
        Row("api.kill_lost", lost, "answers", n=len(marks)),
        Row("api.kill_resent", resent, "requests", n=len(marks)),
        Row("api.kill_differs", float(said["digest"] != whole["digest"]), "", n=arguments.killed),
    ]


def measure_faults(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Every fault, met by a fifth of the requests: answers that are wrong or absent without being counted or told."""
    silent = retried = aside = stopped = 0
    names = {body_key(expected_body(number)): number for number in range(FAULT_REQUESTS)}
    with serving() as url:
        right = asking(url, folder / "right", FAULT_REQUESTS, "--texts")["texts"]
    for fault in FAULTS:
        with serving("--fault", f"{fault}={FAULT_SHARE}", "--seed", str(arguments.seed)) as url:
            said = asking(url, folder / fault, FAULT_REQUESTS, "--texts", "--timeout-s", "1", "--concurrency", "8")
            received = stats(url)["counts"]["received"]
        tally = said["tally"]
        put_aside = sum(tally["quarantined"].values()) + sum(tally["given_up"].values())
        kept = committed(folder / fault, names)
        wrong = sum(text != right[number] for number, text in kept.items())
        # A run that was stopped has told why; else what is absent was put aside, and is counted.
        untold = 0 if said["stopped"] else abs(FAULT_REQUESTS - len(kept) - put_aside)
        silent, stopped = silent + wrong + untold + abs(received - said["spent"][0]), stopped + bool(said["stopped"])
        retried, aside = retried + sum(tally["retried"].values()), aside + put_aside
    n = len(FAULTS) * FAULT_REQUESTS
    return [
        Row("api.faults_silent", silent, "answers", n=n),
        Row("api.faults_retried", retried, "attempts", n=n),
        Row("api.faults_aside", aside, "requests", n=n),
        Row("api.faults_that_stop", stopped, "faults", n=len(FAULTS)),
    ]


def measure_budgets(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Random budgets over requests, tokens and dollars: by how many the server's count is over them."""
    draw = random.Random(arguments.seed)
    usages = {
        body_key(body): answer_to(body, chat=True)["usage"] for body in map(expected_body, range(BUDGET_REQUESTS))
    }
    over = used_up = 0
    for number in range(arguments.budgets):
        limits = draw_limits(draw)
        log = folder / f"{number}.log"
        with serving("--log", str(log), "--fault", "http_500=0.1", "--fault", "reset=0.05") as url:
            options = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
            said = asking(
                url, folder / str(number), BUDGET_REQUESTS, *options, "--concurrency", str(draw.randint(1, 16))
            )
            received = stats(url)["counts"].get("received", 0)
        took = [usages[key] for key in log.read_text().split()]
        paid = [Usage(usage["prompt_tokens"], usage["completion_tokens"]) for usage in took]
        truth = {
            "budget-requests": received,
            "tokens": sum(usage["total_tokens"] for usage in took),
            "usd": sum(map(PRICE.cost, paid)) / 1e12,
        }
        over += any(truth[name] > limit for name, limit in limits.items())
        used_up += said["tally"]["stopped_by"] == "budget"
    return [
        Row("api.budget_overshoot", over, "budgets", n=arguments.budgets),
        Row("api.budgets_used_up", used_up, "budgets", n=arguments.budgets),
    ]


def draw_limits(draw: random.Random) -> dict[str, float]:
    """One to three limits; `worst` is about what one request may take."""
    worst = 256 + 16 + 200 + MAX_TOKENS
    drawn = {
        "budget-requests": draw.randint(1, BUDGET_REQUESTS),
        "tokens": draw.randint(worst // 2, 8 * worst),
        "usd": draw.uniform(0.5, 4.0) * PRICE.worst(worst, MAX_TOKENS) / 1e12,
    }
    chosen = draw.sample(sorted(drawn), draw.randint(1, 3))
    return {name: drawn[name] for name in chosen}


def command_to_ask(url: str, ledger: Path, count: int, *options: str) -> list[str]:
    """A process that asks `count` questions."""
    script = str(ROOT / "bench" / "_asking.py")
    return [sys.executable, script, "--url", url, "--ledger", str(ledger), "--requests", str(count), *options]


def asking(url: str, ledger: Path, count: int, *options: str) -> dict[str, Any]:
    """What such a process printed when it had ended."""
    finished = subprocess.run(command_to_ask(url, ledger, count, *options), check=False, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{finished.stderr[-4000:]}\nasking failed; its last words are above")
    said: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return said


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "tests.servers.api", "--port", "0", *options]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield json.loads(server.stdout.readline())["url"]
    finally:
        server.kill()
        server.communicate()


def stats(url: str) -> dict[str, Any]:
    """What the server has counted."""
    with urlopen(f"{url.removesuffix('/v1')}/stats") as answer:
        said: dict[str, Any] = json.load(answer)
    return said


def kill_at(url: str, mark: int, command: Sequence[str]) -> None:
    """Kills the process when the server has had `mark` requests in all; it may have ended by then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and stats(url)["counts"].get("received", 0) < mark:
        time.sleep(0.002)
    process.kill()
    process.wait()


def committed(ledger: Path, names: dict[str, int]) -> dict[int, str]:
    """Questions whose answers are in the ledger, with what the answers say."""
    with closing(sqlite3.connect(ledger)) as db:
        rows = db.execute("SELECT body, raw FROM requests WHERE state = 'answered'").fetchall()
    return {names[body_key(json.loads(body))]: said_in(raw) for body, raw in rows}


def said_in(raw: bytes) -> str:
    """The text of an answer as the ledger keeps it."""
    text: str = json.loads(zlib.decompress(raw))["choices"][0]["message"]["content"]
    return text


def count_resent(log: Path, names: dict[str, int], known: set[int]) -> int:
    """How often, since this was asked last, the server has answered what was known before; empties the log."""
    answered = [names[key] for key in log.read_text().split()]
    with log.open("r+b") as stream:
        stream.truncate()
    return sum(number in known for number in answered)


PARTS: dict[str, Callable[[Path, argparse.Namespace], list[Row]]] = {
    "speed": measure_speed,
    "storm": measure_storm,
    "kills": measure_kills,
    "faults": measure_faults,
    "budgets": measure_budgets,
}


if __name__ == "__main__":
    main()
