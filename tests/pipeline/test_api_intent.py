"""An API labels texts, a student learns from that, and the report knows what was asked: whole runs against a server."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from tests.servers.api import serve
from tests.servers.faults import Settings

from potstill.data import LabelledText
from potstill.engines import load_tokenizer
from potstill.errors import BudgetError, RecipeError, TeacherError
from potstill.pipeline.answers import draw_test_texts, open_answers
from potstill.pipeline.cast import cast_of
from potstill.pipeline.labelling import plan_rows, priced, question_of
from potstill.pipeline.run import inputs_of, run_recipe, stage_fingerprints
from potstill.pipeline.rundir import RunDir
from potstill.pipeline.texts import open_texts
from potstill.types import Wants

VERBS = {"count": "counting", "find": "finding", "paint": "painting"}
TEXT = re.compile(r"<text>\n(.*)\n</text>", re.DOTALL)


def text_of(body):
    return TEXT.search(body["messages"][0]["content"])[1]


def name_label(body):
    return json.dumps({"label": VERBS[text_of(body).split()[0]]})


@pytest.fixture
def labelled(task, make_encoder):
    """A recipe whose teacher is a server that answers with a function, and that server."""

    def make(server, name="task", *overrides, **keys):
        teacher = {"kind": "openai", "model": "teacher", "base_url": server.url, "api_key": None, "permission": "ours"}
        student = {"kind": "layers", "model": str(make_encoder("masked")), "keep": [0, 2]}
        given = {"student": student, "signals": {"kind": "dense"}, **keys}
        return task(name, *overrides, **{**given, "teacher": {**teacher, **keys.get("teacher", {})}})

    return make


def served(answer=name_label):
    return serve(Settings(answer=answer))


def facts_of(recipe, stage="capture"):
    return RunDir(recipe.folder).manifest(stage).facts


def texts_of(recipe, split):
    return open_texts(recipe.folder / "prepare", split)


def batch_of(recipe, split, tokenizer):
    folder = recipe.folder / "prepare"
    rows = cast_of(recipe, folder).rows(folder, split, tokenizer)
    return rows.batch(range(len(rows)))


def test_a_whole_run_asks_about_every_text_once_and_evaluates_the_teacher(labelled):
    with served() as server:
        recipe = labelled(server)
        run_recipe(recipe)
        texts = [text.text for split in ("train", "validation", "test") for text in texts_of(recipe, split)]
        assert sorted(texts) == sorted(set(texts))
        assert server.stats()["answered"] == len(texts)
        assert server.stats()["answered_again"] == 0
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    accuracy = {row["arm"]: row["value"] for row in rows if row["name"] == "accuracy"}
    assert set(accuracy) == {"teacher", "untrained", "control", "student"}
    assert accuracy["teacher"] == 1.0
    found = facts_of(recipe)["labelling"]
    assert found["unanswered"] == {"test": 0, "train": 0, "validation": 0}
    assert found["tally"]["served"] == {"teacher": len(texts)}


def test_what_a_student_learns_is_the_label_that_was_named(labelled):
    with served() as server:
        recipe = labelled(server)
        run_recipe(recipe, until="capture")
    tokenizer = load_tokenizer(str(recipe.student.model), "student")
    batch = batch_of(recipe, "train", tokenizer)
    said = open_answers(recipe, inputs_of(recipe)).read(batch, Wants(final=True)).logits.logits_NV
    named = [VERBS[text.text.split()[0]] for text in texts_of(recipe, "train")]
    labels = cast_of(recipe, recipe.folder / "prepare").labels
    assert [labels[place] for place in said.argmax(-1).tolist()] == named
    assert said.max(-1).values.abs().max() == 0.0
    assert math.isclose(float(said.min()), -30.0, rel_tol=1e-6)


def test_another_run_beside_asks_nothing_again(labelled):
    with served() as server:
        run_recipe(labelled(server, "first"), until="capture")
        before = server.stats()["answered"]
        second = labelled(server, "second", losses=[{"kind": "reverse_kl"}])
        run_recipe(second, until="train")
        assert server.stats()["answered"] == before
    assert facts_of(second)["captured"] == 0


def unsure(*words):
    def answer(body):
        text = text_of(body)
        return "I cannot tell" if any(word in text for word in words) else name_label(body)

    return answer


def test_texts_without_an_answer_are_left_out_and_counted(labelled):
    with served(unsure("six gold")) as server:
        recipe = labelled(server, "task", "teacher.labelling.missing=0.2", "teacher.attempts=1")
        run_recipe(recipe)
    silent = {split: [t for t in texts_of(recipe, split) if "six gold" in t.text] for split in ("train", "test")}
    found = facts_of(recipe)
    assert silent["train"]
    assert found["labelling"]["unanswered"]["train"] == len(silent["train"])
    assert any("training texts: there, nothing of it was learned" in note for note in found["notes"])
    notes = facts_of(recipe, "evaluate")["notes"]
    left_out = [note for note in notes if "test texts have no answer of the teacher" in note]
    assert len(left_out) == bool(silent["test"])


def test_the_reader_does_not_speak_of_texts_without_an_answer(labelled):
    with served(unsure("six gold")) as server:
        recipe = labelled(server, "task", "teacher.labelling.missing=0.2", "teacher.attempts=1")
        run_recipe(recipe, until="capture")
    batch = batch_of(recipe, "train", load_tokenizer(str(recipe.student.model), "student"))
    reader = open_answers(recipe, inputs_of(recipe))
    marked = reader.mark(batch)
    silent = ["six gold" in text.text for text in texts_of(recipe, "train")]
    assert reader.has_gaps
    assert marked.taught_BT[:, 0].tolist() == [not one for one in silent]
    assert len(reader.read(marked, Wants(final=True)).logits.logits_NV) == silent.count(False)
    first = silent.index(True)
    assert reader.read(marked.rows(first, first + 1), Wants(final=True)).logits.logits_NV.shape == (0, 3)


def test_too_many_texts_without_an_answer_stop_the_run(labelled):
    with served(unsure("gold", "red")) as server:
        recipe = labelled(server, "task", "teacher.attempts=1")
        with pytest.raises(TeacherError, match=r"^teacher.labelling.missing: \d+ of \d+ texts have no answer"):
            run_recipe(recipe, until="capture")


def test_a_budget_that_ends_midway_leaves_training_texts_unanswered(labelled):
    with served() as server:
        whole = labelled(server, "whole", "teacher.budget.requests=1")
        run_recipe(whole, until="prepare")
        held = sum(len(texts_of(whole, split)) for split in ("validation", "test"))
        limited = [f"teacher.budget.requests={held + 20}"]
        with pytest.raises(BudgetError, match=r"^teacher.budget: requests=\d+ was used up"):
            run_recipe(labelled(server, "task", *limited))
        recipe = labelled(server, "task", *limited, "teacher.budget.partial=true")
        run_recipe(recipe)
        assert server.stats()["answered"] == held + 20
    found = facts_of(recipe)["labelling"]
    assert found["unanswered"] == {"test": 0, "validation": 0, "train": found["texts"]["train"] - 20}
    assert found["tally"]["stopped_by"] == "budget"
    assert any(note.startswith("The budget was used up") for note in facts_of(recipe)["notes"])


def test_a_budget_without_the_held_out_texts_stops_the_run(labelled):
    with served() as server:
        recipe = labelled(server, "task", "teacher.budget.requests=5", "teacher.budget.partial=true")
        with pytest.raises(TeacherError, match=r"^teacher.budget: used up with \d+ of \d+ held-out texts"):
            run_recipe(recipe)


def test_what_was_paid_is_the_price_of_the_teachers_queries(labelled):
    with served() as server:
        price = ["evaluation.price={machine_usd_per_hour: 1.0}", "teacher.price={input_usd: 2.0, output_usd: 4.0}"]
        recipe = labelled(server, "task", *price)
        run_recipe(recipe, until="capture")
    paid = facts_of(recipe)["labelling"]["tally"]["usd"] / sum(facts_of(recipe)["labelling"]["texts"].values())
    assert priced(recipe, facts_of(recipe)).evaluation.price.teacher_usd_per_1000 == pytest.approx(1000 * paid)
    stated = labelled(server, "task", "evaluation.price={machine_usd_per_hour: 1.0, teacher_usd_per_1000: 7.0}")
    assert priced(stated, facts_of(recipe)) is stated


def test_probabilities_come_from_the_letters_of_the_first_token(labelled):
    def letter(body):
        listed = dict(re.findall(r"^([A-Z]): (\w+)", body["messages"][0]["content"], re.MULTILINE))
        return next(key for key, name in listed.items() if name == VERBS[text_of(body).split()[0]])

    with served(letter) as server:
        recipe = labelled(server, "task", "teacher.labelling.answers=probabilities")
        run_recipe(recipe)
    found = facts_of(recipe)
    assert found["labelling"]["outside"] == pytest.approx(1.0 - math.exp(-0.25))  # the server's own first token
    assert any("no label" in note for note in found["notes"])


def test_terms_are_looked_at_before_the_first_request(labelled):
    with served() as server:
        recipe = labelled(server, "task", "teacher.permission=null")
        with pytest.raises(RecipeError, match=r"^teacher.model: the terms of 'teacher' at 127.0.0.1 are not clear"):
            run_recipe(recipe)
        assert server.stats()["counts"] == {}


def test_another_question_is_another_capture_and_more_missing_answers_are_not(labelled):
    with served() as server:
        recipe = labelled(server)
        asked = labelled(server, "task", "teacher.labelling.prompt='{labels} {text}'")
        lenient = labelled(server, "task", "teacher.labelling.missing=0.5")
    ours, other, same = (stage_fingerprints(one)["capture"] for one in (recipe, asked, lenient))
    assert ours != other
    assert ours == same


def test_the_evaluation_asks_about_the_same_test_texts_as_the_capture(labelled):
    with served() as server:
        recipe = labelled(server, "task", "evaluation.max_documents=7")
        run_recipe(recipe, until="capture")
        before = server.stats()["answered"]
        run_recipe(recipe)
        assert server.stats()["answered"] == before
    chosen, total = draw_test_texts(recipe, recipe.folder / "prepare")
    assert len(chosen) == 7 < total
    assert len(np.unique([text.key for text in chosen])) == 7


def test_the_plan_tells_requests_and_money_before_any_is_sent(labelled):
    with served() as server:
        extra = ["teacher.price={input_usd: 1e6, output_usd: 0}", "teacher.labelling.votes=3", "teacher.budget.usd=5"]
        recipe = labelled(server, "task", *extra)
        texts = {"train": [LabelledText("a", "find"), LabelledText("b", "find", origin=b"a")], "test": []}
        cast = replace(cast_of(recipe), labels=("counting", "finding"))
        rows = {what: how_much for what, how_much, _ in plan_rows(recipe, cast, texts)}
        assert server.stats()["counts"] == {}
    assert rows["teacher"] == "teacher at 127.0.0.1"
    assert rows["requests"].startswith("3 at most")
    prompt = question_of(recipe, cast).request(texts["train"][0]).messages
    dollars = float(rows["money"].split()[0].replace(",", ""))
    assert dollars == 3 * round(len(str(prompt)) / 4)
    assert rows["money"].endswith("never more than 5 (teacher.budget.usd)")
