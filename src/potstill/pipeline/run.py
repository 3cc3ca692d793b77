"""The walk through the house: which stages are due, in order, each skipped when its manifest still matches.

A finished run is recognised without importing what runs models. Refuses to run in a folder that another process uses,
and to redo what is finished.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from potstill.errors import Interrupted, RecipeError, RunError
from potstill.pipeline.chain import blaming, load_chain, phases_of, settle, settle_teacher
from potstill.pipeline.disk import check_disk, folder_bytes
from potstill.pipeline.identity import stage_fingerprints
from potstill.pipeline.places import STUDENT
from potstill.pipeline.rundir import RunDir, Stage, StageStatus, open_run
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe, dump_recipe, fingerprint
from potstill.recipes.schema import OpenAITeacher, RunTeacher, StoredSignals

if TYPE_CHECKING:
    from potstill.pipeline.lessons import Inputs

__all__ = ["STAGES", "explain_run", "inputs_of", "is_trained", "run_part", "run_recipe", "stage_fingerprints"]

_log = logging.getLogger("potstill")

STAGES = (
    "generate",
    "prepare",
    "finetune",
    "initialise",
    "capture",
    "train",
    "control",
    "static",
    "evaluate",
    "report",
)
"""All stages in order. `generate` is left out where no teacher writes, `finetune` where the teacher is taken as it is,
`capture` where signals are not stored, `control` where there is none, `static` where the recipe has no such part."""

ASSISTANT = "assistant"
"""Name of the assistant's student among the inputs of a stage."""

NO_CAPTURE = "signals.kind: online keeps nothing, so there is nothing to capture. Use sampled, for example."

NO_STAGE = {
    "capture": NO_CAPTURE,
    "generate": "generate: the recipe does not ask the teacher to write, so there is no such stage.",
    "finetune": "teacher.kind: only `finetune` is trained first, so there is no such stage.",
    "static": "static: the recipe asks for no static classifier, so there is no such stage.",
}

LOOKED_AT = 2000
"""Documents that are looked at before an assistant is trained for hours."""


def explain_run(recipe: Recipe) -> list[StageStatus]:
    """Where every stage of this recipe's run stands; touches nothing."""
    return _explain(recipe, RunDir(recipe.folder), stage_fingerprints(recipe))


def _explain(recipe: Recipe, run: RunDir, fingerprints: Mapping[str, str]) -> list[StageStatus]:
    """A capture is as good as the store that it filled; but once the student is trained, nobody needs that any more."""
    statuses = run.explain(list(fingerprints.items()))
    by_name = {status.stage: status for status in statuses}
    capture, train = by_name.get("capture"), by_name.get("train")
    if capture and train and capture.state == "done" and train.state != "done":
        from potstill.pipeline.recall import explain_store

        why = explain_store(recipe, run.folder / "capture", run.manifest("capture").facts)
        return [StageStatus("capture", "damaged", why) if why and one is capture else one for one in statuses]
    return statuses


def is_trained(recipe: Recipe) -> bool:
    """Whether the student of this recipe's run is there, whole, and what the recipe asks for."""
    return RunDir(recipe.folder).state("train", stage_fingerprints(recipe)["train"]) == "done"


def run_recipe(recipe: Recipe, *, until: str | None = None, stopping: Stopping | None = None) -> Path:
    """Run every stage that is due, up to `until` (default: all). Returns the run folder.

    A recipe whose teacher is another recipe's student first has that one run, to its end. Raises what is wrong with
    the recipe before the first stage begins, and Interrupted when `stopping` is asked to while a training runs: after
    its state is saved, or, where that was its last step, after its stage is finished.
    """
    fingerprints = stage_fingerprints(recipe)
    if until is not None and until not in fingerprints:
        raise RecipeError(NO_STAGE.get(until, f"{until}.enabled: false, so there is no such stage. Set it to true."))
    names = list(fingerprints)
    wanted = names if until is None else names[: names.index(until) + 1]
    with open_run(recipe.folder) as run:
        statuses = [status for status in _explain(recipe, run, fingerprints) if status.stage in wanted]
        due = [status.stage for status in statuses if status.state != "done"]
        # Before the assistant's run: what is wrong with this recipe should not show hours later.
        walk = _Walk(
            recipe, settle(recipe), run.folder, stopping or Stopping(), _stage_bytes(recipe, set(due)), fingerprints
        )
        if due:
            walk.check_room(due[0])
            run.write_recipe(dump_recipe(recipe))
        if set(due) - {"generate", "prepare", "finetune"}:
            walk.run_phases()
        if set(due) - {"report"}:
            walk.check_data(set(due))
            walk.run_assistant()
            walk.check_same_assistant(run, [name for name in wanted if name not in due])
        _report_states(statuses)
        if not due:
            _log.info("all done before: nothing to do")
            return recipe.folder
        for position, name in enumerate(due):
            walk.check_room(name)
            if name != "report":
                walk.check_assistant()
            with run.stage(name, fingerprints[name], inputs=walk.inputs(), seed=recipe.seed) as stage:
                walk.work(name, stage)
                manifest = run.manifest(name)
            _log.info("%s: done in %.0f s, %.1f GB", name, manifest.wall_s, manifest.peak_rss_bytes / 1e9)
            walk.stop_before(due[position + 1 :])
    return recipe.folder


@dataclass(frozen=True, slots=True)
class _Walk:
    asked: Recipe
    recipe: Recipe
    """The same, with the assistant's student as the teacher where there is an assistant."""
    folder: Path
    stopping: Stopping
    needed_bytes: Mapping[str, int]
    fingerprints: Mapping[str, str]

    def run_phases(self) -> None:
        """Run the phases that come before, where there are any, in order."""
        for number, phase in enumerate(phases_of(self.asked)):
            _log.info("phase %s, in %s:", phase.name, phase.folder)
            with blaming(phase, f"phases[{number}]"):
                run_recipe(phase, stopping=self.stopping)
            _log.info("%s, in %s:", self.asked.name, self.folder)

    def run_assistant(self) -> None:
        """Run the recipe whose student is the teacher, where there is one."""
        for assistant in load_chain(self.asked)[:1]:
            _log.info("the teacher is the student of %s, in %s:", assistant.name, assistant.folder)
            with blaming(assistant):
                run_recipe(assistant, stopping=self.stopping)
            _log.info("%s, in %s:", self.asked.name, self.folder)

    def check_data(self, due: set[str]) -> None:
        """Look at the first documents, or at all texts, where an assistant's run would come before they are read."""
        if "prepare" not in due or not isinstance(self.asked.teacher, RunTeacher):
            return
        if self.asked.over_texts:
            from potstill.pipeline.textplan import known_labels
            from potstill.pipeline.texts import survey_texts

            survey_texts(self.asked, labels=known_labels(self.asked))
            return
        from potstill.pipeline.survey import survey_data

        survey_data(self.asked, LOOKED_AT)

    def inputs(self) -> Mapping[str, str]:
        """What tells the assistant's student from another one that the same recipe made."""
        found = {}
        for assistant in load_chain(self.asked)[:1]:
            if is_trained(assistant):
                trained = RunDir(assistant.folder).manifest("train")
                # Files too large to be hashed are told by when their training ended: equal sizes say nothing.
                files = {
                    name: [file.size, file.blake2b or trained.finished_at]
                    for name, file in trained.outputs.items()
                    if name.startswith(STUDENT)
                }
                found[ASSISTANT] = fingerprint(files)
        return found

    def check_same_assistant(self, run: RunDir, done: Sequence[str]) -> None:
        """Refuse to go on with another student than the one that taught in the stages that are done."""
        now = self.inputs().get(ASSISTANT)
        others = [name for name in done if name != "prepare" and run.manifest(name).inputs.get(ASSISTANT) != now]
        if now and others:
            raise RunError(
                f"teacher.recipe: the assistant was trained again since {', '.join(others)} of this run: with other "
                f"weights, results would be of two teachers. Delete {self.folder / others[0]} and what was done after "
                "it, or use another run_dir."
            )

    def check_assistant(self) -> None:
        """Refuse a teacher that is not, or no longer, the student that this run's fingerprints speak of."""
        for assistant in load_chain(self.asked)[:1]:
            if not is_trained(assistant):
                raise RunError(
                    f"teacher.recipe: the student of {assistant.name} in {assistant.folder} was changed meanwhile. Run "
                    "the same command again: what depends on it is done anew."
                )

    def check_room(self, name: str) -> None:
        """Refuse a stage that the disk has no room for; what lies in its folder is used again, or cleared first."""
        needed = self.needed_bytes.get(name, 0) - folder_bytes(self.folder / name)
        check_disk(self.folder, needed, f"the stage {name}")

    def stop_before(self, remaining: Sequence[str]) -> None:
        """Raises Interrupted if a request came that the stage before had no step left to answer."""
        if remaining and self.stopping.asked():
            raise Interrupted(f"stopped before {', '.join(remaining)}; the same command continues.")

    def work(self, name: str, stage: Stage) -> None:
        """Do one stage."""
        # Imported when reached: a finished run must be recognised without waiting for torch.
        match name:
            case "generate":
                from potstill.pipeline.generate import generate

                generate(self.asked, stage, stopping=self.stopping)
            case "prepare":
                from potstill.pipeline.stages import prepare

                prepare(self.recipe, stage)
            case "finetune":
                from potstill.pipeline.tutor import finetune

                mark = self.fingerprints["finetune"]
                finetune(self.recipe, stage, self.folder / "prepare", fingerprint=mark, stopping=self.stopping)
            case "initialise":
                from potstill.pipeline.stages import initialise

                initialise(self.taught, stage, self.folder / "prepare")
            case "capture":
                self._capture(stage)
            case "train" | "control":
                self._train(name, stage)
            case "static":
                from potstill.pipeline.still import train_static

                train_static(self.taught, stage, inputs_of(self.recipe), stopping=self.stopping)
            case "evaluate":
                self._evaluate(stage)
            case "report":
                from potstill.pipeline.telling import report

                report(self.asked, stage, self.folder)

    @property
    def taught(self) -> Recipe:
        """The recipe for stages in which a teacher that is trained first has been."""
        return settle_teacher(self.recipe)

    def _capture(self, stage: Stage) -> None:
        if self.recipe.over_texts:
            from potstill.pipeline.answers import capture_answers

            capture_answers(self.taught, stage, inputs_of(self.recipe), self.stopping)
            return
        if isinstance(self.recipe.teacher, OpenAITeacher):
            from potstill.pipeline.scored import capture_scored

            capture_scored(self.taught, stage, inputs_of(self.recipe), self.stopping)
            return
        from potstill.pipeline.capture import capture

        capture(self.taught, stage, inputs_of(self.recipe), self.stopping)

    def _evaluate(self, stage: Stage) -> None:
        prepared = self.folder / "prepare"
        if self.recipe.over_texts:
            from potstill.pipeline.answerers import answering
            from potstill.pipeline.examine import evaluate_texts

            arms = self._arms()
            recipe = self.taught
            if isinstance(recipe.teacher, OpenAITeacher):
                from potstill.pipeline.labelling import priced

                recipe = priced(recipe, RunDir(self.folder).manifest("capture").facts)
            asked = answering(recipe, prepared, arms)
            evaluate_texts(recipe, stage, prepared, answerers=asked, arms=["teacher", *arms])
            return
        if self.asked.generate is not None:
            from potstill.pipeline.solve import evaluate_answers

            evaluate_answers(self.asked, stage, self.folder, self._arms(), stopping=self.stopping)
            return
        from potstill.pipeline.judge import evaluate

        evaluate(self.taught, stage, prepared, self._arms())

    def _train(self, name: str, stage: Stage) -> None:
        from potstill.pipeline.arms import train_arm

        arm: Literal["student", "control"] = "student" if name == "train" else "control"
        train_arm(self.taught, stage, inputs_of(self.recipe), arm, stopping=self.stopping)

    def _arms(self) -> Mapping[str, Path]:
        stages = {"untrained": "initialise", "control": "control", "student": "train", "static": "static"}
        if not self.recipe.has_control:
            del stages["control"]
        if not self.recipe.static:
            del stages["static"]
        return {arm: self.folder / stage / STUDENT for arm, stage in stages.items()}


def run_part(recipe: Recipe, part: str, stopping: Stopping) -> str:
    """Do one part of a recipe's capture beside other processes, as "2/4" says; returns what was done in words.

    Needs the stages before; only reads the run folder. Raises RecipeError for another part, or where nothing is stored,
    RunError where a stage before is not done.
    """
    found = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", part)
    if not found or int(found[1]) > int(found[2]):
        raise RecipeError(f"--part: got {part!r}, needs I/N with I from 1 to N, for example 1/4.")
    if not isinstance(recipe.signals, StoredSignals):
        raise RecipeError(NO_CAPTURE)
    if recipe.over_texts:
        raise RecipeError("--part: a task over texts is captured by one process. Leave --part out.")
    if isinstance(recipe.teacher, OpenAITeacher):
        raise RecipeError("--part: an endpoint is asked by one process, many requests at once. Leave --part out.")
    settled, fingerprints = settle(recipe), stage_fingerprints(recipe)
    for name in ("prepare", "initialise"):
        if RunDir(recipe.folder).state(name, fingerprints[name]) != "done":
            raise RunError(f"--part: {name} is not done in {recipe.folder}. Run `potstill initialise` first, once.")
    from potstill.pipeline.capture import capture_part
    from potstill.pipeline.inspection import inspect_recipe

    inspect_recipe(recipe)
    done = capture_part(settled, inputs_of(recipe), (int(found[1]) - 1, int(found[2])), stopping)
    return f"part {part}: {done.pieces:,} pieces, {done.tokens:,} tokens in {done.seconds:.0f} s"


def inputs_of(recipe: Recipe) -> Inputs:
    """Where a training of this recipe, or a capture for it, finds what the stages before have made."""
    from potstill.pipeline.lessons import Inputs

    folder = recipe.folder
    initial: Mapping[str, object] = RunDir(folder).manifest("initialise").facts
    captured = folder / "capture" if isinstance(recipe.signals, StoredSignals) else None
    return Inputs(folder / "prepare", folder / "initialise", int(str(initial["vocabulary"])), captured)


def _stage_bytes(recipe: Recipe, due: set[str]) -> Mapping[str, int]:
    """Check the recipe as far as possible without weights; then what each stage needs on the disk."""
    if due <= {"report"}:
        return {}
    from potstill.pipeline.inspection import check_store_room, inspect_recipe, stage_bytes

    found = inspect_recipe(recipe)
    if "capture" in due:
        check_store_room(recipe, found)
    return stage_bytes(recipe, found)


def _report_states(statuses: Sequence[StageStatus]) -> None:
    """Say where the stages stand, where there is something to say."""
    for status in statuses:
        if status.state != "missing":
            _log.info("%s: %s (%s)", status.stage, status.state, status.why)
