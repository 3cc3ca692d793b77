"""Masks for masked language models, drawn anew for every batch. Refuses to hide a special token.

Suffixes: B rows of a batch, T positions, N positions that may be masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.types import IGNORE, Batch

__all__ = ["MaskRule", "mask_tokens"]


@dataclass(frozen=True, slots=True)
class MaskRule:
    """How tokens are hidden.

    masked       share of the tokens that are to be said
    by_mask      of these, the share that is replaced by the mask token
    by_random    of these, the share that is replaced by a random token; the rest stays as it is
    vocabulary   random tokens have ids 0..vocabulary-1
    special_ids  tokens that are never hidden, and never drawn as a random one
    """

    masked: float
    by_mask: float
    by_random: float
    mask_id: int
    vocabulary: int
    special_ids: tuple[int, ...]


def mask_tokens(batch: Batch, rule: MaskRule, generator: torch.Generator) -> Batch:
    """The batch with some of its supervised tokens hidden; targets stand at these only.

    Each supervised position whose token is not special is chosen with probability `masked`; one of them where chance
    chose none. The teacher speaks at all attended positions: `taught_BT` = segments > 0. What is drawn depends on the
    generator, which is on the CPU, and on these positions alone: padding changes nothing.

    Devlin et al. (2019), arXiv:1810.04805, section 3.1; drawn for every batch: Liu et al. (2019), arXiv:1907.11692.
    """
    device = batch.ids_BT.device
    special = torch.tensor(sorted(set(rule.special_ids)), dtype=torch.int64)
    maskable_BT = batch.supervised_BT & ~torch.isin(batch.ids_BT, special.to(device))
    chosen_N, ids_N = _draw(batch.ids_BT[maskable_BT].cpu(), rule, special, generator)
    ids_BT = batch.ids_BT.masked_scatter(maskable_BT, ids_N.to(device))
    chosen_BT = maskable_BT.masked_scatter(maskable_BT, chosen_N.to(device))
    return replace(
        batch,
        ids_BT=ids_BT,
        targets_BT=batch.targets_BT.masked_fill(~chosen_BT, IGNORE),
        taught_BT=batch.segments_BT > 0,
    )


def _draw(ids_N: Tensor, rule: MaskRule, special: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which positions are chosen, bool [N], and the ids that now stand at all of them, int64 [N]."""
    count = len(ids_N)
    if not count:
        return torch.zeros(0, dtype=torch.bool), ids_N
    chosen_N = torch.rand(count, generator=generator) < rule.masked
    fate_N = torch.rand(count, generator=generator)
    random_N = _ordinary(count, rule.vocabulary, special[special < rule.vocabulary], generator)
    one = torch.randint(count, (1,), generator=generator)
    if not chosen_N.any():
        chosen_N[one] = True
    hidden_N = torch.where(fate_N < rule.by_mask, rule.mask_id, ids_N)
    is_random_N = (fate_N >= rule.by_mask) & (fate_N < rule.by_mask + rule.by_random)
    hidden_N = torch.where(is_random_N, random_N, hidden_N)
    return chosen_N, torch.where(chosen_N, hidden_N, ids_N)


def _ordinary(count: int, vocabulary: int, special: Tensor, generator: torch.Generator) -> Tensor:
    """Random tokens, none of the special ones, which are ascending. int64 [count].

    Drawn by their place among the others and moved up past the special ones below: no list of all tokens is made, which
    for every row would take longer than all the rest.
    """
    places = torch.randint(vocabulary - len(special), (count,), generator=generator)
    below = special - torch.arange(len(special))  # how many ordinary tokens come before each special one
    return places + torch.searchsorted(below, places, right=True)
