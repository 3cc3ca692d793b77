"""One process that asks the local test server, for `api.py`: it may be killed at any instant.

Refuses to decide what is measured: it asks, and prints what came of it as JSON.

    python bench/_asking.py --url URL --ledger FILE --requests N [--tokens N] [--usd X] [--budget-requests N] ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from potstill.engines.asking import Terms
from potstill.engines.author import ApiAuthor
from potstill.engines.ledger import Budget, Ledger
from potstill.engines.openai import Endpoint
from potstill.engines.prices import Price
from potstill.errors import BudgetError, TeacherError
from potstill.types import Completion, Request

__all__ = ["MAX_TOKENS", "PRICE", "Questions", "ask", "digest_of", "expected_body"]

MAX_TOKENS = 32
PRICE = Price(1_000_000, 4_000_000, 500_000)
"""A dollar a million tokens in, four out."""


class Questions(Sequence[Request]):
    """Short requests that differ, made when they are read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self.count))]
        if not 0 <= index < self.count:
            raise IndexError(index)
        text = f"What is {index} plus {7 * index}? Answer with a number."
        return Request(messages=({"role": "user", "content": text},), max_tokens=MAX_TOKENS, temperature=0.7)


class Memory:
    """Resident bytes of this process when so many requests had ended."""

    def __init__(self, marks: Sequence[int]) -> None:
        self.marks, self.done = set(marks), 0
        self.resident: dict[int, int] = {}

    def advance(self, count: int) -> None:
        """`count` more have ended."""
        self.done += count
        if self.done in self.marks:
            self.resident[self.done] = psutil.Process().memory_info().rss


def endpoint_at(url: str, timeout_s: float) -> Endpoint:
    """The test server's model."""
    return Endpoint("teacher", base_url=url, key="bench", timeout_s=timeout_s)


def expected_body(number: int) -> dict[str, Any]:
    """What is sent for question `number`."""
    return endpoint_at("http://127.0.0.1:9/v1", 1.0).body(Questions(number + 1)[number])


def digest_of(answers: Sequence[Completion | None]) -> str:
    """blake2b of the data set that the answers make, a line each."""
    digest = hashlib.blake2b(digest_size=16)
    for answer in answers:
        digest.update(json.dumps(None if answer is None else asdict(answer), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def ask(arguments: argparse.Namespace) -> dict[str, Any]:
    """Asks all questions that are missing; seconds, tally, memory, the data set's digest, and why the run stopped."""
    budget = Budget(arguments.usd, arguments.budget_requests, arguments.tokens)
    memory = Memory((1000, 10_000))
    with Ledger(arguments.ledger) as ledger:
        author = ApiAuthor(
            endpoint_at(arguments.url, arguments.timeout_s),
            ledger,
            Terms("bench", PRICE, budget, arguments.attempts),
            concurrency=arguments.concurrency,
            advance=memory.advance,
        )
        began = time.perf_counter()
        answers: Sequence[Completion | None] = []
        stopped = ""
        try:
            answers = author.ask(Questions(arguments.requests))
        except BudgetError:
            pass
        except TeacherError as error:
            stopped = str(error)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "tally": asdict(author.tally),
            "memory": memory.resident,
            "digest": digest_of(answers),
            "spent": ledger.spent("bench"),
            "stopped": stopped,
            "texts": [None if answer is None else answer.text for answer in answers] if arguments.texts else [],
        }


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--attempts", type=int, default=6)
    parser.add_argument("--timeout-s", type=float, default=30.0)
    parser.add_argument("--usd", type=float)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--budget-requests", type=int)
    parser.add_argument("--texts", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    print(json.dumps(ask(read_arguments())))
