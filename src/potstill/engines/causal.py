"""How a Hugging Face causal language model reads a packed batch: its body, its head, and proof that both are known.

The body runs without the head, so that no [B, T, V] is ever made. Refuses a model whose logits are not its head applied
to its final hidden states, or whose packed documents see each other: `probe` tries both on a few tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from potstill.engines.insides import NOTHING, Insides, reading_insides
from potstill.errors import ModelError
from potstill.types import Batch, Head, Signal, States, StudentView, Wants

__all__ = ["CausalReader", "TrainableCausal", "dense_logits", "distance", "head_of", "probe", "read_causal"]


def head_of(model: Any) -> Head:
    """The output layer of a causal language model, with the scale and soft-cap that some families put behind it.

    Gemma 2 caps (`final_logit_softcapping`); Cohere multiplies (`logit_scale`); Granite divides (`logits_scaling`).
    Raises ModelError where the model has no linear output layer, or one with an adapter (LoRA) on it.
    """
    layer = model.get_output_embeddings()
    if hasattr(layer, "base_layer"):
        raise ModelError(
            f"{type(model).__name__}'s output layer carries an adapter ({type(layer).__module__}), so its weight is "
            "only a part of what it does. Merge the adapter (merge_and_unload), or leave the output layer out of its "
            "targets."
        )
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear output layer (got {type(layer).__name__}): needs a causal language "
            "model. Use a decoder such as Llama, Qwen, Gemma, Mistral or GPT-2."
        )
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, None if softcap is None else float(softcap))


def read_causal(model: Any, batch: Batch, wants: Wants = NOTHING) -> tuple[Tensor, Insides]:
    """Final hidden states [B, T, D] of a packed batch, and what is wanted of what lies behind them.

    Position ids that start again are what tells the model where one document ends and the next begins. Raises
    ModelError as `reading_insides`, and where a vector for a whole text is wanted.
    """
    if wants.pooled:
        raise ModelError(
            f"{type(model).__name__} is a causal language model, which has no vector for a text. Use a task such as "
            "embedding, or losses over hidden states."
        )
    with reading_insides(model, wants) as insides:
        output = model.base_model(
            input_ids=batch.ids_BT, position_ids=batch.positions_BT, use_cache=False, return_dict=True
        )
    return output.last_hidden_state, insides


class CausalReader:
    """A causal language model as a `Reader`: no gradient, arithmetic in the dtype of its weights."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        """`vocabulary` is the number of tokens that have a meaning; the head's rows beyond it are padding."""
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary

    @torch.inference_mode()
    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the model says about `batch` where it is to speak (`taught_BT`, else supervised), on its device."""
        batch = batch.to(self.model.device)
        final_BTD, insides = read_causal(self.model, batch, wants)
        logits = None
        if wants.final:
            taught_BT = batch.supervised_BT if batch.taught_BT is None else batch.taught_BT
            logits = States(final_BTD[taught_BT], head_of(self.model).sliced(self.vocabulary))
        return Signal(logits, insides.hidden, insides.attentions, insides.vectors)


class TrainableCausal(nn.Module):
    """A causal language model that learns: called with a batch, it shows the losses what they need and no logits."""

    def __init__(self, module: nn.Module, precision: str = "bf16") -> None:
        """`module` holds fp32 master weights; `precision` bf16 means autocast over them, fp32 none."""
        super().__init__()
        self.module, self.precision = module, precision

    def forward(self, batch: Batch, wants: Wants = NOTHING) -> StudentView:
        """The student's view of `batch`; bfloat16 final states under bf16, so that the head runs on the same units."""
        low = self.precision == "bf16"
        with torch.autocast(batch.ids_BT.device.type, torch.bfloat16) if low else nullcontext():
            final_BTD, insides = read_causal(self.module, batch, wants)
        final_ND = final_BTD[batch.spoken_BT]
        final_ND = final_ND.bfloat16() if low else final_ND
        return StudentView(final_ND, head_of(self.module), insides.hidden, insides.attentions, insides.vectors)


@torch.no_grad()
def probe(model: Any, key: str) -> None:
    """Check on a few tokens that potstill reads this model rightly. Raises ModelError naming the recipe key.

    1. Its logits are those of `head_of` applied to its final hidden states.
    2. Two documents packed into one row are read as each alone.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(min(model.config.get_text_config().vocab_size, 1000), (1, 12), generator=generator)
    segments_BT = torch.tensor([[1] * 5 + [2] * 7])
    packed = Batch(ids_BT, torch.full_like(ids_BT, -100), segments_BT).to(model.device)
    second = Batch(ids_BT[:, 5:], torch.full_like(ids_BT[:, 5:], -100), torch.ones_like(segments_BT[:, 5:]))
    final_BTD, _ = read_causal(model, packed)
    alone_BTD, _ = read_causal(model, second.to(model.device))
    logits_BTV = model(input_ids=packed.ids_BT[:, 5:], use_cache=False).logits.float()
    ours_BTV = dense_logits(alone_BTD, head_of(model))
    model.train(was_training)
    name, tolerance = type(model).__name__, 0.05 if model.dtype == torch.bfloat16 else 1e-3
    if not distance(ours_BTV, logits_BTV) <= tolerance:
        raise ModelError(
            f"{key}: the logits of {name} are not its output layer applied to its final hidden states (relative "
            f"difference {distance(ours_BTV, logits_BTV):.2g}). potstill cannot distil it exactly; use another model."
        )
    if not distance(final_BTD[:, 5:].float(), alone_BTD.float()) <= tolerance:
        raise ModelError(
            f"{key}: {name} lets documents that share a packed row see each other (it ignores position_ids that start "
            "again). Use another model, or another attention implementation."
        )


def dense_logits(hidden_BTD: Tensor, head: Head) -> Tensor:
    """softcap(scale * (hidden @ weight^T + bias)), float32 [..., V], for a handful of states [..., D]."""
    bias_V = 0.0 if head.bias_V is None else head.bias_V.float()
    logits_BTV = head.scale * (hidden_BTD.float() @ head.weight_VD.float().T + bias_V)
    return logits_BTV if head.softcap is None else head.softcap * (logits_BTV / head.softcap).tanh()


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||: bfloat16 rounding alone makes up to a few percent of it. NaN where either is not finite."""
    return float((a - b).norm() / b.norm().clamp_min(1e-9))
