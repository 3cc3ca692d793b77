"""Arms as they answer in the evaluation, against the same models alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from potstill.data import LabelledText
from potstill.engines import load_tokenizer
from potstill.pipeline.answerers import answering
from potstill.pipeline.run import run_recipe
from potstill.pipeline.texts import open_texts
from potstill.students import save_student

CLASSES = ("counting", "finding", "painting")


def local(model):
    return {"kind": "local", "model": str(model), "dtype": "fp32"}


@pytest.fixture
def opened(task, make_encoder):
    """Where a recipe of a ready classifier was prepared, and its arms: the same model under another name."""

    def make(**keys):
        model = make_encoder("classes", labels=CLASSES)
        recipe = task(**{"teacher": local(model), **keys})
        run_recipe(recipe, until="prepare")
        folder = recipe.folder / "prepare"
        return answering(recipe, folder, {"student": model}), open_texts(folder, "test")

    return make


def alone(folder, texts, length=16):
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(str(folder), "student")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return torch.cat(
            [model(**tokenizer(text, truncation=True, max_length=length, return_tensors="pt")).logits for text in texts]
        ).numpy()


def test_answers_stand_in_the_order_of_the_texts_and_are_those_of_the_model_alone(opened, make_encoder):
    arms, texts = opened()
    expected = alone(make_encoder("classes", labels=CLASSES), [text.text for text in texts])
    for name in ("teacher", "student"):
        with arms(name) as arm:
            assert arm.name == name
            np.testing.assert_allclose(arm.scores(texts), expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(arm.scores(texts[::-1]), expected[::-1], rtol=1e-4, atol=1e-4)


def test_the_timed_query_gives_the_same_answers(opened):
    arms, texts = opened()
    with arms("student") as arm:
        (queried,) = arm.query([text.text for text in texts])
        np.testing.assert_allclose(queried.numpy(), arm.scores(texts), rtol=1e-4, atol=1e-4)


def test_parameters_and_places_are_those_of_the_model(opened, make_encoder):
    from transformers import AutoModelForSequenceClassification

    arms, _ = opened()
    folder = make_encoder("classes", labels=CLASSES)
    whole = AutoModelForSequenceClassification.from_pretrained(folder).num_parameters()
    with arms("teacher") as arm:
        assert (arm.parameters, list(arm.places)) == (whole, [str(folder)])


def test_an_ensemble_answers_with_the_weighted_mean_of_its_members(opened, make_encoder):
    folders = [
        make_encoder("classes", labels=CLASSES),
        make_encoder("classes", labels=CLASSES, seed=2, backwards=True),
    ]
    members = [{"model": str(folders[0]), "weight": 3.0}, {"model": str(folders[1])}]
    arms, texts = opened(teacher={"kind": "mixture", "dtype": "fp32", "members": members}, signals={"kind": "dense"})
    said = [torch.from_numpy(alone(folder, [text.text for text in texts])).softmax(-1) for folder in folders]
    with arms("teacher") as arm:
        found = torch.from_numpy(arm.scores(texts)).softmax(-1)
        assert len(arm.query([texts[0].text])) == 2
    torch.testing.assert_close(found, 0.75 * said[0] + 0.25 * said[1], rtol=1e-4, atol=1e-5)


def test_classes_in_another_order_are_put_into_the_datas(task, make_encoder, tmp_path):
    """The same model, its outputs and names turned round: the same answers."""
    from transformers import AutoModelForSequenceClassification

    folder = make_encoder("classes", labels=CLASSES)
    model, turned = AutoModelForSequenceClassification.from_pretrained(folder), tmp_path / "turned"
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    model.config.id2label = dict(enumerate(CLASSES[::-1]))
    model.config.label2id = {name: number for number, name in enumerate(CLASSES[::-1])}
    save_student(model, load_tokenizer(str(folder), "x"), turned)
    recipe = task(teacher=local(turned), data={"label": "label"}, task={"kind": "classification"})
    run_recipe(recipe, until="prepare")
    texts = [LabelledText("a", "count two red fox"), LabelledText("b", "paint the owl")]
    with answering(recipe, recipe.folder / "prepare", {})("teacher") as arm:
        found = arm.scores(texts)
    expected = alone(turned, [text.text for text in texts])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    labels = recipe.model_copy(
        update={"task": recipe.task.model_copy(update={"labels": list(CLASSES)}), "run_dir": tmp_path / "named"}
    )
    run_recipe(labels, until="prepare")
    with answering(labels, labels.folder / "prepare", {})("teacher") as arm:
        np.testing.assert_allclose(arm.scores(texts), expected[:, ::-1], rtol=1e-4, atol=1e-4)


def test_a_word_that_was_cut_has_no_answer_and_the_others_theirs(opened, make_encoder):
    folder = make_encoder("words", labels=("B-BEAST", "B-HUE", "O"))
    data = {"text": "words", "label": "word_labels", "sequence_length": 8}
    arms, _ = opened(task={"kind": "token_classification"}, data=data, teacher=local(folder))
    short = LabelledText("short", ("red", "fox"))
    long = LabelledText("long", ("count", "one", "red", "fox", "and", "two", "gold", "owl"))
    with arms("teacher") as arm:
        found = arm.scores([short, long, short])
    assert found.shape == (2 + 8 + 2, 3)
    assert np.isnan(found).any(1).tolist() == [False] * 8 + [True] * 2 + [False] * 2
    np.testing.assert_allclose(found[:2], found[-2:], rtol=1e-5)


def test_recorded_answers_are_looked_up_and_have_no_speed(opened, queries, write_rows, make_encoder):
    told = [{"text": row["text"], "p": {row["label"]: 1.0}} for row in queries(80)]
    arms, texts = opened(
        teacher={"kind": "recorded", "path": str(write_rows(told[::-1])), "probabilities": "p"},
        student={"kind": "model", "model": str(make_encoder("masked"))},
    )
    with arms("teacher") as arm:
        assert arm.query is None
        assert arm.parameters == 0
        said = arm.scores(texts).argmax(-1)
    assert [CLASSES[place] for place in said] == [text.label for text in texts]
