"""Several classifiers as one teacher: the weighted mean of their probabilities.

Refuses members whose classes differ, or that answer at different positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from potstill.engines.encoder import EncoderEngine
from potstill.engines.mixture import shares_of
from potstill.errors import ModelError
from potstill.types import Batch, Logits, Role, Signal, Wants

__all__ = ["EnsembleEngine"]


class EnsembleEngine:
    """Classifiers with the same classes as one `Reader`; the first gives all but the answers."""

    def __init__(
        self, members: Sequence[EncoderEngine], weights: Sequence[float], *, multi_label: bool = False
    ) -> None:
        """`weights` are the members' say. Raises ModelError for members of other roles or with other classes.

        With `multi_label` a text bears any number of labels, and each has a probability of its own. Raises RecipeError
        where all weights are 0.
        """
        _check_members(members)
        self.members = tuple(members)
        self.model, self.tokenizer = members[0].model, members[0].tokenizer
        self.role, self.offers, self.multi_label = members[0].role, members[0].offers, multi_label
        self._shares = shares_of(weights, "")

    @property
    def models(self) -> tuple[Any, ...]:
        """The members' models."""
        return tuple(member.model for member in self.members)

    @property
    def vocabulary(self) -> int:
        """Number of classes."""
        return self.members[0].vocabulary

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What members that share one tokenizer say together about `batch`; see `read_many`."""
        return self.read_many([batch] * len(self.members), wants)

    def read_many(self, batches: Sequence[Batch], wants: Wants) -> Signal:
        """What the members say together about the same texts, each of which has its own batch of them; no gradient.

        Scores [N, C], float32: log sum_m w_m softmax(z_m), or, of several labels a text, log(p / (1 - p)) with
        p = sum_m w_m sigmoid(z_m). Raises ValueError for another number of batches, or of answers, than the first's.
        """
        if len(batches) != len(self.members):
            raise ValueError(f"got {len(batches)} batches for {len(self.members)} members: needs one for each of them.")
        first = self.members[0].read(batches[0], wants)
        if not wants.final:
            return first
        rest = zip(self.members[1:], batches[1:], strict=True)
        signals = [first, *(member.read(batch, Wants(final=True)) for member, batch in rest)]
        said = [cast(Logits, signal.logits).logits_NV.to(self.model.device) for signal in signals]
        counts = [len(logits_NC) for logits_NC in said]
        if len(set(counts)) > 1:
            raise ValueError(
                f"the members gave {counts} answers to the same texts: one of them read shorter texts. Raise "
                "data.sequence_length, or use members with like tokenizers."
            )
        return replace(first, logits=Logits(self._mean(torch.stack(said).float())))

    def _mean(self, logits_MNC: Tensor) -> Tensor:
        log_shares_M11 = torch.tensor(self._shares, device=logits_MNC.device).log()[:, None, None]
        if not self.multi_label:
            return (log_shares_M11 + logits_MNC.log_softmax(-1)).logsumexp(0)
        log_yes_NC = (log_shares_M11 + nn.functional.logsigmoid(logits_MNC)).logsumexp(0)
        return log_yes_NC - (log_shares_M11 + nn.functional.logsigmoid(-logits_MNC)).logsumexp(0)


def _check_members(members: Sequence[EncoderEngine]) -> None:
    roles = {member.role for member in members}
    if len(roles) > 1 or not roles <= {Role.CLASSIFIER, Role.TOKEN_CLASSIFIER}:
        raise ModelError(
            f"teacher.members: are made for {', '.join(sorted(roles))}; classifiers of one kind can be averaged. "
            "Give one model, or a task of classes."
        )
    expected = members[0].model.config.id2label
    for number, member in enumerate(members):
        found = member.model.config.id2label
        if found != expected:
            other = next(name for index, name in sorted(found.items()) if expected.get(index) != name)
            raise ModelError(
                f"teacher.members[{number}].model: its classes are not the first member's in its order ({other} is "
                "the first that differs). Load every member with the labels of the task."
            )
