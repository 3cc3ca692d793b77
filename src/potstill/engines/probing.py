"""Proof, on a few tokens, that potstill reads an encoder rightly. Refuses one of which a law does not hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.engines.causal import dense_logits, distance
from potstill.engines.encoder import read_encoder
from potstill.errors import ModelError
from potstill.types import IGNORE, Batch, Role, StudentView

__all__ = ["probe_encoder"]


@torch.no_grad()
def probe_encoder(model: Any, role: Role, key: str, *, pooling: str = "cls", normalise: bool = True) -> None:
    """Check on a few tokens that potstill reads this model rightly. Raises ModelError naming the recipe key.

    1. Padding behind a text changes none of its answers.
    2. MASKED: its logits are its output layer applied to the states before it.
    3. MASKED: two texts packed into one row are read as each alone.
    """
    was_training = model.training
    model.eval()
    try:
        _probe(model, role, pooling=pooling, normalise=normalise)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # ModelError is a ValueError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{key}: {type(model).__name__} cannot be read as {role} ({reason[:300]}). Use another model for this task."
        ) from error
    finally:
        model.train(was_training)


def _probe(model: Any, role: Role, *, pooling: str, normalise: bool) -> None:
    def read(batch: Batch) -> StudentView:
        return read_encoder(model, batch.to(model.device), role, pooling=pooling, normalise=normalise)

    ids_BT = _ids(model)
    first, second = ids_BT[:, :5], ids_BT[:, 5:]
    short, long = (read(_batch(ids, torch.ones_like(ids), role)) for ids in (first, second))
    beside_BT = torch.cat((second, ids_BT[:, :7]))
    both = read(_batch(beside_BT, torch.tensor([[1] * 7, [1] * 5 + [0] * 2]), role))
    alone = torch.cat((_answers(long, role), _answers(short, role)))
    _agree(model, _answers(both, role), alone, "padding behind a text changes its answers")
    if long.head is None:
        return
    logits_TV = model(input_ids=second.to(model.device)).logits[0].float()
    ours_TV = dense_logits(long.final_ND, long.head)
    _agree(model, ours_TV, logits_TV, "its logits are not its output layer applied to the states before it")
    packed = read(_batch(ids_BT, torch.tensor([[1] * 5 + [2] * 7]), role))
    _agree(model, packed.final_ND[5:], long.final_ND, "texts that share a packed row see each other")


def _ids(model: Any) -> Tensor:
    """Twelve tokens that are no padding. int64 [1, 12]."""
    config = model.config.get_text_config()
    known = torch.arange(min(config.vocab_size, 1000))
    known = known[known != (-1 if config.pad_token_id is None else config.pad_token_id)]
    return known[torch.randint(len(known), (1, 12), generator=torch.Generator().manual_seed(0))]


def _batch(ids_BT: Tensor, segments_BT: Tensor, role: Role) -> Batch:
    taught_BT = segments_BT > 0
    if role in (Role.CLASSIFIER, Role.ENCODER):
        taught_BT = taught_BT & (torch.arange(ids_BT.shape[1]) == 0)
    return Batch(ids_BT, torch.full_like(ids_BT, IGNORE), segments_BT, taught_BT=taught_BT)


def _answers(view: StudentView, role: Role) -> Tensor:
    answers = view.pooled_BD if role is Role.ENCODER else view.final_ND
    return torch.empty(0) if answers is None else answers


def _agree(model: Any, found: Tensor, expected: Tensor, otherwise: str) -> None:
    tolerance = 0.05 if model.dtype == torch.bfloat16 else 1e-3
    if not distance(found.float(), expected.float()) <= tolerance:
        raise ValueError(f"{otherwise}: relative difference {distance(found.float(), expected.float()):.2g}")
