"""What can be known of a run before any weight is loaded: sizes, and whether its parts fit each other.

Refuses whatever would fail hours later: layers that are not there, rows longer than the models' positions, vocabularies
that differ, devices and packages that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from potstill.engines import load_tokenizer, pick_device
from potstill.engines.local import load_config
from potstill.errors import RecipeError
from potstill.pipeline import build
from potstill.pipeline.chain import before, blaming, load_chain, phases_of, runs_folder, student_folder
from potstill.pipeline.disk import check_disk, folder_bytes
from potstill.pipeline.layers import count_layers
from potstill.pipeline.metrics import check_trackers
from potstill.pipeline.objective import Answers, build_objective, check_losses
from potstill.pipeline.places import resolve_data, resolve_model, source_bytes
from potstill.pipeline.recall import check_signals, check_store, spec_for
from potstill.pipeline.run import is_trained
from potstill.pipeline.suitability import check_task
from potstill.recipes import Recipe
from potstill.recipes.schema import (
    FinetuneTeacher,
    LayersStudent,
    OnlineSignals,
    OpenAITeacher,
    PretrainedStudent,
    StoredSignals,
)
from potstill.recipes.signals import DenseSignals
from potstill.signals import check_place, encoding_of, is_remote, shared_vocabulary
from potstill.students import check_static_packages
from potstill.types import Role

__all__ = [
    "SPEED_TOKENS",
    "Inspection",
    "check_store_room",
    "count_parameters",
    "inspect_recipe",
    "stage_bytes",
]

PREPARED_BYTES = 7
"""Disk per byte of text while it is packed: 20 bytes a token (three int32 and the spool), 3 characters a token."""

CHARACTERS_A_TOKEN = 3
"""At least so many bytes of text make a token, on the whole."""

SPEED_TOKENS = 16
"""New tokens a prompt when decode speed is measured: enough for a rate, few enough not to be waited for."""

SMALL_BYTES = 64 * 2**20
"""What a stage that writes no weights may need: pages, measurements, logs."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The parts of a run without weights. Models are on the meta device; of several teachers the first one leads."""

    teachers: tuple[Any, ...]
    student: Any
    tokenizer: Any
    student_tokenizer: Any
    vocabulary: int
    record_bytes: int = 0
    """Of what a store keeps of one position; 0 where nothing is stored."""

    @property
    def teacher_parameters(self) -> int:
        """Weights of all teachers, tied ones once."""
        return sum(map(count_parameters, self.teachers))

    @property
    def student_parameters(self) -> int:
        """Weights of the student, tied ones once."""
        return count_parameters(self.student)


def inspect_recipe(recipe: Recipe) -> Inspection:
    """Look at configs and tokenizers, and check that the recipe can be run. Fetches samples and configs, no weights.

    An assistant that is not trained yet is known by its own recipe. Raises RecipeError, ModelError, VocabularyMismatch,
    SampleError or MissingExtra naming the recipe's key.
    """
    check_task(recipe)
    check_losses(recipe)
    check_signals(recipe)
    check_trackers(recipe.training.trackers)
    pick_device(recipe.teacher.device, "teacher.device")
    pick_device(recipe.training.device, "training.device")
    for number, phase in enumerate(phases_of(recipe)):
        with blaming(phase, f"phases[{number}]"):
            inspect_recipe(phase)
    teachers, tokenizer = _blank_teachers(recipe)
    for teacher in teachers:
        _check_length(recipe, teacher, "teacher")
    student = _blank_student(recipe, teachers[0] if teachers else None)
    _check_length(recipe, student, "student")
    build.check_trainable(recipe, recipe.training, student)
    if isinstance(recipe.teacher, FinetuneTeacher):
        build.check_trainable(recipe, recipe.teacher.training, teachers[0], "teacher.training")
    student_tokenizer = _student_tokenizer(recipe, tokenizer)
    if recipe.over_texts:
        return _inspect_texts(
            recipe, Inspection(teachers, student, tokenizer or student_tokenizer, student_tokenizer, 0)
        )
    found = _inspect_tokens(recipe, Inspection(teachers, student, tokenizer or student_tokenizer, student_tokenizer, 0))
    if not isinstance(recipe.signals, StoredSignals):
        return found
    spec = spec_for(recipe, found.vocabulary, teachers[0].config if teachers else None)
    if recipe.signals.store:
        check_place(recipe.signals.store)
        check_store(recipe, spec)
    return replace(found, record_bytes=encoding_of(spec).stride)


def _inspect_tokens(recipe: Recipe, found: Inspection) -> Inspection:
    """The same with the tokens that all models share, for a task over tokens; tries the losses on them."""
    vocabulary = shared_vocabulary(found.tokenizer, found.student_tokenizer)
    teacher = found.teachers[0].config if found.teachers else None
    with init_empty_weights():
        build_objective(recipe.losses, Answers.of(recipe, vocabulary), found.student.config, teacher)
    heads = [model.get_output_embeddings().weight.shape[0] for model in (*found.teachers, found.student)]
    return replace(found, vocabulary=min(vocabulary, *heads))


def _inspect_texts(recipe: Recipe, found: Inspection) -> Inspection:
    """What can be known of a task over texts before its labels are: layer maps, tokenizers, packages."""
    teacher = found.teachers[0].config if found.teachers else None
    with init_empty_weights():
        build_objective(recipe.losses, Answers.of(recipe, 2), found.student.config, teacher)
    online = isinstance(recipe.signals, OnlineSignals) and found.teachers
    behind = isinstance(recipe.signals, DenseSignals) and recipe.signals.features
    if (online or behind) and any(term.needs for term in recipe.losses):
        shared_vocabulary(found.tokenizer, found.student_tokenizer)  # both read the same tokens
    if recipe.static:
        check_static_packages()
    if isinstance(recipe.signals, StoredSignals) and recipe.signals.store:
        check_place(recipe.signals.store)
    return found


def count_parameters(model: Any) -> int:
    """Weights of a model, tied ones counted once."""
    return sum(int(parameter.numel()) for parameter in model.parameters())


def stage_bytes(recipe: Recipe, found: Inspection) -> Mapping[str, int]:
    """Disk that each stage may need at most, as far as that is known beforehand."""
    weights = 4 * found.student_parameters
    # A checkpoint holds the weights and two moments; one more is written before the oldest goes; then the result.
    training = 3 * weights * (recipe.training.checkpoint.keep + 1) + weights
    trained = isinstance(recipe.teacher, FinetuneTeacher)
    return {
        "prepare": _prepared_bytes(recipe) + SMALL_BYTES,
        **({"finetune": 4 * 5 * found.teacher_parameters + SMALL_BYTES} if trained else {}),
        **({"static": SMALL_BYTES + 4 * 4 * 40_000 * recipe.static.dimensions} if recipe.static else {}),
        "initialise": weights + SMALL_BYTES,
        **_captured_bytes(recipe, found),
        "train": training + SMALL_BYTES,
        "control": training + SMALL_BYTES,
        "evaluate": SMALL_BYTES,
        "report": SMALL_BYTES,
    }


def _prepared_bytes(recipe: Recipe) -> int:
    """Packed rows: by the size of the source where it is here, and by the tokens that are read of it at most."""
    here = PREPARED_BYTES * source_bytes(resolve_data(recipe.data.source))
    most = round(PREPARED_BYTES * CHARACTERS_A_TOKEN * (recipe.data.max_tokens or 0))
    return min(here or most, most or here)


def _captured_bytes(recipe: Recipe, found: Inspection) -> Mapping[str, int]:
    """What a capture writes beside the run: held-out lessons with the teacher's head. Its store is elsewhere."""
    if not isinstance(recipe.signals, StoredSignals) or recipe.over_texts:
        return {}
    held_out = recipe.training.validation_rows * recipe.data.sequence_length
    widths = [model.config.get_text_config().hidden_size for model in found.teachers]
    return {"capture": 4 * sum(widths) * (held_out + found.vocabulary) + SMALL_BYTES}


def check_store_room(recipe: Recipe, found: Inspection) -> None:
    """Refuse a store for which its disk has no room, as far as that is known before the data is read.

    Its size follows from the tokens of the training, or, where these are not given, from the data's. What lies there
    already counts as a part of it. Raises RunError.
    """
    signals = recipe.signals
    if recipe.over_texts or not isinstance(signals, StoredSignals) or (signals.store and is_remote(signals.store)):
        return
    steps = 0 if recipe.training.epochs else build.count_steps(recipe, 0)
    asked = steps * recipe.training.batch_rows * recipe.data.sequence_length
    there = _prepared_bytes(recipe) // (PREPARED_BYTES * CHARACTERS_A_TOKEN)
    size = round(signals.share * min(asked or there, there or asked)) * found.record_bytes
    place = Path(signals.store).expanduser() if signals.store else runs_folder(recipe) / "signals"
    check_disk(place, size - folder_bytes(place), "what the teacher will say", "signals.store")


def _blank_teachers(recipe: Recipe) -> tuple[tuple[Any, ...], Any]:
    """The models that teach, without weights, and the tokenizer of the first."""
    role = Role(recipe.task.kind)
    for assistant in load_chain(recipe)[:1]:
        if is_trained(assistant):
            folder = str(student_folder(assistant))
            model = build.blank_model(load_config(folder, "teacher.recipe"), "teacher.recipe", role)
            return (model,), load_tokenizer(folder, "teacher.recipe")
        with blaming(assistant):
            found = inspect_recipe(assistant)
        return (found.student,), found.student_tokenizer
    places = {key: resolve_model(member.model, key) for key, member in build.teachers_of(recipe).items()}
    models = tuple(build.blank_model(load_config(place, key), key, role) for key, place in places.items())
    tokenizers = {key: load_tokenizer(place, key) for key, place in places.items()}
    if not models:
        return (), _endpoints_tokenizer(recipe)
    first, *others = tokenizers
    if not recipe.over_texts:
        for key in others:
            shared_vocabulary(tokenizers[first], tokenizers[key], key)
        _check_writing(recipe, models)
    return models, tokenizers[first]


def _endpoints_tokenizer(recipe: Recipe) -> Any:
    """That of an endpoint which scores the student's tokens; None of every other teacher that is not here."""
    named = recipe.teacher.tokenizer if isinstance(recipe.teacher, OpenAITeacher) else None
    if named is None or recipe.generate or recipe.over_texts:
        return None
    return load_tokenizer(resolve_model(named, "teacher.tokenizer"), "teacher.tokenizer")


def _check_writing(recipe: Recipe, models: Sequence[Any]) -> None:
    """Refuse a member with fewer positions than samples may take: prompts are cut to the first member's."""
    settings = recipe.evaluation
    needed = max(recipe.data.sequence_length, settings.sample_tokens) + max(settings.sample_tokens, SPEED_TOKENS)
    first, *others = map(_longest, models)
    for number, longest in enumerate(others, start=1):
        if settings.sample_prompts and longest and longest < min(needed, first or needed):
            raise RecipeError(
                f"teacher.members[{number}].model: has {longest} positions, but a prompt of the evaluation with its "
                f"continuation may take {min(needed, first or needed)}. Lower data.sequence_length or "
                "evaluation.sample_tokens."
            )


def _blank_student(recipe: Recipe, teacher: Any) -> Any:
    for phase in before(recipe):
        config = inspect_recipe(phase).student.config
        return build.blank_model(config, "phases", Role(recipe.task.kind))
    if teacher is None and getattr(recipe.student, "model", None) is None:
        raise RecipeError(
            f"student.kind: {recipe.student.kind} is made from the teacher's model, but teacher.kind="
            f"{recipe.teacher.kind} has none here. Use student.kind=model, or layers of a student.model."
        )
    if isinstance(recipe.student, LayersStudent):
        count_layers(recipe.student, _config_to_cut(recipe.student, teacher).get_text_config().num_hidden_layers)
    with init_empty_weights():
        student = build.build_stand_in(recipe, teacher)
    student.tie_weights()  # leaving the weights out parts what is tied
    return student


def _config_to_cut(student: LayersStudent, teacher: Any) -> Any:
    """Of the model whose layers are cut: the student's own, or the teacher's."""
    own = student.model
    return teacher.config if own is None else load_config(resolve_model(own, "student.model"), "student.model")


def _student_tokenizer(recipe: Recipe, tokenizer: Any) -> Any:
    for phase in before(recipe):
        return inspect_recipe(phase).student_tokenizer
    own = recipe.student.model if isinstance(recipe.student, PretrainedStudent | LayersStudent) else None
    return tokenizer if own is None else load_tokenizer(resolve_model(own, "student.model"), "student.model")


def _check_length(recipe: Recipe, model: Any, role: str) -> None:
    longest = _longest(model)
    if longest and recipe.data.sequence_length > longest:
        raise RecipeError(
            f"data.sequence_length: {recipe.data.sequence_length} exceeds the {role}'s {longest} positions. "
            f"Use at most {longest}."
        )


def _longest(model: Any) -> int | None:
    """Positions that a model was made for; None where it does not say."""
    text = model.config.get_text_config()
    longest: int | None = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    # RoBERTa and its kin count positions on from the padding token's number: 514 of them hold 512 tokens.
    unused = max(
        (1 + padding for table in tables if (padding := getattr(table, "padding_idx", None)) is not None), default=0
    )
    return longest and longest - unused
