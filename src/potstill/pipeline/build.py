"""From what a recipe says to the parts that do it: the only place that branches on kinds.

Refuses combinations that cannot work, before any weight is loaded where that can be known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from potstill.data import PackedRows
from potstill.engines import (
    LocalEngine,
    MixtureEngine,
    TeacherEngine,
    TrainableCausal,
    load_model,
    load_tokenizer,
    pick_device,
    shares_of,
)
from potstill.engines.local import load_config
from potstill.errors import ModelError, RecipeError
from potstill.losses import HeadLoss, HeadTerm, HiddenLoss, Objective, Ramp, Schedule, can_compile
from potstill.pipeline.places import resolve_model
from potstill.recipes.losses import (
    ConstantRamp,
    CosineRamp,
    CrossEntropy,
    HiddenCosine,
    HiddenMSE,
    LinearRamp,
    LossTerm,
    SoftTerm,
    VocabularyTerm,
)
from potstill.recipes.schema import (
    CosineSchedule,
    FreshStudent,
    LayersStudent,
    LocalTeacher,
    Member,
    MixtureTeacher,
    Recipe,
    WSDSchedule,
)
from potstill.students import cut_layers, even_layers, fresh_model
from potstill.students.blocks import find_blocks
from potstill.training import Plan, learning_rate_factor
from potstill.types import Offer, Wants

__all__ = [
    "blank_model",
    "build_engine",
    "build_examiner",
    "build_objective",
    "build_plan",
    "build_stand_in",
    "build_teacher",
    "build_trainable",
    "check_losses",
    "check_sources",
    "compile_blocks",
    "count_steps",
    "fixed",
    "teacher_config",
    "teachers_of",
    "terms_of",
    "wants_of",
]

WORTH_COMPILING_OPERATIONS = 3e13
"""Floating-point operations of a training from which on compiling its blocks, some 20 seconds, is won back."""


def build_teacher(recipe: Recipe) -> TeacherEngine:
    """The teacher's engine, of a recipe whose assistant is settled. Its tokenizer and chat template are the run's."""
    device = pick_device(recipe.teacher.device, "teacher.device")
    engines = [
        build_engine(resolve_model(member.model, key), recipe.teacher.dtype, device, key)
        for key, member in teachers_of(recipe).items()
    ]
    if not isinstance(recipe.teacher, MixtureTeacher):
        return engines[0]
    members = recipe.teacher.members
    weights = [member.weight for member in members]
    return MixtureEngine(engines, weights, lambda source: [member.weight_for(source) for member in members])


def teachers_of(recipe: Recipe) -> Mapping[str, Member]:
    """The models that teach, each under its key in the recipe; one that teaches alone is its only member."""
    match recipe.teacher:
        case LocalTeacher(model=model):
            return {"teacher.model": Member(model=model)}
        case MixtureTeacher(members=members):
            return {f"teacher.members[{number}].model": member for number, member in enumerate(members)}
    raise ValueError("teacher.kind=run has no model of its own: settle the recipe first, when its assistant is trained")


def teacher_config(recipe: Recipe) -> Any:
    """The config of the model that teaches, of several the first one's; of a recipe whose assistant is settled."""
    key, first = next(iter(teachers_of(recipe).items()))
    return load_config(resolve_model(first.model, key), key)


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


def build_engine(model: str, dtype: str, device: Any, key: str) -> LocalEngine:
    """An engine for any arm's folder."""
    return LocalEngine(load_model(model, dtype, device, key), load_tokenizer(model, key))


def blank_model(config: Any, key: str) -> Any:
    """A model of this config without weights (on the meta device). Raises ModelError naming the recipe key."""
    with init_empty_weights():
        try:
            model = AutoModelForCausalLM.from_config(config)
        except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ModelError(
                f"{key}: {type(config).__name__} is not the config of a causal language model ({reason}). "
                "Use a decoder such as Llama, Qwen, Gemma, Mistral or GPT-2."
            ) from None
    model.tie_weights()  # leaving the weights out parts what is tied
    return model


def build_stand_in(recipe: Recipe, teacher: Any) -> Any:
    """A model as large as the student will be; which layers and weights it has is left open.

    Takes and makes models with weights or without. Raises RecipeError or ModelError where there can be no such student.
    """
    student = recipe.student
    if isinstance(student, LayersStudent):
        depth = teacher.config.get_text_config().num_hidden_layers
        keep = even_layers(depth, student.count) if isinstance(student.keep, str) and student.count else student.keep
        return cut_layers(teacher, [int(layer) for layer in keep])
    if isinstance(student, FreshStudent):
        return fresh_model(
            teacher.config, student.config.model_dump(exclude_none=True), recipe.seed, teacher.device.type
        )
    config = load_config(resolve_model(student.model, "student.model"), "student.model")
    return (
        blank_model(config, "student.model") if teacher.device.type == "meta" else fresh_model(config, {}, recipe.seed)
    )


def build_trainable(recipe: Recipe, student: Any) -> TrainableCausal:
    """The student in training mode, as the recipe wants it trained."""
    if recipe.training.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return TrainableCausal(student.train(), recipe.training.precision)


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
    positions = steps * recipe.training.batch_rows * recipe.data.sequence_length
    operations = 6 * positions * sum(parameter.numel() for parameter in student.parameters())
    if recipe.training.compile == "auto":
        return operations >= WORTH_COMPILING_OPERATIONS and can_compile(student.device.type)
    if recipe.training.compile and not can_compile(student.device.type):
        raise RecipeError(
            "training.compile: true needs a working C++ compiler with Python's headers (g++ and python3-dev). Install "
            "them, or say `auto`."
        )
    return recipe.training.compile


def check_losses(recipe: Recipe) -> None:
    """Raises RecipeError where a loss needs what the teacher cannot offer."""
    offers = LocalEngine.offers
    for index, term in enumerate(recipe.losses):
        need = term.needs and Offer(term.needs)
        if need and need not in offers:
            raise RecipeError(
                f"losses[{index}].kind={term.kind} needs {need.name}, but teacher.kind={recipe.teacher.kind} offers "
                f"{', '.join(sorted(offer.name for offer in offers))}. Remove this loss, or use another teacher."
            )


def terms_of(recipe: Recipe, arm: str) -> list[LossTerm]:
    """What this arm minimises: the student the recipe's losses, the control arm hard labels alone."""
    return list(recipe.losses) if arm == "student" else [CrossEntropy(kind="cross_entropy")]


def build_objective(
    terms: Sequence[LossTerm], vocabulary: int, student: Any, teacher: Any, *, everywhere: bool = True
) -> Objective:
    """The objective of these terms. `student` and `teacher` are model configs, for depths and widths.

    `everywhere` says that the teacher speaks at every supervised position: then all terms over the vocabulary share a
    pass. Raises RecipeError where a layer map names a layer that a model does not have.
    """
    head = [_head_term(term) for term in terms if isinstance(term, VocabularyTerm)]
    passes = [head] if everywhere else [[one for one in head if one.needs_teacher is soft] for soft in (True, False)]
    losses: list[HeadLoss | HiddenLoss] = [HeadLoss(own, vocabulary) for own in passes if own]
    configs = student.get_text_config(), teacher.get_text_config()
    widths = (configs[0].hidden_size, configs[1].hidden_size)
    depths = (configs[0].num_hidden_layers, configs[1].num_hidden_layers)
    for index, term in enumerate(terms):
        if not isinstance(term, VocabularyTerm):
            layers = _layer_map(term, depths, f"losses[{index}].layers")
            losses.append(HiddenLoss(term.kind, layers, widths, fixed(term.weight)))
    return Objective(losses, {term.kind: schedule for term in terms if (schedule := _schedule_of(term))})


def build_examiner(vocabulary: int) -> Objective:
    """The questions of validation, alike for every arm: forward KL to the teacher and cross-entropy, both at T = 1."""
    return Objective([HeadLoss([HeadTerm("forward_kl"), HeadTerm("cross_entropy")], vocabulary)])


def wants_of(objective: Objective) -> Wants:
    """What to read from the teacher for this objective."""
    return Wants(final=Offer.LOGITS in objective.needs, layers=objective.layers()[1])


def build_plan(recipe: Recipe, rows: PackedRows) -> Plan:
    """The numbers of the training, with its length in steps."""
    training = recipe.training
    minutes = training.checkpoint.every_minutes
    steps = count_steps(recipe, len(rows))
    return Plan(
        steps=steps,
        rate=functools.partial(_rate, steps=steps, peak=training.learning_rate, schedule=_schedule(recipe)),
        weight_decay=training.weight_decay,
        betas=training.betas,
        eps=training.eps,
        clip_norm=training.clip_norm,
        validate_every=training.validate_every or max(1, steps // 10),
        checkpoint_steps=training.checkpoint.every_steps,
        checkpoint_seconds=None if minutes is None else 60 * minutes,
    )


def count_steps(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of the training: as given, or enough for the tokens or epochs asked for."""
    training = recipe.training
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / (training.batch_rows * recipe.data.sequence_length))
    return max(1, math.ceil((training.epochs or 1.0) * rows / training.batch_rows))


def _head_term(term: VocabularyTerm) -> HeadTerm:
    weight = fixed(term.weight)
    if not isinstance(term, SoftTerm):
        return HeadTerm(term.kind, weight, settings=term.settings)
    squared = term.times_temperature_squared
    return HeadTerm(term.kind, weight, fixed(term.temperature), squared, term.settings, term.biased)


def fixed(number: float | LinearRamp | CosineRamp | ConstantRamp) -> float:
    """The number itself; 1 where it moves, since the schedule brings the rest."""
    if isinstance(number, ConstantRamp):
        return number.value
    return number if isinstance(number, float) else 1.0


def _schedule_of(term: LossTerm) -> Schedule | None:
    """What moves in this term, None if nothing does."""
    numbers = (term.weight, term.temperature if isinstance(term, SoftTerm) else 1.0)
    ramps = [Ramp(n.start, n.end, n.kind) if isinstance(n, LinearRamp | CosineRamp) else None for n in numbers]
    return Schedule(*ramps) if any(ramps) else None


def _layer_map(term: HiddenMSE | HiddenCosine, depths: tuple[int, int], key: str) -> Mapping[int, int]:
    """{student layer: teacher layer}; 0 is the embeddings' output. `depths` are the student's and the teacher's."""
    if term.layers == "last":
        return {depths[0]: depths[1]}
    if term.layers == "even":
        matched = even_layers(depths[1] + 1, depths[0] + 1)
        return dict(zip(range(1, depths[0] + 1), matched[1:], strict=True))
    for pair in term.layers.items():
        for role, depth, layer in zip(("student", "teacher"), depths, pair, strict=True):
            if layer > depth:
                raise RecipeError(
                    f"{key}: {{{pair[0]}: {pair[1]}}}, but the {role} has layers 0..{depth} (0 is the embeddings' "
                    "output). Use a layer in that range."
                )
    return term.layers


def _schedule(recipe: Recipe) -> dict[str, Any]:
    schedule = recipe.training.schedule
    settings: dict[str, Any] = {"kind": schedule.kind, "warmup": schedule.warmup}
    if isinstance(schedule, CosineSchedule | WSDSchedule):
        settings["final"] = schedule.final
    if isinstance(schedule, WSDSchedule):
        settings["decay"] = schedule.decay
    return settings


def _rate(step: int, *, steps: int, peak: float, schedule: dict[str, Any]) -> float:
    return peak * learning_rate_factor(step, steps, **schedule)
