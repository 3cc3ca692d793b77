"""What can be known of a run before any weight is loaded: sizes, and whether its parts fit each other.

Refuses whatever would fail hours later: layers that are not there, rows longer than the models' positions, vocabularies
that differ, devices and packages that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights

from potstill.engines import load_tokenizer, pick_device
from potstill.engines.local import load_config
from potstill.errors import RecipeError
from potstill.pipeline import build
from potstill.pipeline.layers import count_layers
from potstill.pipeline.metrics import check_trackers
from potstill.pipeline.places import resolve_data, resolve_model, source_bytes
from potstill.recipes import Recipe
from potstill.recipes.schema import FreshStudent, LayersStudent, PretrainedStudent
from potstill.signals import shared_vocabulary

__all__ = ["Inspection", "count_parameters", "inspect_recipe", "stage_bytes"]

PREPARED_BYTES = 7
"""Disk per byte of text while it is packed: 20 bytes a token (three int32 and the spool), 3 characters a token."""

SMALL_BYTES = 64 * 2**20
"""What a stage that writes no weights may need: pages, measurements, logs."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The parts of a run without weights. `teacher` and `student` are models on the meta device."""

    teacher: Any
    student: Any
    tokenizer: Any
    vocabulary: int

    @property
    def teacher_parameters(self) -> int:
        """Weights of the teacher, tied ones once."""
        return count_parameters(self.teacher)

    @property
    def student_parameters(self) -> int:
        """Weights of the student, tied ones once."""
        return count_parameters(self.student)


def inspect_recipe(recipe: Recipe) -> Inspection:
    """Look at configs and tokenizers, and check that the recipe can be run. Fetches samples and configs, no weights.

    Raises RecipeError, ModelError, VocabularyMismatch, SampleError or MissingExtra naming the recipe's key.
    """
    build.check_losses(recipe)
    check_trackers(recipe.training.trackers)
    pick_device(recipe.teacher.device, "teacher.device")
    pick_device(recipe.training.device, "training.device")
    model = resolve_model(recipe.teacher.model, "teacher.model")
    teacher = build.blank_model(load_config(model, "teacher.model"), "teacher.model")
    tokenizer = load_tokenizer(model, "teacher.model")
    _check_length(recipe, teacher.config, "teacher")
    student = _blank_student(recipe, teacher)
    _check_length(recipe, student.config, "student")
    vocabulary = shared_vocabulary(tokenizer, _student_tokenizer(recipe, tokenizer))
    with init_empty_weights():
        build.build_objective(recipe.losses, vocabulary, student.config, teacher.config)
    return Inspection(teacher, student, tokenizer, vocabulary)


def count_parameters(model: Any) -> int:
    """Weights of a model, tied ones counted once."""
    return sum(int(parameter.numel()) for parameter in model.parameters())


def stage_bytes(recipe: Recipe, found: Inspection) -> Mapping[str, int]:
    """Disk that each stage may need at most, as far as that is known beforehand."""
    weights = 4 * found.student_parameters
    # A checkpoint holds the weights and two moments; one more is written before the oldest goes; then the result.
    training = 3 * weights * (recipe.training.checkpoint.keep + 1) + weights
    return {
        "prepare": PREPARED_BYTES * source_bytes(resolve_data(recipe.data.source)) + SMALL_BYTES,
        "initialise": weights + SMALL_BYTES,
        "train": training + SMALL_BYTES,
        "control": training + SMALL_BYTES,
        "evaluate": SMALL_BYTES,
        "report": SMALL_BYTES,
    }


def _blank_student(recipe: Recipe, teacher: Any) -> Any:
    if isinstance(recipe.student, LayersStudent):
        count_layers(recipe.student, teacher.config.get_text_config().num_hidden_layers)
    if isinstance(recipe.student, FreshStudent):  # whether sizes go together shows only where numbers flow
        student = build.build_stand_in(recipe, teacher).to("meta")
    else:
        with init_empty_weights():
            student = build.build_stand_in(recipe, teacher)
    student.tie_weights()  # leaving the weights out parts what is tied
    return student


def _student_tokenizer(recipe: Recipe, tokenizer: Any) -> Any:
    if not isinstance(recipe.student, PretrainedStudent):
        return tokenizer
    return load_tokenizer(resolve_model(recipe.student.model, "student.model"), "student.model")


def _check_length(recipe: Recipe, config: Any, role: str) -> None:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if longest and recipe.data.sequence_length > longest:
        raise RecipeError(
            f"data.sequence_length: {recipe.data.sequence_length} exceeds the {role}'s {longest} positions. "
            f"Use at most {longest}."
        )
