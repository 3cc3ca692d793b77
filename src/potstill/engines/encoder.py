"""How encoders read padded or packed batches: masked language models, classifiers, sentence encoders.

Refuses, by a try on a few tokens (`probe_encoder`), a model whose answers depend on padding or on the documents beside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engines.causal import head_of
from potstill.engines.insides import NOTHING, reading_insides
from potstill.errors import ModelError
from potstill.types import Batch, Head, Logits, Offer, Role, Signal, States, StudentView, Wants

__all__ = ["EncoderEngine", "TrainableEncoder", "pool_states", "read_encoder", "score_layer"]

_INSIDES = frozenset({Offer.HIDDEN, Offer.ATTENTION, Offer.VECTORS})
_OFFERS = {
    Role.MASKED: _INSIDES | {Offer.LOGITS, Offer.TOP_LOGPROBS},
    Role.CLASSIFIER: _INSIDES | {Offer.LOGITS, Offer.POOLED},
    Role.TOKEN_CLASSIFIER: _INSIDES | {Offer.LOGITS},
    Role.ENCODER: _INSIDES | {Offer.POOLED},
}


def read_encoder(
    model: Any, batch: Batch, role: Role, wants: Wants = NOTHING, *, pooling: str = "cls", normalise: bool = True
) -> StudentView:
    """What a model of this role answers at `batch.spoken_BT`, in batch order, and what is wanted of what lies behind.

    MASKED            final_ND: states [N, D] just before the output layer, which is `head`
    CLASSIFIER        final_ND: scores [N, C], float32, of the rows that N answers stand in; pooled_BD, if wanted: the
                      final state of the first token
    TOKEN_CLASSIFIER  final_ND: scores [N, C], float32
    ENCODER           final_ND: [N, 0]; pooled_BD float32: the final state of the first token (`pooling` cls) or the
                      mean over attended positions (mean), of length 1 where `normalise` says so

    Raises ModelError for packed rows where the architecture takes no position ids, and as `reading_insides`; ValueError
    for several documents a row where the answer is one a row.
    """
    inputs = _inputs(model, batch, role)
    head = masked_head(model) if role is Role.MASKED else None
    pooled = wants.pooled or role is Role.ENCODER
    if pooled and Offer.POOLED not in _OFFERS[role]:
        raise ModelError(f"{type(model).__name__} has no vector for a text in the role {role}. Use another loss.")
    with reading_insides(model, wants) as insides, _last_states(model, pooled) as last, _answering(model, role):
        output = model(**inputs)
    spoken_BT = batch.spoken_BT
    pooled_BD = None
    if pooled:
        pooled_BD = pool_states(last[0], batch.segments_BT > 0, pooling if role is Role.ENCODER else "cls")
    if role is Role.ENCODER:
        final_ND = last[0].new_zeros(int(spoken_BT.sum()), 0)
        pooled_BD = nn.functional.normalize(pooled_BD, dim=-1) if normalise and pooled_BD is not None else pooled_BD
    elif role is Role.CLASSIFIER:
        final_ND = output.logits[spoken_BT.nonzero()[:, 0]]
    else:
        final_ND = output.logits[spoken_BT]
    return StudentView(final_ND, head, insides.hidden, insides.attentions, insides.vectors, pooled_BD)


def pool_states(states_BTD: Tensor, attended_BT: Tensor, pooling: str) -> Tensor:
    """One vector a row: the first position's state (`cls`), or the mean over attended positions. float32 [B, D]."""
    if pooling == "cls":
        return states_BTD[:, 0].float()
    weights_BT1 = attended_BT.unsqueeze(-1).float()
    return (states_BTD.float() * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1.0)


def masked_head(model: Any) -> Head:
    """The output layer of a masked language model. Raises ModelError where it is not a linear layer over all tokens."""
    layer, size = model.get_output_embeddings(), model.config.get_text_config().vocab_size
    if not isinstance(layer, nn.Linear) or layer.out_features != size:
        raise ModelError(
            f"{type(model).__name__} has no linear output layer over its {size} tokens (got {type(layer).__name__}): "
            "needs a masked language model. Use one such as BERT, DistilBERT, RoBERTa or ModernBERT."
        )
    return head_of(model)


def score_layer(model: Any) -> nn.Linear:
    """The last linear layer of a classifier, which makes its scores. Raises ModelError where there is none."""
    body, classes = set(model.base_model.modules()), model.config.num_labels
    linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part not in body]
    if not linear or linear[-1].out_features != classes:
        raise ModelError(
            f"{type(model).__name__} has no linear layer for its {classes} classes as the last part of its head. Use "
            "another architecture, such as BERT, DistilBERT, RoBERTa, ELECTRA, DeBERTa or ModernBERT."
        )
    return linear[-1]


class EncoderEngine:
    """A model of one of the roles of encoders, as one that is asked: no gradient, arithmetic in its weights' dtype."""

    def __init__(self, model: Any, tokenizer: Any, role: Role, *, pooling: str = "cls", normalise: bool = True) -> None:
        """`model` as `load_encoder` gives it; `pooling` and `normalise` say what a sentence encoder's vectors are."""
        self.model, self.tokenizer, self.role = model.eval().requires_grad_(False), tokenizer, role
        self.offers = _OFFERS[role]
        self._pooling, self._normalise = pooling, normalise
        # Once: a tokenizer takes longer to list its tokens than a small model to read a batch.
        self._vocabulary = _size_of_answer(model, tokenizer, role)

    @property
    def models(self) -> tuple[Any, ...]:
        """The model, as the only one."""
        return (self.model,)

    @property
    def multi_label(self) -> bool:
        """Whether a text bears any number of labels."""
        return bool(self.model.config.problem_type == "multi_label_classification")

    @property
    def vocabulary(self) -> int:
        """Tokens that the head has a row for, classes, or components of a sentence encoder's vector."""
        return self._vocabulary

    @torch.inference_mode()
    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the model says about `batch` where it is to speak (`taught_BT`, else supervised), on its device."""
        batch = batch.to(self.model.device)
        view = read_encoder(self.model, batch, self.role, wants, pooling=self._pooling, normalise=self._normalise)
        logits = self._said(view, batch) if wants.final and Offer.LOGITS in self.offers else None
        return Signal(logits, view.hidden, view.attentions, view.vectors, view.pooled_BD)

    def _said(self, view: StudentView, batch: Batch) -> States | Logits:
        taught_N = batch.taught_N
        rows_ND = view.final_ND if taught_N is None else view.final_ND[taught_N]
        return Logits(rows_ND) if view.head is None else States(rows_ND, view.head.sliced(self.vocabulary))


def _size_of_answer(model: Any, tokenizer: Any, role: Role) -> int:
    if role is Role.MASKED:
        named = 1 + max(tokenizer.get_vocab().values())  # its length is less where numbers are left out
        return min(int(named), masked_head(model).vocabulary)
    size: int = model.config.get_text_config().hidden_size if role is Role.ENCODER else model.config.num_labels
    return size


class TrainableEncoder(nn.Module):
    """A model of one of the roles of encoders that learns: called with a batch, it shows the losses what they need."""

    def __init__(
        self, module: nn.Module, role: Role, precision: str = "bf16", *, pooling: str = "cls", normalise: bool = True
    ) -> None:
        """`module` holds fp32 master weights; `precision` bf16 means autocast over them, fp32 none."""
        super().__init__()
        self.module, self.role, self.precision = module, role, precision
        self._pooling, self._normalise = pooling, normalise

    def forward(self, batch: Batch, wants: Wants = NOTHING) -> StudentView:
        """The student's view of `batch`; under bf16, states before a head are bfloat16, scores of classes float32."""
        low = self.precision == "bf16"
        with torch.autocast(batch.ids_BT.device.type, torch.bfloat16) if low else nullcontext():
            view = read_encoder(self.module, batch, self.role, wants, pooling=self._pooling, normalise=self._normalise)
        final_ND = view.final_ND.bfloat16() if low and view.head is not None else view.final_ND
        return StudentView(final_ND, view.head, view.hidden, view.attentions, view.vectors, view.pooled_BD)


def _inputs(model: Any, batch: Batch, role: Role) -> dict[str, Any]:
    """The arguments of the model. Types of tokens go only to an architecture that knows some."""
    taken = inspect.signature(model.forward).parameters
    attended_BT, padding = batch.segments_BT > 0, model.config.get_text_config().pad_token_id
    inputs: dict[str, Any] = {"input_ids": batch.ids_BT}
    if padding is not None:  # some architectures count positions, or look for a text's end, by the padding token
        inputs["input_ids"] = batch.ids_BT.masked_fill(~attended_BT, padding)
    if int(batch.segments_BT.max()) > 1:
        _check_packed(model, role, taken)
        inputs["attention_mask"] = _block_masks(model, batch.segments_BT)
        inputs["position_ids"] = batch.positions_BT + _first_position(model)
    elif not bool(attended_BT.all()):
        inputs["attention_mask"] = attended_BT.long()
    if batch.types_BT is not None and "token_type_ids" in taken:
        inputs["token_type_ids"] = batch.types_BT
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return inputs


def _check_packed(model: Any, role: Role, taken: Any) -> None:
    if role in (Role.CLASSIFIER, Role.ENCODER):
        raise ValueError(
            f"a row of the batch holds several documents, but {role} has one answer a row: needs one each."
        )
    if "position_ids" not in taken:
        raise ModelError(
            f"{type(model).__name__} takes no position_ids, so that documents packed into one row cannot be read as "
            "each alone. Use another architecture, such as BERT, DistilBERT, RoBERTa or ModernBERT."
        )


def _block_masks(model: Any, segments_BT: Tensor) -> Tensor | dict[str, Tensor]:
    """Who sees whom: a document's positions each other, padding padding, so that no row is empty. [B, 1, T, T].

    A mask that is given whole replaces the sliding windows of an architecture, which are therefore put into it.
    """
    same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :]).unsqueeze(1)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" not in kinds:
        return _as_mask(model, same_B1TT)
    index_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    near_TT = (index_T[:, None] - index_T[None, :]).abs() <= config.sliding_window
    return {kind: _as_mask(model, same_B1TT & near_TT if kind == "sliding_attention" else same_B1TT) for kind in kinds}


def _as_mask(model: Any, allowed_B1TT: Tensor) -> Tensor:
    """Eager attention adds its mask to the scores; the others take a bool one."""
    if model.config.get_text_config()._attn_implementation != "eager":
        return allowed_B1TT
    forbidden = torch.finfo(model.dtype).min
    return torch.zeros_like(allowed_B1TT, dtype=model.dtype).masked_fill(~allowed_B1TT, forbidden)


def _first_position(model: Any) -> int:
    """Number of a text's first position: RoBERTa and its kin count on from the padding token's number."""
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    padding = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
    return 0 if padding is None else padding + 1


@contextmanager
def _last_states(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """A list that holds the body's final hidden states [B, T, D] once the model has read, where they are wanted."""
    states: list[Tensor] = []
    if not wanted:
        yield states
        return
    hook = model.base_model.register_forward_hook(
        lambda _module, _args, output: states.append(output.last_hidden_state)
    )
    try:
        yield states
    finally:
        hook.remove()


@contextmanager
def _answering(model: Any, role: Role) -> Iterator[None]:
    """Within the context, `logits` are the states before the output layer (MASKED), or scores in float32."""
    if role is Role.ENCODER:
        yield
        return
    layer: Any = model.get_output_embeddings() if role is Role.MASKED else score_layer(model)
    own = vars(layer).get("forward")
    layer.forward = (lambda states: states) if role is Role.MASKED else _exactly(layer)
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


def _exactly(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The layer in float32: scores rounded to bfloat16 would spoil the gradient where student and teacher agree."""

    def forward(states: Tensor) -> Tensor:
        bias_C = None if layer.bias is None else layer.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return nn.functional.linear(states.float(), layer.weight.float(), bias_C)

    return forward
