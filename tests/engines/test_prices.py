"""Laws of prices: exact, never below the bill, never guessed."""

from __future__ import annotations

from decimal import Decimal

import pytest
from genai_prices import Usage as Counted
from genai_prices import calc_price
from hypothesis import given
from hypothesis import strategies as st

from potstill.engines.ledger import Budget
from potstill.engines.prices import Price, check_price, find_price, most_tokens, price_of
from potstill.errors import BudgetError
from potstill.types import Usage

OPENAI = "https://api.openai.com/v1"
tokens = st.integers(0, 10**6)


@given(tokens, tokens, st.floats(0, 1), st.floats(0, 100))
def test_no_answer_costs_more_than_its_worst_case(tokens_in, tokens_out, share, usd):
    price = price_of(usd, 2 * usd)
    usage = Usage(tokens_in, tokens_out, cached_tokens=int(share * tokens_in))
    assert price.cost(usage) <= price.worst(tokens_in, tokens_out)
    assert price.worst(tokens_in, tokens_out) <= price.worst(tokens_in + 1, tokens_out + 1)


def test_a_price_of_the_recipe_is_exact():
    assert price_of(0.1, 0.4) == Price(100_000, 400_000, 100_000)
    assert price_of(0.1, 0.4).cost(Usage(3, 5)) == 300_000 + 2_000_000


@given(tokens, tokens, tokens)
def test_a_listed_price_is_what_the_list_says_and_never_less(tokens_in, tokens_out, cached):
    cached = min(cached, tokens_in)
    price = find_price("gpt-5-mini", OPENAI)
    listed = calc_price(
        Counted(input_tokens=tokens_in, output_tokens=tokens_out, cache_read_tokens=cached),
        "gpt-5-mini",
        provider_api_url=OPENAI,
    ).total_price
    assert Decimal(price.cost(Usage(tokens_in, tokens_out, cached_tokens=cached))) / 10**12 == listed


@given(st.integers(1, 10**6), tokens)
def test_of_tiers_the_dearest_counts(tokens_in, tokens_out):
    place = "https://generativelanguage.googleapis.com/v1beta/openai/"
    price = find_price("gemini-2.5-pro", place)
    listed = calc_price(
        Counted(input_tokens=tokens_in, output_tokens=tokens_out), "gemini-2.5-pro", provider_api_url=place
    ).total_price
    assert Decimal(price.cost(Usage(tokens_in, tokens_out))) / 10**12 >= listed


def test_a_fee_for_every_request_is_part_of_the_price():
    price = find_price("sonar", "https://api.perplexity.ai")
    assert price.cost(Usage(0, 0)) == price.worst(0, 0) == 12 * 10**9


def test_batches_cost_half_where_the_list_says_so():
    whole, batch = (find_price("gpt-5-mini", OPENAI, batch=batch) for batch in (False, True))
    assert (2 * batch.input_picousd, 2 * batch.output_picousd) == (whole.input_picousd, whole.output_picousd)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8000/v1",
        "http://127.0.0.1/v1",
        "http://[::1]:1/v1",
        "http://10.0.0.7/v1",
        "http://192.168.1.2:8/v1",
    ],
)
def test_what_runs_here_costs_nothing_unless_money_is_limited_and_nobody_said_so(url):
    price = find_price("any", url)
    assert price.worst(10**6, 10**6) == 0
    check_price(price, Budget(tokens=5), "any")
    with pytest.raises(BudgetError, match=r"^teacher\.price: what a gateway .* takes for any is unknown"):
        check_price(price, Budget(usd=5), "any")
    check_price(price_of(0, 0), Budget(usd=5), "any")


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("nosuch-model", OPENAI),
        ("gpt-5-mini", "https://api.example.com/v1"),
        ("gpt-5-mini", "https://localhost.evil.com/v1"),
    ],
)
def test_what_nobody_lists_is_unknown_and_cannot_be_limited(model, url):
    assert find_price(model, url) is None
    check_price(None, Budget(tokens=5), model)
    with pytest.raises(BudgetError, match=rf"teacher\.price: nobody lists a price of {model}"):
        check_price(None, Budget(usd=5), model)


@given(st.text(max_size=200))
def test_a_prompt_has_at_most_as_many_tokens_as_bytes(text):
    assert most_tokens(text, 1) >= len(text.encode("utf-8", "surrogatepass"))


def test_letters_that_are_spelled_out_count_as_what_they_become():
    assert most_tokens("\ufdfa" * 100, 0) - most_tokens("", 0) >= 100 * 18
