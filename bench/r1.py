"""Rejection sampling behind a real server: what a student gains by learning its teacher's right answers.

Runs the recipe r1-sample against a server that speaks OpenAI's protocol (`make vllm-cpu` starts one): the teacher
answers every problem several times, right answers are kept, the student learns them, and its share of right answers on
held-out problems is compared with before, and with the same student trained on unverified answers. Also, with
--intent, the classifier that a labelling model behind the same server teaches (api-intent-sample). Refuses to run
without a server.

    python bench/r1.py --json runs/bench/r1.json [--url http://127.0.0.1:8193/v1] [--intent] [--set KEY=VALUE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _table import Row, describe_machine, describe_versions, print_rows, write_rows

__all__ = ["main"]

POTSTILL = str(Path(sys.executable).with_name("potstill"))

GAINS = {"r1.gain": "pass_gain_over_untrained", "r1.gain_over_unverified": "pass_gain_over_control"}
ARMS = ("teacher", "untrained", "control", "student")


def main() -> None:
    """Run the recipe, write the rows, print the table."""
    arguments = read_arguments()
    began = time.perf_counter()
    rows = intent_rows(arguments) if arguments.intent else r1_rows(arguments)
    write_rows(rows, arguments.json)
    print_rows("a teacher behind a real server", rows, describe(arguments, time.perf_counter() - began))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what rejection sampling adds, against a real server.")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--url", help="of the server; default: the recipe's")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where the run lies, and stays")
    parser.add_argument("--intent", action="store_true", help="the API-labelled classifier instead")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="KEY=VALUE, to try the bench itself"
    )
    return parser.parse_args()


def run(recipe: str, arguments: argparse.Namespace) -> Path:
    """Run a shipped recipe to its report; what was finished, and what was answered, is not done again."""
    folder: Path = arguments.folder / recipe
    keys = [f"run_dir={json.dumps(str(folder))}", *([f"teacher.base_url={arguments.url}"] if arguments.url else [])]
    changes = [part for change in (*keys, *arguments.overrides) for part in ("--set", change)]
    subprocess.run([POTSTILL, "run", recipe, *changes], check=True)
    return folder


def r1_rows(arguments: argparse.Namespace) -> list[Row]:
    """Gains of the verified student, pass@1 of every arm, and what the teacher's answers came to."""
    folder = run("r1-sample", arguments)
    measured = read_measurements(folder)
    rows = []
    for name, gain in GAINS.items():
        found = measured["student", gain]
        rows.append(row_of(name, found))
        rows.append(Row(f"{name}_low", found["low"], found["unit"], None, None, found["n"]))
    rows += [row_of(f"r1.pass_at_1.{arm}", measured[arm, "pass_at_1"]) for arm in ARMS]
    facts = json.loads((folder / "generate" / "manifest.json").read_text(encoding="utf-8"))["facts"]
    told = facts["verdicts"]
    share = told["right"] / max(1, sum(told.values()))
    rows.append(Row("r1.right_of_all_answers", share, "share", None, None, sum(told.values())))
    return rows


def intent_rows(arguments: argparse.Namespace) -> list[Row]:
    """What the classifier keeps of the accuracy of the model that labelled its texts."""
    measured = read_measurements(run("api-intent-sample", arguments))
    rows = [row_of("api.intent_retention", measured["student", "retention"])]
    return rows + [
        row_of(f"api.intent.accuracy.{arm}", one) for (arm, name), one in measured.items() if name == "accuracy"
    ]


def read_measurements(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(arm, name) -> measurement, over the whole test split."""
    rows = json.loads((folder / "evaluate" / "measurements.json").read_text(encoding="utf-8"))
    return {(row["arm"], row["name"]): row for row in rows if row["slice"] == "test"}


def row_of(name: str, found: dict[str, Any]) -> Row:
    """A measurement as a row, with its interval."""
    return Row(name, found["value"], found["unit"], found["low"], found["high"], found["n"])


def describe(arguments: argparse.Namespace, seconds: float) -> dict[str, str]:
    """Where the numbers come from."""
    return {
        "intervals": "95 %, paired bootstrap over held-out problems (texts), of one run",
        "versions": describe_versions(),
        "machine": describe_machine(),
        "minutes": f"{seconds / 60:.1f}, without what was finished before",
        "json": str(arguments.json),
    }


if __name__ == "__main__":
    main()
