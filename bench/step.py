"""One whole training step with an online teacher: potstill against TRL's GKDTrainer on the same rows and models.

Both run in processes of their own, in turn (A B A B ...), so that a machine that slows down slows both. Our side is
potstill's train stage as users run it; the times are those of its metrics.jsonl. Its blocks are compiled where there is
a compiler, as `training.compile: auto` has it in trainings longer than a benchmark's; the peer runs as by default.
Refuses: to time loading, compilation, warm-up steps, validation and checkpoints, and to compare processes that have
different numbers of threads.

    python bench/step.py --json runs/bench/step.json [--peer-python PATH] [--steps 10] [--warmup 2] [--rounds 3]
    python bench/step.py --offline --json runs/bench/offline.json

With --offline there is no peer: the student learns from a store of what its teacher said (`sampled`, k = 16), in turn
with the control arm, which learns from hard labels, and with a student whose teacher sits beside it.

Tokens are positions that are learned from: of 8 x 256 ids TRL's rows have 255 each, potstill's packed rows one less for
every document that ends in them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _peer import peer_python
from _table import Row, describe_machine, describe_versions, print_rows, rounds_row, write_rows

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
POTSTILL = str(Path(sys.executable).with_name("potstill"))
BATCH_ROWS, SEQUENCE_LENGTH = 8, 256
KEEP = list(range(0, 30, 2))
PROFILED_STEPS = 4
PARTS = ("teacher", "student_forward", "loss", "backward", "optimizer")

RECIPE = (
    f"student={{kind: layers, keep: {KEEP}}}",
    f"data.sequence_length={SEQUENCE_LENGTH}",
    f"training.batch_rows={BATCH_ROWS}",
    "training.tokens=null",
    # No work that is not the step: the peer neither validates nor saves.
    "training.validate_every=1000000",
    "training.validation_rows=1",
    "training.checkpoint.every_minutes=null",
)
"""Changes to the quickstart recipe; its loss is forward KL at temperature 1, its precision bf16."""

STORED, ONLINE = "signals={kind: sampled, k: 16}", "signals={kind: online}"
SIDES = {"offline": ("stored", "train"), "hard": ("stored", "control"), "online": ("online", "train")}
"""Of --offline, by name: the run folder and the stage."""


def main() -> None:
    """Measure, write the rows, print the table; or, with --ours, be potstill's side."""
    arguments = read_arguments()
    if arguments.ours:
        run_ours(arguments.ours, arguments.steps + arguments.warmup, profiled=arguments.profile, stage=arguments.stage)
        return
    with tempfile.TemporaryDirectory(prefix="potstill-bench-") as folder:
        if arguments.offline:
            rows, facts = compare_offline(Path(folder), arguments)
        else:
            rows, facts = compare(Path(folder), arguments.peer_python or peer_python(), arguments)
    write_rows(rows, arguments.json)
    title = f"one training step with {'a stored' if arguments.offline else 'an online'} teacher"
    print_rows(title, rows, facts | {"json": str(arguments.json)})


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the training step with TRL's GKDTrainer.")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument(
        "--peer-python", type=Path, help="interpreter with TRL; default: bench/.venv-peers, made if needed"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs")
    parser.add_argument("--offline", action="store_true", help="compare a stored teacher with hard labels; no peer")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=("train", "control"), default="train", help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.ours and not arguments.json:
        parser.error("--json FILE is needed")
    return arguments


def compare(folder: Path, peer: Path, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Both sides in turn, then one more potstill run with a stopwatch on its parts."""
    run, rows_file = folder / "run", folder / "rows.npy"
    steps = arguments.steps + arguments.warmup
    begin("initialise", run, steps, ONLINE)
    learned = write_batches(run, rows_file, steps)
    counts = ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    ours_command = [sys.executable, str(HERE / "step.py"), "--ours", str(run)]
    peer_command = [str(peer), str(HERE / "trl_step.py"), "--rows-file", str(rows_file), *counts]
    peer_command += ["--teacher", sample_folder(), "--student", str(run / "initialise" / "student")]
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(measure(run, [*ours_command, *counts], arguments.warmup))
        theirs.append(measure(run, peer_command, 0))
    refuse_unequal_threads([*ours, *theirs])
    profile = measure(run, [*ours_command, "--profile", "--steps", str(PROFILED_STEPS), "--warmup", counts[-1]], 0)
    rows = ratio_rows(ours, theirs, learned) + share_rows(profile["parts"][arguments.warmup :])
    return rows, describe(theirs[0], arguments)


def compare_offline(folder: Path, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """The sides in turn: all are potstill's stages, on the same rows, with the same student and compilation."""
    steps = arguments.steps + arguments.warmup
    begin("capture", folder / "stored", steps, STORED)
    begin("initialise", folder / "online", steps, ONLINE)
    counts = ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup)]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, (name, stage) in SIDES.items():
            command = [sys.executable, str(HERE / "step.py"), "--ours", str(folder / name), "--stage", stage]
            found[side].append(measure(folder / name, [*command, *counts], arguments.warmup, stage=stage))
    refuse_unequal_threads([result for results in found.values() for result in results])
    facts = {
        "task": f"{BATCH_ROWS} x {SEQUENCE_LENGTH} tokens, 15-layer student, bf16; forward KL to a 30-layer teacher, "
        "stored as 16 sampled tokens a position or online, and hard labels",
        "versions": describe_versions(),
        "compiled": f"the blocks of all sides: {compiles()}",
        "machine": f"{describe_machine()}, {found['hard'][0]['threads']} threads",
        "rounds": f"{arguments.rounds} of {arguments.steps} steps after {arguments.warmup}; low .. high over rounds",
    }
    return offline_rows(found), facts


def offline_rows(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Medians of the rounds with their ranges; ratios are taken round by round."""
    seconds = {side: [statistics.median(result["step_s"]) for result in results] for side, results in found.items()}
    peaks = {side: [float(result["peak_bytes"]) for result in results] for side, results in found.items()}

    def ratio(name: str, values: dict[str, list[float]], over: str) -> Row:
        return rounds_row(name, [a / b for a, b in zip(values["offline"], values[over], strict=True)], "x")

    return [
        ratio("step.offline_vs_hard", seconds, "hard"),
        ratio("step.offline_vs_online", seconds, "online"),
        ratio("step.offline_memory_vs_hard", peaks, "hard"),
        ratio("step.offline_memory_vs_online", peaks, "online"),
        *(rounds_row(f"step.seconds.{side}", values, "s") for side, values in seconds.items()),
        *(rounds_row(f"step.peak_bytes.{side}", values, "bytes") for side, values in peaks.items()),
    ]


def begin(until: str, run: Path, steps: int, *more: str) -> None:
    """Do the stages before the training, of a recipe of so many steps in that run folder."""
    run_keys = (f"training.steps={steps}", f"training.compile={compiles()}", f"run_dir={json.dumps(str(run))}")
    changes = [part for change in (*RECIPE, *run_keys, *more) for part in ("--set", change)]
    subprocess.run([POTSTILL, until, "quickstart", *changes], check=True)


def compiles() -> str:
    """`true` where a compiler is, as YAML."""
    import torch

    from potstill.losses import can_compile

    return str(can_compile("cuda" if torch.cuda.is_available() else "cpu")).lower()


def sample_folder() -> str:
    """The teacher's folder, fetched already."""
    command = [POTSTILL, "samples", "fetch", "smollm2-135m-instruct"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_batches(run: Path, rows_file: Path, steps: int) -> dict[str, float]:
    """Save the rows that potstill will draw, for the peer; returns each side's learned positions a step."""
    import numpy as np

    from potstill.data import PackedRows
    from potstill.recipes import load_recipe
    from potstill.training import RowSource

    recipe = load_recipe(run / "recipe.yaml")
    rows = PackedRows(run / "prepare" / "train")
    source = RowSource(rows, seed=recipe.seed, batch_rows=BATCH_ROWS, rows_at_once=BATCH_ROWS)
    batches = [source.draw()[0] for _ in range(steps)]
    np.save(rows_file, np.concatenate([batch.ids_BT.numpy() for batch in batches]))
    ours = statistics.mean(int(batch.supervised_BT.sum()) for batch in batches)
    return {"ours": ours, "trl": float(BATCH_ROWS * (SEQUENCE_LENGTH - 1))}


def measure(run: Path, command: Sequence[str], skip: int, *, stage: str = "train") -> dict[str, Any]:
    """Run one side in a fresh process and read its line; the first `skip` step times are left out."""
    shutil.rmtree(run / stage, ignore_errors=True)
    print(f"running {Path(command[1]).name} ...", file=sys.stderr)
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{finished.stderr[-4000:]}\n{Path(command[1]).name} failed; its last words are above")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result | {"step_s": result["step_s"][skip:]}


def refuse_unequal_threads(results: Sequence[dict[str, Any]]) -> None:
    """Both sides must have had the same cores."""
    threads = {result["threads"] for result in results}
    if len(threads) > 1:
        raise SystemExit(f"the processes used different numbers of threads ({sorted(threads)}): set OMP_NUM_THREADS")


def ratio_rows(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], learned: dict[str, float]
) -> list[Row]:
    """Medians of the rounds with their ranges; ratios are taken round by round."""
    rates = [
        [learned[side] / statistics.median(r["step_s"]) for r in rs] for side, rs in (("ours", ours), ("trl", theirs))
    ]
    seconds = [[statistics.median(r["step_s"]) for r in rs] for rs in (ours, theirs)]
    peaks = [[float(r["peak_bytes"]) for r in rs] for rs in (ours, theirs)]
    return [
        rounds_row("step.speed_vs_trl", [a / b for a, b in zip(*rates, strict=True)], "x"),
        rounds_row("step.memory_vs_trl", [a / b for a, b in zip(*peaks, strict=True)], "x"),
        *(
            rounds_row(f"step.tokens_per_s.{side}", values, "tokens/s")
            for side, values in zip(learned, rates, strict=True)
        ),
        *(rounds_row(f"step.seconds.{side}", values, "s") for side, values in zip(learned, seconds, strict=True)),
        *(rounds_row(f"step.peak_bytes.{side}", values, "bytes") for side, values in zip(learned, peaks, strict=True)),
    ]


def share_rows(steps: Sequence[dict[str, float]]) -> list[Row]:
    """Share of the step's time that each part takes. The loss takes the head's gradient within its forward pass."""
    shares = {part: [step.get(part, 0.0) / step["step"] for step in steps] for part in PARTS}
    shares["other"] = [1.0 - sum(values) for values in zip(*shares.values(), strict=True)]
    return [rounds_row(f"step.share.{part}", values, "share") for part, values in shares.items()]


def describe(peer: dict[str, Any], arguments: argparse.Namespace) -> dict[str, str]:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in peer["versions"].items())
    return {
        "task": f"forward KL, {BATCH_ROWS} x {SEQUENCE_LENGTH} tokens, 30-layer teacher, 15-layer student, bf16",
        "peer": f"TRL GKDTrainer, lmbda=0, beta=0 ({versions})",
        "versions": describe_versions(),
        "compiled": f"potstill's blocks: {compiles()}; the peer's: false, its default",
        "machine": f"{describe_machine()}, {peer['threads']} threads",
        "rounds": f"{arguments.rounds} of {arguments.steps} steps after {arguments.warmup}; low .. high over rounds",
    }


def run_ours(run: Path, steps: int, *, profiled: bool, stage: str) -> None:
    """Our side: the stage train or control of a run whose earlier stages are done. Prints one JSON line."""
    import torch

    from potstill.pipeline.metrics import read_metrics
    from potstill.pipeline.run import run_recipe
    from potstill.recipes import load_recipe

    parts = watch_parts() if profiled else []
    recipe = load_recipe(run / "recipe.yaml", [f"training.steps={steps}"])
    with contextlib.redirect_stdout(sys.stderr):
        run_recipe(recipe, until=stage)
    clock = [0.0, *(line["seconds"] for line in read_metrics(run / stage / "metrics.jsonl"))]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "step_s": [after - before for before, after in itertools.pairwise(clock)],
        "peak_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "threads": torch.get_num_threads(),
        "parts": parts,
    }
    print(json.dumps(result))


def watch_parts() -> list[dict[str, float]]:
    """Put a stopwatch on the parts of the step. Returns the list that grows by {part: seconds} with every step."""
    import torch
    from accelerate import Accelerator

    from potstill.engines import LocalEngine, TrainableCausal
    from potstill.losses import Objective
    from potstill.training import loop

    finished: list[dict[str, float]] = []
    under_way: list[dict[str, float]] = []

    def timed(part: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = plain(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if under_way:  # validation and reading before the first step are not the step
                under_way[-1][part] += time.perf_counter() - began
            return result

        return run

    def step(*args: Any) -> Any:
        under_way.append(defaultdict(float))
        result = timed("step", take_step)(*args)
        finished.append(under_way.pop())
        return result

    take_step = loop._take_step
    loop._take_step = step  # type: ignore[assignment]
    places: list[tuple[Any, str]] = [(LocalEngine, "read"), (TrainableCausal, "forward"), (Objective, "forward")]
    places += [(Accelerator, "backward"), (torch.optim.AdamW, "step")]
    for part, (owner, name) in zip(PARTS, places, strict=True):
        setattr(owner, name, timed(part, getattr(owner, name)))
    return finished


if __name__ == "__main__":
    main()
