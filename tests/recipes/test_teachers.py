"""What a recipe may say of its teacher, and where it looks for an assistant's recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from potstill.errors import RecipeError
from potstill.recipes import dump_recipe, load_recipe, shipped_recipes
from potstill.recipes.teachers import Member

A, B = "{model: a}", "{model: b, weight: 2, sources: {'code*.jsonl': 3, '*': 0.5}}"


def with_teacher(teacher: str):
    return load_recipe("quickstart", [f"teacher={teacher}"])


def test_a_members_say_is_that_of_the_first_pattern_that_fits():
    member = Member(model="m", weight=2.0, sources={"code*.jsonl": 3.0, "*.jsonl": 0.0, "docs?.txt": 0.5})
    said = {
        name: member.weight_for(name) for name in ("code-1.jsonl", "talk.jsonl", "docs1.txt", "docs.txt", "CODE.jsonl")
    }
    assert said == {"code-1.jsonl": 3.0, "talk.jsonl": 0.0, "docs1.txt": 0.5, "docs.txt": 2.0, "CODE.jsonl": 0.0}


def test_the_order_of_patterns_survives_the_saved_recipe(tmp_path):
    recipe = with_teacher(f"{{kind: mixture, members: [{A}, {B}]}}")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert list(again.teacher.members[1].sources) == ["code*.jsonl", "*"]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("{kind: mixture, members: [{model: a}]}", r"^teacher\.members: got a list of 1, needs 2 or more of them"),
        ("{kind: mixture}", r"^teacher\.members: missing"),
        (f"{{kind: mixture, members: [{A}, {{model: b, weight: -1}}]}}", r"^teacher\.members\[1\]\.weight: got -1"),
        (f"{{kind: mixture, members: [{A}, {{model: b, weight: .inf}}]}}", r"^teacher\.members\[1\]\.weight: got inf"),
        (f"{{kind: mixture, members: [{A}, {{model: b, wieght: 1}}]}}", r"^teacher\.members\[1\]\.wieght: .* weight\?"),
        (
            f"{{kind: mixture, members: [{A}, {{model: b, sources: {{'*': -2}}}}]}}",
            r"^teacher\.members\[1\]\.sources\.'\*': got -2",
        ),
        (
            "{kind: mixture, members: [{model: a, weight: 0}, {model: b, weight: 0}]}",
            r"^teacher\.members: every weight is 0, so that nobody speaks .*raise one\.$",
        ),
        ("{kind: run}", r"^teacher\.recipe: missing\. The assistant's recipe"),
        ("{kind: run, recipe: 3}", r"^teacher\.recipe: got 3, needs text"),
        (
            "{kind: rum, recipe: x}",
            r"^teacher\.kind: got 'rum', needs local, openai, finetune, recorded, run or mixture\. Did you mean run\?",
        ),
        ("{kind: finetune, model: m}", r"^teacher\.training: missing\. How it is trained: on hard labels\.$"),
        (
            "{kind: finetune, model: m, training: {}}",
            r"^teacher\.training: needs exactly one of tokens, steps, epochs; got none\.$",
        ),
        (
            "{kind: finetune, model: m, training: {epochs: 1}, learns: heads}",
            r"^teacher\.learns: got 'heads', needs all or head\. Did you mean head\?",
        ),
        ("{kind: finetune, model: m, training: {epochs: 1}, losses: []}", r"^teacher\.losses: unknown key\."),
        ("{kind: recorded, label: a}", r"^teacher\.path: missing\. A file with a row a text"),
        (
            "{kind: recorded, path: p}",
            r"^teacher: needs exactly one of probabilities, label: the column that holds the answers\.$",
        ),
        (
            "{kind: recorded, path: p, label: a, probabilities: b}",
            r"^teacher: needs exactly one of probabilities, label: the column that holds the answers\.$",
        ),
        ("{kind: recorded, path: p, label: a, match: row}", r"^teacher\.match: got 'row', needs text or id\."),
        ("{kind: recorded, path: p, label: a, model: m}", r"^teacher\.model: unknown key\."),
    ],
)
def test_what_no_teacher_can_be_is_refused_in_one_line(teacher, words):
    with pytest.raises(RecipeError, match=words) as caught:
        with_teacher(teacher)
    assert "\n" not in str(caught.value)


def test_recorded_answers_have_a_place_among_models_without_being_one():
    """Their device and precision are no keys: nobody can ask for what is not there."""
    recipe = with_teacher("{kind: recorded, path: said.jsonl, probabilities: p}")
    assert (recipe.teacher.device, recipe.teacher.dtype) == ("auto", "fp32")
    assert {"device", "dtype"}.isdisjoint(recipe.teacher.model_dump())
    with pytest.raises(RecipeError, match=r"^teacher\.device: unknown key"):
        with_teacher("{kind: recorded, path: said.jsonl, probabilities: p, device: cpu}")


def write(file: Path, assistant: str) -> Path:
    recipe = load_recipe("quickstart").model_dump(mode="json") | {"teacher": {"kind": "run", "recipe": assistant}}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(recipe))
    return file


def test_an_assistants_recipe_is_sought_beside_the_recipe_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = write(tmp_path / "deep" / "final.yaml", "../assistant.yaml")
    assert load_recipe(named).teacher.recipe == str((tmp_path / "assistant.yaml").resolve())
    assert load_recipe("deep/final.yaml").teacher.recipe == str((tmp_path / "assistant.yaml").resolve())
    changed = load_recipe(named, ["teacher.recipe=other.yaml"])  # named on the command line, so relative to it
    assert changed.teacher.recipe == str((tmp_path / "other.yaml").resolve())


def test_the_assistant_of_a_phase_is_sought_there_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart").model_dump(mode="json")
    recipe["phases"] = [{"name": "first", "teacher": {"kind": "run", "recipe": "../assistant.yaml"}}]
    file = tmp_path / "deep" / "final.yaml"
    file.parent.mkdir()
    file.write_text(json.dumps(recipe))
    assert load_recipe(file).phases[0].teacher.recipe == str((tmp_path / "assistant.yaml").resolve())


def test_a_shipped_recipe_may_assist_unless_a_file_of_its_name_is_there(tmp_path):
    named = write(tmp_path / "final.yaml", "quickstart")
    assert load_recipe(named).teacher.recipe == str(shipped_recipes()["quickstart"].resolve())
    (tmp_path / "quickstart").write_text("name: mine")
    assert load_recipe(named).teacher.recipe == str((tmp_path / "quickstart").resolve())


@pytest.mark.parametrize("name", ["", "~nobody-of-that-name/x.yaml", "x" * 5000])
def test_whatever_stands_for_an_assistant_is_no_traceback(tmp_path, name):
    named = load_recipe(write(tmp_path / "final.yaml", name)).teacher.recipe
    with pytest.raises(RecipeError):
        load_recipe(named)
