"""Log-probabilities of given text, from an endpoint that gives them: what is asked of a text, and what its answer says.

The list at place i of a prompt is the distribution over token i, given the tokens before it: it is what a model says at
position i - 1. Refuses to shift anything else: whoever asks says what the last position must predict.

Suffixes: T positions of a text, N chosen ones, K listed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from potstill.types import Completion, Request

__all__ = ["answer_bytes", "read_scores", "score_request"]

ENTRY_BYTES = 192
"""Of one listed token in an answer, on average at most: its number, log-probability, rank, and itself."""

FRAME_BYTES = 1_000_000
"""What may stand around them."""


def score_request(ids_T: Sequence[int], following: int | None, k: int) -> Request:
    """What asks for the K likeliest next tokens at every position of a text, by vLLM's `prompt_logprobs`.

    following  what comes after the last position, so that something is listed there, too; None to leave it out
    """
    ids = (*ids_T, *(() if following is None else (following,)))
    return Request(prompt_ids=ids, max_tokens=1, temperature=0.0, prompt_logprobs=k)


def answer_bytes(tokens: int, k: int) -> int:
    """A bound on the bytes of an answer about so many tokens."""
    return FRAME_BYTES + tokens * (k + 1) * ENTRY_BYTES


def read_scores(answer: Completion, positions_N: Sequence[int], *, k: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The K likeliest next tokens at these positions of the text: ids int64 [N, K], log-probabilities float64 [N, K].

    Tokens from `vocabulary` on, of a padded head, are left out; others at -inf, the lowest numbers that are not listed,
    stand in their places. Raises ValueError for a position after which nothing was asked.
    """
    if positions_N and not 0 <= min(positions_N) <= max(positions_N) < len(answer.prompt_logprobs) - 1:
        raise ValueError(f"positions up to {max(positions_N)}: {len(answer.prompt_logprobs)} tokens were scored")
    rows = [_fill(answer.prompt_logprobs[position + 1], k, vocabulary) for position in positions_N]
    ids_NK = torch.tensor([[number for number, _ in row] for row in rows], dtype=torch.int64)
    logprobs_NK = torch.tensor([[value for _, value in row] for row in rows], dtype=torch.float64)
    return ids_NK.view(len(rows), k), logprobs_NK.view(len(rows), k)


def _fill(listed: Sequence[tuple[int, float]], k: int, vocabulary: int) -> list[tuple[int, float]]:
    kept = [(number, value) for number, value in listed if number < vocabulary][:k]
    taken = {number for number, _ in kept}
    spare = (number for number in range(vocabulary) if number not in taken)
    return kept + [(number, float("-inf")) for number in islice(spare, k - len(kept))]
