"""The store of a teacher's words: bytes, speed of reading and of filling it, how true it is, what harm it takes.

The teacher is SmolLM2-135M on sample news text (V = 49,152), the rows are packed rows of the quickstart recipe, and
captures run the code of the stage. Every part runs in a process of its own. Refuses to run a peer: DistillKit's bytes
are cited.

    python bench/store.py --json runs/bench/store.json [--rows 256] [--rounds 5] [--smoke]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _table import Row, describe_machine, describe_versions, print_rows, rounds_row, write_rows

__all__ = ["main"]

POTSTILL = str(Path(sys.executable).with_name("potstill"))
KILL_STEPS, BATCH_ROWS = 12, 8

RECIPE = (
    # Hardly a student: the stage initialise must make one, and nothing here trains it.
    "student={kind: layers, keep: [0, 29]}",
    "training.tokens=null",
    f"training.steps={KILL_STEPS}",
    f"training.batch_rows={BATCH_ROWS}",
    "training.validation_rows=1",
    "signals={kind: sampled, k: 16}",
)
"""Changes to the quickstart recipe; its training is as long as the capture that is killed."""

TIMED = ("k16", "k64", "hidden")
"""Forms whose capture is compared with the bare forward."""

PEER = "DistillKit a61c2e7: 76 / 172 bytes a token for k = 16 / 64 (cited, not run)"


def main() -> None:
    """Run all parts, write the rows, print the table; or be one part."""
    arguments = read_arguments()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="potstill-bench-") as folder:
        rows, facts = measure(Path(folder), arguments)
    write_rows(rows, arguments.json)
    facts |= {"minutes": f"{(time.perf_counter() - began) / 60:.1f}", "json": str(arguments.json)}
    title = "SMOKE TEST: these numbers mean nothing" if arguments.smoke else "the store of a teacher's words"
    print_rows(title, rows, facts)


def read_arguments() -> argparse.Namespace:
    """The command line; --smoke makes everything small."""
    parser = argparse.ArgumentParser(description="Measure the store of a teacher's words.")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--rows", type=int, default=256, help="packed rows of 256 tokens that are captured")
    parser.add_argument("--timed-rows", type=int, default=64, help="of these, in a capture that is timed")
    parser.add_argument("--rounds", type=int, default=5, help="times that each timed thing runs")
    parser.add_argument("--decoded", type=int, default=262_144, help="positions of a store that is read back")
    parser.add_argument("--positions", type=int, default=2048, help="positions whose estimates are compared")
    parser.add_argument("--draws", type=int, default=4, help="estimates of every position")
    parser.add_argument("--kills", type=int, default=20, help="captures that are killed")
    parser.add_argument("--flips", type=int, default=200, help="bytes that are flipped")
    parser.add_argument("--smoke", action="store_true", help="small numbers, to try the bench itself")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.part and not arguments.json:
        parser.error("--json FILE is needed")
    if arguments.smoke:
        small = {"rows": 16, "timed_rows": 8, "rounds": 1, "decoded": 8192, "positions": 64, "draws": 2, "kills": 2}
        vars(arguments).update(small | {"flips": 12})
    return arguments


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """All parts, one after another, on one prepared run."""
    changes = [part for change in (*RECIPE, f"run_dir={json.dumps(str(folder / 'run'))}") for part in ("--set", change)]
    subprocess.run([POTSTILL, "initialise", "quickstart", *changes], check=True, stdout=subprocess.DEVNULL)
    rows: list[Row] = []
    facts = {
        "task": "SmolLM2-135M-Instruct, bf16, sample news text in packed rows of 256, V = 49,152",
        "peer": PEER,
        "versions": describe_versions(),
        "machine": describe_machine(),
        "rounds": f"{arguments.rounds} after one that is not counted; low .. high over rounds",
    }
    for part in PARTS:
        print(f"{part} ...", file=sys.stderr)
        found = ask(part, folder, arguments)
        rows += [Row(**row) for row in found["rows"]]
        facts |= found["facts"]
    return rows, facts


def ask(part: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One part in a fresh process. Exits where it fails."""
    numbers = ("rows", "timed_rows", "rounds", "decoded", "positions", "draws", "kills", "flips")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in numbers]
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--folder", str(folder), *options]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{finished.stderr[-4000:]}\n{part} failed; its last words are above")
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


def answer(rows: Sequence[Row], facts: dict[str, str] | None = None) -> dict[str, Any]:
    """What a part prints."""
    return {"rows": [asdict(row) for row in rows], "facts": facts or {}}


def weigh(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes of stores of all forms, all files counted, a stored position."""
    from _stand import FORMS, capture_into, folder_bytes, open_stand

    stand = open_stand(arguments.folder / "run")
    numbers = stand.numbers(arguments.rows)
    rows = []
    for form in FORMS:
        place = arguments.folder / form
        store, _ = capture_into(stand, form, numbers, place)
        rows.append(Row(f"store.bytes_{form}", folder_bytes(place) / store.num_records, "bytes", n=store.num_records))
    words = "all files of a store; of hidden states without the head, which is kept once a store"
    return answer(rows, {"bytes": f"{words}; n positions in {store.num_pieces:,} pieces"})


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Reading back, on one core."""
    from _decode import decode_rows, stay_on_one_core

    stay_on_one_core()
    stores = {form: arguments.folder / form for form in ("k16", "k64")}
    rows = decode_rows(stores, arguments.folder, arguments.decoded, arguments.rounds)
    words = "one core; memory-mapped, in the page cache; the captured records repeated under other keys"
    return answer(rows, {"decode": f"{words}; first_read compares every checksum"})


def compare_captures(arguments: argparse.Namespace) -> dict[str, Any]:
    """A bare forward's seconds over those of a capture, round by round, in turn; the first round warms up."""
    from _forward import BareForward
    from _stand import capture_into, open_stand

    stand = open_stand(arguments.folder / "run")
    numbers = stand.numbers(arguments.timed_rows)
    forward = BareForward(stand, numbers, arguments.folder / "empty")
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds + 1):
        seconds["forward"].append(forward.time())
        for form in TIMED:
            seconds[form].append(capture_into(stand, form, numbers, arguments.folder / "timed")[1])
    rates = {name: [forward.tokens / value for value in values[1:]] for name, values in seconds.items()}
    shares = {form: [a / b for a, b in zip(rates[form], rates["forward"], strict=True)] for form in TIMED}
    ids = {form: f"store.capture_vs_forward{'' if form == 'k16' else f'.{form}'}" for form in TIMED}
    rows = [rounds_row(ids[form], values, "x") for form, values in shares.items()]
    rows += [rounds_row(f"store.tokens_per_s.{name}", values, "tokens/s") for name, values in rates.items()]
    words = "body, and head in bf16 at supervised positions into memory that is there; the capture's own batches"
    return answer(rows, {"forward": f"{words}: {forward.tokens:,} tokens"})


def estimate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors of estimates, against random sampling."""
    from _estimates import estimate_rows
    from _stand import open_stand

    rows = estimate_rows(open_stand(arguments.folder / "run"), arguments.positions, arguments.draws)
    words = "random sampling, 50 draws (arXiv:2503.16870), 3 bytes a unique token; fewest_bits: log2 C(V, unique) + 6"
    return answer(rows, {"estimates": f"{words}; {arguments.draws} draws of each, low .. high over them"})


def kill(arguments: argparse.Namespace) -> dict[str, Any]:
    """Captures killed at random instants."""
    from _harm import kill_rows

    return answer(*kill_rows(arguments.folder / "run", arguments.folder, arguments.kills))


def flip(arguments: argparse.Namespace) -> dict[str, Any]:
    """Random bytes of the store that the undisturbed capture left."""
    from _harm import flip_rows

    return answer(*flip_rows(arguments.folder / "whole", arguments.folder, arguments.flips))


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "bytes": weigh,
    "decode": decode,
    "captures": compare_captures,
    "estimates": estimate,
    "kills": kill,
    "flips": flip,
}
"""In this order: `decode` reads the stores of `bytes`, `flips` that of `kills`."""


if __name__ == "__main__":
    main()
