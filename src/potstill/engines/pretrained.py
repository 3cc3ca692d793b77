"""Encoders from folders and the hub, each in the class that its role asks for, with labels by name.

Refuses a model that lacks weights, but for a head that may be drawn, and a ready classifier whose labels are others.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from potstill.engines.encoder import score_layer
from potstill.engines.local import DTYPES, load_config, load_part
from potstill.engines.probing import probe_encoder
from potstill.errors import ModelError
from potstill.types import Role

__all__ = ["load_encoder"]

_log = logging.getLogger(__name__)

_CLASSES = {
    Role.MASKED: AutoModelForMaskedLM,
    Role.CLASSIFIER: AutoModelForSequenceClassification,
    Role.TOKEN_CLASSIFIER: AutoModelForTokenClassification,
    Role.ENCODER: AutoModel,
}
_READY = {Role.CLASSIFIER: "ForSequenceClassification", Role.TOKEN_CLASSIFIER: "ForTokenClassification"}
_SINGLE, _MULTI = "single_label_classification", "multi_label_classification"
_GENERIC = re.compile(r"LABEL_\d+")


def load_encoder(
    model: str,
    role: Role,
    dtype: str,
    device: torch.device,
    *,
    key: str,
    labels: Sequence[str] | None = None,
    in_order: bool = False,
    multi_label: bool = False,
    pooling: str = "cls",
    normalise: bool = True,
    fresh_head: bool = False,
    eager: bool = False,
    seed: int = 0,
) -> Any:
    """A model of this role with all its weights, probed (see `probe_encoder`), on `device`; its classes are `labels`.

    A ready classifier has its outputs put into the order of `labels` by name; one that names them LABEL_0, LABEL_1, ...
    is taken in their order if `in_order` allows it (labels that the recipe gives), which is logged. `fresh_head` lets
    the weights of a head that the model lacks be drawn from `seed`. `eager` is for attention maps. `normalise` is for
    the probe alone.

    Raises ModelError naming the recipe key: weights are missing; other labels; a classifier for another kind of answer;
    a `pooling` that the architecture has no setting for.
    """
    config = load_config(model, key)
    ready = any(name.endswith(_READY[role]) for name in config.architectures or ()) if role in _READY else False
    if role is Role.CLASSIFIER:
        _settle_answers(config, pooling, multi_label, ready, key=key)
    if role in _READY and not ready:
        _name_outputs(config, labels, key=key)
    loaded, notes = _load(model, role, config, key=key, dtype=DTYPES[dtype], eager=eager, seed=seed)
    _check_missing(loaded, sorted(notes["missing_keys"]), fresh_head, f"{key}: {model}")
    if ready and labels is not None:
        _order_outputs(loaded, labels, in_order, key=key)
    loaded.to(device)
    probe_encoder(loaded, role, key, pooling=pooling, normalise=normalise)
    return loaded


def _load(model: str, role: Role, config: Any, *, key: str, dtype: torch.dtype, eager: bool, seed: int) -> Any:
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if eager:
        options["attn_implementation"] = "eager"
    if role is Role.ENCODER and type(config) in MODEL_MAPPING:  # a pooler is a head for another task than this
        body = MODEL_MAPPING[type(config)]
        if "add_pooling_layer" in inspect.signature(body).parameters:
            options["add_pooling_layer"] = False
    with torch.random.fork_rng(), _without_report():
        torch.manual_seed(seed)
        return load_part(_CLASSES[role].from_pretrained, model, key, **options)


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps transformers from printing a table of missing weights, which are judged here."""
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def _settle_answers(config: Any, pooling: str, multi_label: bool, ready: bool, *, key: str) -> None:
    """What a classifier's scores are made of, and whether classes exclude each other: as asked, or as it was made."""
    own, has = getattr(config, "classifier_pooling", "cls"), hasattr(config, "classifier_pooling")
    if pooling != own and (ready or not has):
        raise ModelError(
            f"{key}: a classifier of the kind {config.model_type} "
            f"{'that pools by ' + own + ' is here' if has else 'has no setting for its pooling'}, and task.pooling is "
            f"{pooling}. Set task.pooling: {own}{'' if has else ', or use an architecture such as ModernBERT'}."
        )
    if has:
        config.classifier_pooling = pooling
    asked = _MULTI if multi_label else _SINGLE
    if ready and config.problem_type not in (None, asked):
        raise ModelError(
            f"{key}: the classifier was trained for {config.problem_type}, the task is {asked}. Set task.multi_label, "
            "or give another model."
        )
    config.problem_type = asked


def _name_outputs(config: Any, labels: Sequence[str] | None, *, key: str) -> None:
    if labels is None:
        raise ModelError(f"{key}: the model is no ready classifier and nobody named its classes. Set task.labels.")
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: number for number, name in enumerate(labels)}


def _check_missing(loaded: Any, missing: list[str], fresh_head: bool, what: str) -> None:
    """Only weights outside the body, or of its pooler, which belongs to a task, may be drawn."""
    body = f"{loaded.base_model_prefix}." if loaded.base_model is not loaded else ""
    lacking = [name for name in missing if name.startswith(body) and ".pooler." not in name] if fresh_head else missing
    if lacking:
        raise ModelError(
            f"{what} lacks weights of {type(loaded).__name__} ({len(lacking)}; {lacking[0]} is the first), which would "
            "be random numbers. Give a whole checkpoint for this task; a teacher without a head is first trained with "
            "teacher.kind=finetune."
        )


def _order_outputs(loaded: Any, labels: Sequence[str], in_order: bool, *, key: str) -> None:
    """Put the outputs of a ready classifier into the order of `labels`, by name."""
    config = loaded.config
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if in_order and len(own) == len(labels) and all(_GENERIC.fullmatch(name) for name in own):
        _log.warning(
            "%s: its outputs have no names; they are taken to be task.labels in order: %s", key, ", ".join(labels)
        )
        own = list(labels)
    _check_names(own, labels, key=key)
    layer, order = score_layer(loaded), [own.index(name) for name in labels]
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order].clone())
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[order].clone())
    _name_outputs(config, labels, key=key)


def _check_names(own: Sequence[str], labels: Sequence[str], *, key: str) -> None:
    strange, absent = sorted(set(own) - set(labels)), sorted(set(labels) - set(own))
    if not strange and not absent and len(own) == len(labels):
        return
    if all(_GENERIC.fullmatch(name) for name in own):
        raise ModelError(
            f"{key}: the classifier's {len(own)} outputs have no names (LABEL_0, ...), the task has {len(labels)} "
            f"labels. Set task.labels to {len(own)} names in the order of its outputs."
        )
    raise ModelError(
        f"{key}: the classifier's labels are not the task's: only the model has {_listing(strange)}; only the task has "
        f"{_listing(absent)}. Rename the data's labels, set task.labels, or give another model."
    )


def _listing(names: Sequence[str]) -> str:
    return (", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")) if names else "none"
