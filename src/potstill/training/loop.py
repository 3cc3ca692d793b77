"""The loop: draw lessons, sum losses, divide once, step. The same for every source and every arm.

Refuses to take a step whose loss or gradient is not finite: it stops before the weights are touched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from potstill.errors import Interrupted, NonFiniteError
from potstill.training.checkpoint import CheckpointStore, random_state, restore_random_state
from potstill.types import Batch, Lesson, LessonSource, StudentView

__all__ = ["Callbacks", "Objective", "Plan", "Training", "train"]


class Objective(Protocol):
    """What the loop asks of a recipe's losses; `losses.Objective` is one."""

    def layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Hidden layers to read: the student's, the teacher's."""
        ...

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Positions each loss sums over, [losses]."""
        ...

    def __call__(self, view: StudentView, lesson: Lesson, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A lesson's share of the step's loss and of every term."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the losses learn themselves."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers of a training. Rates and shares as in the recipe; `rate(step)` is the learning rate itself."""

    steps: int
    rate: Callable[[int], float]
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    validate_every: int = 0
    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = 300.0


@dataclass(frozen=True, slots=True)
class Callbacks:
    """The loop's only ways out: a line of metrics after a step, and the question whether to stop now."""

    log: Callable[[dict[str, Any]], None] = lambda line: None
    stopping: Callable[[], bool] = lambda: False
    rewind: Callable[[int], None] = lambda step: None


@dataclass(slots=True)
class Training:
    """All that changes while training. `step` counts finished optimiser steps.

    `examiner` is the objective of the validation lessons, the same for every arm, so that their curves compare.
    """

    student: nn.Module
    objective: Objective
    source: LessonSource
    accelerator: Accelerator
    validation: Sequence[Lesson] = ()
    examiner: Objective | None = None
    step: int = 0
    seconds: float = 0.0
    positions: int = 0


def train(training: Training, plan: Plan, store: CheckpointStore, callbacks: Callbacks | None = None) -> None:
    """Train to the plan's last step, from the newest whole checkpoint in `store` if there is one.

    Continuing is exact: weights, optimiser, source and random numbers go on as if nothing had happened. Raises Interrupted
    after saving when `callbacks.stopping()` turns true, NonFiniteError (naming the examples) before a bad step is taken,
    CheckpointError when checkpoints exist but none is whole.
    """
    callbacks = callbacks or Callbacks()
    optimizer = _optimizer(training, plan)
    student, optimizer = training.accelerator.prepare(training.student, optimizer)
    _resume(training, optimizer, store)
    callbacks.rewind(training.step)
    saved_at = began = time.monotonic()
    before = training.seconds
    while training.step < plan.steps:
        line = _take_step(training, plan, student, optimizer)
        training.seconds = before + time.monotonic() - began
        if (
            training.validation
            and plan.validate_every
            and (training.step % plan.validate_every == 0 or training.step == plan.steps)
        ):
            line |= _validate(training, student)
        callbacks.log(line | {"seconds": training.seconds})
        if callbacks.stopping() and training.step < plan.steps:
            _save(training, optimizer, store)
            raise Interrupted(f"stopped after step {training.step} of {plan.steps}; run the same command to continue.")
        if _due(plan, training.step, time.monotonic() - saved_at):
            _save(training, optimizer, store)
            saved_at = time.monotonic()
    training.accelerator.wait_for_everyone()


def _take_step(training: Training, plan: Plan, student: nn.Module, optimizer: Any) -> dict[str, Any]:
    """One optimiser step over the source's next micro-batches; returns its line of metrics."""
    accelerator = training.accelerator
    batches = [batch.to(accelerator.device) for batch in training.source.draw()]
    counts = accelerator.reduce(training.objective.counts(batches).to(accelerator.device), "sum")
    rate = plan.rate(training.step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    layers = training.objective.layers()[0]
    loss, terms = torch.zeros((), device=accelerator.device), {}
    for index, batch in enumerate(batches):
        with accelerator.no_sync(student) if index + 1 < len(batches) else nullcontext():
            share, parts = training.objective(student(batch, layers), training.source.lesson(batch), counts)
            # Data parallelism averages gradients over processes; the count is already global, so undo the average.
            accelerator.backward(share * accelerator.num_processes)
        loss += share.detach()
        terms = {name: terms.get(name, 0.0) + value for name, value in parts.items()}
    norm = _clip(training, plan)
    _refuse_nonfinite(training.step + 1, {"loss": float(loss), "gradient norm": norm}, batches)
    optimizer.step()
    optimizer.zero_grad()
    training.step += 1
    training.positions += sum(batch.ids_BT.numel() for batch in batches) * accelerator.num_processes
    return {
        "step": training.step,
        "tokens": training.positions,
        "loss": _total(accelerator, loss),
        **{name: _total(accelerator, value) for name, value in terms.items()},
        "gradient_norm": norm,
        "learning_rate": rate,
    }


def _clip(training: Training, plan: Plan) -> float:
    """Clip the global gradient norm (or only measure it) and return what it was."""
    learned = list(training.objective.parameters())
    for parameter in learned:
        if parameter.grad is not None and training.accelerator.num_processes > 1:
            # The student's gradients were averaged by its wrapper; what the losses learn has none.
            parameter.grad = training.accelerator.reduce(parameter.grad, "mean")
    parameters = [*training.student.parameters(), *learned]
    largest = math.inf if plan.clip_norm is None else plan.clip_norm
    return float(nn.utils.clip_grad_norm_(parameters, largest))


def _refuse_nonfinite(step: int, numbers: Mapping[str, float], batches: Sequence[Batch]) -> None:
    bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
    if bad:
        ids = list(dict.fromkeys(name for batch in batches for row in batch.examples for name in row))
        more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
        raise NonFiniteError(
            f"training: {', '.join(f'{name} is {value}' for name, value in bad.items())} in step {step}, before any weight "
            f"was changed. The batch's examples: {', '.join(ids[:20])}{more}. Look at these, or lower "
            "training.learning_rate; the last good checkpoint is kept."
        )


@torch.no_grad()
def _validate(training: Training, student: nn.Module) -> dict[str, float]:
    """The examiner's terms on the held-out lessons, by name with `validation_` in front."""
    examiner = training.examiner or training.objective
    counts = examiner.counts([lesson.batch for lesson in training.validation])
    terms: dict[str, float] = {}
    student.eval()
    for lesson in training.validation:
        view = student(lesson.batch.to(training.accelerator.device), examiner.layers()[0])
        for name, value in examiner(view, lesson, counts)[1].items():
            terms[name] = terms.get(name, 0.0) + float(value)
    student.train()
    return {f"validation_{name}": value for name, value in terms.items()}


def _optimizer(training: Training, plan: Plan) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101); matrices decay, norms and biases do not."""
    parameters = [p for p in (*training.student.parameters(), *training.objective.parameters()) if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.rate(0), betas=plan.betas, eps=plan.eps, fused=True)


def _due(plan: Plan, step: int, since_save: float) -> bool:
    by_steps = plan.checkpoint_steps is not None and step % plan.checkpoint_steps == 0
    by_time = plan.checkpoint_seconds is not None and since_save >= plan.checkpoint_seconds
    return step < plan.steps and (by_steps or by_time)


def _save(training: Training, optimizer: Any, store: CheckpointStore) -> None:
    state = {
        "student": training.student.state_dict(),
        "objective": training.objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "source": training.source.state_dict(),
        "random": random_state(),
        "progress": {"step": training.step, "seconds": training.seconds, "positions": training.positions},
    }
    if training.accelerator.is_main_process:
        store.save(training.step, state)
    training.accelerator.wait_for_everyone()


def _resume(training: Training, optimizer: Any, store: CheckpointStore) -> None:
    found = store.load_newest()
    if found is None:
        return
    _, state = found
    training.student.load_state_dict(state["student"])
    training.objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    training.source.load_state_dict(state["source"])
    restore_random_state(state["random"])
    for name, value in state["progress"].items():
        setattr(training, name, value)


def _total(accelerator: Accelerator, value: Tensor) -> float:
    return float(accelerator.reduce(value.to(accelerator.device), "sum"))
