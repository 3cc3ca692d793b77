"""DistilBERT's ablation at the scale of the sample: the full loss, and what each part of the rule is worth.

For every seed, students of the recipe `distilbert-sample` learn general language from the same teacher, in the same
steps, with the full loss, without one of its terms, or from random weights. Each is asked what the same masks hide in
held-out text, and then fine-tuned on question types with hard labels, as a probe. Run again with the same --folder,
what is finished is not done again. Refuses to compare students of different seeds: differences are taken seed by seed.

    python bench/distilbert.py --json runs/bench/distilbert.json [--folder runs/bench/distilbert] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from _table import Row, describe_machine, describe_versions, print_rows, seeds_row, write_rows

from potstill.pipeline.chain import phases_of, student_folder
from potstill.recipes import Recipe, dump_recipe, load_recipe
from potstill.recipes.losses import CrossEntropy
from potstill.recipes.schema import Control, OnlineSignals, PretrainedStudent

__all__ = ["main"]

POTSTILL = str(Path(sys.executable).with_name("potstill"))
RECIPE = "distilbert-sample"
FULL, RANDOM = "full", "random_start"

WITHOUT = {"no_kd": "forward_kl", "no_cosine": "hidden_cosine", "no_mlm": "cross_entropy"}
"""Arms, and the term that each lacks."""

ARMS = (FULL, *WITHOUT, RANDOM)

Found = Mapping[str, Mapping[str, float]]
"""Of one seed: by what was measured (nll, probe), the value of every arm."""


def main() -> None:
    """Train, measure and probe every arm of every seed, write the rows, print the table."""
    arguments = read_arguments()
    began = time.perf_counter()
    rows = ablation_rows([run_seed(seed, arguments) for seed in range(arguments.seeds)])
    write_rows(rows, arguments.json)
    print_rows("DistilBERT's ablation", rows, describe(arguments, time.perf_counter() - began))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run DistilBERT's ablation on the samples.")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/distilbert"), help="where the runs lie")
    parser.add_argument("--seeds", type=int, default=3, help="of data split, order of rows, masks, random weights")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="KEY=VALUE, to try the bench itself"
    )
    return parser.parse_args()


def run_seed(seed: int, arguments: argparse.Namespace) -> Found:
    """Every arm of one seed; what was finished before is not done again."""
    recipe = load_recipe(RECIPE, [*arguments.overrides, f"seed={seed}"])
    folder = (arguments.folder / f"seed-{seed}").resolve()
    found: dict[str, dict[str, float]] = {"nll": {}, "probe": {}}
    for arm in ARMS:
        print(f"seed {seed}: {arm} ...", file=sys.stderr)
        general = general_recipe(recipe, arm, folder)
        if arm == RANDOM:
            draw_weights(folder / FULL / "initialise" / "student", folder / "random", seed)
        evaluate(general)
        probe = probe_recipe(recipe, arm, student_folder(general))
        evaluate(probe)
        found["nll"][arm] = read_value(general, "student", "nll")
        found["probe"][arm] = read_value(probe, "student", "accuracy")
        for role in ("teacher", "untrained") if arm == FULL else ():
            found["nll"][role] = read_value(general, role, "nll")
            found["probe"][role] = read_value(probe, role, "accuracy")
    return found


def general_recipe(recipe: Recipe, arm: str, folder: Path) -> Recipe:
    """The recipe's first phase as a recipe of its own, changed as the arm says."""
    general = phases_of(recipe)[0]
    change = {
        "name": arm,
        "run_dir": folder / arm,
        "losses": [term for term in general.losses if term.kind != WITHOUT.get(arm)],
        "control": Control(enabled=False),
        "evaluation": general.evaluation.model_copy(update={"speed": False}),
    }
    if arm == RANDOM:
        change["student"] = PretrainedStudent(kind="model", model=str(folder / "random"))
    return general.model_copy(update=change)


def probe_recipe(recipe: Recipe, arm: str, student: Path) -> Recipe:
    """The recipe's task, learned by that student from hard labels alone; the teacher is there to compare with."""
    change = {
        "name": f"{arm}-probe",
        "run_dir": student.parents[2] / f"{arm}-probe",
        "phases": [],
        "student": PretrainedStudent(kind="model", model=str(student)),
        "losses": [CrossEntropy(kind="cross_entropy")],
        "signals": OnlineSignals(kind="online"),
        "control": Control(enabled=False),
        "evaluation": recipe.evaluation.model_copy(update={"speed": False}),
    }
    return recipe.model_copy(update=change)


def draw_weights(like: Path, folder: Path, seed: int) -> None:
    """A student as that one, with random weights. A folder that is whole stays: its files tell runs who began."""
    if (folder / "config.json").is_file():
        return
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    from potstill.students import fresh_model, save_student

    model = fresh_model(AutoConfig.from_pretrained(like), {}, seed, kind=AutoModelForMaskedLM)
    save_student(model, AutoTokenizer.from_pretrained(like), folder)


def evaluate(recipe: Recipe) -> None:
    """Run a recipe up to its evaluation, in a process of its own."""
    file = recipe.folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    subprocess.run([POTSTILL, "evaluate", str(file)], check=True)


def read_value(recipe: Recipe, arm: str, name: str) -> float:
    """What a run measured over its test split."""
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text(encoding="utf-8"))
    return float(next(r["value"] for r in rows if (r["arm"], r["name"], r["slice"]) == (arm, name, "test")))


def ablation_rows(seeds: Sequence[Found]) -> list[Row]:
    """What an arm loses against the full loss, seed by seed; then every arm for itself. All with t-intervals."""
    losses = [
        seeds_row(f"distilbert.nll_above_full.{arm}", [s["nll"][arm] - s["nll"][FULL] for s in seeds], "nats")
        for arm in ARMS[1:]
    ]
    probes = [
        seeds_row(f"distilbert.probe_below_full.{arm}", [s["probe"][FULL] - s["probe"][arm] for s in seeds], "share")
        for arm in ARMS[1:]
    ]
    units = {"nll": "nats", "probe": "share"}
    each = [
        seeds_row(f"distilbert.{name}.{arm}", [seed[name][arm] for seed in seeds], unit)
        for name, unit in units.items()
        for arm in seeds[0][name]
    ]
    return [*losses, *probes, *each]


def describe(arguments: argparse.Namespace, seconds: float) -> dict[str, str]:
    """Where the numbers come from."""
    return {
        "task": "MiniLM-L6, trained here as a masked language model, into 3 of its 6 layers, news text",
        "nll": "of the tokens that masks hide in held-out text, a token; the same masks for every arm",
        "probe": "accuracy on held-out questions after fine-tuning on hard labels; untrained: the full arm's student "
        "before that",
        "seeds": f"{arguments.seeds}; value: their mean, low .. high: its 95 % t-interval; differences seed by seed",
        "versions": describe_versions(),
        "machine": describe_machine(),
        "minutes": f"{seconds / 60:.1f}, without what was finished before",
        "json": str(arguments.json),
    }


if __name__ == "__main__":
    main()
