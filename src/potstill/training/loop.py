"""The loop: draw lessons, sum losses, divide once, step. The same for every source and every arm.

Refuses to take a step whose loss or gradient is not finite: it stops before the weights are touched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from potstill.errors import Interrupted, NonFiniteError, RunError
from potstill.training.checkpoint import CheckpointStore, random_state, restore_random_state
from potstill.types import Batch, Lesson, LessonSource, StudentView, Wants

__all__ = ["Callbacks", "Objective", "Plan", "Progress", "Training", "train"]


class Objective(Protocol):
    """What the loop asks of a recipe's losses; `losses.Objective` is one."""

    def wants(self) -> tuple[Wants, Wants]:
        """What to read from the student, and from the teacher."""
        ...

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Positions each loss sums over, [losses]."""
        ...

    def scheduled(self, progress: float) -> dict[str, float]:
        """What moves over the training, as it is now, by the names of the log."""
        ...

    def __call__(
        self, view: StudentView, lesson: Lesson, counts: Tensor, progress: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A lesson's share of the step's loss and of every term."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """What the losses learn themselves."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the losses have learned."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Continue with what `state_dict` gave."""
        ...


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

    log: Callable[[dict[str, Any]], None] = lambda _: None
    stopping: Callable[[], bool] = lambda: False
    rewind: Callable[[int], None] = lambda _: None


class Progress:
    """How far a training is: all of it that is neither weights nor a module's state."""

    def __init__(self) -> None:
        """At the start."""
        self.step, self.seconds, self.positions = 0, 0.0, 0


@dataclass(frozen=True, slots=True)
class Training:
    """All that takes part in a training. The objects in it learn; which objects they are never changes.

    `examiner` is the objective of the validation lessons, the same for every arm, so that their curves compare.
    """

    student: nn.Module
    objective: Objective
    source: LessonSource
    accelerator: Accelerator
    validation: Sequence[Lesson] = ()
    examiner: Objective | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def step(self) -> int:
        """Finished optimiser steps."""
        return self.progress.step

    @property
    def seconds(self) -> float:
        """Wall time of the finished steps, over all resumptions."""
        return self.progress.seconds

    @property
    def positions(self) -> int:
        """Packed positions read, padding included, on all ranks together."""
        return self.progress.positions


def train(training: Training, plan: Plan, store: CheckpointStore, callbacks: Callbacks | None = None) -> None:
    """Train to the plan's last step, from the newest whole checkpoint in `store` if there is one.

    Continuing is exact: weights, optimiser, source and random numbers go on as if nothing had happened. Raises
    Interrupted after saving when `callbacks.stopping()` turns true, NonFiniteError (naming the examples) before a bad
    step is taken, CheckpointError when checkpoints exist but none is whole, RunError when one cannot be written.
    """
    callbacks = callbacks or Callbacks()
    accelerator, progress = training.accelerator, training.progress
    student, optimizer = accelerator.prepare(training.student, _optimizer(training, plan))
    _resume(training, optimizer, store)
    callbacks.rewind(progress.step)
    saved_at = began = time.monotonic()
    before = progress.seconds
    while progress.step < plan.steps:
        moment = {"source": training.source.state_dict(), "random": random_state()}
        try:
            line = _take_step(training, plan, student, optimizer)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error} {_keep(training, optimizer, store, moment)}") from None
        progress.seconds = before + time.monotonic() - began
        if _examining(training, plan):
            line |= _validate(training, student)
        callbacks.log(line | {"seconds": progress.seconds})
        due = _due(plan, progress.step, time.monotonic() - saved_at)
        stopping, due = _any_rank(accelerator, callbacks.stopping(), due)
        if progress.step < plan.steps and (stopping or due):
            _save(training, optimizer, store)
            saved_at = time.monotonic()
            if stopping:
                raise Interrupted(
                    f"stopped after step {progress.step} of {plan.steps}; run the same command to continue."
                )
    accelerator.wait_for_everyone()


def _take_step(training: Training, plan: Plan, student: nn.Module, optimizer: Any) -> dict[str, Any]:
    """One optimiser step over the source's next micro-batches; returns its line of metrics."""
    accelerator, progress = training.accelerator, training.progress
    batches = [batch.to(accelerator.device) for batch in training.source.draw()]
    rate = plan.rate(progress.step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    done = progress.step / max(1, plan.steps - 1)  # 0 in the first step, 1 in the last
    loss, terms = _accumulate(training, student, batches, done)
    norm = _clip(training, plan)
    _refuse_nonfinite(progress.step + 1, {"loss": loss, "gradient norm": norm}, batches)
    optimizer.step()
    optimizer.zero_grad()
    progress.step += 1
    progress.positions += int(_total(accelerator, torch.tensor(sum(batch.ids_BT.numel() for batch in batches))))
    return {
        "step": progress.step,
        "tokens": progress.positions,
        "loss": loss,
        **terms,
        **training.objective.scheduled(done),
        "gradient_norm": norm,
        "learning_rate": rate,
    }


def _accumulate(
    training: Training, student: nn.Module, batches: Sequence[Batch], done: float
) -> tuple[float, dict[str, float]]:
    """Add up the gradients of the micro-batches; returns the step's loss and terms over all ranks."""
    accelerator = training.accelerator
    counts = accelerator.reduce(training.objective.counts(batches).to(accelerator.device), "sum")
    wants = training.objective.wants()[0]
    loss = torch.zeros((), device=accelerator.device)
    terms: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        lesson = training.source.lesson(batch)  # before the student's graph is there: the teacher has the memory alone
        with accelerator.no_sync(student) if index + 1 < len(batches) else nullcontext():
            share, parts = training.objective(student(batch, wants), lesson, counts, done)
            # Data parallelism averages gradients over processes; the count is already global, so undo the average.
            accelerator.backward(share * accelerator.num_processes)
        loss += share.detach()
        terms = {name: terms.get(name, torch.zeros_like(value)) + value for name, value in parts.items()}
    return _total(accelerator, loss), {name: _total(accelerator, value) for name, value in terms.items()}


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
            f"training: {', '.join(f'{name} is {value}' for name, value in bad.items())} in step {step}, before any "
            f"weight was changed. The batch's examples: {', '.join(ids[:20])}{more}."
        )


@torch.no_grad()
def _validate(training: Training, student: nn.Module) -> dict[str, float]:
    """The examiner's terms on the held-out lessons, by name with `validation_` in front."""
    examiner = training.examiner or training.objective
    counts = examiner.counts([lesson.batch for lesson in training.validation])
    terms: dict[str, float] = {}
    student.eval()
    for lesson in training.validation:
        device = training.accelerator.device
        held_out = Lesson(lesson.batch.to(device), lesson.signal.to(device))
        view = student(held_out.batch, examiner.wants()[0])
        for name, value in examiner(view, held_out, counts)[1].items():
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


def _examining(training: Training, plan: Plan) -> bool:
    regular = plan.validate_every and (training.step % plan.validate_every == 0 or training.step == plan.steps)
    return bool(training.validation and regular)


def _any_rank(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Which flags are up on any rank: ranks have their own clocks and signals, but must save and stop together."""
    raised = accelerator.reduce(torch.tensor(flags, dtype=torch.int64, device=accelerator.device), "sum")
    return [bool(count) for count in raised]


def _due(plan: Plan, step: int, since_save: float) -> bool:
    by_steps = plan.checkpoint_steps is not None and step % plan.checkpoint_steps == 0
    by_time = plan.checkpoint_seconds is not None and since_save >= plan.checkpoint_seconds
    return by_steps or by_time


def _keep(training: Training, optimizer: Any, store: CheckpointStore, moment: Mapping[str, Any]) -> str:
    """Save the state before the step that could not be taken; says whether, and what the user can do now."""
    try:
        _save(training, optimizer, store, moment)
        kept = f"The state before this step is saved in {store.folder}"
    except RunError as error:
        kept = f"The state before this step could not be saved ({error})"
    return (
        f"{kept}; the same command meets the same batch again. Look at these examples, or lower "
        "training.learning_rate; another recipe or other data starts the training anew."
    )


def _save(training: Training, optimizer: Any, store: CheckpointStore, moment: Mapping[str, Any] | None = None) -> None:
    """Save the state after the last step; `moment` is what a step begun and not taken has changed, from before it."""
    state = {
        "student": training.student.state_dict(),
        "objective": training.objective.state_dict(),
        "optimizer": optimizer.state_dict(),
        "source": training.source.state_dict(),
        "random": random_state(),
        "progress": vars(training.progress),
    } | dict(moment or {})
    if training.accelerator.is_main_process:
        store.save(training.step, state)
    training.accelerator.wait_for_everyone()


def _resume(training: Training, optimizer: Any, store: CheckpointStore) -> None:
    with training.accelerator.main_process_first():  # who finds a damaged checkpoint sets it aside
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
        setattr(training.progress, name, value)


def _total(accelerator: Accelerator, value: Tensor) -> float:
    return float(accelerator.reduce(value.to(accelerator.device), "sum"))
