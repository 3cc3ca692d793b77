from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from potstill.recipes.problems import describe, nearest, show
from potstill.recipes.schema import Recipe

BASE: dict[str, Any] = {
    "name": "toy",
    "data": {"source": "words.jsonl"},
    "teacher": {"kind": "local", "model": "big"},
    "student": {"kind": "layers", "count": 3},
    "losses": [{"kind": "forward_kl"}],
    "training": {"steps": 3},
}
KINDS = "forward_kl, reverse_kl, symmetric_kl, jsd, ... (23 kinds; docs/recipes.md lists them)"
KEEP = "0-based layer numbers, or `even`, or `greedy` (remove one by one the layer whose removal hurts least)."
SEED = "Of everything that is random: splits, order, initial weights. Change it or leave it out for the default, 0."
BETAS = "AdamW's decay rates of the first and second moment."
LAYERS = (
    "{student layer: teacher layer}, 0 being the embeddings' output and i the output of block i. `even` spreads all "
    "student layers over the teacher's; `last` matches the last ones."
)


def problems(recipe: object) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(recipe)
    return describe(caught.value).split("\n")


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in BASE.items() if name != key}


UNKNOWN = [
    ({"trainning": {}}, "trainning: unknown key. Did you mean training?"),
    ({"data": {"source": "x", "splits": {"tst": 0.1}}}, "data.splits.tst: unknown key. Did you mean test?"),
    ({"student": {"kind": "layers", "count": 3, "serch": {}}}, "student.serch: unknown key. Did you mean search?"),
    ({"student": {"kind": "model", "model": "m", "z": 1}}, "student.z: unknown key. Known here: kind, model."),
    ({"losses": [{"kind": "forward_kl", "wieght": 2}]}, "losses[0].wieght: unknown key. Did you mean weight?"),
    ({"report": {1: 2}}, "report.1: unknown key. Known here: title."),
    ({"report": {"\x1b[31m\n": 2}}, r"report.'\x1b[31m\n': unknown key. Known here: title."),
]
KIND = [
    ({"student": {"kind": "layer"}}, "student.kind: got 'layer', needs layers, model or config. Did you mean layers?"),
    ({"student": {"kind": None}}, "student.kind: got null, needs layers, model or config."),
    ({"student": {"kind": [1]}}, "student.kind: got a list of 1, needs layers, model or config."),
    ({"student": {"count": 3}}, "student.kind: missing. Give layers, model or config."),
    ({"student": "layers"}, "student: got 'layers', needs a mapping with kind: layers, model or config."),
    ({"losses": [{"kind": "kl"}]}, f"losses[0].kind: got 'kl', needs {KINDS}."),
    ({"losses": [3]}, f"losses[0]: got 3, needs a mapping with kind: {KINDS}."),
    ({"losses": {}}, f"losses: got an empty mapping, needs a list of mappings, each with kind: {KINDS}."),
    ({"losses": []}, "losses: got an empty list, needs 1 or more of them."),
    (
        {"teacher": {"kind": "lokal", "model": "m"}},
        "teacher.kind: got 'lokal', needs local, openai, finetune, recorded, run or mixture. Did you mean local?",
    ),
    (
        {"teacher": None},
        "teacher: got null, needs a mapping with kind: local, openai, finetune, recorded, run or mixture.",
    ),
]
NO_SOURCE = "is not there; name a file, a folder, a Hugging Face id or sample:NAME."
MISSING = [
    (without("name"), "name: missing. Name of the run; letters, digits, dot, dash, underscore."),
    (without("data"), f"data.source: {NO_SOURCE}"),
    (without("student"), "student: missing. Give a mapping with kind: layers, model or config."),
    (without("losses"), f"losses: missing. Give a list of mappings, each with kind: {KINDS}."),
    ({"data": {}}, f"data.source: {NO_SOURCE}"),
    ({"training": {"steps": 3, "betas": [0.9]}}, "training.betas[1]: missing. Give a number."),
]
VALUES = [
    ({"seed": 1.5}, f"seed: got 1.5, needs a whole number. {SEED}"),
    ({"seed": True}, f"seed: got true, needs a whole number. {SEED}"),
    (
        {"seed": -1},
        f"seed: got -1, needs a number greater than or equal to 0. {SEED}",
    ),
    (
        {"seed": float("nan")},
        f"seed: got nan, needs a finite number. {SEED}",
    ),
    (
        {"training": {"steps": 3, "learning_rate": "fast"}},
        "training.learning_rate: got 'fast', needs a number. Its peak, which the schedule scales. "
        "Change it or leave it out for the default, 0.0005.",
    ),
    (
        {"training": {"steps": 3, "precision": "fp16"}},
        "training.precision: got 'fp16', needs bf16 or fp32. Did you mean bf16? bf16: autocast over fp32 master "
        "weights. fp32: everything in fp32. Change it or leave it out for the default, 'bf16'.",
    ),
    (
        {"evaluation": {"speed": "maybe"}},
        "evaluation.speed: got 'maybe', needs true or false. Measure speed and memory of every arm: prefill and decode "
        "tokens/s (which needs prompts); for tasks over texts, latency at one text and texts/s at 32. Change it or "
        "leave it out for the default, true.",
    ),
    (
        {"name": "a b"},
        "name: got 'a b', which does not fit. Name of the run; letters, digits, dot, dash, underscore.",
    ),
    ({"name": 1}, "name: got 1, needs text. Name of the run; letters, digits, dot, dash, underscore."),
    (
        {"run_dir": 3},
        "run_dir: got 3, needs a path. Where the run lives. Default: runs/NAME. Change it or leave it out.",
    ),
    ({"data": []}, "data: got an empty list, needs a mapping."),
    ({"training": {"steps": 3, "betas": 3}}, f"training.betas: got 3, needs a list of 2. {BETAS}"),
    (
        {"training": {"steps": 3, "betas": [0.1, 0.2, 0.3]}},
        f"training.betas: got a list of 3, needs 2 or fewer of them. {BETAS}",
    ),
    ({"training": {"steps": 3, "betas": [0.1, 2]}}, "training.betas[1]: got 2, needs a number less than 1."),
    (
        {"training": {"steps": 3, "trackers": ["wnadb"]}},
        "training.trackers[0]: got 'wnadb', needs tensorboard, wandb or trackio. Did you mean wandb?",
    ),
]
UNIONS = [
    (
        {"losses": [{"kind": "hidden_mse", "layers": {}}]},
        "losses[0].layers: got an empty mapping, needs 1 or more of them or even or last. "
        f"{LAYERS} Change it or leave it out for the default, 'last'.",
    ),
    (
        {"student": {"kind": "layers", "keep": "greed", "count": 3}},
        "student.keep: got 'greed', needs greedy or even or a list. Did you mean greedy? "
        f"{KEEP} Change it or leave it out for the default, 'greedy'.",
    ),
    ({"student": {"kind": "layers", "keep": [1, "x"]}}, "student.keep[1]: got 'x', needs a whole number."),
    (
        {"losses": [{"kind": "hidden_mse", "layers": "lst"}]},
        "losses[0].layers: got 'lst', needs a mapping or even or last. Did you mean last? "
        f"{LAYERS} Change it or leave it out for the default, 'last'.",
    ),
    (
        {"losses": [{"kind": "hidden_mse", "layers": {1: "x"}}]},
        "losses[0].layers.1: got 'x', needs a whole number.",
    ),
    (
        {"losses": [{"kind": "hidden_mse", "layers": {"y": 1}}]},
        "losses[0].layers.y: got 'y' as a key, needs a whole number.",
    ),
]
RULES = [
    (
        {"evaluation": {"attempts": 2}},
        "evaluation.attempts: 2 greedy answers would all be the same; raise evaluation.answers.temperature, or ask "
        "once.",
    ),
    (
        {"generate": {"prompts": {"kind": "reasoning_gym", "task": "chain_sum", "count": 9}}},
        "data.source: 'words.jsonl' would not be read, since generate.prompts makes its own prompts; leave it out, or "
        "use `rows`.",
    ),
    (
        {"generate": {"prompts": {"kind": "grid", "axes": {"topic": ["a"]}, "template": "Write."}}},
        "generate.prompts.template: names [], and the axes are ['topic']; put each there in braces.",
    ),
    (
        {"data": {"source": "words.jsonl", "splits": {"validation": 0.5, "test": 0.5}}},
        "data.splits: validation 0.5 + test 0.5 leave no document to train on; lower one of them.",
    ),
    ({"training": {}}, "training: needs exactly one of tokens, steps, epochs; got none."),
    (
        {"student": {"kind": "layers"}},
        "student.keep: greedy needs count, the number of layers to keep, for example `count: 15`.",
    ),
    (
        {"training": {"steps": 3, "micro_batch_rows": 3}},
        "training.micro_batch_rows: 3 must divide batch_rows: 8; try 2.",
    ),
    (
        {"training": {"steps": 3, "schedule": {"kind": "wsd", "warmup": 0.5, "decay": 0.9}}},
        "training.schedule: warmup 0.5 + decay 0.9 exceed 1, the whole run; lower one of them.",
    ),
    (
        {"losses": [{"kind": "forward_kl"}, {"kind": "forward_kl"}]},
        "losses[1].kind: forward_kl is there twice; merge the two terms into one weight.",
    ),
]
PHASES = [
    (
        {"phases": [{"name": "a"}, {"name": "a"}]},
        "phases[1].name: a is there twice; each phase has a folder of its name.",
    ),
    (
        {"phases": [{"name": "a", "losses": [{"kind": "forward_kl"}, {"kind": "forward_kl"}]}]},
        "phases[0].losses[1].kind: forward_kl is there twice; merge the two terms into one weight.",
    ),
    ({"phases": [{}]}, "phases[0].name: missing. Of the phase; its run lives in phases/NAME within the run folder."),
    ({"phases": [{"name": "a", "loses": []}]}, "phases[0].loses: unknown key. Did you mean losses?"),
    ({"phases": [{"name": "a", "losses": [{"kind": "kl"}]}]}, f"phases[0].losses[0].kind: got 'kl', needs {KINDS}."),
    (
        {"phases": [{"name": "a", "student": {"kind": "model", "model": "m"}}]},
        "phases[0].student: unknown key. Known here: name, task, data, teacher, losses, signals, training, control, "
        "evaluation.",
    ),
    (
        {"phases": [{"name": "../a"}]},
        "phases[0].name: got '../a', which does not fit. Of the phase; its run lives in phases/NAME within the run "
        "folder.",
    ),
    ({"phases": [{"name": "a", "training": {}}]}, "phases[0].training: needs exactly one of tokens, steps, epochs; "
     "got none."),
    ({"phases": {"name": "a"}}, "phases: got a mapping, needs a list. Trainings that come before this one, in order; "
     "each begins with the student that the one before has left."),
]  # fmt: skip
CASES = PHASES + UNKNOWN + KIND + VALUES + UNIONS + RULES


@pytest.mark.parametrize(("change", "words"), CASES, ids=[words.partition(":")[0] for _, words in CASES])
def test_a_problem_is_one_line_in_the_recipes_words(change: dict[str, Any], words: str) -> None:
    assert problems({**BASE, **change}) == [words]


@pytest.mark.parametrize(("recipe", "words"), MISSING, ids=[words.partition(":")[0] for _, words in MISSING])
def test_a_missing_key_says_what_belongs_there(recipe: dict[str, Any], words: str) -> None:
    assert problems(recipe if len(recipe) > 1 else {**BASE, **recipe}) == [words]


def test_every_problem_has_its_line() -> None:
    found = problems({**BASE, "seed": "x", "report": {"titel": "a"}, "losses": [{"kind": "kl"}, 3]})
    assert [line.partition(":")[0] for line in found] == ["seed", "losses[0].kind", "losses[1]", "report.titel"]


def test_a_misspelt_key_is_not_reported_as_missing_too() -> None:
    assert problems({**without("training"), "trainning": {"steps": 3}}) == [
        "trainning: unknown key. Did you mean training?"
    ]


def test_the_kind_of_a_union_is_never_a_key() -> None:
    """`student.kind: model` has a key `model`, and `config` a key `config`: the tags that pydantic inserts."""
    assert problems({**BASE, "student": {"kind": "model", "model": 3}})[0].startswith("student.model: got 3")
    found = problems({**BASE, "student": {"kind": "config", "config": {"hidden_size": "a"}}})
    assert found[0].startswith("student.config.hidden_size: got 'a'")


def test_a_thousand_problems_are_cut_short() -> None:
    found = problems({**BASE, "losses": [3] * 1000})
    assert len(found) == 21
    assert found[-1] == "... and 980 more problems of this recipe."


WORDS = st.sampled_from(
    ["kind", "name", "layers", "model", "config", "keep", "count", "losses", "data", "training", "steps", "schedule"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | WORDS
VALUE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.integers(0, 3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)), VALUE))
def test_no_jargon_reaches_the_user_whatever_the_recipe(changes: dict[str, Any]) -> None:
    try:
        Recipe.model_validate({**BASE, **changes})
    except ValidationError as error:
        for line in describe(error).split("\n"):
            assert not any(word in line for word in ("pydantic", "Input", "Extra", "Field required", "http", "[type"))
            assert line.endswith((".", "?"))
            assert line.isprintable()
            assert line.split(".")[0].split("[")[0].split(":")[0] in {*Recipe.model_fields, ""}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ("a\nb", r"'a\nb'"),
        ({}, "an empty mapping"),
        ({"a": 1}, "a mapping"),
        ([], "an empty list"),
        ((1, 2), "a list of 2"),
        ("x" * 100, "'" + "x" * 59 + "..."),
    ],
)
def test_values_are_shown_as_yaml_names_them(value: object, shown: str) -> None:
    assert show(value) == shown


def test_the_nearest_name_forgives_case_and_knows_when_to_be_silent() -> None:
    assert nearest("Weight", ["weight", "width"]) == "weight"
    assert nearest("zzz", ["weight"]) is None
    assert nearest(3, ["weight"]) is None


def test_problems_of_the_path_type_name_no_class(tmp_path: Path) -> None:
    assert "pathlib" not in problems({**BASE, "run_dir": [tmp_path]})[0]
