"""What `potstill ledger` says, writes and forgets."""

from __future__ import annotations

import json

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from potstill.cli import app
from potstill.engines.ledger import Asked, Budget, Ledger, Outcome, Spend, request_key
from potstill.errors import StoreError
from potstill.pipeline.ledgers import describe_ledger, export_ledger, forget_in_ledger
from potstill.types import Usage


@pytest.fixture
def path(tmp_path):
    """Three answers, one of them ada's and used by a run, and one that was given up."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for number in range(4):
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"question {number}"}]})
            key = request_key("m", "chat", body, 0)
            asked = Asked(key, body, "m", "https://a/v1", "first", user="ada" if number == 1 else "")
            attempt = ledger.claim(asked, Spend(100, 100, 9), Budget()).result().attempt
            good = Outcome("answered", Spend(5, 7, 4), raw=f"answer {number}\n\xe4".encode(), usage=Usage(5, 7))
            ledger.settle(attempt, good if number < 3 else Outcome("given_up", Spend(), "http_400")).result()
            if number == 1:
                ledger.record_use([key], "/runs/r1", "generate")
    return path


def test_stats_add_up_to_what_was_spent(path):
    header, *lines = describe_ledger(path)
    rows = [dict(zip(header.split(), line.split(), strict=True)) for line in lines]
    assert [(row["state"], row["requests"], row["tokens"]) for row in rows] == [
        ("answered", "3", "36"),
        ("given_up", "1", "0"),
    ]


def test_both_exports_say_the_same(path, tmp_path):
    for name in ("all.jsonl", "all.parquet"):
        assert export_ledger(path, tmp_path / name).endswith("4 requests.")
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    table = parquet.read_table(tmp_path / "all.parquet").to_pylist()
    assert [
        {**row, **{name: json.loads(row[name] or "null") for name in ("request", "usage")}} for row in table
    ] == rows
    assert rows[1]["answer"] == "answer 1\n\xe4"
    assert [row["state"] for row in rows] == ["answered"] * 3 + ["given_up"]
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("name", ["all.csv", "nowhere/all.jsonl"])
def test_an_export_needs_a_name_that_can_be_written(path, tmp_path, name):
    with pytest.raises(StoreError, match=r"\.jsonl or \.parquet"):
        export_ledger(path, tmp_path / name)


def test_forgetting_a_user_names_the_runs_that_used_the_answers(path):
    first, second = forget_in_ledger(path, [], "ada")
    assert "1 requests are forgotten" in first
    assert "/runs/r1" in second
    assert b"question 1" not in path.read_bytes()
    assert any("forgotten" in line for line in describe_ledger(path))


def put_aside(path) -> None:
    """Two requests of a run, with answers that cannot be used."""
    with Ledger(path) as ledger:
        for number in range(10, 12):
            key = request_key("m", "chat", f'{{"number": {number}}}', 0)
            asked = Asked(key, f'{{"number": {number}}}', "m", "https://a/v1", "second")
            attempt = ledger.claim(asked, Spend(100, 100, 9), Budget()).result().attempt
            ledger.settle(attempt, Outcome("quarantined", Spend(5, 7, 4), "empty", raw=b"{}")).result()
            ledger.record_use([key], "/runs/r2", "generate")


def test_all_that_could_not_be_used_is_forgotten_to_be_asked_again(path):
    put_aside(path)
    before = [line.split() for line in describe_ledger(path) if "answered" in line or "given_up" in line]
    first, second = forget_in_ledger(path, [], None, unusable=True)
    assert "2 requests are forgotten" in first
    assert "/runs/r2" in second
    assert "asks them again" in second
    lines = [line.split() for line in describe_ledger(path)]
    assert [line for line in lines if "answered" in line or "given_up" in line] == before
    assert not any("quarantined" in line for line in lines)
    (none,) = forget_in_ledger(path, [], None, unusable=True)
    assert "0 requests are forgotten" in none


@pytest.mark.parametrize(("ids", "user"), [(["00" * 16], None), ([], "ada")])
def test_what_could_not_be_used_is_forgotten_by_itself(path, ids, user):
    put_aside(path)
    before = list(describe_ledger(path))
    with pytest.raises(StoreError, match=r"^ledger forget: .*--unusable.* in two commands\."):
        list(forget_in_ledger(path, ids, user, unusable=True))
    assert list(describe_ledger(path)) == before


@pytest.mark.parametrize(
    ("ids", "message"), [([], "nothing to forget"), (["xyz"], "32 hexadecimal digits"), (["00"], "32")]
)
def test_what_to_forget_must_be_said(path, ids, message):
    with pytest.raises(StoreError, match=message):
        list(forget_in_ledger(path, ids, None))


def test_no_ledger_is_made_where_there_is_none(tmp_path):
    with pytest.raises(StoreError, match="cannot be opened"):
        list(describe_ledger(tmp_path / "absent.sqlite"))
    assert not list(tmp_path.iterdir())


def test_a_ledger_without_a_request_says_so(tmp_path):
    Ledger(tmp_path / "l").close()
    assert list(describe_ledger(tmp_path / "l")) == [f"{tmp_path / 'l'}: nothing was asked yet."]


def test_the_front_door_leads_there(path, tmp_path):
    run = CliRunner().invoke
    assert "answered" in run(app, ["ledger", "stats", str(path)]).stdout
    assert "4 requests" in run(app, ["ledger", "export", str(path), str(tmp_path / "x.jsonl")]).stdout
    name = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])["id"]
    assert "1 requests are forgotten" in run(app, ["ledger", "forget", str(path), name]).stdout


def test_the_front_door_forgets_what_could_not_be_used(path):
    put_aside(path)
    run = CliRunner().invoke
    assert "--unusable" in run(app, ["ledger", "forget", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    found = run(app, ["ledger", "forget", str(path), "--unusable"])
    assert found.exit_code == 0
    assert "2 requests are forgotten" in found.stdout
    assert "/runs/r2" in found.stdout
