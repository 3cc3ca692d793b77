"""The walk through the house: which stages are due, in order, each skipped when its manifest still matches.

Refuses to run in a folder that another process uses, and to redo what is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.pipeline import build
from potstill.pipeline.rundir import RunDir, Stage, StageStatus, open_run
from potstill.pipeline.stages import STUDENT, initialise, prepare, train_arm
from potstill.recipes import Recipe, dump_recipe, fingerprint

__all__ = ["STAGES", "explain_run", "run_recipe", "stage_fingerprints"]

_log = logging.getLogger("potstill")

STAGES = ("prepare", "initialise", "train", "control", "evaluate", "report")
"""All stages in order. `control` is left out where the recipe switches it off."""

FREE_TRAINING_KEYS = {"checkpoint", "trackers"}
"""Settings of the training that change how it is watched and kept, not what comes out of it."""


def stage_fingerprints(recipe: Recipe) -> dict[str, str]:
    """What decides each stage's result: its part of the recipe, its inputs, and the stages before it."""
    teacher = [recipe.teacher.model_dump(exclude={"device"}), build.identify(recipe.teacher.model)]
    student = [recipe.student, build.identify(getattr(recipe.student, "model", ""))]
    training = recipe.training.model_dump(exclude=FREE_TRAINING_KEYS)
    prompts = [recipe.evaluation.sample_prompts, recipe.evaluation.sample_tokens]
    data = [recipe.data, build.identify(recipe.data.source), build.identify(recipe.teacher.model), recipe.seed, prompts]
    found = {"prepare": fingerprint(["prepare", data])}
    found["initialise"] = fingerprint(["initialise", found["prepare"], student, teacher])
    found["train"] = fingerprint(["train", found["initialise"], training, recipe.losses])
    if recipe.control.enabled:
        found["control"] = fingerprint(["control", found["initialise"], training])
    found["evaluate"] = fingerprint(["evaluate", found["train"], found.get("control"), recipe.evaluation])
    words = [recipe.name, recipe.description, recipe.report]
    found["report"] = fingerprint(["report", found["evaluate"], words])
    return found


def explain_run(recipe: Recipe) -> list[StageStatus]:
    """Where every stage of this recipe's run stands; touches nothing."""
    return RunDir(recipe.folder).explain(list(stage_fingerprints(recipe).items()))


def run_recipe(
    recipe: Recipe, *, until: str | None = None, stopping: Callable[[], bool] = lambda: False
) -> Path:
    """Run every stage that is due, up to `until` (default: all). Returns the run folder.

    Raises Interrupted when `stopping()` turns true in a training, after its state is saved.
    """
    fingerprints = stage_fingerprints(recipe)
    names = list(fingerprints)
    wanted = names if until is None else names[: names.index(until) + 1]
    build.check_losses(recipe)
    with open_run(recipe.folder, dump_recipe(recipe)) as run:
        due = _report_states(run, [(name, fingerprints[name]) for name in wanted])
        walk = _Walk(recipe, run.folder, stopping)
        for name in wanted:
            if name in due:
                with run.stage(name, fingerprints[name], seed=recipe.seed) as stage:
                    walk.work(name, stage)
                    manifest = run.manifest(name)
                _log.info("%s: done in %.0f s, %.1f GB", name, manifest.wall_s, manifest.peak_rss_bytes / 1e9)
    return recipe.folder


@dataclass(frozen=True, slots=True)
class _Walk:
    recipe: Recipe
    folder: Path
    stopping: Callable[[], bool]

    def work(self, name: str, stage: Stage) -> None:
        """Do one stage."""
        # Imported when reached: evaluation and report bring libraries that a training need not wait for.
        from potstill.pipeline.judge import evaluate
        from potstill.pipeline.telling import report

        prepared, initial = self.folder / "prepare", self.folder / "initialise"
        match name:
            case "prepare":
                prepare(self.recipe, stage)
            case "initialise":
                initialise(self.recipe, stage, prepared)
            case "train":
                train_arm(self.recipe, stage, (prepared, initial), "student", self.stopping)
            case "control":
                train_arm(self.recipe, stage, (prepared, initial), "control", self.stopping)
            case "evaluate":
                evaluate(self.recipe, stage, prepared, self._arms())
            case "report":
                report(self.recipe, stage, self.folder)

    def _arms(self) -> Mapping[str, Path]:
        teacher = Path(build.resolve_model(self.recipe.teacher.model, "teacher.model"))
        arms = {"teacher": teacher, "untrained": self.folder / "initialise" / STUDENT}
        if self.recipe.control.enabled:
            arms["control"] = self.folder / "control" / STUDENT
        return arms | {"student": self.folder / "train" / STUDENT}


def _report_states(run: RunDir, stages: Sequence[tuple[str, str]]) -> set[str]:
    """Say where the stages stand, where there is something to say; return those that are due."""
    statuses = run.explain(stages)
    for status in statuses:
        if status.state != "missing":
            _log.info("%s: %s (%s)", status.stage, status.state, status.why)
    return {status.stage for status in statuses if status.state != "done"}
