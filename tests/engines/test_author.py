"""Laws of asking: nothing twice, nothing lost, nothing beyond the budget; every fault retried or put aside by rule."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.servers.api import Server, serve
from tests.servers.faults import Settings

from potstill.engines.accounts import forget_requests, read_rows
from potstill.engines.asking import Terms
from potstill.engines.author import ApiAuthor
from potstill.engines.ledger import Asked, Budget, Ledger, Spend
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
    "error_in_200": "server_error",
    "empty": "empty",
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


@pytest.mark.parametrize("wish", [{"choices": ("a", "b")}, {"schema": {"type": "integer"}}])
def test_an_answer_that_is_not_what_was_asked_for_is_paid_once_and_kept(desk, monkeypatch, wish):
    with serve(Settings(answer=lambda _: "neither")) as server:
        strict = desk.author(server, attempts=4)
        assert list(strict.ask(questions(3, **wish))) == [None] * 3
        assert (sum(strict.tally.quarantined.values()), strict.tally.retried, server.counts["received"]) == (3, {}, 3)
        monkeypatch.setattr("potstill.engines.completions._checked", lambda text, _: text)
        lax = desk.author(server)
        assert [answer.text for answer in lax.ask(questions(3, **wish))] == ["neither"] * 3
        assert (lax.tally.answered_before, server.counts["received"]) == (3, 3)


def test_an_answer_of_another_model_stops_the_run_and_is_kept(desk, monkeypatch):
    with serve(Settings(faults={"wrong_model": 1.0})) as server:
        strict = desk.author(server, attempts=4, concurrency=1)
        with pytest.raises(TeacherError, match=r"^teacher\.model: .* answers as 'another-7b', and 'teacher' was asked"):
            strict.ask(questions(30))
        received = server.counts["received"]
        assert received <= 2
        assert desk.ledger.read(strict.key_of(questions(1)[0])).raw is not None
    with serve() as server:
        assert None not in desk.author(server).ask(questions(30))
        assert server.counts["received"] == 30
    with serve(Settings(faults={"wrong_model": 1.0})) as server:
        with pytest.raises(TeacherError):
            desk.author(server, concurrency=1).ask(questions(1, start=90))
        received = server.counts["received"]
        monkeypatch.setattr("potstill.engines.completions.same_model", lambda *_: True)
        lax = desk.author(server)
        assert None not in lax.ask(questions(1, start=90))
        assert (lax.tally.answered_before, server.counts["received"]) == (1, received)


def test_an_endpoint_without_log_probabilities_stops_the_run(desk, monkeypatch):
    monkeypatch.setattr("tests.servers.answers._chat_logprobs", lambda *_: None)
    with serve() as server:
        with pytest.raises(TeacherError, match=r"teacher\.base_url: .* answers without logprobs"):
            desk.author(server, concurrency=1).ask(questions(30, top_logprobs=4))
        assert server.counts["received"] <= 2


def test_an_error_in_place_of_an_answer_is_asked_again_by_the_next_run(desk):
    with serve(Settings(faults={"error_in_200": 1.0})) as server:
        author = desk.author(server, attempts=2)
        author.ask(questions(3))
        assert (author.tally.given_up, author.tally.quarantined) == ({"server_error": 3}, {})
        assert server.counts["received"] == 6
    with serve() as server:
        assert None not in desk.author(server).ask(questions(3))


def test_every_bad_answer_is_kept_whatever_comes_after_it(desk):
    with serve(Settings(schedule={0: "empty", 1: "http_500"})) as server:
        author = desk.author(server, attempts=2)
        author.ask(questions(1))
    record = desk.ledger.read(author.key_of(questions(1)[0]))
    assert (record.state, record.reason, author.tally.given_up) == ("given_up", "http_500", {"http_500": 1})
    assert b'"content": ""' in record.raw


@pytest.mark.parametrize("given", [{"text": "half \ud83d pair"}, {"user": "x\ud83d"}])
def test_half_of_a_surrogate_pair_hangs_nothing(desk, given):
    message = {"role": "user", "content": given.get("text", "whole")}
    request = Request(messages=(message,), max_tokens=8, user=given.get("user", ""))
    with serve() as server:
        assert desk.author(server, concurrency=1).ask([request])[0] is not None
    for row in read_rows(desk.ledger.path):
        json.dumps(row, ensure_ascii=False).encode()


def test_a_server_that_writes_more_than_it_may_stops_the_run_before_the_budget_is_gone(desk):
    with serve(Settings(answer=lambda _: "w " * 5000)) as server:
        author = desk.author(server, budget=Budget(tokens=30_000), concurrency=1)
        with pytest.raises(TeacherError, match=r"^teacher\.budget: .* took 5,0\d\d tokens .* max_tokens"):
            author.ask(questions(20))
        assert server.counts["received"] <= 2
        spent = desk.ledger.spent("run")
        assert spent[1] == author.tally.tokens > 5000
        assert author.tally.answered == server.counts["received"]
        free = desk.author(server, run="unlimited")
        assert None not in free.ask(questions(5, start=50))


def test_another_address_is_another_teacher_unless_it_is_this_network(desk):
    def key(url: str) -> bytes:
        return desk.author(url).key_of(questions(1)[0])

    ours = {key(url) for url in ("http://127.0.0.1:1/v1", "http://localhost:2/v1", "http://[::1]:3", "http://10.0.0.9")}
    others = {key(url) for url in ("https://api.a.example/v1", "https://api.b.example/v1")}
    assert (len(ours), len(others), len(ours | others)) == (1, 2, 3)
    assert key("https://api.a.example/v1") == key("https://API.A.example.:443/other")


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


def test_an_interrupt_in_a_notebook_ends_the_call_and_keeps_what_came(desk):
    import asyncio

    async def cell(url: str) -> None:
        author = desk.author(url, concurrency=2)
        began = time.monotonic()
        here = threading.main_thread().ident
        threading.Timer(0.6, signal.pthread_kill, (here, signal.SIGINT)).start()
        with pytest.raises(Interrupted, match="same command"):
            author.ask(questions(300))
        assert time.monotonic() - began < 5.0
        assert author.tally.stopped_by == "interrupt"
        assert 0 < author.tally.answered == server.counts["received"] < 100

    with (
        serve(Settings(delay_s=0.1)) as server,
        _interrupts_as_python_does(),
        closing(asyncio.new_event_loop()) as loop,
    ):
        loop.run_until_complete(cell(server.url))


@contextmanager
def _interrupts_as_python_does():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_another_process_asks_takes_no_turn_of_the_limit(desk):
    requests, stop = questions(8), AfterSome(3)
    with serve() as server, Ledger(desk.ledger.path) as other:
        limit = {"requests_per_minute": 120, "concurrency": 8}
        author = desk.author(server, stopping=stop, advance=stop.advance, **limit)
        for request in requests:
            other.claim(Asked(author.key_of(request), "{}", "m", "u", "r"), Spend(), Budget()).result()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            author.ask([*requests, *questions(3, start=50)])
        assert time.monotonic() - began < 3.0
        assert author.tally.answered == 3


def test_a_stop_puts_no_answer_aside_that_may_still_come(desk):
    stop = AfterSome(1)
    with serve(Settings(schedule={0: "empty"}, delay_s=0.3)) as server:
        author = desk.author(server, stopping=stop)
        threading.Timer(0.15, stop.advance, (1,)).start()
        with pytest.raises(Interrupted):
            author.ask(questions(1))
        assert (author.tally.quarantined, author.tally.left) == ({}, 1)
        assert desk.author(server).ask(questions(1))[0] is not None


def test_a_shared_answer_is_found_by_whoever_it_was_asked_for(desk):
    with serve() as server:
        for user in ("", "ann", "bob\ud83d"):
            desk.author(server).ask(questions(2, user=user))
        desk.author(server).ask([*questions(1, start=5), *questions(1, start=5, user="eve")])
        assert server.counts["received"] == 3
    desk.ledger.close()
    assert forget_requests(desk.ledger.path, user="eve").requests == 1
    assert forget_requests(desk.ledger.path, user="bob\ud83d").requests == 2
    assert forget_requests(desk.ledger.path, user="ann").requests == 0
    assert b"ann" not in b"".join(file.read_bytes() for file in desk.ledger.path.parent.iterdir())


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


def test_an_answer_that_another_process_is_writing_is_waited_for(desk, tiny_tokenizer):
    author = LocalAuthor(Parrot(), tiny_tokenizer, desk.ledger, name="tiny", run="run")
    with Ledger(desk.ledger.path) as other:
        asked = Asked(author.key_of(questions(1)[0]), "{}", "tiny", "local", "run")
        other.claim(asked, Spend(), Budget()).result()
        threading.Timer(0.5, other.close).start()
        assert None not in author.ask(questions(2))
    assert author.tally.answered == 2
    with Ledger(desk.ledger.path) as other:
        asked = Asked(author.key_of(questions(1, start=7)[0]), "{}", "tiny", "local", "run")
        other.claim(asked, Spend(), Budget()).result()
        stop = AfterSome(1)
        threading.Timer(0.5, stop.advance, (1,)).start()
        stopped = LocalAuthor(Parrot(), tiny_tokenizer, desk.ledger, name="tiny", run="run", stopping=stop)
        with pytest.raises(Interrupted):
            stopped.ask(questions(1, start=7))
        assert stopped.tally.stopped_by == "interrupt"


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
def test_requests_are_many_a_second(desk):
    with serve() as server:
        author = desk.author(server)
        began = time.monotonic()
        author.ask(questions(2000))
        assert 2000 / (time.monotonic() - began) > 150
