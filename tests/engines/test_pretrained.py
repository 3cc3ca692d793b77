"""Labels are kept by name, a head is drawn only where that was allowed, and what does not fit is refused in a line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from potstill.engines import load_encoder, read_encoder
from potstill.errors import ModelError
from potstill.types import Role, Wants

CPU = torch.device("cpu")
NAMES = ["fox", "owl", "toad", "wren"]


@pytest.fixture
def saved(build, tmp_path):
    """Saves a model of a family for a role, its classes named, and gives its folder."""

    def save(family, role, names=NAMES, **changes):
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        model = build(family, role, **(labels if role in (Role.CLASSIFIER, Role.TOKEN_CLASSIFIER) else {}), **changes)
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def load(folder, role=Role.CLASSIFIER, **options):
    return load_encoder(str(folder), role, "fp32", CPU, key="teacher.model", **options)


def refusal(folder, role=Role.CLASSIFIER, **options) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, role, **options)
    assert str(caught.value).startswith("teacher.model: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(folder, *parts):
    """The folder's weights without those whose names hold one of these parts, as of a body pretrained alone."""
    file = folder / "model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if not any(part in name for part in parts)}
    save_file(kept, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SomeModel"]}))
    return folder


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "modernbert", "debertav2"])
@torch.no_grad()
def test_labels_in_another_order_give_equal_probabilities_by_name(saved, texts, family):
    folder = saved(family, Role.CLASSIFIER)
    own, other = load(folder, labels=NAMES), load(folder, labels=["wren", "fox", "toad", "owl"])
    said = [read_encoder(model, texts, Role.CLASSIFIER).final_ND.softmax(-1) for model in (own, other)]
    assert_close(said[1][:, [1, 3, 2, 0]], said[0])
    assert [other.config.id2label[i] for i in range(4)] == ["wren", "fox", "toad", "owl"]
    assert other.config.label2id == {"wren": 0, "fox": 1, "toad": 2, "owl": 3}
    assert own.config.problem_type == "single_label_classification"


@torch.no_grad()
def test_what_was_loaded_is_what_transformers_loads_and_survives_saving(saved, texts, tmp_path):
    model = load(saved("bert", Role.CLASSIFIER), labels=NAMES[::-1])
    model.save_pretrained(tmp_path / "again")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    expected_BC = plain(input_ids=texts.ids_BT, attention_mask=texts.segments_BT).logits
    assert_close(read_encoder(model, texts, Role.CLASSIFIER).final_ND, expected_BC)
    assert plain.config.id2label[0] == "wren"


@torch.no_grad()
def test_a_word_classifier_is_ordered_too(saved, texts):
    folder = saved("bert", Role.TOKEN_CLASSIFIER)
    own, other = (load(folder, Role.TOKEN_CLASSIFIER, labels=names) for names in (NAMES, NAMES[::-1]))
    said = [read_encoder(model, texts, Role.TOKEN_CLASSIFIER).final_ND for model in (own, other)]
    assert_close(said[1].flip(-1), said[0])


def test_other_labels_are_refused_by_name(saved):
    message = refusal(saved("bert", Role.CLASSIFIER), labels=["fox", "owl", "toad", "hare"])
    assert "only the model has wren; only the task has hare" in message
    assert "only the task has none" in refusal(saved("bert", Role.CLASSIFIER), labels=NAMES[:3])


def test_outputs_without_names_are_taken_in_order_only_where_the_recipe_names_them(saved, caplog):
    folder = saved("bert", Role.CLASSIFIER, names=["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"])
    assert "Set task.labels to 4 names" in refusal(folder, labels=NAMES)
    model = load(folder, labels=NAMES, in_order=True)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert "taken to be task.labels in order: fox, owl, toad, wren" in caplog.text
    assert "outputs have no names" in refusal(folder, labels=NAMES[:3], in_order=True)


@pytest.mark.parametrize(
    ("family", "role", "head"),
    [
        ("bert", Role.CLASSIFIER, ("classifier", "pooler")),
        ("roberta", Role.CLASSIFIER, ("classifier",)),
        ("distilbert", Role.TOKEN_CLASSIFIER, ("classifier",)),
        ("modernbert", Role.CLASSIFIER, ("classifier", "head.")),
        ("bert", Role.MASKED, ("cls.",)),
    ],
)
def test_a_head_is_drawn_where_that_is_allowed_and_by_the_seed_alone(saved, family, role, head):
    folder = without(saved(family, role), *head)
    assert "lacks weights of" in refusal(folder, role, labels=NAMES)
    models = [load(folder, role, labels=NAMES, fresh_head=True, seed=seed) for seed in (1, 1, 2)]
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name])
        drawn = name.endswith("weight") and any(part in name for part in head) and weight.ndim == 2
        tied = "decoder" in name
        assert torch.equal(weight, models[2].state_dict()[name]) != (drawn and not tied), name
    if role is not Role.MASKED:
        assert models[0].config.id2label == dict(enumerate(NAMES))


def test_a_body_is_never_drawn(saved):
    folder = without(saved("bert", Role.CLASSIFIER), "classifier", "layer.1.output.dense")
    message = refusal(folder, labels=NAMES, fresh_head=True)
    assert "bert.encoder.layer.1.output.dense" in message
    folder = without(saved("bert", Role.ENCODER), "layer.1.output.dense")
    assert "lacks weights of BertModel" in refusal(folder, Role.ENCODER, fresh_head=True)


def test_loading_draws_nothing_from_the_stream_of_random_numbers(saved):
    folder = without(saved("bert", Role.CLASSIFIER), "classifier")
    state = torch.get_rng_state()
    load(folder, labels=NAMES, fresh_head=True)
    assert torch.equal(state, torch.get_rng_state())


def test_a_drawn_head_is_no_news_to_be_printed(saved, capfd):
    load(without(saved("bert", Role.CLASSIFIER), "classifier"), labels=NAMES, fresh_head=True)
    assert "MISSING" not in "".join(capfd.readouterr())


def test_a_head_without_labels_is_refused(saved):
    folder = without(saved("bert", Role.CLASSIFIER), "classifier")
    assert "nobody named its classes" in refusal(folder, fresh_head=True)


def test_a_sentence_encoder_has_no_pooler_and_lacks_none(saved):
    model = load(without(saved("bert", Role.ENCODER), "pooler"), Role.ENCODER, pooling="mean")
    assert model.pooler is None
    assert load(saved("distilbert", Role.ENCODER), Role.ENCODER).config.model_type == "distilbert"


def test_kinds_of_answers_are_not_mixed_up(saved):
    folder = saved("bert", Role.CLASSIFIER, problem_type="multi_label_classification")
    assert "trained for multi_label_classification" in refusal(folder, labels=NAMES)
    assert load(folder, labels=NAMES, multi_label=True).config.problem_type == "multi_label_classification"


def test_pooling_is_a_setting_of_the_architecture_or_refused(saved):
    folder = saved("modernbert", Role.CLASSIFIER, classifier_pooling="mean")
    assert load(folder, labels=NAMES, pooling="mean").config.classifier_pooling == "mean"
    assert "Set task.pooling: mean" in refusal(folder, labels=NAMES)
    fresh = load(without(folder, "classifier"), labels=NAMES, pooling="cls", fresh_head=True)
    assert fresh.config.classifier_pooling == "cls"
    assert "has no setting for its pooling" in refusal(saved("bert", Role.CLASSIFIER), labels=NAMES, pooling="mean")


def test_eager_gives_maps(saved, texts):
    model = load(saved("bert", Role.CLASSIFIER), labels=NAMES, eager=True)
    assert set(read_encoder(model, texts, Role.CLASSIFIER, Wants(attentions=(2,))).attentions) == {2}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_that_cannot_tell_padding_is_refused(saved, family):
    folder = saved(family, Role.CLASSIFIER, pad_token_id=None)
    assert "cannot be read as classification (Cannot handle batch sizes > 1" in refusal(folder, labels=NAMES)


def test_a_decoder_that_can_is_loaded(saved):
    assert load(saved("llama", Role.CLASSIFIER, pad_token_id=0), labels=NAMES).config.num_labels == 4


def test_dtypes_are_what_is_asked(saved):
    folder = saved("bert", Role.MASKED)
    assert load_encoder(str(folder), Role.MASKED, "bf16", CPU, key="t").dtype == torch.bfloat16


def test_nothing_there_is_refused(tmp_path):
    assert "cannot be loaded" in refusal(tmp_path)
