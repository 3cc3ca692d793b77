"""Laws of asking in batches: no batch is paid twice, forgotten, or asked beside; why one failed is told."""

from __future__ import annotations

import pytest
from tests.engines.test_author import Desk, questions
from tests.servers.answers import answer_to
from tests.servers.api import serve
from tests.servers.faults import Settings

from potstill.engines import batching
from potstill.engines.batches import BatchState
from potstill.engines.ledger import Budget, Ledger
from potstill.errors import Interrupted, TeacherError

FULL = "Enqueued token limit reached for gpt-4o in organization org"


@pytest.fixture
def desk(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield Desk(ledger)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(batching, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(batching, "_LIMIT_WAIT_S", 0.01)
    monkeypatch.setattr(batching, "_LOOKS_S", (0.0, 0.0))


def broken(server, *, made: bool, status: int = 500, lists: bool = True):
    """The reply to the first creation of a batch is lost; whether it was made all the same."""
    real, asked = server.batches.route, []

    def route(method, path, sent):
        if (method, path) == ("POST", "/batches"):
            asked.append(path)
            if len(asked) == 1:
                if made:
                    real(method, path, sent)
                return status, {"error": {"message": "the gateway lost it"}}
        if (method, path) == ("GET", "/batches") and not lists:
            return 403, {"error": {"message": "no"}}
        return real(method, path, sent)

    server.batches.route = route


def fail(server, problem: str, times: int = 10**9, *, above: int = 0):
    """Batches of more than `above` requests fail, so many of them."""
    real, failed = server.batches._finish, []

    def finish(batch):
        if len(failed) < times and batch["request_counts"]["total"] > above:
            failed.append(batch["id"])
            error = {"message": problem, "code": "c", "line": None, "param": None}
            batch.update(status="failed", errors={"data": [error], "object": "list"})
        else:
            real(batch)

    server.batches._finish = finish
    return failed


async def never_done(*_):
    return BatchState("in_progress", False, 5, 0, 0)


class AfterSome:
    """Says stop when it was asked so often."""

    def __init__(self, times: int) -> None:
        self.times = times

    def asked(self) -> bool:
        self.times -= 1
        return self.times < 0


def left_waiting(desk, server, count: int = 5, monkeypatch=None) -> None:
    """A run that was stopped while the provider worked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "poll", never_done)
        with pytest.raises(Interrupted):
            desk.author(server, batch=True, stopping=AfterSome(3)).ask(questions(count))


# A lost reply


def test_a_batch_whose_reply_was_lost_is_found_and_not_started_again(desk):
    with serve() as server:
        broken(server, made=True)
        author = desk.author(server, batch=True)
        assert None not in author.ask(questions(3))
        assert len(server.batches.batches) == 1
        assert server.stats()["answered_again"] == 0
    assert desk.ledger.spent("run")[0] == 3


def test_a_batch_that_nobody_lists_counts_at_its_worst_case(desk):
    with serve() as server:
        broken(server, made=False)
        author = desk.author(server, batch=True)
        with pytest.raises(TeacherError, match=r"^teacher\.batch: .* did not say whether it started a batch"):
            author.ask(questions(3))
        worst = sum(author._job(each).worst.picousd for each in questions(3))
        assert desk.ledger.spent("run")[::2] == (3, worst)
        assert desk.ledger.open_batches("run") == {}
        assert None not in desk.author(server, batch=True).ask(questions(3))
    assert desk.ledger.spent("run")[2] > worst


def test_a_batch_that_was_refused_costs_nothing(desk):
    with serve() as server:
        broken(server, made=False, status=400)
        with pytest.raises(TeacherError, match=r"^teacher\.batch: .*HTTP 400"):
            desk.author(server, batch=True).ask(questions(3))
    assert desk.ledger.spent("run") == (3, 0, 0)
    assert desk.ledger.open_batches("run") == {}


def test_a_batch_that_cannot_be_looked_for_is_looked_for_by_the_next_run(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with serve() as server:
        real = server.batches.route
        broken(server, made=True, lists=False)
        with Ledger(path) as ledger, pytest.raises(TeacherError):
            Desk(ledger).author(server, batch=True).ask(questions(3))
        server.batches.route = real
        with Ledger(path) as ledger:
            author = Desk(ledger).author(server, batch=True)
            assert None not in author.ask(questions(3))
            assert (len(server.batches.batches), server.stats()["answered_again"]) == (1, 0)
            assert ledger.spent("run")[0] == 3


def test_what_another_process_is_sending_is_left_to_it(tmp_path):
    with serve() as server, Ledger(tmp_path / "ledger.sqlite") as first:
        broken(server, made=True, lists=False)
        with pytest.raises(TeacherError):
            Desk(first).author(server, batch=True).ask(questions(3))
        before = first.spent("run")
        with Ledger(first.path) as second, pytest.raises(Interrupted):
            Desk(second).author(server, batch=True, stopping=AfterSome(3)).ask(questions(3))
        assert first.spent("run") == before
        assert len(first.open_batches("run")) == 1


# Requests that are in a batch


def test_a_request_in_a_batch_is_asked_by_nobody_else(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with serve() as server:
        with Ledger(path) as ledger:
            left_waiting(Desk(ledger), server)
            (batch,) = ledger.open_batches("run")
        with Ledger(path) as ledger:
            desk = Desk(ledger)
            for run in ("run", "other"):
                with pytest.raises(TeacherError, match=rf"in batch {batch}, .* teacher\.batch: true"):
                    desk.author(server, run=run).ask(questions(5))
            with pytest.raises(TeacherError, match=rf"in batch {batch}, "):
                desk.author(server, run="other", batch=True).ask(questions(5))
            author = desk.author(server, batch=True)
            assert None not in author.ask(questions(5))
            assert (author.tally.answered_before, server.stats()["answered_again"]) == (5, 0)
            assert None not in desk.author(server, run="other").ask(questions(5))
            assert (ledger.spent("run")[0], ledger.spent("other")[0]) == (5, 0)


def test_the_same_ledger_does_not_ask_beside_its_batch(desk):
    with serve() as server:
        left_waiting(desk, server)
        with pytest.raises(TeacherError, match="in batch batch-0, "):
            desk.author(server).ask(questions(5))
        assert server.counts["received"] == 0
        assert None not in desk.author(server).ask(questions(3, start=10))


# Budgets, attempts, stops


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_run_that_its_budget_ends_says_so_however_late(desk, attempts):
    with serve() as server:
        author = desk.author(server, batch=True, attempts=attempts, budget=Budget(requests=5))
        answers = author.ask(questions(20))
    assert sum(answer is not None for answer in answers) == 5
    assert (author.tally.stopped_by, author.tally.left, author.tally.given_up) == ("budget", 15, {})


def test_rounds_that_the_budget_cut_short_are_no_attempts(desk):
    with serve() as server:
        worst = desk.author(server)._job(questions(1)[0]).worst
        tokens = 20 * (worst.input_tokens + worst.output_tokens)
        author = desk.author(server, batch=True, attempts=1, budget=Budget(tokens=tokens))
        answers = author.ask(questions(24))
        assert len(server.batches.batches) > 1
    assert None not in answers
    assert author.tally.stopped_by == ""


def test_answers_that_are_there_are_counted_where_the_budget_ends(desk):
    with serve() as server:
        desk.author(server).ask(questions(4, start=100))
        author = desk.author(server, batch=True, budget=Budget(requests=6))
        author.ask([*questions(10), *questions(4, start=100)])
    assert (author.tally.answered_before, author.tally.answered, author.tally.left) == (4, 2, 8)


def test_who_is_asked_to_stop_while_claiming_sends_nothing(desk, monkeypatch):
    monkeypatch.setattr(batching, "_GROUP", 2)
    with serve() as server:
        with pytest.raises(Interrupted):
            desk.author(server, batch=True, stopping=AfterSome(0)).ask(questions(50))
        assert server.batches.batches == {}
    assert desk.ledger.spent("run")[1:] == (0, 0)


def test_many_claims_are_one_commit(desk, monkeypatch):
    groups, real = [], desk.ledger._commit
    monkeypatch.setattr(desk.ledger, "_commit", lambda group: (groups.append(len(group)), real(group))[1])
    with serve() as server:
        assert None not in desk.author(server, batch=True).ask(questions(400))
    assert len(groups) < 60


# Batches that failed


def test_a_batch_that_failed_tells_why_and_is_not_sent_again(desk):
    with serve() as server:
        fail(server, "Invalid model for batch")
        with pytest.raises(TeacherError, match=r"^teacher\.batch: .*failed batch batch-0 \(Invalid model for batch\)"):
            desk.author(server, batch=True, attempts=6).ask(questions(3))
        assert len(server.batches.batches) == 1
    assert desk.ledger.spent("run") == (3, 0, 0)
    assert desk.ledger.open_batches("run") == {}


def test_where_the_providers_queue_is_full_it_is_tried_again_later(desk):
    with serve() as server:
        failed = fail(server, FULL, times=3)
        author = desk.author(server, batch=True, attempts=1)
        assert None not in author.ask(questions(8))
    assert len(failed) == 3
    assert author.tally.given_up == {}


def test_a_batch_larger_than_the_queue_becomes_smaller(desk):
    with serve() as server:
        failed = fail(server, FULL, above=3)
        assert None not in desk.author(server, batch=True, attempts=1).ask(questions(16))
    assert len(failed) < 10


# Answers that show that all others will be of no use


ANOTHER = r"^teacher\.model: .* answers as 'another-7b', and 'teacher' was asked"


def another_model_answers(patch, question: str = ""):
    """Another model answers whatever has `question` in it."""

    def answer(body, **options):
        return answer_to(body, **options) | ({"model": "another-7b"} if question in str(body["messages"]) else {})

    patch.setattr("tests.servers.batches.answer_to", answer)


def states(desk, author, requests):
    return [(record.state, record.reason) for record in map(desk.ledger.read, map(author.key_of, requests))]


def test_a_batch_of_another_model_is_settled_and_the_last(desk):
    with serve() as server:
        worst = desk.author(server)._job(questions(1)[0]).worst
        tokens = 10 * (worst.input_tokens + worst.output_tokens)
        author = desk.author(server, batch=True, budget=Budget(tokens=tokens))
        with pytest.MonkeyPatch.context() as patch:
            another_model_answers(patch)
            with pytest.raises(TeacherError, match=ANOTHER):
                author.ask(questions(30))
        (sent,) = (batch["request_counts"]["total"] for batch in server.batches.batches.values())
        assert sent < 30
        assert states(desk, author, questions(sent)) == [("given_up", "wrong_model")] * sent
        assert desk.ledger.read(author.key_of(questions(1)[0])).raw is not None
        assert desk.ledger.spent("run")[:2] == (sent, author.tally.tokens)
        assert 0 < author.tally.tokens < tokens
        assert desk.ledger.open_batches("run") == {}
        # Whoever mends the endpoint has them asked again, and all others.
        assert None not in desk.author(server, batch=True).ask(questions(30))


def test_a_batch_stops_with_the_words_of_a_single_request(desk, monkeypatch):
    another_model_answers(monkeypatch)
    with serve(Settings(faults={"wrong_model": 1.0})) as server, pytest.raises(TeacherError) as alone:
        desk.author(server, concurrency=1).ask(questions(1))
    with serve() as other, pytest.raises(TeacherError) as batched:
        desk.author(other, batch=True).ask(questions(1))
    told = [str(alone.value).replace(server.url, "URL"), str(batched.value).replace(other.url, "URL")]
    assert told[0] == told[1]


def test_one_answer_of_another_model_among_good_ones_stops_too_and_only_it_is_asked_again(desk):
    with serve() as server:
        author = desk.author(server, batch=True)
        with pytest.MonkeyPatch.context() as patch:
            another_model_answers(patch, "question 2")
            with pytest.raises(TeacherError, match=ANOTHER):
                author.ask(questions(5))
        good = ("answered", "")
        assert states(desk, author, questions(5)) == [good, good, ("given_up", "wrong_model"), good, good]
        again = desk.author(server, batch=True)
        assert None not in again.ask(questions(5))
        assert (again.tally.answered_before, again.tally.answered) == (4, 1)


def test_a_batch_without_log_probabilities_stops_the_run(desk, monkeypatch):
    monkeypatch.setattr("tests.servers.answers._chat_logprobs", lambda *_: None)
    with serve() as server:
        with pytest.raises(TeacherError, match=r"^teacher\.base_url: .* answers without logprobs"):
            desk.author(server, batch=True).ask(questions(3, top_logprobs=4))
        assert len(server.batches.batches) == 1


def test_an_earlier_runs_batch_of_another_model_stops_before_anything_is_sent(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    another_model_answers(monkeypatch)
    with serve() as server:
        with Ledger(path) as ledger:
            left_waiting(Desk(ledger), server)
        with Ledger(path) as ledger:
            author = Desk(ledger).author(server, batch=True)
            with pytest.raises(TeacherError, match=ANOTHER):
                author.ask(questions(20))
            assert len(server.batches.batches) == 1
            assert ledger.open_batches("run") == {}
            assert set(states(Desk(ledger), author, questions(5))) == {("given_up", "wrong_model")}


def test_an_earlier_runs_batch_of_what_is_not_asked_any_more_stops_nothing(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with serve() as server:
        with Ledger(path) as ledger:
            left_waiting(Desk(ledger), server)
        with Ledger(path) as ledger, pytest.MonkeyPatch.context() as patch:
            another_model_answers(patch, "question")
            server.batches._finish(server.batches.batches["batch-0"])
            patch.undo()
            assert None not in Desk(ledger).author(server, batch=True).ask(questions(3, start=90))
            assert ledger.open_batches("run") == {}


def test_of_other_batches_what_is_there_is_collected_and_the_rest_is_left_to_the_next_run(desk, monkeypatch):
    monkeypatch.setattr(batching, "MOST_REQUESTS", 2)
    another_model_answers(monkeypatch, "question 0")
    real = batching.poll

    async def poll(endpoint, batch):
        return await (never_done() if batch == "batch-1" else real(endpoint, batch))

    monkeypatch.setattr(batching, "poll", poll)
    with serve() as server:
        server.batches._advance = lambda batch: (server.batches._finish(batch), batch)[1]
        with pytest.raises(TeacherError, match=ANOTHER):
            desk.author(server, batch=True).ask(questions(6))
        assert list(desk.ledger.open_batches("run")) == ["batch-1"]
        monkeypatch.undo()
        again = desk.author(server, batch=True)
        assert None not in again.ask(questions(6))
        assert (len(server.batches.batches), again.tally.answered) == (4, 1)


# More than may be


def test_a_batch_that_took_more_than_it_may_is_settled_and_the_last(desk):
    with serve(Settings(answer=lambda _: "w " * 5000)) as server:
        author = desk.author(server, batch=True, budget=Budget(tokens=1_000))
        with pytest.raises(TeacherError, match=r"^teacher\.budget: .* took 5,0\d\d tokens .* max_tokens"):
            author.ask(questions(20))
        assert len(server.batches.batches) == 1
        spent = desk.ledger.spent("run")
        assert spent[1] == author.tally.tokens > 5000 * spent[0]
        assert desk.ledger.open_batches("run") == {}
        assert author.tally.answered == spent[0] > 0


def test_where_no_budget_is_to_be_kept_an_answer_may_be_longer(desk):
    with serve(Settings(answer=lambda _: "w " * 5000)) as server:
        author = desk.author(server, batch=True, budget=Budget(requests=10))
        assert None not in author.ask(questions(5))
