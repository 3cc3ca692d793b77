"""A teacher behind an API writes, and a student learns: from prompts to the report, on a server in this process."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.servers.api import Server, serve
from tests.servers.faults import Settings

from potstill.data.quality import WRITING_SYSTEMS
from potstill.engines import Ledger
from potstill.errors import BudgetError, DataError, PotstillError
from potstill.pipeline import telling
from potstill.pipeline.run import explain_run, run_recipe, stage_fingerprints
from potstill.recipes import load_recipe
from potstill.recipes.cleaning import WritingSystem
from potstill.report.generation import generation_rows

PROBLEMS = 60
KEY = "sk-a-secret-that-nobody-may-find"


class Reckoner:
    """Adds two numbers; every third time that it is asked the same, it is one off."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __call__(self, body: dict[str, Any]) -> str:
        question = body["messages"][-1]["content"]
        self.asked[question] += 1
        first, second = map(int, re.findall(r"\d+", question)[:2])
        off = int(self.asked[question] % 3 == 2)
        words = ("It is", "We get", "That makes")[self.asked[question] % 3]
        return f"{words} {first + second + off}"


@pytest.fixture
def problems(tmp_path) -> Path:
    file = tmp_path / "problems.jsonl"
    rows = (
        {"id": f"p{i}", "question": f"{10 + i} plus {37 * i % 50 + 3}", "answer": 10 + i + 37 * i % 50 + 3}
        for i in range(PROBLEMS)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def written(tmp_path, tiny_llama, problems, monkeypatch):
    """A recipe of a teacher that writes, changed by keys with dots."""
    monkeypatch.setenv("RECKONER_KEY", KEY)

    def load(server: Server, **changes: Any) -> Any:
        recipe = {
            "name": "written",
            "run_dir": str(tmp_path / "run"),
            "data": {"source": str(problems), "sequence_length": 64, "splits": {"validation": 0.15, "test": 0.2}},
            "teacher": {
                "kind": "openai",
                "model": "reckoner",
                "base_url": server.url,
                "api_key": "RECKONER_KEY",
                "permission": "we wrote it ourselves",
            },
            "generate": {
                "prompts": {"kind": "rows", "template": "What is {question}?"},
                "samples": 3,
                "sampling": {"max_tokens": 40},
                "verify": {"kind": "math"},
            },
            "student": {"kind": "model", "model": str(tiny_llama)},
            "losses": [{"kind": "cross_entropy"}],
            "training": {"steps": 8, "batch_rows": 4, "precision": "fp32", "learning_rate": 1e-2},
            "evaluation": {
                "max_rows": 8,
                "resamples": 100,
                "sample_prompts": 2,
                "answers": {"max_tokens": 8},
                "speed": False,
            },
        }
        file = tmp_path / "written.yaml"
        file.write_text(json.dumps(recipe), encoding="utf-8")
        return load_recipe(file, [f"{key}={json.dumps(value)}" for key, value in changes.items()])

    return load


def rows_of(recipe: Any, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / "generate" / name).read_text().splitlines()]


def test_from_prompts_to_the_report(written):
    with serve(Settings(answer=Reckoner(), models=("reckoner",))) as server:
        recipe = written(server)
        run_recipe(recipe)
        asked = sum(server.answered.values())
        assert {status.state for status in explain_run(recipe)} == {"done"}
        (recipe.folder / "generate" / "manifest.json").unlink()
        run_recipe(recipe)
        assert sum(server.answered.values()) == asked
    rows, unverified = rows_of(recipe, "rows.jsonl"), rows_of(recipe, "unverified.jsonl")
    facts = json.loads((recipe.folder / "generate" / "manifest.json").read_text())["facts"]
    # Of three answers one is wrong.
    assert facts["verdicts"] == {"right": 2 * PROBLEMS, "wrong": PROBLEMS, "unknown": 0, "unfinished": 0}
    assert len(rows) == 2 * PROBLEMS
    assert len(unverified) == sum(row["split"] == "train" for row in rows)
    homes = {}
    for row in rows:
        assert homes.setdefault(row["prompt_id"], row["split"]) == row["split"]
        assert row["provenance"]["written_by"] == "reckoner"
    measured = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    passes = {row["arm"]: row["value"] for row in measured if row["name"] == "pass_at_1" and row["slice"] == "test"}
    assert set(passes) == {"teacher", "untrained", "control", "student"}
    assert passes["teacher"] > passes["untrained"] == 0.0
    assert (recipe.folder / "report" / "index.html").is_file()
    questions = rows_of(recipe, "questions.jsonl")
    assert asked == 3 * PROBLEMS + len(questions)
    for path in (recipe.folder.parent).rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def facts_of(recipe: Any) -> dict[str, Any]:
    return json.loads((recipe.folder / "generate" / "manifest.json").read_text())["facts"]


@pytest.fixture
def server():
    with serve(Settings(answer=Reckoner(), models=("reckoner",))) as found:
        yield found


BAD = {
    "a key that is not set": (
        {"teacher.api_key": "NOBODY_SETS_THIS"},
        "teacher.api_key: .*NOBODY_SETS_THIS is not set",
    ),
    "a model that is not served": ({"teacher.model": "recktoner"}, "teacher.model: .*reckoner"),
    "nobody at the address": ({"teacher.base_url": "http://127.0.0.1:9"}, "teacher.base_url"),
    "a column that no row has": ({"generate.prompts": {"kind": "rows", "template": "{qestion}"}}, "qestion.*question"),
    "a verifier's column that no teacher's prompt has": (
        {"generate.prompts": {"kind": "evolved", "template": "{question}"}},
        "generate.verify.kind: math compares with the column 'answer'",
    ),
    "a verifier's column that no row has": ({"generate.verify": {"kind": "math", "answer": "sum"}}, "'sum'"),
    "a schema that is no file": (
        {"generate.verify": {"kind": "json_schema", "file": "/nowhere.json"}},
        "generate.verify.file: /nowhere.json",
    ),
    "a judge of other problems": (
        {"generate.verify": {"kind": "reasoning_gym"}},
        "generate.verify.kind: reasoning_gym",
    ),
    "a budget for less than a request": ({"teacher.budget": {"tokens": 10}}, "teacher.budget: too small"),
    "terms that forbid": (
        {"teacher.base_url": "https://api.anthropic.com/v1", "teacher.permission": None},
        "terms|permission",
    ),
    "terms that nobody knows": ({"teacher.permission": None}, "teacher.permission"),
    "a student made of the teacher": ({"student": {"kind": "layers", "count": 2}}, "student.kind: layers"),
    "a loss that needs more than text": (
        {"losses": [{"kind": "forward_kl"}]},
        "losses\\[0\\].kind=forward_kl needs LOGITS, but a teacher that writes offers TEXT",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_told_before_anything_is_asked(written, server, name):
    changes, message = BAD[name]
    with pytest.raises(PotstillError, match=message) as caught:
        run_recipe(written(server, **changes), until="generate")
    assert "\n" not in str(caught.value)
    assert not server.answered


def test_a_template_without_a_place_for_answers_is_told_before_anything_is_asked(
    written, server, tiny_llama, tiny_tokenizer, tmp_path
):
    folder = tmp_path / "mute"
    shutil.copytree(tiny_llama, folder)
    mute = copy.deepcopy(tiny_tokenizer)
    mute.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"
    )
    mute.save_pretrained(folder)
    with pytest.raises(DataError, match="chat template"):
        run_recipe(written(server, **{"student.model": str(folder)}), until="generate")
    assert not server.answered


def test_a_budget_that_ends_midway_stops_the_run_which_continues_or_goes_on_with_what_there_is(written, server):
    with pytest.raises(BudgetError, match=r"^teacher\.budget: requests=100 was used up with \d+ of 180 requests to go"):
        run_recipe(written(server, **{"teacher.budget": {"requests": 100}}), until="generate")
    assert sum(server.answered.values()) == 100
    partial = written(server, **{"teacher.budget": {"requests": 100, "partial": True}})
    run_recipe(partial, until="generate")
    assert sum(server.answered.values()) == 100
    facts, tests = facts_of(partial), len(rows_of(partial, "questions.jsonl"))
    assert facts["tally"]["stopped_by"] == "budget"
    # The teacher's answers to the test come first: an evaluation is whole or not at all.
    assert facts["dropped"]["no usable answer came"] == 3 * PROBLEMS + tests - 100
    more = written(server, **{"teacher.budget": {"requests": 120, "partial": True}})
    run_recipe(more, until="generate")
    assert sum(server.answered.values()) == 120
    whole = written(server)
    run_recipe(whole, until="generate")
    assert facts_of(whole)["tally"]["answered_before"] == 120
    assert sum(server.answered.values()) == 3 * PROBLEMS + tests


def test_an_answer_that_says_what_a_test_says_is_removed_and_shown(written, tmp_path):
    leak = "the quick brown fox jumps over the lazy dog and runs home to its den at night"
    tests = tmp_path / "tests.jsonl"
    tests.write_text(json.dumps({"question": leak}) + "\n", encoding="utf-8")
    reckoner = Reckoner()

    def tell(body: dict[str, Any]) -> str:
        said = reckoner(body)
        return f"{leak.upper()}! {said}" if "12 plus" in str(body) else said

    with serve(Settings(answer=tell, models=("reckoner",))) as server:
        recipe = written(server, **{"generate.cleaning.decontaminate.against": [str(tests)]})
        run_recipe(recipe, until="generate")
    leaks = json.loads((recipe.folder / "generate" / "leaks.json").read_text())
    assert len(leaks) == facts_of(recipe)["dropped"]["answer shares text with a test"] == 3
    assert leak.upper() in leaks[0]["matched"]
    assert not [row for row in rows_of(recipe, "rows.jsonl") if "FOX" in row["messages"][-1]["content"]]


def test_keep_takes_the_shortest_right_answer_of_each_prompt(written, server):
    recipe = written(server, **{"generate.keep": {"rule": "shortest", "most": 1}})
    run_recipe(recipe, until="generate")
    rows = rows_of(recipe, "rows.jsonl")
    assert len(rows) == len({row["prompt_id"] for row in rows}) == PROBLEMS
    # "We get" is shorter than "That makes"; "It is" is always one off.
    assert all(row["messages"][-1]["content"].startswith("It is") for row in rows)


def test_reasoning_is_learned_before_the_answer_and_left_out_on_request(written):
    reckoner = Reckoner()

    def think(body: dict[str, Any]) -> dict[str, Any]:
        return {"content": reckoner(body), "reasoning_content": "Carry the one."}

    with serve(Settings(answer=think, models=("reckoner",))) as server:
        recipe = written(server, **{"data.sequence_length": 128})
        run_recipe(recipe, until="prepare")
        row = rows_of(recipe, "rows.jsonl")[0]
        assert row["messages"][-1]["reasoning_content"] == "Carry the one."
        assert row["provenance"]["reasoning"] == "raw"
        silent = written(server, **{"generate.thinking": False})
        run_recipe(silent, until="generate")
        assert "reasoning_content" not in rows_of(silent, "rows.jsonl")[0]["messages"][-1]


def test_answers_cut_off_are_never_learned_and_unknown_is_not_wrong(written):
    def answer(body: dict[str, Any]) -> str:
        return "It is 10^10^10^10 + 1" if "11 plus" in str(body) else Reckoner()(body)

    with serve(Settings(answer=answer, models=("reckoner",))) as server:
        recipe = written(server, **{"generate.samples": 1, "generate.verify.timeout_s": 2.0})
        run_recipe(recipe, until="generate")
    facts = facts_of(recipe)
    assert facts["verdicts"]["unknown"] + facts["verdicts"]["wrong"] == 1
    assert facts["unsolved"] == facts["verdicts"]["wrong"]


def test_the_chance_of_a_right_answer_is_told_where_it_is_known(written):
    with serve(Settings(answer=Reckoner(), models=("reckoner",))) as server:
        recipe = written(server)
        run_recipe(recipe, until="generate")
    facts = facts_of(recipe)
    told = dict(generation_rows(telling._generation(facts)))
    assert told["a right one among"].startswith(f"1: {facts['pass_at']['1']:.1%}, 2: ")
    # Paid answers of earlier versions are read on, whose facts have no such thing.
    before = {name: fact for name, fact in facts.items() if name != "pass_at"}
    assert "a right one among" not in dict(generation_rows(telling._generation(before)))


def test_personal_data_is_masked_in_what_is_learned(written):
    reckoner = Reckoner()
    with serve(Settings(answer=lambda body: f"Ask me@example.org. {reckoner(body)}", models=("reckoner",))) as server:
        recipe = written(server, **{"generate.cleaning.pii": "mask"})
        run_recipe(recipe, until="generate")
    rows = rows_of(recipe, "rows.jsonl")
    assert rows
    assert all("[EMAIL]" in row["messages"][-1]["content"] for row in rows)
    assert facts_of(recipe)["masked"] == {"email": len(rows)}


def test_a_judge_that_prefers_the_longer_answer_whatever_the_order(written):
    reckoner = Reckoner()

    def answer(body: dict[str, Any]) -> str:
        question = body["messages"][-1]["content"]
        if "[First answer]" not in question:
            return reckoner(body)
        first, second = re.findall(r"answer\]\n(.*)\n", question)
        return "FIRST" if len(first) > len(second) else "SECOND"

    with serve(Settings(answer=answer, models=("reckoner",))) as server:
        recipe = written(server, **{"generate.cleaning.judge": {"least": 0.9}})
        run_recipe(recipe, until="generate")
    rows = rows_of(recipe, "rows.jsonl")
    assert len(rows) == PROBLEMS
    assert all(row["messages"][-1]["content"].startswith("We get") for row in rows)


@pytest.mark.parametrize("kind", ["grid", "self_instruct", "evolved", "reasoning_gym"])
def test_prompts_of_every_source(written, kind):
    prompts = {
        "grid": {
            "kind": "grid",
            "axes": {"a": [str(n) for n in range(8)], "b": ["3", "5"]},
            "template": "{a} plus {b}?",
        },
        "self_instruct": {"kind": "self_instruct", "count": 20, "written": 5, "template": "What is {question}?"},
        "evolved": {"kind": "evolved", "rounds": 1, "template": "What is {question}?"},
        "reasoning_gym": {"kind": "reasoning_gym", "task": "chain_sum", "count": 30, "settings": {"max_terms": 2}},
    }[kind]
    written_so_far = iter(range(10_000))

    def answer(body: dict[str, Any]) -> str:
        question = body["messages"][-1]["content"]
        if kind == "self_instruct" and "plus" in question and len(question) > 100:
            return "\n".join(
                f"{n + 1}. Name {next(written_so_far)} things about a number of kind {n}" for n in range(5)
            )
        if kind == "evolved" and len(question) > 60:
            return f"Work out step by step, with a reason for each of the {next(written_so_far)} steps, what to add."
        return "It is so."

    changes = {"generate.prompts": prompts, "generate.verify": None, "generate.samples": 1, "generate.held_out": 3}
    if kind in ("grid", "reasoning_gym"):
        changes["data.source"] = ""
    with serve(Settings(answer=answer, models=("reckoner",))) as server:
        recipe = written(server, **changes, **{"data.splits.validation": 0.2})
        run_recipe(recipe, until="generate")
    facts = facts_of(recipe)
    count = {"grid": 16, "self_instruct": 20, "evolved": 2 * PROBLEMS, "reasoning_gym": 30}[kind]
    assert sum(facts["prompts"].values()) + facts["prompts_dropped"].get("prompt shares text with a test", 0) == count
    assert facts["prompts"]["test"] >= 3
    assert not (recipe.folder / "generate" / "unverified.jsonl").exists()


def test_a_teacher_of_this_machine_writes_too_and_is_asked_once(written, server, tiny_llama):
    local = {"kind": "local", "model": str(tiny_llama), "dtype": "fp32"}
    recipe = written(
        server,
        **{
            "teacher": local,
            "generate.verify": None,
            "generate.samples": 1,
            "generate.sampling": {"max_tokens": 12, "temperature": 0.7},
        },
    )
    for _ in range(2):
        # A random model does not end what it begins, and what is cut off is not learned.
        with pytest.raises(DataError, match="cut off at max_tokens"):
            run_recipe(recipe, until="generate")
        with Ledger(recipe.folder.parent / "ledger.sqlite") as ledger:
            asked, _, usd = ledger.spent("written")
            assert (asked, usd) == (PROBLEMS + 2, 0)  # nothing is verified: of the test, what the report shows
    assert not server.answered


def test_a_row_that_nobody_could_judge_is_not_paid_for(written, server, problems):
    lines = problems.read_text().splitlines()
    lines[3] = json.dumps({"id": "p3", "question": "5 plus 6", "answer": None})
    problems.write_text("\n".join(lines))
    recipe = written(server)
    run_recipe(recipe, until="generate")
    assert facts_of(recipe)["prompts_dropped"]["row lacks what its answers are judged by"] == 1
    assert not any("5 plus 6" in str(body) for body in server.bodies)


def test_a_conversation_that_the_students_template_refuses_is_not_paid_for(
    written, server, problems, tiny_llama, tiny_tokenizer, tmp_path
):
    folder = tmp_path / "strict"
    shutil.copytree(tiny_llama, folder)
    strict = copy.deepcopy(tiny_tokenizer)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.chat_template = refusal + strict.chat_template
    strict.save_pretrained(folder)
    row = {
        "id": "s",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1 plus 2?"}],
    }
    problems.write_text(problems.read_text() + json.dumps({**row, "answer": 3}) + "\n")
    recipe = written(server, **{"student.model": str(folder)})
    run_recipe(recipe, until="generate")
    assert facts_of(recipe)["prompts_dropped"]["the student's chat template refuses the conversation"] == 1
    assert not any("Be short" in str(body) for body in server.bodies)


def test_the_control_arm_learns_answers_chosen_by_the_same_rule(written, server):
    recipe = written(server, **{"generate.keep": {"rule": "shortest", "most": 1}})
    run_recipe(recipe, until="generate")
    kept, control = rows_of(recipe, "rows.jsonl"), rows_of(recipe, "unverified.jsonl")
    train = [row for row in kept if row["split"] == "train"]
    assert len(control) == len(train)
    assert len({row["prompt_id"] for row in control}) == len(control)
    # "It is" is the shortest of all answers, and never wrong: here the two arms learn the same.
    assert sorted(row["id"] for row in control) == sorted(row["id"] for row in train)


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"control.enabled": False}, True),
        ({"generate.samples": 2}, True),
        ({"teacher.limits.concurrency": 3}, False),
        ({"teacher.budget": {"requests": 9999}}, False),
        ({"teacher.permission": "a contract"}, False),
        ({"training.steps": 9}, False),
    ],
)
def test_what_changes_the_answers_makes_them_stale_and_nothing_else(written, server, change, redone):
    before, after = stage_fingerprints(written(server)), stage_fingerprints(written(server, **change))
    assert (before["generate"] != after["generate"]) is redone
    assert before["report"] != after["report"] or not {"teacher.permission"} & set(change)


def test_a_recipe_may_name_exactly_the_writing_systems_that_are_told_apart():
    assert sorted(get_args(WritingSystem)) == sorted(WRITING_SYSTEMS)
