"""Chains of runs: a teacher that is the student of another recipe's run, its assistant.

Importing this module is cheap. Refuses a chain that goes in a circle, and two runs of a chain in one folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from potstill.errors import Interrupted, PotstillError, RecipeError
from potstill.pipeline.places import STUDENT
from potstill.recipes import Recipe, load_recipe
from potstill.recipes.schema import (
    FinetuneTeacher,
    LocalTeacher,
    PretrainedStudent,
    Report,
    RunTeacher,
    TextTask,
)

__all__ = [
    "PhaseStudent",
    "before",
    "blaming",
    "load_chain",
    "phases_of",
    "runs_folder",
    "settle",
    "settle_teacher",
    "student_folder",
]

PHASE_KEYS = ("task", "data", "teacher", "losses", "signals", "training", "control", "evaluation")
"""What a phase may say otherwise than its recipe."""

PHASES = "phases"
"""Folder of the phases' runs within a run."""


class PhaseStudent(PretrainedStudent):
    """The student that an earlier phase has left, or will leave: it is known by that phase, not by its files."""

    phase: Recipe
    """The phase whose student it is."""


def load_chain(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe's assistant, then the assistant's own, and so on; empty where the teacher is nobody's student.

    Raises RecipeError for what is wrong with any of them, with the file named, and for a chain without an end.
    """
    chain, files = [recipe], list[str]()
    while isinstance(teacher := chain[-1].teacher, RunTeacher):
        if teacher.recipe in files:
            raise _circle([*files[files.index(teacher.recipe) :], teacher.recipe])
        files.append(teacher.recipe)
        chain.append(_load(teacher.recipe))
    _check_folders(chain)
    _check_held_out(chain)
    return tuple(chain[1:])


def settle(recipe: Recipe) -> Recipe:
    """The recipe with its assistant's trained student as a teacher like any other, for the stages.

    And with the student that the phase before has left as the one to go on with.
    """
    for phase in phases_of(recipe)[-1:]:
        recipe = recipe.model_copy(update={"student": _left_by(phase), "phases": []})
    if not isinstance(recipe.teacher, RunTeacher):
        return recipe
    model = str(student_folder(load_chain(recipe)[0]))
    local = LocalTeacher(kind="local", model=model, dtype=recipe.teacher.dtype, device=recipe.teacher.device)
    return recipe.model_copy(update={"teacher": local})


def settle_teacher(recipe: Recipe) -> Recipe:
    """The settled recipe with a teacher that was trained first as a teacher like any other, for the stages after."""
    teacher = recipe.teacher
    if not isinstance(teacher, FinetuneTeacher):
        return recipe
    model = str(recipe.folder.absolute() / "finetune" / "teacher")
    local = LocalTeacher(kind="local", model=model, dtype=teacher.dtype, device=teacher.device)
    return recipe.model_copy(update={"teacher": local})


def phases_of(recipe: Recipe) -> tuple[Recipe, ...]:
    """The recipe's earlier phases as recipes of their own, in order: each begins with the student of the one before."""
    found: list[Recipe] = []
    for phase in recipe.phases:
        given = {key: value for key in PHASE_KEYS if (value := getattr(phase, key)) is not None}
        if phase.evaluation is None and not isinstance(phase.task or recipe.task, TextTask):
            # Queries have a price where the recipe's own task has queries.
            given["evaluation"] = recipe.evaluation.model_copy(update={"price": None})
        folder = recipe.folder / PHASES / phase.name
        same = {
            "name": f"{recipe.name}-{phase.name}",
            "run_dir": folder,
            "phases": [],
            "static": None,
            "report": Report(),
        }
        if found:
            same["student"] = _left_by(found[-1])
        found.append(recipe.model_copy(update={**given, **same}))
    return tuple(found)


def runs_folder(recipe: Recipe) -> Path:
    """Where the run lies with others, and what they share: of a phase, where its whole recipe's run lies."""
    folder = recipe.folder.absolute()
    return folder.parents[2] if folder.parent.name == PHASES else folder.parent


def before(recipe: Recipe) -> tuple[Recipe, ...]:
    """The phase whose student this recipe, or this phase of one, begins with; empty where it makes its own."""
    own = (recipe.student.phase,) if isinstance(recipe.student, PhaseStudent) else ()
    return phases_of(recipe)[-1:] or own


def student_folder(recipe: Recipe) -> Path:
    """Where the trained student of a recipe's run is, or will be."""
    return recipe.folder.absolute() / "train" / STUDENT


@contextmanager
def blaming(assistant: Recipe, key: str = "teacher.recipe") -> Iterator[None]:
    """In this block, what goes wrong is said of the assistant (or phase): its keys are not those of the recipe."""
    try:
        yield
    except Interrupted:  # nothing is wrong with it
        raise
    except PotstillError as error:
        raise type(error)(f"{key}: in the run of {assistant.name}: {error}") from error


def _left_by(phase: Recipe) -> PhaseStudent:
    return PhaseStudent(kind="model", model=str(student_folder(phase)), phase=phase)


def _load(file: str) -> Recipe:
    try:
        return load_recipe(file)
    except RecipeError as error:
        lines = [line if line.startswith(file) else f"in {file}: {line}" for line in str(error).splitlines()]
        raise RecipeError("\n".join(f"teacher.recipe: {line}" for line in lines)) from error


def _circle(files: list[str]) -> RecipeError:
    names = " -> ".join(Path(file).name for file in files)
    return RecipeError(
        f"teacher.recipe: {names} goes in a circle, so that none of these runs could be the first. Give one of them a "
        "teacher of another kind."
    )


def _check_folders(chain: list[Recipe]) -> None:
    folders = [recipe.folder.resolve() for recipe in chain]
    for number, recipe in enumerate(chain[1:], start=1):
        if folders[number] in folders[:number]:
            raise RecipeError(
                f"teacher.recipe: {recipe.name} and the run that it is to teach have one folder, {recipe.folder}. Give "
                "one of them another name or run_dir."
            )


def _check_held_out(chain: list[Recipe]) -> None:
    """Refuse an assistant that trains on what a run of the chain holds out of the same data."""
    for recipe, assistant in pairwise(chain):
        same = recipe.data.source == assistant.data.source
        if same and (recipe.seed, recipe.data.splits) != (assistant.seed, assistant.data.splits):
            raise RecipeError(
                f"teacher.recipe: {assistant.name} holds out other documents of {recipe.data.source} (seed "
                f"{assistant.seed}, {_shares(assistant)}) than {recipe.name} (seed {recipe.seed}, {_shares(recipe)}), "
                "and would have been trained on what its student is tested on. Give both the same seed and data.splits."
            )


def _shares(recipe: Recipe) -> str:
    splits = recipe.data.splits
    return f"splits {splits.validation:g} and {splits.test:g}"
