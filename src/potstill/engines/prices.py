"""What tokens cost: as the recipe says, as genai-prices lists it, nothing on this machine or network; else unknown.

Money is counted in whole 1e-12 US dollars, rounded up, so that sums are exact. Of tiers and hours the dearest price
counts: a bill may be less. Refuses to guess a price.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from urllib.parse import urlsplit

from genai_prices import Usage as Counted
from genai_prices import calc_price

from potstill.engines.ledger import Budget, Spend
from potstill.errors import BudgetError
from potstill.types import Usage

__all__ = ["FREE", "Price", "check_price", "find_price", "is_private", "most_tokens", "price_of"]

_MANY = 10_000_000
"""Tokens: past the start of every tier that providers have."""
_MARGIN, _MESSAGE_MARGIN = 256, 16
"""Tokens of a chat template around a request (system prompts of its own among them) and around each message."""


@dataclass(frozen=True, slots=True)
class Price:
    """1e-12 US dollars: a token of a prompt, of a prompt's cached part, of an answer; and for a request as such.

    is_presumed  nobody said so: a gateway on one's own network may pass on what is asked to whoever sends a bill
    """

    input_picousd: int
    output_picousd: int
    cached_picousd: int
    request_picousd: int = 0
    is_presumed: bool = False

    def worst(self, input_tokens: int, output_tokens: int) -> int:
        """1e-12 dollars that a request with so many tokens costs at most."""
        dearest = max(self.input_picousd, self.cached_picousd)
        return self.request_picousd + input_tokens * dearest + output_tokens * self.output_picousd

    def cost(self, usage: Usage) -> int:
        """1e-12 dollars of an answer: reasoning is part of its output tokens, cached tokens are part of its input."""
        cached = min(usage.cached_tokens, usage.input_tokens)
        paid_in = (usage.input_tokens - cached) * self.input_picousd + cached * self.cached_picousd
        return self.request_picousd + paid_in + usage.output_tokens * self.output_picousd

    def spend(self, usage: Usage) -> Spend:
        """What an answer took."""
        return Spend(usage.input_tokens, usage.output_tokens, self.cost(usage))


FREE = Price(0, 0, 0)
_PRESUMED = Price(0, 0, 0, is_presumed=True)


def price_of(input_usd: float, output_usd: float) -> Price:
    """A price in dollars a million tokens, as `teacher.price` of a recipe gives it; cached tokens at the full price."""
    paid_in, paid_out = (_pico(Decimal(repr(usd)), 1_000_000) for usd in (input_usd, output_usd))
    return Price(paid_in, paid_out, paid_in)


def find_price(model: str, base_url: str, *, batch: bool = False) -> Price | None:
    """What is listed for a model at an endpoint; presumed nothing on this machine or network; None where nobody knows.

    `batch`: what the provider's batch API costs, where that is listed.
    """
    if is_private(base_url):
        return _PRESUMED
    context = {"processing": "batch"} if batch else None
    now = datetime.now(UTC)
    hours = (now + timedelta(hours=hour) for hour in range(24))
    try:
        found = [_listed(model, base_url, (hour, context)) for hour in hours]
    except (LookupError, ValueError):
        return None
    return Price(*(max(column) for column in zip(*found, strict=True)))


def check_price(price: Price | None, budget: Budget, model: str) -> None:
    """Raises BudgetError where money is limited and the price unknown, or presumed to be nothing."""
    if budget.usd is None or not (price is None or price.is_presumed):
        return
    if price is None:
        raise BudgetError(
            f"teacher.price: nobody lists a price of {model}, and teacher.budget.usd={budget.usd:g} needs one. Set "
            "teacher.price: {input_usd: ..., output_usd: ...} for a million tokens, or limit teacher.budget.tokens."
        )
    raise BudgetError(
        f"teacher.price: what a gateway on a private network takes for {model} is unknown, and teacher.budget.usd="
        f"{budget.usd:g} needs it. Set teacher.price: {{input_usd: ..., output_usd: ...}} for a million tokens (0 and "
        "0 for a server of your own), or limit teacher.budget.tokens."
    )


def most_tokens(body: str, num_messages: int) -> int:
    """A bound from above on the tokens of a request's prompt: bytes of UTF-8, and a margin for the chat template.

    A token of a vocabulary over bytes stands for at least one; some tokenizers first spell letters out (NFKC), which
    may take more bytes.
    """
    longest = len(body.encode("utf-8", "surrogatepass"))
    if not body.isascii():
        spelled = unicodedata.normalize("NFKC", body).encode("utf-8", "surrogatepass")
        longest = max(longest, len(spelled))
    return longest + _MARGIN + _MESSAGE_MARGIN * num_messages


def _listed(model: str, base_url: str, when: tuple[datetime, dict[str, str] | None]) -> tuple[int, int, int, int]:
    """1e-12 dollars as in `Price`. Raises LookupError where the provider or model is not listed."""

    def total(input_tokens: int, output_tokens: int, cached: int = 0) -> Decimal:
        usage = Counted(input_tokens=input_tokens, output_tokens=output_tokens, cache_read_tokens=cached)
        hour, context = when
        found = calc_price(usage, model, provider_api_url=base_url, genai_request_timestamp=hour, price_context=context)
        return found.total_price

    fee = total(0, 0)
    paid_in, paid_out = total(_MANY, 0), total(_MANY, _MANY)
    cached = total(_MANY, 0, _MANY)
    return (
        _pico(paid_in - fee, _MANY),
        _pico(paid_out - paid_in, _MANY),
        _pico(cached - fee, _MANY),
        _pico(fee, 1),
    )


def _pico(usd: Decimal, parts: int) -> int:
    return int((usd * 10**12 / parts).to_integral_value(ROUND_CEILING))


def is_private(base_url: str) -> bool:
    """Whether the address is of this machine or of a private network."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return bool(re.fullmatch(r"(.+\.)?localhost\.?", host))
