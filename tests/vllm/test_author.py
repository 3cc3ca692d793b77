"""Asking a real server through the ledger: many at once, each once, samples that differ, refusals that stay alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.vllm.conftest import MakeEndpoint
from tests.vllm.test_server import chat

from potstill.engines.asking import Terms
from potstill.engines.author import ApiAuthor
from potstill.engines.ledger import Budget, Ledger
from potstill.engines.prices import FREE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

MANY = 32


@pytest.fixture
def author(make_endpoint: MakeEndpoint, tmp_path: Path) -> Iterator[ApiAuthor]:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ApiAuthor(make_endpoint(), ledger, Terms("run", FREE, Budget(), 3), concurrency=MANY)


def test_many_at_once_are_all_answered_and_none_is_asked_again(author: ApiAuthor, model: str):
    requests = [chat(f"What comes after {number}?", temperature=0.7) for number in range(MANY)]
    first = [said.text for said in author.ask(requests) if said]
    assert author.tally.answered == len(first) == MANY
    assert author.tally.served == {model: MANY}
    assert [said.text for said in author.ask(requests) if said] == first
    assert (author.tally.answered, author.tally.answered_before) == (0, MANY)


def test_samples_are_drawn_anew(author: ApiAuthor):
    asked = [chat("Name an animal.", temperature=1.0, max_tokens=12, sample=number) for number in range(8)]
    assert len({said.text for said in author.ask(asked) if said}) > 1


def test_a_refused_request_leaves_the_others_alone(author: ApiAuthor):
    asked = [chat("Hello"), chat("word " * 40_000), chat("Good evening")]
    first, refused, last = author.ask(asked)
    assert first is not None
    assert refused is None
    assert last is not None
    assert sum(author.tally.given_up.values()) == 1
