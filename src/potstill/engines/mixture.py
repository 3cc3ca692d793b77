"""Several models of one vocabulary as one teacher: the weighted mean of their next-token probabilities.

Refuses a document on which no member has a say, naming its source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from potstill.engines.local import LocalEngine
from potstill.errors import RecipeError
from potstill.types import Batch, Mixture, Sampling, Signal, States, Wants

__all__ = ["MixtureEngine", "shares_of"]


def shares_of(weights: Sequence[float], source: str) -> list[float]:
    """The members' weights on documents from `source`, made to sum to 1. Raises RecipeError where all are 0."""
    total = sum(weights)
    if not total > 0.0:
        raise RecipeError(
            f"teacher.members: every weight is 0 for the source {source!r}. Raise one of them, or take that source out "
            "of data.source."
        )
    return [weight / total for weight in weights]


class MixtureEngine:
    """Engines of one vocabulary as one `Engine`; members read one after another, the first gives all but the logits."""

    offers = LocalEngine.offers

    def __init__(
        self, members: Sequence[LocalEngine], weights: Sequence[float], weigh: Callable[[str], Sequence[float]]
    ) -> None:
        """`weigh` gives the members' weights on documents from a source; `weights` are those for what has no source."""
        self.members = tuple(members)
        self.model, self.tokenizer = members[0].model, members[0].tokenizer
        self._shares, self._weigh = shares_of(weights, ""), weigh

    @property
    def models(self) -> tuple[Any, ...]:
        """The members' models."""
        return tuple(member.model for member in self.members)

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the members say together about `batch`, and what lies behind the first one's answers; no gradient.

        The distribution at a position is sum_m w_m p_m, w the weights for its document's source. Raises ValueError
        where the batch does not know its sources, RecipeError where all weights for one of them are 0.
        """
        first = self.members[0].read(batch, wants)
        if not wants.final:
            return first
        others = [member.read(batch, Wants(final=True)) for member in self.members[1:]]
        states = [cast(States, signal.logits) for signal in (first, *others)]
        vocabulary = min(one.head.vocabulary for one in states)
        weights_NM = self._weights(batch).to(states[0].rows_ND.device)
        return replace(first, logits=Mixture(tuple(one.sliced(vocabulary) for one in states), weights_NM))

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """As `LocalEngine.generate`, each token from the mean of the members' probabilities.

        A prompt has no source, so the weights are those for what has none.
        """
        # In place of the first member's own logits: whatever generation does with logits, it does with the mixture's.
        hook = self.model.register_forward_hook(_Mixing(self.members, self._shares), with_kwargs=True)
        try:
            return self.members[0].generate(prompts, sampling)
        finally:
            hook.remove()

    def _weights(self, batch: Batch) -> Tensor:
        """The members' weights at every position at which they speak, in batch order. float32 [N, M]."""
        if len(batch.sources) != len(batch):
            raise ValueError(
                f"the batch has {len(batch)} rows and the sources of {len(batch.sources)}: needs Batch.sources, from "
                "which the members' weights follow."
            )
        shares_SM = torch.tensor([shares_of(self._weigh(name), name) for row in batch.sources for name in row])
        starts_B = torch.tensor([0, *map(len, batch.sources)]).cumsum(0)
        taught_BT = (batch.supervised_BT if batch.taught_BT is None else batch.taught_BT).cpu()
        rows_N = taught_BT.nonzero(as_tuple=True)[0]
        return shares_SM[starts_B[rows_N] + batch.segments_BT.cpu()[taught_BT] - 1]


class _Mixing:
    """A forward hook on the first member's model while it generates: its logits become the mixture's log-probabilities.

    The other members read the same tokens with caches of their own.
    """

    def __init__(self, members: Sequence[LocalEngine], shares: Sequence[float]) -> None:
        self._others = [member.model for member in members[1:]]
        self._caches: list[Any] = [None for _ in self._others]
        self._log_shares = torch.tensor(shares).log().tolist()
        self._vocabulary = min(member.vocabulary for member in members)

    def __call__(self, _module: Any, _args: Any, given: dict[str, Any], output: Any) -> Any:
        ids_BT, length = given["input_ids"], output.past_key_values.get_seq_length()
        mask_BT = given.get("attention_mask")  # left out where no prompt is padded
        mask_BT = ids_BT.new_ones(len(ids_BT), length) if mask_BT is None else mask_BT
        if ids_BT.shape[1] == length:  # prompts from their beginning
            self._caches = [None for _ in self._others]
        own_BV = output.logits[:, -1]
        said = [own_BV, *(self._ask(number, ids_BT, mask_BT) for number in range(len(self._others)))]
        terms_MBV = [
            share + logits_BV[:, : self._vocabulary].float().log_softmax(-1)
            for share, logits_BV in zip(self._log_shares, said, strict=True)
        ]
        mixed_BV = torch.full_like(own_BV, -torch.inf, dtype=torch.float32)
        mixed_BV[:, : self._vocabulary] = torch.stack(terms_MBV).logsumexp(0)
        output.logits = mixed_BV[:, None]
        return output

    def _ask(self, number: int, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The logits of another member after the last token. [B, V]."""
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        output = self._others[number](
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=self._caches[number],
            use_cache=True,
        )
        self._caches[number] = output.past_key_values
        return cast(Tensor, output.logits[:, -1])
