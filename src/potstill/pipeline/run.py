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
from potstill.pipeline.chain import blaming, load_chain, settle
from potstill.pipeline.disk import check_disk, folder_bytes
from potstill.pipeline.places import STUDENT, identify
from potstill.pipeline.rundir import RunDir, Stage, StageStatus, open_run
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe, dump_recipe, fingerprint
from potstill.recipes.losses import SoftTerm
from potstill.recipes.schema import MixtureTeacher, PretrainedStudent, RunTeacher, StoredSignals

if TYPE_CHECKING:
    from potstill.pipeline.lessons import Inputs

__all__ = ["STAGES", "explain_run", "inputs_of", "is_trained", "run_part", "run_recipe", "stage_fingerprints"]

_log = logging.getLogger("potstill")

STAGES = ("prepare", "initialise", "capture", "train", "control", "evaluate", "report")
"""All stages in order. `capture` is left out where signals are not stored, `control` where the recipe says so."""

ROWS = "rows that know their sources"
"""Which rows prepare writes: another text here makes those of earlier versions stale."""

ASSISTANT = "assistant"
"""Name of the assistant's student among the inputs of a stage."""

NO_CAPTURE = "signals.kind: online keeps nothing, so there is nothing to capture. Use sampled, for example."

LOOKED_AT = 2000
"""Documents that are looked at before an assistant is trained for hours."""

FREE_TRAINING_KEYS = {"checkpoint", "trackers"}
"""Settings of the training that change how it is watched and kept, not what comes out of it."""

LENGTH_KEYS = {"tokens", "steps", "epochs", "batch_rows", "micro_batch_rows", "validation_rows"}
"""Settings of the training that decide what a store must hold for it."""

FREE_SIGNAL_KEYS = {"store", "batch_tokens"}
"""Settings of the signals that change where they are and how fast they come, not what a student learns of them."""


def stage_fingerprints(recipe: Recipe) -> dict[str, str]:
    """What decides each stage's result: its part of the recipe, its inputs, and the stages before it."""
    tokenizer, teacher = _identify_teacher(recipe)
    own = recipe.student.model if isinstance(recipe.student, PretrainedStudent) else None
    student = [recipe.student, own and identify(own)]
    training = recipe.training.model_dump(exclude=FREE_TRAINING_KEYS)
    data = [recipe.data, identify(recipe.data.source), tokenizer, recipe.seed]
    found = {"prepare": fingerprint(["prepare", ROWS, data])}
    found["initialise"] = fingerprint(["initialise", found["prepare"], student, teacher])
    said: list[object] = []
    if isinstance(recipe.signals, StoredSignals):
        length = recipe.training.model_dump(include=LENGTH_KEYS)
        temperatures = [term.temperature for term in recipe.losses if isinstance(term, SoftTerm)]
        said = [recipe.signals.model_dump(exclude=FREE_SIGNAL_KEYS)]
        found["capture"] = fingerprint(["capture", found["initialise"], length, temperatures, *said])
    found["train"] = fingerprint(["train", found["initialise"], training, recipe.losses, *said])
    if recipe.control.enabled:
        found["control"] = fingerprint(["control", found["initialise"], training])
    found["evaluate"] = fingerprint(["evaluate", found["train"], found.get("control"), recipe.evaluation])
    words = [recipe.name, recipe.description, recipe.report]
    found["report"] = fingerprint(["report", found["evaluate"], words])
    return found


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
        if until == "capture":
            raise RecipeError(NO_CAPTURE)
        raise RecipeError(f"{until}.enabled: false, so there is no such stage. Set it to true.")
    names = list(fingerprints)
    wanted = names if until is None else names[: names.index(until) + 1]
    with open_run(recipe.folder) as run:
        statuses = [status for status in _explain(recipe, run, fingerprints) if status.stage in wanted]
        due = [status.stage for status in statuses if status.state != "done"]
        # Before the assistant's run: what is wrong with this recipe should not show hours later.
        walk = _Walk(recipe, settle(recipe), run.folder, stopping or Stopping(), _stage_bytes(recipe, set(due)))
        if due:
            walk.check_room(due[0])
            run.write_recipe(dump_recipe(recipe))
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

    def run_assistant(self) -> None:
        """Run the recipe whose student is the teacher, where there is one."""
        for assistant in load_chain(self.asked)[:1]:
            _log.info("the teacher is the student of %s, in %s:", assistant.name, assistant.folder)
            with blaming(assistant):
                run_recipe(assistant, stopping=self.stopping)
            _log.info("%s, in %s:", self.asked.name, self.folder)

    def check_data(self, due: set[str]) -> None:
        """Look at the first documents where an assistant's run would come before they are read."""
        if "prepare" in due and isinstance(self.asked.teacher, RunTeacher):
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
            case "prepare":
                from potstill.pipeline.stages import prepare

                prepare(self.recipe, stage)
            case "initialise":
                from potstill.pipeline.stages import initialise

                initialise(self.recipe, stage, self.folder / "prepare")
            case "capture":
                from potstill.pipeline.capture import capture

                capture(self.recipe, stage, inputs_of(self.recipe), self.stopping)
            case "train" | "control":
                self._train(name, stage)
            case "evaluate":
                from potstill.pipeline.judge import evaluate

                evaluate(self.recipe, stage, self.folder / "prepare", self._arms())
            case "report":
                from potstill.pipeline.telling import report

                report(self.asked, stage, self.folder)

    def _train(self, name: str, stage: Stage) -> None:
        from potstill.pipeline.arms import train_arm

        arm: Literal["student", "control"] = "student" if name == "train" else "control"
        train_arm(self.recipe, stage, inputs_of(self.recipe), arm, stopping=self.stopping)

    def _arms(self) -> Mapping[str, Path]:
        stages = {"untrained": "initialise", "control": "control", "student": "train"}
        if not self.recipe.control.enabled:
            del stages["control"]
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


def _identify_teacher(recipe: Recipe) -> tuple[object, object]:
    """What decides the teacher's tokenizer, and what decides the teacher."""
    teacher = recipe.teacher
    if isinstance(teacher, RunTeacher):
        # Not the folder's files: the report adds the model card to them, and another assistant of the same sizes
        # could hardly be told by them.
        student = stage_fingerprints(load_chain(recipe)[0])["train"]
        return student, [teacher.kind, teacher.dtype, student]
    if isinstance(teacher, MixtureTeacher):
        # As lists, since the order of patterns counts and that of a mapping's keys does not.
        members = [[one.weight, list(one.sources.items()), one.model, identify(one.model)] for one in teacher.members]
        return identify(teacher.members[0].model), [teacher.kind, teacher.dtype, members]
    return identify(teacher.model), [teacher.model_dump(exclude={"device"}), identify(teacher.model)]


def _report_states(statuses: Sequence[StageStatus]) -> None:
    """Say where the stages stand, where there is something to say."""
    for status in statuses:
        if status.state != "missing":
            _log.info("%s: %s (%s)", status.stage, status.state, status.why)
