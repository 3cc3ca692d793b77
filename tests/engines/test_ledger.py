"""Laws of the ledger: nothing is asked twice, no payment is lost, the budget holds, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from potstill.engines import ledger as module
from potstill.engines.accounts import forget_requests, read_accounts, read_rows
from potstill.engines.ledger import Asked, Budget, Claim, Ledger, Outcome, Spend, request_key
from potstill.errors import StoreError
from potstill.types import Usage

WORST = Spend(100, 50, 7)
COST = Spend(10, 5, 3)


def asked(number: int, *, run: str = "run", user: str = "", text: str = "") -> Asked:
    body = json.dumps({"messages": [{"role": "user", "content": f"question {number} {text}"}]})
    key = request_key("model", "chat", body, 0)
    return Asked(key, body, "model", "https://api.example/v1", run, user=user)


def answer(text: str = "yes") -> Outcome:
    return Outcome("answered", COST, raw=text.encode(), served="model-1", usage=Usage(10, 5))


def claim(ledger: Ledger, one: Asked, budget: Budget = Budget(), worst: Spend = WORST) -> Claim:  # noqa: B008
    return ledger.claim(one, worst, budget).result(timeout=10)


def settle(ledger: Ledger, attempt: int, outcome: Outcome) -> None:
    ledger.settle(attempt, outcome).result(timeout=10)


def crash(ledger: Ledger) -> None:
    """The process is gone: nothing of what it did not commit is there, and nobody says goodbye."""
    ledger.flush()
    module._OPEN.discard(ledger.owner)
    ledger._waiting.put(None)
    ledger._thread.join()
    ledger._writer.close()
    ledger._reader.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_an_answer_is_there_for_the_next_process_and_is_not_asked_again(path):
    with Ledger(path) as ledger:
        settle(ledger, claim(ledger, asked(1)).attempt, answer("42"))
    with Ledger(path) as ledger:
        record = ledger.read(asked(1).key)
        assert record is not None
        assert (record.state, record.raw, record.served, record.usage) == ("answered", b"42", "model-1", Usage(10, 5))
        assert claim(ledger, asked(1)) == Claim("known")
        assert ledger.spent("run") == (1, 15, 3)


def test_what_a_crash_left_open_stays_counted_at_its_worst_and_may_be_asked_again(path):
    lost = Ledger(path)
    claim(lost, asked(1))
    crash(lost)
    with Ledger(path) as ledger:
        assert ledger.spent("run") == (1, 150, 7)
        settle(ledger, claim(ledger, asked(1)).attempt, answer())
        assert ledger.spent("run") == (2, 165, 10)


def test_what_another_process_is_asking_is_not_asked_beside_it(path):
    with Ledger(path) as one, Ledger(path) as other:
        attempt = claim(one, asked(1)).attempt
        assert claim(other, asked(1)) == Claim("busy")
        settle(one, attempt, answer())
        assert claim(other, asked(1)) == Claim("known")


def test_a_request_that_failed_may_be_asked_by_anyone(path):
    with Ledger(path) as one, Ledger(path) as other:
        settle(one, claim(one, asked(1)).attempt, Outcome("reserved", Spend(), "http_500"))
        assert claim(other, asked(1)).verdict == "send"
        assert other.spent("run") == (2, 150, 7)


@pytest.mark.parametrize(
    ("budget", "held"), [(Budget(requests=3), 3), (Budget(tokens=450), 3), (Budget(usd=21e-12), 3), (Budget(), 9)]
)
def test_the_worst_case_of_what_is_open_counts_against_the_budget(path, budget, held):
    with Ledger(path) as ledger:
        verdicts = [claim(ledger, asked(number), budget).verdict for number in range(9)]
    assert verdicts == ["send"] * held + ["budget"] * (9 - held)


def test_several_processes_together_stay_within_the_budget(path):
    budget, verdicts = Budget(tokens=150 * 20), []
    with Ledger(path) as one, Ledger(path) as other:
        futures = [
            ledger.claim(asked(2 * number + which), WORST, budget)
            for number in range(30)
            for which, ledger in enumerate((one, other))
        ]
        verdicts = [future.result(timeout=10).verdict for future in futures]
        assert verdicts.count("send") == 20
        assert one.spent("run") == (20, 3000, 140)


def test_a_budget_of_another_run_is_another_one(path):
    with Ledger(path) as ledger:
        claim(ledger, asked(1), Budget(requests=1))
        assert claim(ledger, asked(2, run="other"), Budget(requests=1)).verdict == "send"
        assert claim(ledger, asked(3), Budget(requests=1)).verdict == "budget"


def test_an_attempt_is_settled_once(path):
    with Ledger(path) as ledger:
        attempt = claim(ledger, asked(1)).attempt
        settle(ledger, attempt, answer("first"))
        settle(ledger, attempt, answer("second"))
        assert ledger.read(asked(1).key).raw == b"first"
        assert ledger.spent("run") == (1, 15, 3)


def test_money_that_nobody_could_count_is_counted_once_there_is_a_price(path):
    with Ledger(path) as ledger:
        first = claim(ledger, asked(1), worst=Spend(100, 50, None)).attempt
        settle(ledger, first, Outcome("answered", Spend(10, 5, None), raw=b"yes"))
        claim(ledger, asked(2), worst=Spend(100, 50, None))
        assert read_accounts(path)[0].usd is None
        ledger.price_unpriced("run", lambda tokens_in, tokens_out: 2 * tokens_in + 3 * tokens_out)
        assert ledger.spent("run") == (2, 165, 35 + 350)


def test_the_key_is_of_what_is_asked_and_of_nothing_else():
    key = request_key("model", "chat", '{"a": 1, "b": "ä"}', 0)
    assert key == request_key("model", "chat", '{"b":"\\u00e4","a":1}', 0)
    others = [("other", "chat", '{"a":1,"b":"ä"}', 0), ("model", "completion", '{"a":1,"b":"ä"}', 0)]
    others += [("model", "chat", '{"a":1,"b":"ä"}', 1), ("model", "chat", '{"a":2,"b":"ä"}', 0)]
    elsewhere = request_key("model", "chat", '{"a": 1, "b": "ä"}', 0, place="api.example")
    assert len({key, elsewhere, *(request_key(*other) for other in others)}) == 6


def test_only_the_owner_can_read_the_file_and_its_log(path):
    with Ledger(path) as ledger:
        claim(ledger, asked(1))
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert set(modes.values()) == {0o600}
    assert "ledger.sqlite-wal" in modes


@pytest.mark.parametrize("content", [b"not a database at all" * 300, b"SQLite format 3\x00" + b"\x01" * 5000])
def test_a_file_that_is_no_ledger_is_refused_and_left_as_it_is(path, content):
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"teacher\.ledger: .*(no ledger|cannot be used)"):
        Ledger(path)
    assert path.read_bytes() == content


def test_another_database_is_refused(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (a)")
    db.close()
    with pytest.raises(StoreError, match="no ledger of potstill"):
        Ledger(path)


def test_another_schema_is_refused(path):
    Ledger(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StoreError, match="schema 99, this potstill reads 1"):
        Ledger(path)


def test_a_folder_in_its_place_is_refused(path):
    path.mkdir()
    with pytest.raises(StoreError, match="cannot be opened"):
        Ledger(path)


def test_a_damaged_page_is_named_by_stats(path):
    with Ledger(path) as ledger:
        for number in range(200):
            settle(ledger, claim(ledger, asked(number)).attempt, answer())
    content = bytearray(path.read_bytes())
    content[4096 * 5 : 4096 * 9] = b"\xff" * 4096 * 4
    path.write_bytes(content)
    with pytest.raises(StoreError, match="is damaged"):
        read_accounts(path)


def test_a_ledger_that_was_closed_says_so(path):
    ledger = Ledger(path)
    ledger.close()
    with pytest.raises(StoreError, match="was closed"):
        ledger.claim(asked(1), WORST, Budget()).result(timeout=1)


def test_numbers_that_no_file_holds_are_refused_and_the_next_are_taken(path):
    with Ledger(path) as ledger:
        with pytest.raises(OverflowError):
            claim(ledger, asked(1), worst=Spend(2**70, 0, 0))
        assert claim(ledger, asked(1)).verdict == "send"


def test_what_no_file_takes_fails_and_the_next_is_taken(path):
    with Ledger(path) as ledger:
        broken = ledger._submit(lambda _db: {}["nothing"])
        with pytest.raises(KeyError):
            broken.result(timeout=5)
        with pytest.raises(UnicodeEncodeError):
            claim(ledger, asked(1, run="half \ud83d"))
        given_up = ledger.claim(asked(1), WORST, Budget())
        given_up.cancel()
        one = asked(2, user="half \ud83d")
        settle(ledger, claim(ledger, one).attempt, Outcome("answered", COST, raw=b"x", served="half \ud83d"))
        assert ledger.read(one.key).served == "half ?"
    assert forget_requests(path, user="half \ud83d").requests == 1


def test_a_ledger_of_before_learns_of_several_users(path):
    with Ledger(path) as ledger:
        settle(ledger, claim(ledger, asked(1, user="ada")).attempt, answer())
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE users")
    db.close()
    with Ledger(path) as ledger:
        ledger.note_user(asked(1, user="bob"))
    assert forget_requests(path, user="bob").requests == 1


def test_forgetting_leaves_no_trace_but_the_payment(path):
    with Ledger(path) as ledger:
        for number, user in enumerate(["", "ada", "ada"]):
            one = asked(number, user=user, text=f"SECRET-{number}")
            settle(ledger, claim(ledger, one).attempt, answer(os.urandom(40).hex() + f"ANSWER-{number}"))
        keys = [asked(number, text=f"SECRET-{number}").key for number in range(3)]
        ledger.record_use(keys[:2], "/runs/a", "generate")
        ledger.record_use(keys[2:], "/runs/b", "generate")
        paid = ledger.spent("run")
    forgotten = forget_requests(path, keys=[keys[1]])
    assert (forgotten.requests, forgotten.affected) == (1, (("/runs/a", "generate"),))
    assert forget_requests(path, user="ada").affected == (("/runs/b", "generate"),)
    left = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"SECRET-0" in left
    for word in (b"SECRET-1", b"SECRET-2", b"ada", keys[1], keys[2], b"/runs/b"):
        assert word not in left
    with Ledger(path) as ledger:
        assert ledger.spent("run") == paid
        assert ledger.read(keys[1]) is None
    assert {(account.state, account.attempts) for account in read_accounts(path)} == {("answered", 1), ("forgotten", 2)}


def test_all_that_could_not_be_used_is_forgotten_at_once_and_nothing_else(path):
    ends = [answer(), *[Outcome("quarantined", COST, "empty", raw=b"{}")] * 2, Outcome("given_up", COST, "http_400")]
    with Ledger(path) as ledger:
        for number, end in enumerate(ends):
            settle(ledger, claim(ledger, asked(number, user="ada")).attempt, end)
        claim(ledger, asked(4))
        ledger.record_use([asked(0).key], "/runs/a", "generate")
        ledger.record_use([asked(2).key], "/runs/b", "generate")
        paid = ledger.spent("run")
    forgotten = forget_requests(path, unusable=True)
    assert (forgotten.requests, forgotten.affected) == (2, (("/runs/b", "generate"),))
    with Ledger(path) as ledger:
        assert [number for number in range(5) if ledger.read(asked(number).key) is None] == [1, 2]
        assert ledger.spent("run") == paid
        assert claim(ledger, asked(1)).verdict == "send"
    assert forget_requests(path, unusable=True).requests == 0


def test_forgetting_says_when_a_trace_may_stay_in_the_log_of_another_process(path):
    with Ledger(path) as ledger:
        settle(ledger, claim(ledger, asked(1)).attempt, answer())
        ledger._reader.execute("BEGIN")
        ledger._reader.execute("SELECT count(*) FROM requests").fetchone()
        with pytest.raises(StoreError, match="another process"):
            forget_requests(path, keys=[asked(1).key])
        ledger._reader.execute("COMMIT")


def test_rows_tell_all_there_is(path):
    with Ledger(path) as ledger:
        settle(ledger, claim(ledger, asked(1, user="ada")).attempt, Outcome("reserved", COST, "http_500"))
        settle(ledger, claim(ledger, asked(1, user="ada")).attempt, answer("42"))
    (row,) = read_rows(path)
    assert row["id"] == asked(1).key.hex()
    assert row["request"] == json.loads(asked(1).body)
    said = [row[name] for name in ("answer", "state", "attempts", "tokens", "usd", "user", "served")]
    assert said == ["42", "answered", 2, 30, 6e-12, "ada", "model-1"]


KILLED = """
import sys
from tests_ledger import asked, answer, WORST
from potstill.engines.ledger import Ledger, Budget
ledger = Ledger(sys.argv[1])
for start in range(0, 100000, 10):
    claims = [ledger.claim(asked(number), WORST, Budget()) for number in range(start, start + 10)]
    futures = [ledger.settle(claim.result().attempt, answer(str(start))) for claim in claims]
    for future in futures: future.result()
    print(start, flush=True)
"""


def test_what_was_said_to_be_durable_is_there_after_a_kill(path, tmp_path):
    shutil.copy(__file__, tmp_path / "tests_ledger.py")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
    )
    assert process.stdout is not None
    last = 0
    for _ in range(20):
        last = int(process.stdout.readline())
    process.kill()
    process.communicate()
    keys = [asked(number).key for number in range(last + 10)]
    with Ledger(path) as ledger:
        assert set(ledger.states(keys).values()) == {"answered"}
        requests, tokens, _ = ledger.spent("run")
        assert tokens >= 15 * (last + 10)
        assert requests >= last + 10


def test_many_threads_are_committed_together(path):
    with Ledger(path) as ledger:
        futures = []
        lock = threading.Lock()

        def work(which: int) -> None:
            for number in range(50):
                future = ledger.claim(asked(1000 * which + number), WORST, Budget())
                with lock:
                    futures.append(future)

        threads = [threading.Thread(target=work, args=(which,)) for which in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({future.result(timeout=20).attempt for future in futures}) == 400
        assert ledger.spent("run") == (400, 400 * 150, 400 * 7)


@given(limit=st.integers(1, 5000), worsts=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), max_size=12))
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_no_order_of_sizes_goes_over_the_budget(limit, worsts):
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "l") as ledger:
        for number, (worst, actual) in enumerate(worsts):
            verdict = claim(ledger, asked(number), Budget(tokens=limit), Spend(worst, 0, 0))
            if verdict.verdict == "send" and number % 2:
                settle(ledger, verdict.attempt, Outcome("answered", Spend(min(worst, actual), 0, 0), raw=b"x"))
            assert ledger.spent("run")[1] <= limit


class LedgerMachine(RuleBasedStateMachine):
    """Random interleavings of two processes that ask, answer, fail, crash, reopen, re-read and forget."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.ledgers = [Ledger(self.path), Ledger(self.path)]
        self.open: dict[int, tuple[int, int]] = {}
        self.answers: dict[int, bytes] = {}
        self.spent = [0, 0, 0]
        self.budget = Budget(requests=40, tokens=4000)

    @rule(which=st.integers(0, 1), number=st.integers(0, 6))
    def ask(self, which: int, number: int) -> None:
        holders = [owner for owner, other in self.open.values() if other == number]
        if which in holders:  # nobody asks what he is asking
            return
        found = claim(self.ledgers[which], asked(number), self.budget)
        if number in self.answers:
            assert found.verdict == "known"
        elif holders:
            assert found.verdict == "busy"
        elif found.verdict == "send":
            self.open[found.attempt] = (which, number)
            self.spent = [self.spent[0] + 1, self.spent[1] + 150, self.spent[2] + 7]
        elif found.verdict == "budget":
            assert not self.budget.holds(self.spent[0] + 1, self.spent[1] + 150, 0)
        else:
            assert found.verdict == "busy"

    @precondition(lambda self: self.open)
    @rule(data=st.data(), state=st.sampled_from(["answered", "quarantined", "given_up", "reserved"]))
    def end(self, data: st.DataObject, state: str) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.open)))
        which, number = self.open.pop(attempt)
        raw = str(attempt).encode() if state in ("answered", "quarantined") else None
        settle(self.ledgers[which], attempt, Outcome(state, COST, raw=raw))
        self.spent = [self.spent[0], self.spent[1] - 135, self.spent[2] - 4]
        if raw is not None:
            self.answers.setdefault(number, raw)

    @rule(which=st.integers(0, 1))
    def crash_and_reopen(self, which: int) -> None:
        crash(self.ledgers[which])
        self.open = {attempt: owner for attempt, owner in self.open.items() if owner[0] != which}
        self.ledgers[which] = Ledger(self.path)

    @precondition(lambda self: self.answers)
    @rule(data=st.data(), state=st.sampled_from(["answered", "quarantined"]))
    def change_the_parser(self, data: st.DataObject, state: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.answers)))
        self.ledgers[0].amend(asked(number).key, state, "").result(timeout=10)

    @invariant()
    def no_payment_is_lost_and_no_budget_exceeded(self) -> None:
        assert self.ledgers[0].spent("run") == tuple(self.spent)
        assert self.budget.holds(*self.spent)
        accounts = read_accounts(self.path)
        assert sum(account.attempts for account in accounts) == self.spent[0]
        assert sum(account.tokens for account in accounts) == self.spent[1]

    @invariant()
    def no_answer_is_lost_or_changed(self) -> None:
        for number, raw in self.answers.items():
            assert self.ledgers[1].read(asked(number).key).raw == raw

    def teardown(self) -> None:
        for ledger in getattr(self, "ledgers", []):
            ledger.close()
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
