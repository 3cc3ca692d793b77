"""The intent classifier on CLINC150: what two students keep of their teacher, how fast they are, how long it takes.

Runs the recipe `intent` once a seed. With --fewlabel: 10 labels a class, the rest unlabelled, with two teachers. One is
ready: the seed's own, fine-tuned on all labels, stands for a model or an API that others have trained; its gain has the
bar. The other is fine-tuned on the same 10 labels a class. With --peer: a sentence encoder cut to 2 layers, against the
layer reduction of sentence-transformers. Run again with the same --folder, what is finished is not done again. Refuses
to give minutes where a stage took over what another run has made.

    python bench/intent.py --json runs/bench/intent.json [--data data_full.json] [--fewlabel | --peer] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _intent_rows import Measured, claim_rows, fewlabel_rows, minutes_rows, read_run
from _intent_sides import compare
from _peer import peer_python
from _table import Row, describe_machine, describe_versions, print_rows, write_rows

from potstill.recipes import load_recipe
from potstill.recipes.schema import FinetuneTeacher

__all__ = ["main"]

POTSTILL = str(Path(sys.executable).with_name("potstill"))
MODEL = "sample:minilm-l6"
"""The recipe's model, hash-pinned: the same weights as on the hub."""

FEW, ALL = 10, 100
"""Labels a class that are kept, and that CLINC150 has."""

FEW_CHANGES = (f"data.labels_per_class={FEW}", "static=null", "evaluation.speed=false")


def main() -> None:
    """Run what is asked for, write the rows, print the table."""
    arguments = read_arguments()
    began = time.perf_counter()
    if arguments.peer:
        rows, facts = measure_peer(arguments)
    elif arguments.fewlabel:
        rows, facts = measure_fewlabel(arguments)
    else:
        rows, facts = measure_claims(arguments)
    write_rows(rows, arguments.json)
    spent = f"{(time.perf_counter() - began) / 60:.1f}, without what was finished before"
    print_rows("an intent classifier", rows, facts | describe(arguments) | {"minutes": spent})


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the recipe intent on CLINC150.")
    parser.add_argument("--json", type=Path, required=True, help="where the rows go")
    parser.add_argument("--data", type=Path, help="the data set's data_full.json; default: the Hugging Face hub")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/intent"), help="where the runs lie, and stay")
    parser.add_argument("--seeds", type=int, default=3, help="of first weights, order of texts, and evaluation")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--fewlabel", action="store_true", help="measure the gain where few texts have labels")
    part.add_argument("--peer", action="store_true", help="compare a sentence encoder with sentence-transformers")
    parser.add_argument(
        "--teachers",
        nargs="+",
        choices=("ready", "own"),
        default=("ready", "own"),
        help="whose students, with --fewlabel",
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs, with --peer")
    parser.add_argument("--peer-python", type=Path, help="interpreter with sentence-transformers, with --peer")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="KEY=VALUE, to try the bench itself"
    )
    return parser.parse_args()


def measure_claims(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """The whole recipe, seed by seed."""
    seeds: list[Measured] = []
    for seed in range(arguments.seeds):
        run = run_folder(arguments, seed)
        begin("run", run, seed, arguments)
        seeds.append(read_run(run))
    timed = minutes_rows(run_folder(arguments, 0))
    facts = {
        "task": "CLINC150: 150 intents; accuracy over the test queries that have one",
        "stages": "minutes of the first seed's" if timed else "no minutes: one took over what another run has made",
    }
    return claim_rows(seeds) + timed, facts


def measure_fewlabel(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Students of a ready teacher and of one that has seen as few labels, seed by seed."""
    found: dict[str, list[Measured]] = {"ready": [], "own": []}
    for seed in range(arguments.seeds):
        whole = run_folder(arguments, seed)
        begin("finetune", whole, seed, arguments)
        teachers = {"ready": ready_teacher(whole), "own": own_teacher(arguments)}
        for kind in arguments.teachers:
            teacher = teachers[kind]
            run = run_folder(arguments, seed, f"fewlabel-{kind}")
            begin("evaluate", run, seed, arguments, *FEW_CHANGES, *teacher)
            found[kind].append(read_run(run))
    facts = {
        "task": f"CLINC150 with {FEW} of {ALL} labels a class; control: equal steps on the labelled texts alone",
        "bar": "with a ready teacher, fine-tuned on all labels, as an API may be; it has seen the labels of those very "
        "texts that are unlabelled to the student",
        "own_teacher": f"fine-tuned on the same {FEW} labels a class, for as many steps as on all",
    }
    return fewlabel_rows(found["ready"], found["own"]), facts


def measure_peer(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Both sides on the same texts."""
    peer = arguments.peer_python or peer_python()
    teacher = f"teacher={{kind: local, model: {json.dumps(MODEL)}, dtype: fp32}}"
    changes = [teacher, *data_changes(arguments.data), *arguments.overrides]
    return compare(peer, changes, arguments.rounds)


def ready_teacher(whole: Path) -> Sequence[str]:
    """A teacher that is taken as it is: what the run of the whole recipe has fine-tuned on all labels."""
    model = json.dumps(str((whole / "finetune" / "teacher").resolve()))
    return [f"teacher={{kind: local, model: {model}, dtype: fp32}}"]


def own_teacher(arguments: argparse.Namespace) -> Sequence[str]:
    """The recipe's teacher, with as many steps on few labels as on all."""
    teacher = load_recipe("intent", arguments.overrides).teacher
    if not isinstance(teacher, FinetuneTeacher) or teacher.training.epochs is None:
        return []
    return [f"teacher.training.epochs={teacher.training.epochs * ALL / FEW:g}"]


def begin(until: str, run: Path, seed: int, arguments: argparse.Namespace, *more: str) -> None:
    """Do the stages of the recipe's run in that folder which are due."""
    given = (f"seed={seed}", f"run_dir={json.dumps(str(run))}", f"teacher.model={MODEL}")
    keys = [*given, *data_changes(arguments.data), *arguments.overrides, *more]
    print(f"seed {seed}: {run.name} ...", file=sys.stderr)
    changes = [part for change in keys for part in ("--set", change)]
    subprocess.run([POTSTILL, until, "intent", *changes], check=True)


def run_folder(arguments: argparse.Namespace, seed: int, name: str = "intent") -> Path:
    """Where a run lies; every seed has teachers and answers of its own."""
    folder: Path = arguments.folder / f"seed-{seed}" / name
    return folder


def data_changes(data: Path | None) -> Sequence[str]:
    """The recipe's data from a file that is here, with the columns text and label."""
    if data is None:
        return []
    return [f"data.source={json.dumps(str(data.resolve()))}", "data.config=null", "data.label=label"]


def describe(arguments: argparse.Namespace) -> dict[str, str]:
    """Where the numbers come from."""
    seeds = f"{arguments.seeds}; value: their mean, low .. high: its 95 % t-interval over seeds"
    return {
        "data": str(arguments.data or "the Hugging Face hub"),
        **({} if arguments.peer else {"seeds": seeds}),
        "versions": describe_versions(),
        "machine": describe_machine(),
        "json": str(arguments.json),
    }


if __name__ == "__main__":
    main()
