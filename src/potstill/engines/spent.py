"""What an attempt cost, by what came back. Refuses to count an attempt as free that may be billed."""

from __future__ import annotations

import json

from potstill.engines.completions import read_usage
from potstill.engines.ledger import Spend
from potstill.engines.prices import Price
from potstill.engines.replies import Reply
from potstill.types import Usage

__all__ = ["said_in", "spend_of", "spent_on"]

_REFUSALS = range(400, 600)
_TIMEOUTS = {408, 499, 504, 524}
"""Statuses of a gateway that did not wait: what is behind it may have answered, and bill it."""


def spent_on(reply: Reply, worst: Spend, price: Price | None) -> Spend:
    """Nothing where the server refused; what its usage says where it answered; else `worst`, the worst case.

    A timeout or a lost connection may be billed, and an answer without usage says nothing.
    """
    if reply.status in _REFUSALS and reply.status not in _TIMEOUTS:
        return Spend(0, 0, None if price is None else 0)
    usage = said_in(reply.raw)[1] if reply.status == 200 and not reply.problem else None
    return worst if usage is None else spend_of(usage, price)


def spend_of(usage: Usage, price: Price | None) -> Spend:
    """What an answer took that says what it took."""
    return Spend(usage.input_tokens, usage.output_tokens, None if price is None else price.cost(usage))


def said_in(raw: bytes) -> tuple[str, Usage | None]:
    """Who answered and what it took, as an answer says that may be useless otherwise; "" and None where it does not."""
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        return "", None
    if not isinstance(answer, dict):
        return "", None
    model = answer.get("model")
    return model if isinstance(model, str) else "", read_usage(answer.get("usage"))
