"""A student, a teacher and rows that are made in a moment, and trainings of them.

Run as a script, this file trains in a process of its own: one to be killed, or one of several ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from potstill.losses import HeadLoss, HeadTerm, HiddenLoss, Objective, Schedule
from potstill.training import Callbacks, CheckpointStore, Plan, RowSource, Training, learning_rate_factor, train
from potstill.types import IGNORE, Batch, Head, Lesson, Signal, States, StudentView, Wants

VOCABULARY, LENGTH, ROWS = 32, 12, 22
NOTHING = Wants()


class TinyStudent(nn.Module):
    """Two residual blocks of width `width` with biases, norms, dropout and a head with bias."""

    def __init__(self, width: int = 16, dropout: float = 0.0, precision: str = "fp32", seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
            self.head = nn.Linear(width, VOCABULARY)
        self.dropout, self.precision = nn.Dropout(dropout), precision

    def states(self, batch: Batch) -> list[Tensor]:
        states = [self.embed(batch.ids_BT)]
        for norm, block in zip(self.norms, self.blocks, strict=True):
            states.append(states[-1] + self.dropout(torch.tanh(block(norm(states[-1])))))
        return states

    def forward(self, batch: Batch, wants: Wants = NOTHING) -> StudentView:
        low = self.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            states = self.states(batch)
        final_ND = states[-1][batch.spoken_BT]
        head = Head(self.head.weight, self.head.bias)
        return StudentView(final_ND.bfloat16() if low else final_ND, head, {i: states[i] for i in wants.layers})


class TinyTeacher:
    """A wider `TinyStudent` that only reads. Counts how often it was asked."""

    def __init__(self) -> None:
        self.model, self.asked = TinyStudent(width=24, seed=1).eval().requires_grad_(False), 0

    @torch.inference_mode()
    def read(self, batch: Batch, wants: Wants) -> Signal:
        self.asked += 1
        states = self.model.states(batch)
        head = Head(self.model.head.weight, self.model.head.bias)
        said_BT = batch.supervised_BT if batch.taught_BT is None else batch.taught_BT
        return Signal(States(states[-1][said_BT], head), {layer: states[layer] for layer in wants.layers})


class TinyRows:
    """Rows whose supervised counts differ from 0 to all; row i holds the documents `doc-i-a` and `doc-i-b`."""

    def __init__(self, count: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
        self.targets = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
        for row in range(count):
            self.targets[row, row % (LENGTH + 1) :] = IGNORE
        self.segments = torch.ones_like(self.ids)
        self.segments[:, LENGTH // 2 :] = 2

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, row_numbers: Sequence[int]) -> Batch:
        rows = list(row_numbers)
        names = tuple((f"doc-{row}-a", f"doc-{row}-b") for row in rows)
        return Batch(self.ids[rows], self.targets[rows], self.segments[rows], names)


def make_objective(
    projections: bool = True, schedules: dict[str, Schedule] | None = None, *, apart: bool = False
) -> Objective:
    """`apart` where the teacher speaks at other positions than the supervised ones."""
    terms = [HeadTerm("forward_kl", temperature=2.0), HeadTerm("cross_entropy", 0.5)]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        heads = [HeadLoss(own, VOCABULARY) for own in ([terms[:1], terms[1:]] if apart else [terms])]
        hidden = [HiddenLoss("hidden_mse", {1: 1, 2: 2}, (16, 24), 0.3)] if projections else []
        return Objective([*heads, *hidden], schedules)


def make_plan(steps: int, **changes: Any) -> Plan:
    def rate(step: int) -> float:
        return 0.02 * learning_rate_factor(step, max(steps, 20), "cosine", warmup=0.2)

    return Plan(**{"steps": steps, "rate": rate, "checkpoint_seconds": None} | changes)


def make_training(**changes: Any) -> Training:
    """Eight rows a step, four at once, an online teacher whose hidden states are wider."""
    settings: dict[str, Any] = {
        "precision": "fp32",
        "dropout": 0.0,
        "batch_rows": 8,
        "rows_at_once": 4,
        "teacher": TinyTeacher(),
        "validation": (),
        "examiner": None,
        "projections": True,
        "schedules": None,
        "order": None,
        "prepare": None,
    } | changes
    accelerator = Accelerator(cpu=True)
    source = RowSource(
        TinyRows(),
        seed=3,
        batch_rows=settings["batch_rows"],
        rows_at_once=settings["rows_at_once"],
        teacher=settings["teacher"],
        wants=Wants(final=True, layers=(1, 2)),
        order=settings["order"],
        prepare=settings["prepare"],
        rank=(accelerator.process_index, accelerator.num_processes),
    )
    student = TinyStudent(dropout=settings["dropout"], precision=settings["precision"]).train()
    objective = make_objective(settings["projections"], settings["schedules"], apart=settings["prepare"] is not None)
    return Training(student, objective, source, accelerator, settings["validation"], settings["examiner"])


def learned(training: Training) -> dict[str, Tensor]:
    """Copies of all that was learned: the student's weights and the objective's."""
    state = {f"student.{name}": value for name, value in training.student.state_dict().items()}
    state |= {f"objective.{name}": value for name, value in training.objective.state_dict().items()}
    return {name: value.clone() for name, value in state.items()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost such small products more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Kit:
    """What the tests build with; a fixture, since test modules cannot import each other."""

    script = Path(__file__)
    rows, student, teacher = TinyRows, TinyStudent, TinyTeacher
    objective, plan, training = staticmethod(make_objective), staticmethod(make_plan), staticmethod(make_training)
    learned = staticmethod(learned)

    @staticmethod
    def lessons(count: int = 3) -> list[Lesson]:
        teacher, rows = TinyTeacher(), TinyRows()
        batches = [rows.batch([2 * i + 5, 2 * i + 6]) for i in range(count)]
        return [Lesson(batch, teacher.read(batch, Wants(final=True))) for batch in batches]


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """Train with fresh objects in a folder of checkpoints; gives what was learned."""

    def start(steps: int, folder: str = "checkpoints", *, plan: Any = None, callbacks: Any = None, **changes: Any):
        torch.manual_seed(11)
        training = make_training(**changes)
        train(training, make_plan(steps, **(plan or {})), CheckpointStore(tmp_path / folder), callbacks)
        return learned(training)

    return start


def main(folder: Path, steps: int, precision: str) -> None:
    """Train to the end with a checkpoint each step, telling every step, and leave what was learned in `final.pt`."""
    torch.manual_seed(11)
    training = make_training(precision=precision, dropout=0.2 if precision == "bf16" else 0.0)
    store = CheckpointStore(folder / "checkpoints")
    log = Callbacks(log=lambda line: sys.stdout.write(f"step {line['step']} loss {line['loss']!r}\n"))
    train(training, make_plan(steps, checkpoint_steps=1), store, log)
    if training.accelerator.is_main_process:
        torch.save(learned(training), folder / "final.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.reconfigure(line_buffering=True)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
