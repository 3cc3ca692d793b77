"""A sentence encoder cut to 2 layers: potstill's run and the peer's script, in turn, and one judge for both students.

Each side makes a student of the same layers of the same teacher, on the same texts, with as many steps of as many
texts, from loading the teacher to a saved student. Refuses to compare runs of unequal steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _table import Row, rounds_row

__all__ = ["compare", "side_rows"]

POTSTILL = str(Path(sys.executable).with_name("potstill"))
PEER = Path(__file__).resolve().with_name("_intent_peer.py")
LAYERS, BATCH_TEXTS, LEARNING_RATE, LENGTH = [1, 4], 64, 1e-4, 64

RECIPE = (
    "task={kind: embedding, pooling: mean, normalise: true}",
    f"student={{kind: layers, keep: {LAYERS}}}",
    "losses=[{kind: vector_mse}]",
    "signals={kind: dense}",
    "static=null",
    f"data.sequence_length={LENGTH}",
    f"training={{epochs: 1, batch_rows: {BATCH_TEXTS}, learning_rate: {LEARNING_RATE}, weight_decay: 0.0, "
    "betas: [0.9, 0.999], schedule: {kind: linear, warmup: 0.1}, precision: fp32, "
    # Batches drawn at random, as the peer draws them; in parts of like length, which changes no gradient.
    "group_by_length: false, micro_batch_rows: 32, "
    # A student that copies vectors needs no dropout: of what it would hide, nothing is to be learned.
    "dropout: 0.0, "
    # No work that is not the step: the peer neither validates nor saves on the way.
    "validate_every: 1000000, validation_rows: 1, checkpoint: {every_minutes: null}}",
)
"""Changes to the recipe `intent`: what the peer's script has as its settings."""

STAGES = ("initialise", "capture", "train")
"""Of potstill's run: from loading the teacher to a saved student."""


def compare(peer: Path, changes: Sequence[str], rounds: int) -> tuple[list[Row], dict[str, str]]:
    """Both sides in turn, each in fresh processes; then the judge, round by round."""
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    agreement: dict[str, list[float]] = {"ours": [], "peer": []}
    told: dict[str, Any] = {}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="potstill-bench-") as name:
            folder = Path(name)
            spent, steps = run_ours(folder / "run", [*RECIPE, *changes, f"seed={number}"])
            teacher = write_texts(folder)
            told = ask(peer, "--train", folder, steps, number, teacher=teacher)
            judged = ask(peer, "--judge", folder, steps, number, teacher=teacher)
        seconds["ours"].append(spent)
        seconds["peer"].append(told["seconds"])
        for side, values in agreement.items():
            values.append(judged[side])
    return side_rows(seconds, agreement), describe(told, rounds)


def side_rows(seconds: dict[str, list[float]], agreement: dict[str, list[float]]) -> list[Row]:
    """Medians of the rounds with their ranges; ratios, ours over the peer's, are taken round by round."""

    def ratios(values: dict[str, list[float]]) -> list[float]:
        return [ours / peer for ours, peer in zip(values["ours"], values["peer"], strict=True)]

    return [
        rounds_row("intent.time_vs_peer", ratios(seconds), "x"),
        rounds_row("intent.quality_vs_peer", ratios(agreement), "x"),
        *(rounds_row(f"intent.peer.seconds.{side}", values, "s") for side, values in seconds.items()),
        *(rounds_row(f"intent.peer.spearman.{side}", values, "rho") for side, values in agreement.items()),
    ]


def run_ours(run: Path, changes: Sequence[str]) -> tuple[float, int]:
    """Our side up to the student: seconds of the stages, and the steps of the training."""
    print("running potstill ...", file=sys.stderr)
    keys = [part for change in (*changes, f"run_dir={json.dumps(str(run))}") for part in ("--set", change)]
    subprocess.run([POTSTILL, "train", "intent", *keys], check=True)
    manifests = [json.loads((run / stage / "manifest.json").read_text(encoding="utf-8")) for stage in STAGES]
    return sum(one["wall_s"] for one in manifests), int(manifests[-1]["facts"]["steps"])


def write_texts(folder: Path) -> str:
    """Give the peer the texts of our run, to learn from and to be judged by; returns the teacher's folder or id."""
    from potstill.data import read_texts
    from potstill.pipeline.places import resolve_model
    from potstill.recipes import load_recipe
    from potstill.recipes.schema import LocalTeacher

    for split in ("train", "test"):
        texts = [text.text for text in read_texts(folder / "run" / "prepare" / f"{split}.jsonl")]
        (folder / f"{split}.json").write_text(json.dumps(texts), encoding="utf-8")
    teacher = load_recipe(folder / "run" / "recipe.yaml").teacher
    if not isinstance(teacher, LocalTeacher):
        raise SystemExit(f"teacher.kind={teacher.kind}: the peer needs a model that is here; use local")
    return str(resolve_model(teacher.model, "teacher.model"))


def ask(peer: Path, task: str, folder: Path, steps: int, seed: int, *, teacher: str) -> dict[str, Any]:
    """Run the peer's program and read its line. Exits where it fails, or took another number of steps."""
    print(f"running {PEER.name} {task} ...", file=sys.stderr)
    counts = {"--steps": steps, "--seed": seed, "--batch-texts": BATCH_TEXTS, "--length": LENGTH}
    options = [str(part) for option in counts.items() for part in option]
    options += ["--learning-rate", str(LEARNING_RATE), "--layers", *map(str, LAYERS)]
    command = [str(peer), str(PEER), task, "--folder", str(folder), "--teacher", teacher, *options]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{finished.stderr[-4000:]}\n{PEER.name} failed; its last words are above")
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    if answer.get("steps", steps) != steps:
        raise SystemExit(f"the peer took {answer['steps']} steps, and potstill {steps}: they cannot be compared")
    return answer


def describe(told: dict[str, Any], rounds: int) -> dict[str, str]:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return {
        "task": f"MiniLM-L6 to its layers {LAYERS}, mean squared error of vectors, CLINC150 queries, one epoch of "
        f"{told['steps']} steps of {BATCH_TEXTS}, AdamW at {LEARNING_RATE:g}, fp32",
        "peer": f"sentence-transformers' layer reduction ({versions}), {told['threads']} threads",
        "time": "from loading the teacher to a saved student, the teacher's vectors included",
        "quality": "Spearman's rho of students' and teacher's cosines between 20,000 random pairs of test queries",
        "rounds": f"{rounds}; low .. high over rounds; ratios are taken round by round",
    }
