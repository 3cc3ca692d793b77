"""The evaluate stage of tasks over texts, with arms whose answers are planted."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from potstill.data import LabelledText, write_texts
from potstill.errors import DataError
from potstill.evaluation import Latency, Round
from potstill.pipeline import examine
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.rundir import open_run
from potstill.recipes import Recipe

LABELS = ("cold", "hot", "warm")
ARMS = ("teacher", "untrained", "control", "student")


def recipe_of(task, **evaluation):
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": task,
            "data": {"source": "texts.jsonl"},
            "teacher": {"kind": "local", "model": "someone/tiny", "device": "cpu"},
            "student": {"kind": "layers", "keep": "even", "count": 2},
            "losses": [{"kind": "forward_kl"}],
            "training": {"steps": 1},
            "evaluation": {"resamples": 100, "speed": False, "sample_prompts": 3, **evaluation},
        }
    )


CLASSES = {"kind": "classification"}
SCOPED = {"kind": "classification", "out_of_scope": "oos"}


@dataclass
class Arm:
    """Says what `answer` says of every text; its folder holds 5 bytes."""

    name: str
    answer: Any
    places: list[str]
    parameters: int = 7
    query: Any = None
    length: int = 10**6

    def scores(self, texts, meter=None):
        return np.concatenate([np.atleast_2d(self.answer(text)) for text in texts]).astype(np.float32)

    def cut(self, texts):
        return sum(len(text.text) > self.length for text in texts)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """What runs the stage on texts by split, and gives back its files by name and its notes."""
    monkeypatch.setattr(examine, "release_memory", lambda: None)  # there is nothing to release, and it takes a second

    def run(recipe, splits, answers, *, labels=LABELS, queries=None, lengths=None):
        prepared, model = tmp_path / "prepare", tmp_path / "model"
        for folder in (prepared, model):
            folder.mkdir(exist_ok=True)
        (model / "weights").write_bytes(b"12345")
        for split in ("train", "validation", "test"):
            write_texts(prepared / f"{split}.jsonl", splits.get(split, []))
        write_json_atomic(prepared / "labels.json", {"names": list(labels), "out_of_scope": None} if labels else None)
        opened: list[str] = []

        @contextmanager
        def answerers(arm):
            opened.append(arm)
            query = (queries or {}).get(arm, lambda texts: len(texts))
            yield Arm(arm, answers[arm], [str(model)], query=query, **(lengths or {}).get(arm, {}))
            opened.remove(arm)

        with open_run(tmp_path / "run") as folder, folder.stage("evaluate", "f") as stage:
            examine.evaluate_texts(recipe, stage, prepared, answerers=answerers, arms=list(answers))
        assert opened == []
        files = {path.stem: json.loads(path.read_text()) for path in stage.folder.glob("*.json")}
        return files, files["manifest"]["facts"]["notes"]

    return run


def text(number, label, **more):
    return LabelledText(f"t{number}", f"text {number}", label=label, **more)


def texts_of(count, start=0):
    return [text(start + number, LABELS[number % 3], slice=("web", "phone")[number % 2]) for number in range(count)]


def sure_of(strength, *, wrong=()):
    """Right, but for the texts of these ids, of which it says the next class."""

    def answer(one):
        place = LABELS.index(one.label) if one.label in LABELS else 0
        logits = np.zeros(3)
        logits[(place + (one.id in wrong)) % 3] = strength if one.label in LABELS else 0.1 * strength
        return logits

    return answer


def values(files, where="test"):
    return {(row["arm"], row["name"]): row["value"] for row in files["measurements"] if row["slice"] == where}


def planted(**changes):
    return {
        "teacher": sure_of(4.0, wrong=("t0",)),
        "untrained": sure_of(0.5, wrong={f"t{n}" for n in range(20)}),
        "control": sure_of(2.0, wrong=("t0", "t1", "t2", "t3")),
        "student": sure_of(3.0, wrong=("t0", "t1")),
        **changes,
    }


def test_a_classification_is_measured_and_told(house):
    files, notes = house(recipe_of(CLASSES), {"test": texts_of(30), "validation": texts_of(30, 100)}, planted())
    found = values(files)
    assert found["teacher", "accuracy"] == pytest.approx(29 / 30)
    assert found["student", "accuracy"] == pytest.approx(28 / 30)
    assert found["student", "retention"] == pytest.approx(28 / 29)
    assert found["student", "agreement"] == pytest.approx(29 / 30)
    assert found["student", "accuracy_gain_over_control"] == pytest.approx(2 / 30)
    assert (found["student", "parameters"], found["student", "folder_bytes"]) == (7, 5)
    assert found["student", "temperature"] > 0
    assert {row["slice"] for row in files["measurements"]} >= {"class:cold", "slice:web", "slice:phone"}
    assert files["confusions"] == [{"true": "hot", "predicted": "warm", "student": 1, "teacher": 0}]
    assert files["classes"]["labels"] == list(LABELS)
    assert set(files["classes"]["arms"]) == set(files["calibration"]) == set(ARMS)
    assert {row["value"] for row in files["slices"]} == {"web", "phone"}
    assert not [note for note in notes if "label" in note or "recorded" in note]


def test_samples_show_the_texts_on_which_arms_differ(house):
    files, _ = house(recipe_of(CLASSES, sample_prompts=2), {"test": texts_of(60), "validation": texts_of(3)}, planted())
    assert len(files["samples"]) == 2
    for sample in files["samples"]:
        said = {answer.split(" (")[0] for answer in sample["completions"].values()}
        assert len(said) > 1
        assert sample["reference"] in LABELS
        assert set(sample["completions"]) == set(ARMS)


def test_what_test_texts_say_moves_neither_temperature_nor_threshold(house):
    """The test texts are planted to be unlike: every arm is wrong on them, and sure."""
    validation = [*texts_of(30, 100), *(text(200 + n, "oos") for n in range(5))]
    likely = [*texts_of(30), *(text(50 + n, "oos") for n in range(5))]
    unlike = {one.id for one in likely}
    on_validation = sure_of(2.0, wrong=("t100",))

    def split_by(on_test):
        return lambda one: (on_test if one.id in unlike else on_validation)(one)

    chosen = []
    for answers in (planted(), {arm: sure_of(9.0, wrong=unlike) for arm in ARMS}):
        split = {arm: split_by(answers[arm]) for arm in ARMS}
        files, _ = house(recipe_of(SCOPED), {"test": likely, "validation": validation}, split)
        found = values(files)
        chosen.append([found[arm, name] for arm in ARMS for name in ("temperature", "oos_threshold")])
    assert chosen[0] == chosen[1]


def test_texts_out_of_scope_are_no_class_but_told_by_their_confidence(house):
    test = [*texts_of(30), *(text(50 + n, "oos") for n in range(6))]
    validation = [*texts_of(30, 100), *(text(200 + n, "oos") for n in range(6))]
    files, notes = house(recipe_of(SCOPED), {"test": test, "validation": validation}, planted())
    found = values(files)
    assert found["student", "accuracy"] == pytest.approx(28 / 30)
    assert (found["student", "oos_auroc"], found["student", "oos_recall"], found["student", "oos_precision"]) == (
        1,
        1,
        1,
    )
    assert not [note for note in notes if "scope" in note]


def test_without_such_texts_that_part_is_left_out_and_said(house):
    files, notes = house(recipe_of(SCOPED), {"test": texts_of(9), "validation": texts_of(9, 100)}, planted())
    assert not [name for _, name in values(files) if name.startswith("oos")]
    assert [note for note in notes if note.startswith("texts out of scope were not measured: task.out_of_scope")]


def test_a_precision_that_is_not_to_be_had_is_said(house):
    validation = [*texts_of(30, 100), *(text(200 + n, "oos") for n in range(2))]
    blind = {arm: lambda one: np.array([2.0, 0.0, 0.0]) for arm in ("teacher", "student")}
    test = [*texts_of(6), text(50, "oos")]
    _, notes = house(recipe_of(SCOPED), {"test": test, "validation": validation}, blind)
    assert "out of scope: student reaches a precision of 0.9 at no threshold" in " ".join(notes)


def test_unlabelled_texts_are_counted_in_a_note(house):
    test = [*texts_of(10), text(90, None)]
    files, notes = house(recipe_of(CLASSES), {"test": test, "validation": []}, planted())
    assert "1 of 11 texts of the test split have no label: they count only where an arm is compared" in notes[0]
    assert "no temperature was fitted: no text of the validation split has a label" in notes
    assert ("student", "ece_calibrated") not in values(files)


def test_several_labels_are_told_as_sets(house):
    pairs = [("cold",), ("hot", "warm"), (), ("warm",)] * 5
    test = [text(number, labels) for number, labels in enumerate(pairs)]

    def answer(one):
        return [3.0 if name in one.label else -3.0 for name in LABELS]

    answers = {"teacher": answer, "student": lambda one: [3.0, *answer(one)[1:]]}
    files, _ = house(recipe_of({**CLASSES, "multi_label": True}), {"test": test, "validation": test}, answers)
    found = values(files)
    assert (found["teacher", "accuracy"], found["teacher", "micro_f1"]) == (1.0, 1.0)
    assert found["student", "accuracy"] == 0.25
    assert files["confusions"] == []
    assert files["samples"][0]["completions"]["student"].startswith("cold (0.95)")


def test_words_are_measured_text_by_text_and_unread_ones_left_out_for_all(house):
    names = ("O", "B-X", "I-X")
    sentences = [LabelledText(f"t{n}", ("a", "b", "c"), label=("B-X", "I-X", "O")) for n in range(12)]

    def right(one):
        return 4.0 * np.array([[label == name for name in names] for label in one.label])

    def cut(one):
        return np.concatenate([right(one)[:2], np.full((1, 3), np.nan)])

    files, notes = house(
        recipe_of({"kind": "token_classification"}),
        {"test": sentences},
        {"teacher": right, "student": cut},
        labels=names,
    )
    found = values(files)
    assert found["student", "accuracy"] == found["student", "entity_f1"] == 1.0
    assert "12 words of the test split stand where some arm no longer reads" in notes[0]
    assert files["samples"][0]["completions"] == {"teacher": "B-X I-X O", "student": "B-X I-X -"}


def test_an_arm_that_answers_fewer_words_is_refused(house):
    sentences = [LabelledText("t0", ("a", "b"), label=("O", "B-X"))]
    answers = {"teacher": lambda one: np.eye(2), "student": lambda one: np.eye(2)[:1]}
    with pytest.raises(DataError, match=r"^data\.sequence_length: student answered 1 of the 2 words"):
        house(recipe_of({"kind": "token_classification"}), {"test": sentences}, answers, labels=("O", "B-X"))


def test_vectors_are_compared_with_the_teachers_and_with_what_people_say_of_pairs(house):
    generator = np.random.default_rng(0)
    places = {f"text {n}": generator.normal(size=4) for n in range(30)}
    test = []
    for number in range(12):
        first, second = places[f"text {number}"], places[f"text {number + 12}"]
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        test.append(text(number, str(cosine), pair=f"text {number + 12}"))
    test += [text(number, None) for number in range(24, 30)]
    answers = {"teacher": lambda one: places[one.text], "student": lambda one: places[one.text][:2]}
    recipe = recipe_of({"kind": "embedding"})
    files, _ = house(recipe, {"test": test}, answers, labels=None)
    found = values(files)
    assert found["teacher", "sts_spearman"] == pytest.approx(1.0)
    assert found["student", "sts_spearman"] < 1.0
    assert 0 < found["student", "neighbours_kept"] < 1
    assert ("student", "cosine_to_teacher") not in found
    assert "classes" not in files
    assert files["samples"][0]["completions"]["teacher"].startswith("text ")


def test_arms_that_are_here_are_timed_in_turns_and_priced(house, monkeypatch):
    monkeypatch.setattr(examine, "measure_latency", short(together := []))
    price = {"machine_usd_per_hour": 3.6, "teacher_usd_per_1000": 2.0}
    recipe = recipe_of(CLASSES, speed=True, price=price)
    splits = {"test": texts_of(40), "validation": texts_of(9, 100)}
    files, notes = house(recipe, splits, planted(), queries={"teacher": None})
    found = values(files)
    assert together == [["untrained", "control", "student"]]
    assert found["teacher", "cost_usd_per_1000"] == 2.0
    assert found["student", "cost_usd_per_1000"] == pytest.approx(1.0 / found["student", "throughput_per_s"])
    assert ("student", "throughput_vs_teacher") not in found
    assert "teacher has no speed: no model of it is here" in notes
    rows = {row["name"]: row for row in files["measurements"] if row["arm"] == "student" and row["slice"] == "test"}
    assert rows["cost_usd_per_1000"]["low"] <= rows["cost_usd_per_1000"]["value"] <= rows["cost_usd_per_1000"]["high"]


def test_arms_that_do_not_fit_side_by_side_are_timed_one_after_another(house, monkeypatch):
    monkeypatch.setattr(examine, "measure_latency", short(together := []))
    monkeypatch.setattr(examine, "SIDE_BY_SIDE", 10)
    answers = {arm: planted()[arm] for arm in ("teacher", "student")}
    recipe = recipe_of(CLASSES, speed=True)
    files, notes = house(recipe, {"test": texts_of(9), "validation": texts_of(9, 100)}, answers)
    assert together == [["teacher"], ["student"]]
    assert [note for note in notes if "one after another" in note]
    assert ("student", "latency_vs_teacher") in values(files)


def short(log):
    """A measurement of planted turns, which keeps what was timed together."""

    def measure(queries, texts):
        log.append(list(queries))
        turns = tuple(Round((1.0 + place,) * 20, 100.0 + place) for place in range(7))
        return {arm: Latency(turns) for arm in queries}

    return measure


@pytest.mark.parametrize(("precision", "told"), [("fp32", True), ("bf16", False)])
def test_arms_that_are_timed_in_different_precisions_are_said_to_be(house, monkeypatch, precision, told):
    monkeypatch.setattr(examine, "measure_latency", short([]))
    recipe = recipe_of(CLASSES, speed=True)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"precision": precision})})
    answers = {arm: planted()[arm] for arm in ("teacher", "student")}
    _, notes = house(recipe, {"test": texts_of(9), "validation": texts_of(9, 100)}, answers)
    assert bool([note for note in notes if "the teacher answered in bf16 and its students in fp32" in note]) == told


def test_test_texts_that_an_arm_reads_the_beginning_of_are_counted(house):
    """`task.overlong` is for what is learned: a test text is asked about whatever its length."""
    task = {**CLASSES, "overlong": "refuse"}
    lengths = {arm: {"length": 6} for arm in ("untrained", "student")}
    _, notes = house(
        recipe_of(task), {"test": texts_of(12), "validation": texts_of(6, 100)}, planted(), lengths=lengths
    )
    (note,) = (note for note in notes if "tokens" in note)
    assert note == "2 of 12 test texts have more than 512 tokens: untrained, student answered by their beginnings"


def test_a_part_of_the_test_texts_is_drawn_by_the_seed_and_said(house):
    recipe = recipe_of(CLASSES, max_documents=6)
    files, notes = house(recipe, {"test": texts_of(60), "validation": texts_of(6, 100)}, planted())
    rows = {
        row["name"]: row["n"] for row in files["measurements"] if row["arm"] == "student" and row["slice"] == "test"
    }
    assert rows["accuracy"] == 6
    assert notes[0].startswith("6 of 60 test texts were asked")
    again, _ = house(recipe, {"test": texts_of(60), "validation": texts_of(6, 100)}, planted())
    assert again["measurements"] == files["measurements"]


def test_without_a_test_text_nothing_can_be_measured(house):
    with pytest.raises(DataError, match=r"^data\.splits\.test: .* holds no text"):
        house(recipe_of(CLASSES), {"validation": texts_of(3)}, planted())
