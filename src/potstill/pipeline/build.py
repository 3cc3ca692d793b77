"""From what a recipe says to the parts that do it: the only place that branches on kinds.

Refuses combinations that cannot work, before any weight is loaded where that can be known.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from potstill.data import LabelledText, Split
from potstill.engines import (
    EnsembleEngine,
    MixtureEngine,
    RecordedReader,
    load_tokenizer,
    pick_device,
    read_recorded,
    shares_of,
)
from potstill.engines.local import load_config
from potstill.errors import ModelError, RecipeError
from potstill.losses import can_compile
from potstill.pipeline.cast import Cast, cast_of
from potstill.pipeline.places import resolve_model
from potstill.recipes.schema import (
    CosineSchedule,
    FinetuneTeacher,
    FreshStudent,
    LayersStudent,
    LinearSchedule,
    LocalTeacher,
    Member,
    MixtureTeacher,
    OpenAITeacher,
    Recipe,
    RecordedTeacher,
    RunTeacher,
    Training,
    WSDSchedule,
)
from potstill.students import (
    add_adapters,
    cut_layers,
    even_layers,
    find_dropout,
    find_targets,
    fresh_model,
    set_dropout,
    to_distilbert,
)
from potstill.students.blocks import find_blocks
from potstill.training import Plan, learning_rate_factor
from potstill.types import Role

__all__ = [
    "blank_model",
    "build_engine",
    "build_plan",
    "build_stand_in",
    "build_teacher",
    "build_trainable",
    "check_recorded",
    "check_sources",
    "check_trainable",
    "compile_blocks",
    "count_steps",
    "open_recorded",
    "ready_labels",
    "steps_of",
    "teacher_config",
    "teachers_of",
]

AUTO_CLASSES = {
    Role.CAUSAL: AutoModelForCausalLM,
    Role.MASKED: AutoModelForMaskedLM,
    Role.CLASSIFIER: AutoModelForSequenceClassification,
    Role.TOKEN_CLASSIFIER: AutoModelForTokenClassification,
    Role.ENCODER: AutoModel,
}
"""Whose class transformers finds for a config."""

WORTH_COMPILING_OPERATIONS = 3e13
"""Floating-point operations of a training from which on compiling its blocks, some 20 seconds, is won back."""


def build_teacher(recipe: Recipe, prepared: Path | None = None, *, eager: bool = False) -> Any:
    """The teacher's engine, of a recipe whose assistant is settled. Its tokenizer and chat template are the run's.

    `prepared` is where a task over texts finds its labels; `eager` is for attention maps.
    """
    cast = cast_of(recipe, prepared)
    device = pick_device(recipe.teacher.device, "teacher.device")
    engines = [
        build_engine(resolve_model(member.model, key), recipe.teacher.dtype, device, key, cast=cast, eager=eager)
        for key, member in teachers_of(recipe).items()
    ]
    if not isinstance(recipe.teacher, MixtureTeacher):
        return engines[0]
    members = recipe.teacher.members
    weights = [member.weight for member in members]
    if not cast.causal:
        return EnsembleEngine(engines, weights, multi_label=cast.multi_label)
    return MixtureEngine(engines, weights, lambda source: [member.weight_for(source) for member in members])


def open_recorded(teacher: RecordedTeacher, cast: Cast) -> RecordedReader:
    """Answers that were recorded, as a teacher."""
    return read_recorded(
        teacher.path,
        match=teacher.match,
        text=teacher.text,
        pair=teacher.text_pair,
        probabilities=teacher.probabilities,
        label=teacher.label,
        labels=cast.labels,
        multi_label=cast.multi_label,
    )


def check_recorded(recipe: Recipe, cast: Cast, texts: Mapping[Split, Sequence[LabelledText]]) -> None:
    """Raises DataError for texts of which no answer was recorded, before hours of training end at the first of them.

    `texts` are those of each split. Says nothing of a recipe whose teacher is a model.
    """
    if not isinstance(recipe.teacher, RecordedTeacher):
        return
    # Of the test texts only some are asked about where the evaluation is limited.
    asked = [split for split in texts if split != "test" or recipe.evaluation.max_documents is None]
    named = [text for split in asked for text in texts[split] if text.origin is None]
    open_recorded(recipe.teacher, cast).rows_of([text.id for text in named], [text.key for text in named])


def teachers_of(recipe: Recipe) -> Mapping[str, Member]:
    """The models that teach, each under its key in the recipe; one that teaches alone is its only member.

    Of a teacher that is trained first, the model that it begins as; none of recorded answers, of an API, and of
    one that only writes.
    """
    if recipe.generate:
        return {}
    match recipe.teacher:
        case LocalTeacher(model=model) | FinetuneTeacher(model=model):
            return {"teacher.model": Member(model=model)}
        case MixtureTeacher(members=members):
            return {f"teacher.members[{number}].model": member for number, member in enumerate(members)}
        case RecordedTeacher() | OpenAITeacher():
            return {}
    raise ValueError("teacher.kind=run has no model of its own: settle the recipe first, when its assistant is trained")


def ready_labels(recipe: Recipe) -> tuple[str, ...] | None:
    """The classes of a teacher that is a ready classifier and names them; None of any other."""
    config = None if isinstance(recipe.teacher, FinetuneTeacher | RunTeacher) else teacher_config(recipe)
    if config is None or not any(name.endswith("Classification") for name in config.architectures or ()):
        return None
    names = tuple(config.id2label[number] for number in range(config.num_labels))
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def teacher_config(recipe: Recipe) -> Any:
    """The config of the model that teaches, of several the first one's; None where none is here.

    Of a recipe whose assistant is settled.
    """
    for key, first in teachers_of(recipe).items():
        return load_config(resolve_model(first.model, key), key)
    return None


def check_sources(recipe: Recipe, sources: Iterable[str], *, complete: bool = True) -> None:
    """Raises RecipeError naming a source on which no member of the teacher has a say, or a pattern that fits none.

    `complete` says that there are no other sources.
    """
    if not isinstance(recipe.teacher, MixtureTeacher):
        return
    found = sorted(sources)
    for source in found:
        shares_of([member.weight_for(source) for member in recipe.teacher.members], source)
    for number, member in enumerate(recipe.teacher.members):
        idle = [pattern for pattern in member.sources if not any(fnmatchcase(source, pattern) for source in found)]
        if complete and idle:
            raise RecipeError(
                f"teacher.members[{number}].sources: {', '.join(idle)} fits none of the sources: "
                f"{', '.join(found[:8])}{', ...' if len(found) > 8 else ''}. Patterns are for file names, without "
                "folders, and mind the case."
            )


def build_engine(
    model: str, dtype: str, device: Any, key: str, *, cast: Cast | None = None, eager: bool = False
) -> Any:
    """An engine for any arm's folder; of a language model where `cast` says nothing else."""
    cast = cast or Cast(Role.CAUSAL)
    return cast.engine(cast.load(model, dtype, device, key, eager=eager), load_tokenizer(model, key))


def blank_model(config: Any, key: str, role: Role = Role.CAUSAL) -> Any:
    """A model of this config without weights (on the meta device). Raises ModelError naming the recipe key."""
    with init_empty_weights():
        try:
            model = AUTO_CLASSES[role].from_config(config)
        except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            wanted = "a decoder such as Llama, Qwen, Gemma, Mistral or GPT-2"
            if role is not Role.CAUSAL:
                wanted = "an encoder such as BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT"
            raise ModelError(
                f"{key}: {type(config).__name__} is not the config of a model for {_WHAT[role]} ({reason}). "
                f"Use {wanted}."
            ) from None
    model.tie_weights()  # leaving the weights out parts what is tied
    return model


_WHAT = {
    Role.CAUSAL: "causal language modelling",
    Role.MASKED: "masked language modelling",
    Role.CLASSIFIER: "classification",
    Role.TOKEN_CLASSIFIER: "token classification",
    Role.ENCODER: "embedding",
}


def build_stand_in(recipe: Recipe, teacher: Any) -> Any:
    """A model as large as the student will be; which layers and weights it has is left open.

    Takes and makes models with weights or without; `teacher` is None where none is here. Raises RecipeError or
    ModelError where there can be no such student.
    """
    student, role = recipe.student, Role(recipe.task.kind)
    if isinstance(student, LayersStudent):
        teacher = teacher if student.model is None else _model_like(student.model, teacher, role, recipe.seed)
        depth = teacher.config.get_text_config().num_hidden_layers
        keep = even_layers(depth, student.count) if isinstance(student.keep, str) and student.count else student.keep
        cut = cut_layers(teacher, [int(layer) for layer in keep])
        return to_distilbert(cut) if student.architecture == "distilbert" else cut
    if isinstance(student, FreshStudent):
        sizes = student.config.model_dump(exclude_none=True)
        return fresh_model(teacher.config, sizes, recipe.seed, teacher.device.type, kind=AUTO_CLASSES[role])
    return _model_like(student.model, teacher, role, recipe.seed)


def _model_like(model: str, teacher: Any, role: Role, seed: int) -> Any:
    """A model of this one's config, with random weights where the teacher has some, else without."""
    config = load_config(resolve_model(model, "student.model"), "student.model")
    if teacher is None or teacher.device.type == "meta":
        return blank_model(config, "student.model", role)
    return fresh_model(config, {}, seed, kind=AUTO_CLASSES[role])


def build_trainable(recipe: Recipe, student: Any, training: Training | None = None) -> nn.Module:
    """The student in training mode, as the recipe (or another training of it, the teacher's) wants it trained."""
    settings = training or recipe.training
    where = "training" if training is None else "teacher.training"
    check_trainable(recipe, settings, student, where)
    if settings.dropout is not None:
        set_dropout(student, settings.dropout)
    if settings.lora is not None:
        add_adapters(student, **settings.lora.model_dump(), key=f"{where}.lora")
    if settings.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
    if settings.gradient_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    return cast_of(recipe).trainable(student.train(), settings.precision)


def check_trainable(recipe: Recipe, training: Training, student: Any, where: str = "training") -> None:
    """Raises RecipeError or MissingExtra where this training asks for dropout or adapters that the model cannot have.

    A model without weights will do. `where` is the training's key.
    """
    if training.dropout and not find_dropout(student):
        raise RecipeError(
            f"{where}.dropout={training.dropout:g}: {type(student).__name__} has nothing to drop. Leave it out."
        )
    if training.lora is None:
        return
    if Role(recipe.task.kind) is not Role.CAUSAL:
        raise RecipeError(
            f"{where}.lora: is for language models, but task.kind={recipe.task.kind}, whose models are small enough to "
            "be trained whole, and must be where their heads are new. Leave lora out."
        )
    find_targets(student, training.lora.targets, f"{where}.lora")


def compile_blocks(recipe: Recipe, steps: int, student: Any, teachers: Sequence[Any]) -> None:
    """Compile the blocks of student and teachers where the recipe says so, or where a training is long enough to pay.

    All blocks of a model share one compiled function. Raises RecipeError where it is asked for and cannot be done.
    """
    # What was compiled before, for the other arm or the layer search, would be used again where its shapes fit: a run
    # that was interrupted in between would then compute with other code than one that was not.
    torch._dynamo.reset()
    if not _worth_compiling(recipe, steps, student):
        return
    # Past this limit torch falls back to uncompiled code, silently; packed and unpacked batches, training and
    # validation, and each type of block are one variant each.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for model in (student, *teachers):
        for block in find_blocks(model)[1]:
            block.compile(dynamic=False)


def _worth_compiling(recipe: Recipe, steps: int, student: Any) -> bool:
    insides = [term.kind for term in recipe.losses if term.needs in ("attention", "vectors")]
    positions = steps * recipe.training.batch_rows * recipe.data.sequence_length
    operations = 6 * positions * sum(parameter.numel() for parameter in student.parameters())
    if recipe.training.compile == "auto":
        worth = operations >= WORTH_COMPILING_OPERATIONS and not recipe.over_texts and not insides
        return worth and can_compile(student.device.type)
    if recipe.training.compile and insides:
        raise RecipeError(
            f"training.compile: true, but {insides[0]} looks into the blocks, of which every one would be compiled for "
            "itself. Say `auto`, or remove this loss."
        )
    if recipe.training.compile and not can_compile(student.device.type):
        raise RecipeError(
            "training.compile: true needs a working C++ compiler with Python's headers (g++ and python3-dev). Install "
            "them, or say `auto`."
        )
    return recipe.training.compile


def build_plan(training: Training, steps: int) -> Plan:
    """The numbers of a training of so many steps."""
    minutes = training.checkpoint.every_minutes
    return Plan(
        steps=steps,
        rate=functools.partial(_rate, steps=steps, peak=training.learning_rate, schedule=_schedule(training)),
        weight_decay=training.weight_decay,
        betas=training.betas,
        eps=training.eps,
        clip_norm=training.clip_norm,
        validate_every=training.validate_every or max(1, steps // 10),
        checkpoint_steps=training.checkpoint.every_steps,
        checkpoint_seconds=None if minutes is None else 60 * minutes,
    )


def count_steps(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of the recipe's training: as given, or enough for the tokens or epochs asked for."""
    return steps_of(recipe.training, recipe.data.sequence_length, rows)


def steps_of(training: Training, sequence_length: int, rows: int) -> int:
    """Optimiser steps of a training over so many rows: as given, or enough for the tokens or epochs asked for."""
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / (training.batch_rows * sequence_length))
    return max(1, math.ceil((training.epochs or 1.0) * rows / training.batch_rows))


def _schedule(training: Training) -> dict[str, Any]:
    schedule = training.schedule
    settings: dict[str, Any] = {"kind": schedule.kind, "warmup": schedule.warmup}
    if isinstance(schedule, CosineSchedule | LinearSchedule | WSDSchedule):
        settings["final"] = schedule.final
    if isinstance(schedule, WSDSchedule):
        settings["decay"] = schedule.decay
    return settings


def _rate(step: int, *, steps: int, peak: float, schedule: dict[str, Any]) -> float:
    return peak * learning_rate_factor(step, steps, **schedule)
