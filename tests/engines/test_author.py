"""Laws of asking: nothing twice, nothing lost, nothing beyond the budget; every fault retried or put aside by rule."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.servers.api import Server, serve
from tests.servers.faults import Settings

from potstill.engines.asking import Terms
from potstill.engines.author import ApiAuthor
from potstill.engines.ledger import Budget, Ledger
from potstill.engines.local_author import LocalAuthor
from potstill.engines.openai import Endpoint
from potstill.engines.prices import FREE, Price
from potstill.errors import BudgetError, Interrupted, ModelError, StoreError, TeacherError
from potstill.types import Request, Sampling

KEY = "sk-secret-0123456789abcdef"
PRICE = Price(1_000_000, 2_000_000, 500_000)


def questions(count: int, *, start: int = 0, **options: object) -> list[Request]:
    return [
        Request(messages=({"role": "user", "content": f"question {number}"},), max_tokens=32, **options)
        for number in range(start, start + count)
    ]


@dataclass
class Desk:
    """A ledger, and authors over it."""

    ledger: Ledger
    authors: list[ApiAuthor] = field(default_factory=list)

    def author(self, server: Server | str, *, budget: Budget = Budget(), attempts: int = 3, **options) -> ApiAuthor:  # noqa: B008
        url = server if isinstance(server, str) else server.url
        rest = {name: options.pop(name) for name in ("timeout_s", "model", "api") if name in options}
        endpoint = Endpoint(rest.pop("model", "teacher"), base_url=url, key=KEY, **({"timeout_s": 5.0} | rest))
        terms = Terms(options.pop("run", "run"), options.pop("price", PRICE), budget, attempts)
        return ApiAuthor(endpoint, self.ledger, terms, **options)


@pytest.fixture
def desk(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield Desk(ledger)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """How long is waited between attempts is the law of `replies`."""
    monkeypatch.setattr("potstill.engines.asking.delay_s", lambda *_: 0.01)


def test_answers_come_in_order_and_a_second_run_asks_nothing(desk):
    requests = questions(40)
    with serve() as server:
        author = desk.author(server)
        first = [answer.text for answer in author.ask(requests)]
        assert (author.tally.answered, author.tally.answered_before, server.counts["received"]) == (40, 0, 40)
        again = desk.author(server)
        assert [answer.text for answer in reversed(again.ask(requests[::-1]))] == first
        assert (again.tally.answered, again.tally.answered_before, server.counts["received"]) == (0, 40, 40)
    assert len(set(first)) == 40
    assert desk.ledger.spent("run")[0] == 40
    assert [answer.text for answer in desk.author("http://127.0.0.1:9/v1").ask(requests)] == first


def test_the_same_request_is_asked_once_and_another_sample_is_another_answer(desk):
    with serve() as server:
        author = desk.author(server)
        requests = [*questions(5), *questions(5), *questions(5, sample=1)]
        answers = author.ask(requests)
        assert answers[2] == answers[7]
        assert (author.tally.answered, author.tally.repeated, server.counts["received"]) == (10, 5, 10)


def test_what_is_counted_is_what_usage_says_times_the_price(desk):
    with serve() as server:
        author = desk.author(server)
        usages = [answer.usage for answer in author.ask(questions(10))]
        paid = sum(PRICE.cost(usage) for usage in usages)
        tokens = sum(usage.input_tokens + usage.output_tokens for usage in usages)
    assert desk.ledger.spent("run") == (10, tokens, paid)
    assert (author.tally.tokens, author.tally.usd) == (tokens, paid / 1e12)


RETRIED = {
    "http_500": "http_500",
    "http_502": "http_502",
    "http_429": "http_429",
    "http_429_after": "http_429",
    "hang": "timeout",
    "reset": "connection",
    "truncated_json": "not_json",
    "no_choices": "no_choices",
    "wrong_model": "wrong_model",
    "invalid_utf8": "not_utf8",
    "too_large": "too_large",
    "slow_drip": "timeout",
}


@pytest.mark.parametrize(("fault", "reason"), RETRIED.items())
def test_a_fault_is_counted_and_asked_again(desk, fault, reason):
    with serve(Settings(schedule={1: fault})) as server:
        author = desk.author(server, timeout_s=1.0)
        answers = list(author.ask(questions(4)))
    assert all(answer is not None for answer in answers)
    assert (author.tally.retried, author.tally.answered) == ({reason: 1}, 4)


@pytest.mark.parametrize(
    ("fault", "where", "reason"),
    [
        ("http_500", "given_up", "http_500"),
        ("http_400", "given_up", "http_400"),
        ("no_choices", "quarantined", "no_choices"),
        ("invalid_utf8", "quarantined", "not_utf8"),
    ],
)
def test_what_never_works_is_put_aside_by_rule(desk, fault, where, reason):
    bad = "question 2"
    rule = lambda _number, body: fault if body["messages"][0]["content"] == bad else None  # noqa: E731
    with serve(Settings(schedule=rule)) as server:
        author = desk.author(server, attempts=3)
        answers = list(author.ask(questions(6)))
        received = server.counts["received"]
        assert [number for number, answer in enumerate(answers) if answer is None] == [2]
        assert getattr(author.tally, where) == {reason: 1}
        assert author.tally.answered == 5
        author.ask(questions(6))
        asked_again = server.counts["received"] - received
    # A quarantined answer is there, and was paid; where there was none, the next run tries again.
    assert asked_again == {"quarantined": 0, "given_up": 1 if fault == "http_400" else 3}[where]
    assert any("1 of 6" in line for line in author.tally.remarks())


def test_a_quarantined_answer_is_kept_as_it_came(desk):
    with serve(Settings(faults={"no_choices": 1.0})) as server:
        author = desk.author(server, attempts=2)
        assert author.ask(questions(1))[0] is None
        assert server.counts["received"] == 2
    ((state, reason),) = [
        tuple(row) for row in sqlite3.connect(desk.ledger.path).execute("SELECT state, reason FROM requests").fetchall()
    ]
    assert (state, reason) == ("quarantined", "no_choices")


def test_another_reading_of_what_is_there_costs_nothing(desk, monkeypatch):
    with serve(Settings(faults={"wrong_model": 1.0})) as server:
        strict = desk.author(server, attempts=1)
        assert list(strict.ask(questions(3))) == [None] * 3
        assert strict.tally.quarantined == {"wrong_model": 3}
        received = server.counts["received"]
        monkeypatch.setattr("potstill.engines.completions.same_model", lambda *_: True)
        lax = desk.author(server)
        assert all(answer is not None for answer in lax.ask(questions(3)))
        assert (lax.tally.answered_before, server.counts["received"]) == (3, received)


def test_nobody_is_asked_without_a_key_that_is_taken(desk):
    with serve(Settings(key="sk-another-0123456789")) as server, pytest.raises(TeacherError, match="api_key"):
        desk.author(server).ask(questions(3))
    assert desk.ledger.spent("run") == (0, 0, 0)


def test_a_model_that_is_not_served_is_refused_before_anything_is_spent(desk):
    with serve() as server, pytest.raises(TeacherError, match="teacher"):
        desk.author(server, model="gpt-nine").ask(questions(3))
    assert desk.ledger.spent("run") == (0, 0, 0)


def test_a_refusal_midway_stops_the_run_with_its_reason_and_keeps_what_was_answered(desk):
    with serve(Settings(schedule=lambda number, _: "http_401" if number >= 10 else None)) as server:
        author = desk.author(server, concurrency=4)
        with pytest.raises(TeacherError):
            author.ask(questions(100))
        assert server.counts["received"] < 30
    assert author.tally.answered == 10
    with serve() as server:
        again = desk.author(server)
        assert None not in again.ask(questions(100))
        assert (again.tally.answered_before, again.tally.answered) == (10, 90)


def test_a_budget_that_ends_midway_leaves_a_valid_part(desk):
    with serve() as server:
        author = desk.author(server, budget=Budget(requests=7), concurrency=4)
        answers = author.ask(questions(20))
        assert sum(answer is not None for answer in answers) == 7
        assert (author.tally.stopped_by, author.tally.left, server.counts["received"]) == ("budget", 13, 7)
        assert "13 of 20" in author.tally.remarks()[0]
        more = desk.author(server, budget=Budget(requests=7))
        more.ask(questions(20))
        assert (more.tally.answered, more.tally.stopped_by, server.counts["received"]) == (0, "budget", 7)


def test_what_attempts_leave_over_of_their_worst_case_is_used(desk):
    with serve() as server:
        requests = questions(60)
        probe = desk.author(server, run="probe")
        probe.ask(requests[:10])
        used = desk.ledger.spent("probe")[1]
        worst = 1000
        author = desk.author(server, budget=Budget(tokens=4 * used + worst))
        author.ask(requests[10:])
        assert author.tally.answered >= 35
        assert desk.ledger.spent("run")[1] <= 4 * used + worst


@pytest.mark.parametrize("seed", range(12))
def test_no_budget_is_exceeded_whatever_fails(desk, seed):
    draw = random.Random(seed)
    limits = {"requests": draw.randint(1, 40), "tokens": draw.randint(500, 20_000), "usd": draw.uniform(0.0006, 0.02)}
    chosen = {name: limits[name] for name in limits if draw.random() < 0.6} or {"requests": limits["requests"]}
    faults = {"http_500": 0.1, "reset": 0.1, "no_choices": 0.1}
    budget, received = Budget(**chosen), 0
    with serve(Settings(faults=faults, seed=seed)) as server:
        for _ in range(2):
            author = desk.author(server, budget=budget, concurrency=draw.randint(1, 8))
            try:
                author.ask(questions(30))
            except BudgetError:
                break
        received = server.counts["received"]
    requests, tokens, picousd = desk.ledger.spent("run")
    assert budget.holds(requests, tokens, picousd)
    assert received <= requests


def test_a_budget_too_small_for_one_request_is_an_error_before_anything_is_sent(desk):
    with serve() as server, pytest.raises(BudgetError, match=r"teacher\.budget: too small for one request.*max_tokens"):
        desk.author(server, budget=Budget(tokens=100)).ask(questions(2))
    assert server.counts["received"] == server.counts["connections"] == 0


def test_money_cannot_be_limited_without_a_price(desk):
    with serve() as server, pytest.raises(BudgetError, match=r"teacher\.price"):
        desk.author(server, price=None, budget=Budget(usd=1.0)).ask(questions(2))
    assert server.counts["connections"] == 0


class AfterSome:
    """Somebody asks to stop when so many requests have ended."""

    def __init__(self, count: int) -> None:
        self.left = count

    def asked(self) -> bool:
        return self.left <= 0

    def advance(self, count: int) -> None:
        self.left -= count


def test_being_asked_to_stop_keeps_all_that_was_answered(desk):
    stop = AfterSome(15)
    with serve(Settings(delay_s=0.02)) as server:
        author = desk.author(server, concurrency=4, stopping=stop, advance=stop.advance)
        with pytest.raises(Interrupted, match="same command"):
            author.ask(questions(400))
        assert author.tally.stopped_by == "interrupt"
        answered = server.counts["received"]
        assert author.tally.answered == answered
        again = desk.author(server)
        again.ask(questions(400))
        assert server.counts["received"] == 400
        assert again.tally.answered_before == answered


def test_progress_counts_every_request_once(desk):
    told = []
    with serve(Settings(faults={"http_500": 0.2, "no_choices": 0.2})) as server:
        desk.author(server, attempts=2, advance=told.append).ask([*questions(20), *questions(3)])
    assert sum(told) == 23


def test_two_processes_share_the_work_and_ask_nothing_twice(tmp_path):
    requests = questions(60)
    with (
        serve(Settings(delay_s=0.005)) as server,
        Ledger(tmp_path / "l") as one,
        Ledger(tmp_path / "l") as other,
    ):
        authors = [Desk(one).author(server, concurrency=4), Desk(other).author(server, concurrency=4)]
        threads = [threading.Thread(target=author.ask, args=(requests,)) for author in authors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert server.counts["received"] == 60
        assert sum(author.tally.answered for author in authors) == 60


def test_another_name_of_the_model_is_remarked(desk, monkeypatch):
    monkeypatch.setattr("potstill.engines.completions.same_model", lambda *_: True)
    with serve(Settings(schedule={2: "wrong_model"})) as server:
        author = desk.author(server)
        author.ask(questions(6))
    assert author.tally.served == {"teacher": 5, "another-7b": 1}
    assert author.tally.remarks() == ("The endpoint changed the model that answers: teacher (5), another-7b (1).",)


def test_no_secret_reaches_the_file(desk, caplog):
    with serve(Settings(key=KEY, faults={"http_500": 0.3})) as server:
        desk.author(server).ask(questions(20))
    with serve(Settings(key="sk-another-0123456789")) as server, pytest.raises(TeacherError) as caught:
        desk.author(server).ask(questions(20, start=100))
    content = b"".join(file.read_bytes() for file in desk.ledger.path.parent.iterdir())
    assert KEY.encode() not in content
    assert KEY not in str(caught.value) + caplog.text + repr(desk.ledger.read(b"0" * 16))


def test_asking_within_a_running_loop_works_as_in_notebooks(desk):
    import asyncio

    async def cell(url: str) -> str:
        answer = desk.author(url).ask(questions(1))[0]
        assert answer is not None
        return answer.text

    with serve() as server:
        assert asyncio.run(cell(server.url))


def test_a_ledger_that_fails_stops_the_asking(desk):
    with serve() as server:
        author = desk.author(server)
        desk.ledger.close()
        with pytest.raises(StoreError):
            author.ask(questions(3))
        assert server.counts["received"] == 0


def test_batches_are_asked_once_and_resumed(desk):
    with serve() as server:
        author = desk.author(server, batch=True)
        answers = author.ask(questions(12))
        assert None not in answers
        assert author.tally.answered == 12
        assert author.tally.remarks() == ()
        again = desk.author(server, batch=True)
        again.ask(questions(12))
        assert (again.tally.answered_before, again.tally.answered) == (12, 0)
    assert desk.ledger.spent("run")[0] == 12


def test_a_batch_that_was_submitted_before_a_stop_is_collected_and_not_submitted_again(desk):
    stop = AfterSome(0)
    with serve() as server:
        first = desk.author(server, batch=True, stopping=None)
        waiting = pytest.MonkeyPatch()
        waiting.setattr("potstill.engines.batching.poll", _interrupted)
        with pytest.raises(Interrupted):
            first.ask(questions(8))
        waiting.undo()
        assert len(desk.ledger.open_batches("run")) == 1
        again = desk.author(server, batch=True)
        assert None not in again.ask(questions(8))
        assert len(desk.ledger.open_batches("run")) == 0
    assert desk.ledger.spent("run")[0] == 8
    assert stop.asked()


async def _interrupted(*_):
    raise KeyboardInterrupt


class Parrot:
    """An engine that repeats the end of its prompt."""

    offers = frozenset()

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def generate(self, prompts, sampling: Sampling) -> list[str]:
        self.asked.append(list(prompts))
        return [f"{prompt[-70:]} at {sampling.temperature}" for prompt in prompts]


def test_a_model_of_this_machine_writes_into_the_same_ledger(desk, tiny_tokenizer):
    parrot = Parrot()
    author = LocalAuthor(parrot, tiny_tokenizer, desk.ledger, name="tiny", run="run")
    requests = [*questions(20), *questions(20)]
    answers = author.ask(requests)
    assert "question 3" in answers[3].text
    assert answers[3] == answers[23]
    assert (author.tally.answered, author.tally.repeated) == (20, 20)
    again = LocalAuthor(parrot, tiny_tokenizer, desk.ledger, name="tiny", run="run")
    before = len(parrot.asked)
    assert list(again.ask(requests)) == list(answers)
    assert (len(parrot.asked), again.tally.answered_before) == (before, 20)
    assert desk.ledger.spent("run")[2] == 0


def test_what_is_generated_does_not_depend_on_what_is_missing(desk, tiny_tokenizer):
    parrot = Parrot()
    requests = questions(20)
    LocalAuthor(parrot, tiny_tokenizer, desk.ledger, name="tiny", run="run").ask(requests[:5])
    LocalAuthor(parrot, tiny_tokenizer, desk.ledger, name="tiny", run="run").ask(requests)
    assert len(parrot.asked[1]) == 16


@pytest.mark.parametrize("wish", [{"stop": ("x",)}, {"choices": ("a",)}, {"schema": {}}, {"top_logprobs": 2}])
def test_what_an_engine_cannot_do_is_refused(desk, tiny_tokenizer, wish):
    with pytest.raises(ModelError, match="openai"):
        LocalAuthor(Parrot(), tiny_tokenizer, desk.ledger, name="tiny", run="run").ask(questions(1, **wish))


def test_a_price_of_nothing_is_a_price(desk):
    with serve() as server:
        author = desk.author(server, price=FREE, budget=Budget(usd=0.01))
        author.ask(questions(3))
    assert (author.tally.usd, author.tally.answered) == (0.0, 3)


@pytest.mark.slow
def test_400_requests_a_second_on_a_quiet_machine(desk):
    with serve() as server:
        author = desk.author(server)
        began = time.monotonic()
        author.ask(questions(2000))
        assert 2000 / (time.monotonic() - began) > 150
