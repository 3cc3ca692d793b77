"""Arms and teacher are tested alike: whole prompts, whole answers, the same rules for what is no answer."""

from __future__ import annotations

import json

import pytest
from tests.servers.api import serve
from tests.servers.faults import Settings

from potstill.pipeline.grading import Grader
from potstill.pipeline.run import run_recipe
from potstill.pipeline.solve import CUT, _grade, _notes, _said, teacher_requests
from potstill.pipeline.written import Question
from potstill.recipes import load_recipe
from potstill.types import Completion
from potstill.verify import Verdict

QUESTIONS = [Question(f"q{i}", ({"role": "user", "content": f"What is {i}?"},), {"answer": i}) for i in range(6)]
VERIFY = {"kind": "math"}


@pytest.fixture
def written(tmp_path, tiny_llama, monkeypatch):
    """A recipe of a teacher that writes, changed by keys with dots."""
    monkeypatch.setenv("SOLVER_KEY", "sk-none")
    rows = ({"id": f"p{i}", "question": f"{10 + i} plus {37 * i % 50 + 3}", "answer": 13 + i} for i in range(60))
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def load(url="http://127.0.0.1:9", **changes):
        recipe = {
            "name": "solve",
            "run_dir": str(tmp_path / "run"),
            "data": {"source": str(file), "sequence_length": 64, "splits": {"validation": 0.15, "test": 0.2}},
            "teacher": {
                "kind": "openai", "model": "solver", "base_url": url, "api_key": "SOLVER_KEY", "permission": "ours",
            },
            "generate": {
                "prompts": {"kind": "rows", "template": "What is {question}?"}, "sampling": {"max_tokens": 40},
            },
            "student": {"kind": "model", "model": str(tiny_llama)},
            "losses": [{"kind": "cross_entropy"}],
            "control": {"enabled": False},
            "training": {"steps": 2, "batch_rows": 4, "precision": "fp32", "learning_rate": 1e-3},
            "evaluation": {
                "max_rows": 4, "resamples": 100, "sample_prompts": 2, "answers": {"max_tokens": 8}, "speed": False,
            },
        }  # fmt: skip
        place = tmp_path / "solve.yaml"
        place.write_text(json.dumps(recipe), encoding="utf-8")
        return load_recipe(place, [f"{key}={json.dumps(value)}" for key, value in changes.items()])

    return load


@pytest.mark.parametrize("taught", [True, False])
def test_the_teacher_is_tested_with_the_system_message_that_it_wrote_with(written, taught):
    recipe = written(**{"generate.system": "Add.", "generate.teach_system": taught, "generate.verify": VERIFY})
    system = {"role": "system", "content": "Add."}
    questions = [Question(q.id, (system, *q.messages), q.row) if taught else q for q in QUESTIONS]
    asked = [request.messages for request in teacher_requests(recipe, questions)]
    assert asked == [(system, *question.messages) for question in QUESTIONS]


def test_without_a_system_message_the_teacher_is_asked_what_the_student_is(written):
    recipe = written(**{"generate.teach_system": False, "generate.verify": VERIFY, "evaluation.attempts": 2,
                        "evaluation.answers.temperature": 0.5})  # fmt: skip
    asked = [(request.messages, request.sample) for request in teacher_requests(recipe, QUESTIONS)]
    assert asked == [(question.messages, sample) for question in QUESTIONS for sample in (0, 1)]


@pytest.mark.parametrize("shown", [0, 2, 64])
def test_without_a_verifier_only_what_is_shown_is_answered(written, shown):
    recipe = written(**{"evaluation.sample_prompts": shown})
    asked = [request.messages for request in teacher_requests(recipe, QUESTIONS)]
    assert asked == [question.messages for question in QUESTIONS[:shown]]


@pytest.mark.parametrize(
    ("text", "finish", "prompt", "expected"),
    [
        ("It is 4", "stop", "", ("It is 4", "stop")),
        ("It is 4", "length", "", ("It is 4", "length")),
        ("It is 4. Q: more", "length", "", ("It is 4.", "stop")),
        ("<think>2 + 2</think>\n\nIt is 4", "stop", "", ("It is 4", "stop")),
        ("2 + 2</think>\n\nIt is 4", "stop", "A: <think>\n", ("It is 4", "stop")),
        ("<think>2 + 2 is 4", "stop", "", ("<think>2 + 2 is 4", "length")),
        ("2 + 2 is 4", "stop", "A: <think>\n", ("2 + 2 is 4", "length")),
        ("<think>2 + 2 Q: is </think> 4", "stop", "", ("<think>2 + 2", "length")),
        ("4", "stop", "What is <think>? A: <think></think>", ("4", "stop")),
        ("", "no room", "", ("", "no room")),
    ],
)
def test_what_is_said_and_how_it_finished(text, finish, prompt, expected):
    said = _said(Completion(text, finish=finish), ["Q:"], prompt)
    assert (said.text, said.finish) == expected


def test_a_teacher_that_only_thought_did_not_come_to_an_end():
    assert _said(Completion("", reasoning="2 + 2"), []).finish == "length"


class _Lenient:
    """A verifier to which every answer is right, but "?": of that it cannot say."""

    workers = 1

    def __call__(self, answer, row):
        return Verdict(None if answer == "?" else True, "")

    def close(self):
        pass


def test_what_did_not_end_is_wrong_whatever_the_verifier_says_of_it(monkeypatch):
    seen = []

    def grade(self, answers):
        seen.extend(text for text, _ in answers)
        return [_Lenient()(text, row) for text, row in answers]

    monkeypatch.setattr(Grader, "grade", grade)
    said = [Completion("4"), Completion("4", finish="length"), Completion("?"), Completion("", finish="no room")]
    solved = _grade(QUESTIONS[:2], said, 2, Grader(None))
    assert seen == ["4", "", "?", ""]
    assert solved.right_P.tolist() == [0.5, 0.0]
    assert solved.counted == {"length": 1, "unknown": 1, "no room": 1}
    assert solved.answers == ["4", "?"]
    assert _grade(QUESTIONS[:1], said[1:2], 1, Grader(None)).answers == ["4" + CUT]


def test_notes_tell_every_reason_with_its_arms():
    notes = _notes({"teacher": {"content_filter": 1}, "student": {"length": 3, "no room": 2}, "control": {"length": 1}})
    assert [note.rpartition(": ")[2] for note in notes] == ["student 3, control 1", "student 2", "teacher 1"]
    assert _notes({"teacher": {}}) == []


def test_prompts_that_leave_no_room_are_told(written, tmp_path):
    file = tmp_path / "problems.jsonl"
    with serve(Settings(answer=answer_of, models=("solver",))) as server:
        changes = {"generate.verify": VERIFY, "generate.overlong": 1.0, "data.sequence_length": 512}
        recipe = written(server.url, **changes)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows[::2]:
            row["question"] += f" (mind the {row['id']} foxes)" * 60
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        run_recipe(recipe)
    facts = json.loads((recipe.folder / "evaluate" / "manifest.json").read_text())["facts"]
    (told,) = (note for note in facts["notes"] if "fill the model's positions" in note)
    questions = (recipe.folder / "generate" / "questions.jsonl").read_text().splitlines()
    long = sum("foxes" in line for line in questions)
    assert 0 < long < len(questions)
    assert told.endswith(f": untrained {long}, student {long}")


def answer_of(body):
    first = int(body["messages"][-1]["content"].split()[2])
    return f"It is {first + 3}"


def test_without_a_verifier_a_run_asks_and_shows_no_more_than_the_report_does(written):
    with serve(Settings(answer=answer_of, models=("solver",))) as server:
        recipe = written(server.url)
        run_recipe(recipe)
        assert sum(server.answered.values()) == 60 + 2
    shown = json.loads((recipe.folder / "evaluate" / "samples.json").read_text())
    assert [set(one["completions"]) for one in shown] == [{"teacher", "untrained", "student"}] * 2
    assert shown[0]["completions"]["teacher"].startswith("It is ")
