"""What a student keeps of the gain from distillation when its teacher speaks from a store of 16 tokens a position.

For every seed the same student learns, from the same first weights, on the same batches: from hard labels, from the
exact teacher (stored hidden states), from 16 sampled tokens, and from the 16 likeliest renormalised, which is what
others store and the control of the claim. All by `potstill evaluate`, with the quickstart recipe. Run again with the
same --folder, what is finished is not done again. Refuses to divide by a gain that is not there.

    gain kept = (hard - arm) / (hard - exact)

    python bench/gain.py --json runs/bench/gain.json [--folder runs/bench/gain] [--steps 40] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _table import Row, describe_machine, describe_versions, print_rows, write_rows

__all__ = ["main"]

POTSTILL = str(Path(sys.executable).with_name("potstill"))
LAYERS = [0, 1, 2, 8, 9, 10, 11, 20, 21, 22, 23, 24, 27, 28, 29]
"""What the quickstart recipe's greedy search chooses, so that no search runs here."""

RECIPE = (
    f"student={{kind: layers, keep: {LAYERS}}}",
    "training.tokens=null",
    "training.batch_rows=8",
    "evaluation.max_rows=128",
    "evaluation.speed=false",
    "evaluation.sample_prompts=0",
)
"""Changes to the quickstart recipe."""

SIGNALS = {
    "exact": "{kind: hidden}",
    "sampled": "{kind: sampled, k: 16}",
    "topk_renormalised": "{kind: topk_renormalised, k: 16}",
}
"""The run of each arm: what the recipe says as `signals`. The hard labels are the control arm of the first."""

MEASURES = {"kl_to_teacher": "kl", "nll": "nll", "agreement": "agreement", "ece": "ece"}
"""Names of the measurements, and what the rows call them."""

Seed = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Of one seed: by arm and measure, a measurement as evaluate writes it."""


def main() -> None:
    """Train and evaluate every arm of every seed, write the rows, print the table."""
    arguments = read_arguments()
    began = time.perf_counter()
    seeds = [run_seed(seed, arguments) for seed in range(arguments.seeds)]
    rows = [row for kind in ("sampled", "topk_renormalised") for row in kept_rows(seeds, kind)]
    rows += [row for measure in MEASURES.values() for row in arm_rows(seeds, measure)]
    write_rows(rows, arguments.json)
    print_rows("the gain that stored signals keep", rows, describe(arguments, time.perf_counter() - began))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure what stored signals keep of the gain from distillation.")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/gain"), help="where the runs lie, and stay")
    parser.add_argument("--steps", type=int, default=40, help="training steps of 8 x 256 tokens")
    parser.add_argument("--seeds", type=int, default=3, help="of data split, order of rows, and evaluation")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="KEY=VALUE, to try the bench itself"
    )
    return parser.parse_args()


def run_seed(seed: int, arguments: argparse.Namespace) -> Seed:
    """Every arm of one seed, up to its evaluation; what was finished before is not done again."""
    found: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    for kind, signals in SIGNALS.items():
        run = arguments.folder / f"seed-{seed}" / kind
        keys = [f"seed={seed}", f"training.steps={arguments.steps}", f"signals={signals}"]
        keys += [f"control.enabled={json.dumps(kind == 'exact')}", f"run_dir={json.dumps(str(run))}"]
        changes = [part for change in (*RECIPE, *keys, *arguments.overrides) for part in ("--set", change)]
        print(f"seed {seed}: {kind} ...", file=sys.stderr)
        subprocess.run([POTSTILL, "evaluate", "quickstart", *changes], check=True)
        rows = json.loads((run / "evaluate" / "measurements.json").read_text(encoding="utf-8"))
        arms = {"student": kind} | ({"control": "hard", "untrained": "untrained"} if kind == "exact" else {})
        for arm, name in arms.items():
            measured = {row["name"]: row for row in rows if row["arm"] == arm and row["slice"] == "test"}
            found[name] = {short: measured[long] for long, short in MEASURES.items() if long in measured}
    return found


def kept_rows(seeds: list[Seed], kind: str) -> list[Row]:
    """Share of the exact teacher's gain that an arm keeps: the mean of the seeds' ratios, with their range.

    A measure on which the exact teacher gains nothing, in any seed, has no row.
    """
    rows = []
    for measure in ("kl", "nll", "agreement"):
        values = [{arm: float(seed[arm][measure]["value"]) for arm in ("hard", "exact", kind)} for seed in seeds]
        sign = -1.0 if measure == "agreement" else 1.0
        if all(sign * (one["hard"] - one["exact"]) > 0 for one in values):
            kept = [(one["hard"] - one[kind]) / (one["hard"] - one["exact"]) for one in values]
            name = "store.gain_kept" + (f"_{measure}" if measure != "kl" else "")
            rows.append(mean_row(name + (f".{kind}" if kind != "sampled" else ""), kept, "x"))
    return rows


def arm_rows(seeds: list[Seed], measure: str) -> list[Row]:
    """The measure of every arm: the mean of the seeds, with their range."""
    return [
        mean_row(
            f"store.gain.{measure}.{arm}",
            [float(seed[arm][measure]["value"]) for seed in seeds],
            str(seeds[0][arm][measure]["unit"]),
        )
        for arm in seeds[0]
        if all(measure in seed[arm] for seed in seeds)
    ]


def mean_row(name: str, values: list[float], unit: str) -> Row:
    """The mean over seeds with their range."""
    return Row(name, statistics.fmean(values), unit, min(values), max(values), len(values))


def describe(arguments: argparse.Namespace, seconds: float) -> dict[str, str]:
    """Where the numbers come from."""
    return {
        "task": f"SmolLM2-135M-Instruct, {len(LAYERS)} of 30 layers, news text, {arguments.steps} steps of 8 x 256",
        "arms": "hard labels; exact: hidden states, which give the dense forward KL; the others keep 16 tokens",
        "seeds": f"{arguments.seeds}; value: their mean, low .. high: their range; ratios are taken seed by seed",
        "versions": describe_versions(),
        "machine": describe_machine(),
        "minutes": f"{seconds / 60:.1f}, without what was finished before",
        "json": str(arguments.json),
    }


if __name__ == "__main__":
    main()
