"""From what a recipe says to the parts that do it: the only place that branches on kinds.

Refuses combinations that cannot work, before any weight is loaded where that can be known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from potstill import samples
from potstill.data import PackedRows
from potstill.engines import LocalEngine, load_model, load_tokenizer, pick_device
from potstill.engines.local import fingerprint_model
from potstill.errors import RecipeError
from potstill.losses import HeadLoss, HeadTerm, HiddenLoss, Objective
from potstill.recipes import fingerprint
from potstill.recipes.schema import (
    CosineSchedule,
    CrossEntropy,
    ForwardKL,
    HiddenCosine,
    HiddenMSE,
    LossTerm,
    Recipe,
    ReverseKL,
    WSDSchedule,
)
from potstill.samples.catalogue import sample_info
from potstill.students import even_layers
from potstill.training import Plan, learning_rate_factor
from potstill.types import Offer, Wants

__all__ = [
    "build_examiner",
    "build_objective",
    "build_plan",
    "build_teacher",
    "check_losses",
    "identify",
    "resolve_data",
    "resolve_model",
    "wants_of",
]

SAMPLE = "sample:"


def resolve_model(model: str, key: str) -> str:
    """A folder or hub id for what a recipe calls a model; fetches samples and converts .gguf files, each once."""
    if model.startswith(SAMPLE):
        return str(samples.fetch(model.removeprefix(SAMPLE)))
    if model.endswith(".gguf"):
        return str(_converted(Path(model), key))
    return model


def resolve_data(source: str) -> str:
    """A path or hub id for what a recipe calls a data source; fetches samples."""
    return str(samples.fetch(source.removeprefix(SAMPLE))) if source.startswith(SAMPLE) else source


def identify(source: str) -> str:
    """Which model or data this is, for fingerprints, without fetching anything: another file is another identity."""
    if source.startswith(SAMPLE):
        return sample_info(source.removeprefix(SAMPLE)).key
    path = Path(source)
    if path.is_file():
        stat = path.stat()
        return fingerprint([source, stat.st_size, stat.st_mtime_ns])
    return fingerprint([source, fingerprint_model(source)]) if path.is_dir() else source


def build_teacher(recipe: Recipe) -> LocalEngine:
    """The teacher's engine. Its tokenizer and chat template are the run's."""
    model = resolve_model(recipe.teacher.model, "teacher.model")
    device = pick_device(recipe.teacher.device, "teacher.device")
    return build_engine(model, recipe.teacher.dtype, device, "teacher.model")


def build_engine(model: str, dtype: str, device: Any, key: str) -> LocalEngine:
    """An engine for any arm's folder."""
    return LocalEngine(load_model(model, dtype, device, key), load_tokenizer(model, key))


def check_losses(recipe: Recipe) -> None:
    """Raises RecipeError where a loss needs what the teacher cannot offer."""
    offers = LocalEngine.offers
    needs = {ForwardKL: Offer.LOGITS, ReverseKL: Offer.LOGITS, HiddenMSE: Offer.HIDDEN, HiddenCosine: Offer.HIDDEN}
    for index, term in enumerate(recipe.losses):
        need = needs.get(type(term))
        if need is not None and need not in offers:
            raise RecipeError(
                f"losses[{index}].kind={term.kind} needs {need.name}, but teacher.kind={recipe.teacher.kind} offers "
                f"{', '.join(sorted(offer.name for offer in offers))}. Remove this loss, or use another teacher."
            )


def build_objective(terms: list[LossTerm], vocabulary: int, student: Any, teacher: Any) -> Objective:
    """The objective of these terms. `student` and `teacher` are model configs, for depths and widths."""
    head = [_head_term(term) for term in terms if isinstance(term, ForwardKL | ReverseKL | CrossEntropy)]
    losses: list[HeadLoss | HiddenLoss] = [HeadLoss(head, vocabulary)] if head else []
    widths = (student.hidden_size, teacher.hidden_size)
    for index, term in enumerate(terms):
        if isinstance(term, HiddenMSE | HiddenCosine):
            depths = (student.num_hidden_layers, teacher.num_hidden_layers)
            layers = _layer_map(term, depths, f"losses[{index}].layers")
            losses.append(HiddenLoss(term.kind, layers, widths, term.weight))
    return Objective(losses)


def build_examiner(vocabulary: int) -> Objective:
    """The questions of validation, the same for every arm: forward KL to the teacher and cross-entropy, both at T = 1."""
    return Objective([HeadLoss([HeadTerm("forward_kl"), HeadTerm("cross_entropy")], vocabulary)])


def wants_of(objective: Objective) -> Wants:
    """What to read from the teacher for this objective."""
    return Wants(final=Offer.LOGITS in objective.needs, layers=objective.layers()[1])


def build_plan(recipe: Recipe, rows: PackedRows) -> Plan:
    """The numbers of the training, with its length in steps."""
    training = recipe.training
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
        checkpoint_seconds=None if training.checkpoint.every_minutes is None else 60 * training.checkpoint.every_minutes,
    )


def count_steps(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of the training: as given, or enough for the tokens or epochs asked for."""
    training = recipe.training
    if training.steps is not None:
        return training.steps
    if training.tokens is not None:
        return math.ceil(training.tokens / (training.batch_rows * recipe.data.sequence_length))
    return max(1, math.ceil((training.epochs or 1.0) * rows / training.batch_rows))


def _converted(path: Path, key: str) -> Path:
    if not path.is_file():
        raise RecipeError(f"{key}: {path} does not exist. Give the path of a .gguf file, a folder, or a hub id.")
    folder = Path(platformdirs.user_cache_dir("potstill")) / "gguf" / identify(str(path))
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        samples.convert_gguf(path, part)
        part.rename(folder)
    return folder


def _head_term(term: ForwardKL | ReverseKL | CrossEntropy) -> HeadTerm:
    if isinstance(term, CrossEntropy):
        return HeadTerm("cross_entropy", term.weight)
    return HeadTerm(term.kind, term.weight, term.temperature, term.times_temperature_squared)


def _layer_map(term: HiddenMSE | HiddenCosine, depths: tuple[int, int], key: str) -> Mapping[int, int]:
    """{student layer: teacher layer}; 0 is the embeddings' output."""
    if term.layers == "last":
        return {depths[0]: depths[1]}
    if term.layers == "even":
        matched = even_layers(depths[1] + 1, depths[0] + 1)
        return dict(zip(range(1, depths[0] + 1), matched[1:], strict=True))
    for role, depth, layers in zip(("student", "teacher"), depths, (term.layers.keys(), term.layers.values()), strict=True):
        for layer in layers:
            if layer > depth:
                raise RecipeError(f"{key}: the {role} has layers 0..{depth}, got {layer}. Use a layer in that range.")
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
