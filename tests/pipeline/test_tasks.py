"""Every task from its recipe to its report, with every kind of teacher that suits it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.pipeline.killing import finish_killed, finish_undisturbed

from potstill import cli
from potstill.pipeline.run import explain_run, run_recipe
from potstill.recipes import Recipe

CLASSES = ("counting", "finding", "painting")
FRESH = {"kind": "config", "config": {"num_hidden_layers": 2}}


def measured(recipe: Recipe) -> dict[tuple[str, str], float]:
    """(arm, name) -> value, of the whole test split."""
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    return {(row["arm"], row["name"]): row["value"] for row in rows if row["slice"] == "test"}


def finish(recipe: Recipe) -> dict[tuple[str, str], float]:
    """Runs the recipe to its report and says what was measured."""
    run_recipe(recipe)
    assert {status.state for status in explain_run(recipe)} == {"done"}
    assert (recipe.folder / "report" / "index.html").is_file()
    assert (recipe.folder / "train" / "student" / "README.md").is_file()
    return measured(recipe)


def lines(recipe: Recipe, stage: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / stage / "metrics.jsonl").read_text().splitlines()]


def local(model: Path) -> dict[str, Any]:
    return {"kind": "local", "model": str(model), "dtype": "fp32"}


@pytest.fixture
def classifier(make_encoder) -> dict[str, Any]:
    return local(make_encoder("classes", labels=CLASSES))


def test_masked_language_modelling(task, make_encoder):
    losses = [
        {"kind": "forward_kl", "weight": 5.0, "temperature": 2.0, "times_temperature_squared": True},
        {"kind": "cross_entropy", "weight": 2.0},
        {"kind": "hidden_cosine"},
    ]
    recipe = task(task={"kind": "masked_lm"}, teacher=local(make_encoder("masked")), losses=losses)
    found = finish(recipe)
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]
    assert found["student", "nll"] > 0


@pytest.mark.parametrize("family", ["distilbert", "roberta", "modernbert"])
def test_one_label_a_text_for_every_family(task, make_encoder, family):
    recipe = task(teacher=local(make_encoder("classes", labels=CLASSES, family=family)), student=FRESH)
    found = finish(recipe)
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


def test_several_labels_a_text(task, make_encoder):
    teacher = local(make_encoder("classes", labels=("bird", "warm")))
    several = {"kind": "classification", "multi_label": True}
    found = finish(task(task=several, data={"label": "tags"}, teacher=teacher, student=FRESH))
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]
    assert 0.0 <= found["student", "micro_f1"] <= 1.0


def test_pairs_of_texts(task, classifier):
    found = finish(task(data={"text_pair": "second", "sequence_length": 24}, teacher=classifier))
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


def test_a_label_for_every_word(task, make_encoder):
    data = {"text": "words", "label": "word_labels"}
    teacher = local(make_encoder("words", labels=("B-BEAST", "B-HUE", "O")))
    found = finish(task(task={"kind": "token_classification"}, data=data, teacher=teacher))
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]
    assert ("student", "entity_f1") in found


@pytest.mark.parametrize("signals", ["online", "dense"])
def test_vectors_of_texts(task, make_encoder, signals):
    losses = [{"kind": "vector_mse"}, {"kind": "rkd_distance", "over": "texts"}]
    losses = losses if signals == "online" else losses[:1]
    recipe = task(
        task={"kind": "embedding"}, teacher=local(make_encoder("body")), losses=losses, signals={"kind": signals}
    )
    found = finish(recipe)
    assert found["student", "cosine_to_teacher"] > found["untrained", "cosine_to_teacher"]
    assert ("control", "cosine_to_teacher") not in found


# Teachers of every kind


def finetuned(model: Path, training: dict[str, Any], learns: str = "all") -> dict[str, Any]:
    return {"kind": "finetune", "model": str(model), "dtype": "fp32", "learns": learns, "training": training}


def test_a_teacher_that_is_trained_first_knows_the_labels(task, make_encoder, brief):
    start = make_encoder("masked")
    recipe = task(teacher=finetuned(start, brief(60)))
    found = finish(recipe)
    assert found["teacher", "accuracy"] > 0.6  # by chance it would be a third
    assert found["student", "retention"] == pytest.approx(
        found["student", "accuracy"] / found["teacher", "accuracy"], abs=1e-6
    )
    assert lines(recipe, "finetune")[-1]["loss"] < lines(recipe, "finetune")[0]["loss"]


def test_where_the_head_alone_learns_the_body_stays_bit_by_bit(task, make_encoder, brief):
    from safetensors.torch import load_file

    start = make_encoder("masked")
    recipe = task(teacher=finetuned(start, brief(3), "head"), task={"kind": "classification"})
    run_recipe(recipe, until="finetune")
    trained, before = (
        load_file(folder / "model.safetensors") for folder in (recipe.folder / "finetune" / "teacher", start)
    )
    body = [name for name in trained if name.startswith("bert.") and name in before]
    assert len(body) > 30
    assert all(trained[name].equal(before[name]) for name in body)


def test_a_head_for_masked_language_modelling_is_trained_first_where_it_lacks(task, make_encoder, brief):
    recipe = task(task={"kind": "masked_lm"}, teacher=finetuned(make_encoder("body"), brief(4), "head"))
    found = finish(recipe)
    assert found["teacher", "nll"] > 0


def test_words_are_taught_by_a_teacher_that_is_trained_first(task, make_encoder, brief):
    data = {"text": "words", "label": "word_labels"}
    teacher = finetuned(make_encoder("masked"), brief(20))
    found = finish(task(task={"kind": "token_classification"}, data=data, teacher=teacher, signals={"kind": "dense"}))
    assert found["teacher", "accuracy"] > 0.9


def test_two_teachers_of_different_tokenizers_teach_by_their_weighted_mean(task, make_encoder):
    members = [
        {"model": str(make_encoder("classes", labels=CLASSES)), "weight": 3.0},
        {"model": str(make_encoder("classes", labels=CLASSES[::-1], seed=2, backwards=True)), "weight": 1.0},
    ]
    teacher = {"kind": "mixture", "members": members, "dtype": "fp32"}
    found = finish(task(teacher=teacher, signals={"kind": "dense"}))
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


def test_the_student_of_another_run_teaches(task, write_task, classifier):
    assistant = write_task("assistant", teacher=classifier)
    recipe = task(
        "final",
        teacher={"kind": "run", "recipe": str(assistant), "dtype": "fp32"},
        student={"kind": "layers", "keep": [0]},
    )
    found = finish(recipe)
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]


RECORDED = {
    "a mapping": ({"probabilities": "p"}, lambda p, _: {"p": dict(zip(CLASSES, p, strict=True))}),
    "a list": ({"probabilities": "p"}, lambda p, _: {"p": list(p)}),
    "by id": ({"probabilities": "p", "match": "id"}, lambda p, row: {"p": list(p), "id": row["id"], "text": None}),
}


def answers(rows: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Sure of the true class, and leaning to the first of the others."""
    return [
        tuple(0.85 if name == row["label"] else 0.1 if n < 1 else 0.05 for n, name in enumerate(CLASSES))
        for row in rows
    ]


def normal(p: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(one / sum(p) for one in p)


@pytest.mark.parametrize("form", [*RECORDED, "labels alone"])
def test_recorded_answers_teach_in_any_order_and_form(task, queries, write_rows, make_encoder, form):
    rows = queries(80)
    if form == "labels alone":
        keys, told = {"label": "said"}, [{"text": row["text"], "said": row["label"]} for row in rows]
    else:
        keys, write = RECORDED[form]
        told = [{"text": row["text"], **write(normal(p), row)} for p, row in zip(answers(rows), rows, strict=True)]
    recipe = task(
        task={"kind": "classification", "labels": list(CLASSES)},
        teacher={"kind": "recorded", "path": str(write_rows(told[::-1])), **keys},
        student={"kind": "model", "model": str(make_encoder("masked", layers=2))},
        training=brief_steps(40),
    )
    found = finish(recipe)
    assert found["teacher", "accuracy"] == 1.0
    assert found["student", "agreement"] > found["untrained", "agreement"]
    assert ("teacher", "parameters") not in found


def brief_steps(steps: int) -> dict[str, Any]:
    return {"steps": steps}


# What the arms learn from


def split_rows(queries: Any, labelled: int = 12) -> list[dict[str, Any]]:
    """50 training texts, of which the first so many are labelled, 14 for validation, 16 for test."""
    rows = queries(80)
    for number, row in enumerate(rows):
        row["split"] = "train" if number < 50 else "validation" if number < 64 else "test"
        if labelled <= number < 50:
            row["label"] = None
    return rows


def test_the_control_arm_takes_as_many_steps_on_the_labelled_texts_alone(
    task, classifier, queries, write_rows, monkeypatch
):
    from potstill.pipeline import arms

    seen: dict[str, set[str]] = {}

    class Watched(arms.RowSource):
        def draw(self):
            batches = super().draw()
            kind = "student" if self._teacher else "control"
            seen.setdefault(kind, set()).update(name for one in batches for names in one.examples for name in names)
            return batches

    monkeypatch.setattr(arms, "RowSource", Watched)
    recipe = task(
        data={"source": str(write_rows(split_rows(queries)))},
        teacher=classifier,
        signals={"kind": "dense"},
        losses=[{"kind": "forward_kl"}],
        training={"steps": 8},
    )
    run_recipe(recipe, until="control")
    assert seen["control"] == {f"q{number}" for number in range(12)}
    assert seen["student"] == {f"q{number}" for number in range(50)}
    assert len(lines(recipe, "train")) == len(lines(recipe, "control")) == 8
    assert {"forward_kl", "cross_entropy"} & set(lines(recipe, "control")[0]) == {"cross_entropy"}


def test_test_texts_change_no_weight_temperature_or_threshold(task, classifier, queries, write_rows):
    """Two runs whose test texts alone differ: whatever is learned or chosen is the same, bit by bit."""
    chosen, students = [], []
    for name, first in (("plain", 100), ("planted", 200)):
        rows = split_rows(queries, labelled=50)[:64]
        rows += [
            {**row, "split": "test", "label": "far" if n % 3 == 0 else row["label"]}
            for n, row in enumerate(queries(16, first))
        ]
        for number in (50, 55, 60):
            rows[number]["label"] = "far"
        recipe = task(
            name,
            task={"kind": "classification", "out_of_scope": "far"},
            data={"source": str(write_rows(rows))},
            teacher=classifier,
            evaluation={"precision": 0.5},
            training={"steps": 4},
        )
        found = finish(recipe)
        names = ("temperature", "oos_threshold")
        chosen.append({key: value for key, value in found.items() if key[1] in names})
        students.append(
            [(recipe.folder / arm / "student" / "model.safetensors").read_bytes() for arm in ("train", "control")]
        )
    assert students[0] == students[1]
    assert chosen[0] == chosen[1]
    assert {name for _, name in chosen[0]} == {"temperature", "oos_threshold"}


def test_texts_that_straddle_splits_are_removed_from_training_and_counted(task, classifier, queries, write_rows):
    from potstill.pipeline.rundir import RunDir
    from potstill.pipeline.texts import open_texts

    rows = split_rows(queries, labelled=50)
    rows += [
        {**row, "id": f"copy{n}", "split": "train", "text": row["text"].upper()} for n, row in enumerate(rows[60:68])
    ]
    recipe = task(data={"source": str(write_rows(rows))}, teacher=classifier)
    run_recipe(recipe, until="prepare")
    told = RunDir(recipe.folder).manifest("prepare").facts["cleaning"]
    assert told["removed: train text stands in validation"] == told["removed: train text stands in test"] == 4
    kept = {split: {text.text.lower() for text in open_texts(recipe.folder / "prepare", split)} for split in SPLITS}
    assert not kept["train"] & (kept["validation"] | kept["test"])
    assert len(kept["train"]) == 50


SPLITS = ("train", "validation", "test")


# The saved student


def turned(folder: Path, to: Path) -> Path:
    """The same classifier with its outputs in reverse order."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0).clone())
        model.classifier.bias.copy_(model.classifier.bias.flip(0).clone())
    model.config.id2label = dict(enumerate(CLASSES[::-1]))
    model.config.label2id = {name: number for number, name in enumerate(CLASSES[::-1])}
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def test_a_teacher_whose_classes_are_in_another_order_makes_the_same_student(task, make_encoder, tmp_path):
    """By name: the data's labels are in the recipe, the teacher's in its config."""
    model = make_encoder("classes", labels=CLASSES)
    named = {"kind": "classification", "labels": list(CLASSES)}
    students = []
    for name, folder in (("same", model), ("other", turned(model, tmp_path / "turned"))):
        recipe = task(name, task=named, teacher=local(folder), training={"steps": 4})
        run_recipe(recipe, until="train")
        students.append(recipe.folder / "train" / "student")
    assert (
        students[0].joinpath("model.safetensors").read_bytes() == students[1].joinpath("model.safetensors").read_bytes()
    )
    config = json.loads((students[1] / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(CLASSES)}


def test_the_student_answers_elsewhere_as_in_the_evaluation_and_holds_no_projection(task, make_encoder):
    from safetensors import safe_open
    from transformers import AutoModelForSequenceClassification, pipeline

    recipe = task(
        teacher=local(make_encoder("classes", labels=CLASSES)),
        student={"kind": "config", "config": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}},
        losses=[{"kind": "forward_kl"}, {"kind": "hidden_mse", "layers": "even"}],
        evaluation={"sample_prompts": 20, "calibrate": False},
    )
    finish(recipe)
    folder = recipe.folder / "train" / "student"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    ask = pipeline("text-classification", model=str(folder), device="cpu")
    samples = json.loads((recipe.folder / "evaluate" / "samples.json").read_text())
    for sample in samples:
        said = ask(sample["prompt"])[0]
        assert sample["completions"]["student"] == f"{said['label']} ({said['score']:.2f})"


def test_attention_maps_are_had_of_models_that_return_none_by_default(task, make_encoder, tmp_path):
    import shutil

    folder = tmp_path / "sdpa"
    shutil.copytree(make_encoder("classes", labels=CLASSES), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "sdpa"}))
    losses = [{"kind": "attention_kl", "layers": "even"}, {"kind": "minilm"}, {"kind": "linear_cka"}]
    recipe = task(teacher=local(folder), losses=losses, training={"steps": 25}, control={"enabled": False})
    run_recipe(recipe, until="train")
    terms = lines(recipe)
    for kind in ("attention_kl", "minilm", "linear_cka"):
        assert sum(term[kind] for term in terms[-5:]) < sum(term[kind] for term in terms[:5]), kind


# Interruptions


@pytest.fixture
def check_killed(encoder_processes, task, tmp_path):
    """Runs a recipe twice, killed so many times and undisturbed: these stages' models, and all measurements, are alike.

    In folders of their own, so that the second finds nothing of the first beside it.
    """

    def check(kills: int, stages: Sequence[str], **keys: Any) -> None:
        whole, killed = (task("task", f"run_dir={tmp_path / name / 'run'}", **keys) for name in ("whole", "killed"))
        seconds = finish_undisturbed(encoder_processes, whole)
        assert finish_killed(encoder_processes, killed, kills, seconds) > 0
        files = [Path("evaluate", "measurements.json")]
        for stage in stages:
            folder = whole.folder / stage / ("teacher" if stage == "finetune" else "student")
            files += [file.relative_to(whole.folder) for file in folder.glob("*.safetensors")]
        assert len(files) > len(stages)
        for file in files:
            assert (killed.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file

    return check


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_a_run_over_texts_ends_as_if_undisturbed(check_killed, make_encoder, brief, kills):
    check_killed(
        kills,
        ["finetune", "train", "control", "static"],
        teacher=finetuned(make_encoder("masked"), brief(24)),
        signals={"kind": "dense"},
        static={"dimensions": 8, "training": brief(24)},
        training={"steps": 24},
    )


@pytest.mark.slow
def test_killed_a_masked_language_model_ends_as_if_undisturbed(check_killed, make_encoder):
    check_killed(
        6,
        ["train", "control"],
        task={"kind": "masked_lm"},
        teacher=local(make_encoder("masked")),
        losses=[{"kind": "forward_kl"}, {"kind": "cross_entropy"}, {"kind": "hidden_cosine"}],
        training={"steps": 60},
    )


def test_masks_go_on_where_a_stopped_training_was(task, make_encoder, monkeypatch):
    from potstill.training import CheckpointStore

    keys: dict[str, Any] = {
        "task": {"kind": "masked_lm"},
        "teacher": local(make_encoder("masked")),
        "losses": [{"kind": "forward_kl"}, {"kind": "cross_entropy"}],
        "training": {"steps": 9},
    }
    whole, stopped = task("whole", **keys), task("stopped", **keys)
    run_recipe(whole, until="train")
    save = CheckpointStore.save

    def save_and_stop(self, step, state):
        save(self, step, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(stopped, until="train")
    monkeypatch.undo()
    run_recipe(stopped, until="train")
    ours, theirs = (recipe.folder / "train" / "student" / "model.safetensors" for recipe in (stopped, whole))
    assert ours.read_bytes() == theirs.read_bytes()


# Mistakes are told in one line


class Finished(NamedTuple):
    code: int
    err: str


@pytest.fixture
def potstill(monkeypatch, capsys):
    """Runs the command line in this process."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["potstill", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        return Finished(code, capsys.readouterr().err)

    return run


DENSE = {"signals": {"kind": "dense"}}
STATIC = {"static": {"dimensions": 8, "training": {"steps": 2}}}

MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "greedy for an encoder": (
        {"student": {"kind": "layers", "keep": "greedy", "count": 2}},
        ["student.keep: greedy judges layers by the next token", "Use `even`"],
    ),
    "tokens for texts": ({"training": {"steps": None, "tokens": 1000}}, ["training.tokens", "Use epochs"]),
    "static without answers kept": (STATIC, ["signals.kind: online", "Use signals.kind=dense"]),
    "sampled answers": ({"signals": {"kind": "sampled"}}, ["signals.kind: sampled", "Use signals.kind=dense"]),
    "text beyond the positions": (
        {"data": {"sequence_length": 64}},
        ["data.sequence_length: 64 exceeds the teacher's 48 positions", "Use at most 48"],
    ),
    "layer that is not there": (
        {"losses": [{"kind": "hidden_mse", "layers": {"2": 9}}]},
        ["losses[0].layers", "the teacher has layers 0..3"],
    ),
    "other labels": (
        {"data": {"label": "beast"}},
        ["counting", "finding", "painting", "fox", "hare", "owl"],
    ),
    "empty class": (
        {"task": {"kind": "classification", "labels": [*CLASSES, "dreaming"]}},
        ["task.labels: no training text is of 'dreaming'"],
    ),
    "no such column": ({"data": {"label": "lable"}}, ["data.label"]),
    "layers of vectors": (
        {"task": {"kind": "embedding"}, "losses": [{"kind": "forward_kl"}]},
        ["losses[0].kind=forward_kl"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(potstill, write_task, classifier, mistake):
    keys, words = MISTAKES[mistake]
    file = write_task(teacher=classifier, **keys)
    for command in ("check", "run"):
        tell_in_one_line(potstill(command, file), words)


def tell_in_one_line(finished: Finished, words: Sequence[str]) -> None:
    told = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert finished.code == 2, finished
    assert len(told) == 1, finished.err
    assert "Traceback" not in finished.err
    for word in words:
        assert word in told[0], told[0]


def test_unlabelled_texts_need_a_teacher(potstill, write_task, classifier, queries, write_rows):
    rows = split_rows(queries, labelled=0)
    named = {"kind": "classification", "labels": list(CLASSES)}
    data = {"source": str(write_rows(rows))}
    hard = write_task(teacher=classifier, task=named, data=data, losses=[{"kind": "cross_entropy"}])
    for command in ("check", "run"):
        words = ["data.label: none of the 50 training texts has a label", "losses[0].kind=cross_entropy"]
        tell_in_one_line(potstill(command, hard), words)
    switched = write_task(teacher=classifier, task=named, data=data)
    tell_in_one_line(potstill("run", switched), ["control.enabled learns from labels"])


def test_recorded_probabilities_that_are_none_name_their_row(potstill, write_task, make_encoder, queries, write_rows):
    told = [{"text": row["text"], "p": {row["label"]: 1.0}} for row in queries(80)]
    told[6]["p"] = {"counting": 0.5, "finding": 0.4}
    file = write_task(
        teacher={"kind": "recorded", "path": str(write_rows(told)), "probabilities": "p"},
        student={"kind": "model", "model": str(make_encoder("masked"))},
    )
    words = ["teacher.path", "queries.jsonl:7", "the probabilities sum to 0.9"]
    for command in ("check", "run"):
        tell_in_one_line(potstill(command, file), words)


def test_texts_without_a_recorded_answer_are_counted_and_the_first_is_named(
    potstill, write_task, make_encoder, queries, write_rows
):
    told = [{"text": row["text"], "said": row["label"]} for row in queries(79)]
    file = write_task(
        teacher={"kind": "recorded", "path": str(write_rows(told)), "label": "said"},
        student={"kind": "model", "model": str(make_encoder("masked"))},
    )
    for command in ("check", "run"):
        tell_in_one_line(potstill(command, file), ["teacher.path", "has no answer to 1 of", "q79"])


def test_a_task_over_texts_has_no_parts(potstill, write_task, classifier):
    file = write_task(teacher=classifier, **DENSE)
    tell_in_one_line(potstill("capture", file, "--part", "1/2"), ["--part: a task over texts", "Leave --part out"])
