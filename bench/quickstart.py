"""The quickstart recipe from start to report, as its user runs it: minutes, memory, what the student kept and gained.

Refuses: a run folder that holds anything, because a run that continues an earlier one has no honest time.

    python bench/quickstart.py --json runs/bench/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _table import Row, describe_machine, describe_versions, print_rows, write_rows

__all__ = ["main"]

POTSTILL = str(Path(sys.executable).with_name("potstill"))
SAMPLES = ("smollm2-135m-instruct", "news-articles")
STAGES = ("prepare", "initialise", "capture", "train", "control", "evaluate", "report")
HELP_RUNS = 5
GB = 1e9

QUALITY = (
    ("quickstart.student_kl", "student", "kl_to_teacher"),
    ("quickstart.student_agreement", "student", "agreement"),
    ("quickstart.control_kl", "control", "kl_to_teacher"),
    ("quickstart.control_agreement", "control", "agreement"),
    ("quickstart.untrained_kl", "untrained", "kl_to_teacher"),
    ("quickstart.untrained_agreement", "untrained", "agreement"),
    ("quickstart.kl_gain", "student", "kl_gain_over_control"),
    ("quickstart.agreement_gain", "student", "agreement_gain_over_control"),
    ("quickstart.student_perplexity", "student", "perplexity"),
    ("quickstart.teacher_perplexity", "teacher", "perplexity"),
    ("quickstart.student_decode", "student", "decode_tokens_per_s"),
    ("quickstart.teacher_decode", "teacher", "decode_tokens_per_s"),
)
"""Row id, arm, name of the measurement."""


def main() -> None:
    """Run, write the rows, print the table."""
    arguments = read_arguments()
    help_row = time_help()
    subprocess.run([POTSTILL, "samples", "fetch", *SAMPLES], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(prefix="potstill-bench-") as folder:
        run = arguments.run_dir or Path(folder) / "quickstart"
        minutes = time_run(run, arguments.overrides)
        rows = [Row("quickstart.minutes", minutes, "min"), *read_run(run), help_row]
    write_rows(rows, arguments.json)
    facts = {"machine": describe_machine(), "versions": describe_versions(), "peers": "none; the control arm is inside"}
    print_rows("potstill run quickstart", rows, facts | {"json": str(arguments.json)})


def read_arguments() -> argparse.Namespace:
    """The command line. Exits where the run folder is not empty."""
    parser = argparse.ArgumentParser(description="Time the quickstart recipe and read what it measured.")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--run-dir", type=Path, help="keep the run here; default: a folder that is deleted")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="KEY=VALUE, to try the bench itself"
    )
    arguments = parser.parse_args()
    if arguments.run_dir and arguments.run_dir.exists() and any(arguments.run_dir.iterdir()):
        raise SystemExit(f"--run-dir: {arguments.run_dir} is not empty. Name a new folder.")
    return arguments


def time_help() -> Row:
    """Median seconds of `potstill --help`, with the range."""
    seconds = []
    for _ in range(HELP_RUNS):
        began = time.perf_counter()
        subprocess.run([POTSTILL, "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return Row("help.seconds", statistics.median(seconds), "s", min(seconds), max(seconds), len(seconds))


def time_run(run: Path, overrides: list[str]) -> float:
    """Wall minutes of the whole job in a process of its own, from the shell's point of view."""
    changed = [part for override in overrides for part in ("--set", override)]
    began = time.perf_counter()
    subprocess.run([POTSTILL, "run", "quickstart", *changed, "--set", f"run_dir={json.dumps(str(run))}"], check=True)
    return (time.perf_counter() - began) / 60


def read_run(run: Path) -> list[Row]:
    """Rows of a finished run: memory, quality with intervals, minutes of each stage."""
    manifests = {stage: read(run / stage / "manifest.json") for stage in STAGES}
    measurements = {(row["arm"], row["name"]): row for row in read(run / "evaluate" / "measurements.json")}
    rows = [Row("quickstart.peak_gb", peak_bytes(manifests, measurements) / GB, "GB", n=len(manifests))]
    for name, arm, measurement in QUALITY:
        found = measurements[arm, measurement]
        rows.append(Row(name, found["value"], found["unit"], found["low"], found["high"], found["n"]))
    for name in ("kl_gain", "agreement_gain"):
        found = measurements["student", f"{name}_over_control"]
        rows.append(Row(f"quickstart.{name}_low", found["low"], found["unit"], n=found["n"]))
    rows += [Row(f"quickstart.minutes.{stage}", m["wall_s"] / 60, "min") for stage, m in manifests.items()]
    rows += [Row(f"quickstart.peak_gb.{stage}", m["peak_rss_bytes"] / GB, "GB") for stage, m in manifests.items()]
    return rows


def peak_bytes(manifests: dict[str, Any], measurements: dict[tuple[str, str], Any]) -> float:
    """Largest resident memory of any stage; evaluation measures every arm by itself, so these count too."""
    stages = [float(manifest["peak_rss_bytes"]) for manifest in manifests.values()]
    arms = [float(row["value"]) for (_, name), row in measurements.items() if name == "peak_memory_bytes"]
    return max(stages + arms)


def read(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
