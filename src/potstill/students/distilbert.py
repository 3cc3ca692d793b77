"""From a BERT, already cut, to a DistilBERT of the same numbers: no token types, no pooler, other names.

Sanh et al. (2019), arXiv:1910.01108, section 3. Refuses any other architecture, and a BERT of which DistilBERT has no
counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)

from potstill.errors import ModelError

__all__ = ["to_distilbert"]

_CLASSES: Mapping[type[nn.Module], Any] = {
    BertModel: DistilBertModel,
    BertForMaskedLM: DistilBertForMaskedLM,
    BertForSequenceClassification: DistilBertForSequenceClassification,
    BertForTokenClassification: DistilBertForTokenClassification,
}

EPSILON = 1e-12
"""Of every layer norm of a DistilBERT, which has no setting for it."""

_IN_LAYER = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
_IN_HEAD = {
    "cls.predictions.transform.dense.": "vocab_transform.",
    "cls.predictions.transform.LayerNorm.": "vocab_layer_norm.",
    "cls.predictions.decoder.": "vocab_projector.",
}


def to_distilbert(model: Any, *, seed: int = 0) -> Any:
    """The DistilBERT that says what this BERT says of texts whose token types are all 0, to float32 rounding.

    A BertModel (its pooler is left out), BertForMaskedLM or BertForTokenClassification becomes the DistilBERT of its
    kind, and is exact: the embedding of token type 0 is added to those of the positions. Of a
    BertForSequenceClassification the body is; DistilBERT's head is another one (a ReLU layer in place of the pooler),
    with fresh weights, drawn with `seed`. Dtype, labels and dropout are kept; `model` itself is not changed.

    Raises ModelError for any other class, and for a BERT with another epsilon in its layer norms, or that decodes.
    """
    _refuse_strangers(model)
    made = _CLASSES[type(model)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = made._from_config(_config(model.config), dtype=model.dtype)
    body = "" if isinstance(model, BertModel) else "distilbert."
    state = _body(model.base_model, body) | _head(model)
    fresh, strange = student.load_state_dict(state, strict=False)
    expected = ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"]
    if strange or fresh != (expected if made is DistilBertForSequenceClassification else []):
        raise ModelError(
            f"student.architecture=distilbert: {type(model).__name__} has weights without a place in DistilBERT "
            f"({', '.join(strange) or 'none'}), or lacks some ({', '.join(fresh) or 'none'}). Use architecture=teacher."
        )
    student.tie_weights()
    return student.train(model.training)


def _refuse_strangers(model: Any) -> None:
    if type(model) not in _CLASSES:
        raise ModelError(
            f"student.architecture=distilbert: the teacher is a {type(model).__name__}, needs one of "
            f"{', '.join(kind.__name__ for kind in _CLASSES)}. Use architecture=teacher."
        )
    config = model.config
    if config.layer_norm_eps != EPSILON or config.is_decoder or config.add_cross_attention:
        raise ModelError(
            f"student.architecture=distilbert: the teacher has layer_norm_eps={config.layer_norm_eps}, "
            f"is_decoder={config.is_decoder}, add_cross_attention={config.add_cross_attention}; DistilBERT has "
            f"{EPSILON}, False, False. Use architecture=teacher."
        )


def _config(bert: Any) -> DistilBertConfig:
    classifier_dropout = getattr(bert, "classifier_dropout", None)
    return DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        n_layers=bert.num_hidden_layers,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act,
        initializer_range=bert.initializer_range,
        seq_classif_dropout=bert.hidden_dropout_prob if classifier_dropout is None else classifier_dropout,
        pad_token_id=bert.pad_token_id,
        tie_word_embeddings=bert.tie_word_embeddings,
        id2label=bert.id2label,
        label2id=bert.label2id,
        problem_type=bert.problem_type,
        attn_implementation=bert._attn_implementation,
    )


def _body(bert: Any, prefix: str) -> dict[str, Tensor]:
    """Embeddings and layers under DistilBERT's names."""
    own = bert.state_dict()
    embeddings = f"{prefix}embeddings."
    types_D = own["embeddings.token_type_embeddings.weight"][0]
    state = {
        f"{embeddings}word_embeddings.weight": own["embeddings.word_embeddings.weight"],
        f"{embeddings}position_embeddings.weight": own["embeddings.position_embeddings.weight"] + types_D,
        f"{embeddings}LayerNorm.weight": own["embeddings.LayerNorm.weight"],
        f"{embeddings}LayerNorm.bias": own["embeddings.LayerNorm.bias"],
    }
    for number in range(bert.config.num_hidden_layers):
        for theirs, ours in _IN_LAYER.items():
            for part in ("weight", "bias"):
                value = own[f"encoder.layer.{number}.{theirs}.{part}"]
                state[f"{prefix}transformer.layer.{number}.{ours}.{part}"] = value
    return state


def _head(model: Any) -> dict[str, Tensor]:
    """What stands on the body, where DistilBERT has the same."""
    own = model.state_dict()
    if isinstance(model, BertForTokenClassification):
        return {name: own[name] for name in ("classifier.weight", "classifier.bias")}
    if not isinstance(model, BertForMaskedLM):
        return {}
    return {
        ours + name.removeprefix(theirs): value
        for name, value in own.items()
        for theirs, ours in _IN_HEAD.items()
        if name.startswith(theirs)
    }
