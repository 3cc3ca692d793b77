"""From what a recipe says to the parts that do it: steps, plans, the models that teach and those that are to learn."""

from __future__ import annotations

import pytest
from transformers import BertConfig, LlamaConfig, MambaConfig

from potstill.errors import ModelError, RecipeError
from potstill.pipeline import build
from potstill.recipes import load_recipe
from potstill.types import Role

BERT = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=16)


def quickstart(*changes: str):
    return load_recipe("quickstart", changes)


@pytest.mark.parametrize(
    ("length", "steps"),
    [("steps: 7", 7), ("tokens: 1000", 4), ("tokens: 1024", 4), ("epochs: 1", 3), ("epochs: 0.5", 2), ("epochs: 3", 8)],
)
def test_steps_are_as_given_or_enough_for_the_tokens_or_epochs(length, steps):
    recipe = quickstart(f"training={{{length}, batch_rows: 4}}", "data.sequence_length=64")
    assert build.count_steps(recipe, rows=10) == steps
    assert build.steps_of(recipe.training, 64, 10) == steps


@pytest.mark.parametrize(
    ("schedule", "end"),
    [("{kind: cosine, final: 0.1}", 0.1), ("{kind: linear, final: 0.2}", 0.2), ("{kind: linear}", 0.0),
     ("{kind: constant}", 1.0), ("{kind: wsd, final: 0.3}", 0.3)],
)  # fmt: skip
def test_the_rate_rises_to_its_peak_and_ends_where_the_schedule_says(schedule, end):
    training = quickstart(f"training={{steps: 100, learning_rate: 2, schedule: {schedule}}}").training
    rates = [build.build_plan(training, 100).rate(step) for step in range(100)]
    assert max(rates) == pytest.approx(2.0, rel=0.02)
    assert rates[0] < rates[4]
    assert rates[-1] == pytest.approx(2.0 * end, abs=0.1)


def test_a_plan_validates_ten_times_unless_the_recipe_says_how_often():
    training = quickstart("training={steps: 100, checkpoint: {every_minutes: 2}}").training
    assert (build.build_plan(training, 100).validate_every, build.build_plan(training, 3).validate_every) == (10, 1)
    assert build.build_plan(training, 100).checkpoint_seconds == 120
    assert build.build_plan(quickstart("training.validate_every=7").training, 100).validate_every == 7


@pytest.mark.parametrize(
    ("teacher", "found"),
    [
        ("{kind: local, model: a}", {"teacher.model": "a"}),
        ("{kind: finetune, model: a, training: {epochs: 1}}", {"teacher.model": "a"}),
        ("{kind: mixture, members: [{model: a}, {model: b}]}",
         {"teacher.members[0].model": "a", "teacher.members[1].model": "b"}),
        ("{kind: recorded, path: said.csv, label: a}", {}),
    ],
)  # fmt: skip
def test_every_model_that_teaches_is_known_by_its_key(teacher, found):
    asked = build.teachers_of(quickstart(f"teacher={teacher}"))
    assert {key: member.model for key, member in asked.items()} == found


def test_an_assistant_that_is_not_settled_has_no_model_here():
    with pytest.raises(ValueError, match="settle the recipe first"):
        build.teachers_of(quickstart("teacher={kind: run, recipe: x.yaml}"))


@pytest.mark.parametrize(
    ("architecture", "names", "ready"),
    [("BertForSequenceClassification", {0: "no", 1: "yes"}, ("no", "yes")),
     ("BertForSequenceClassification", None, None),
     ("BertForMaskedLM", {0: "no", 1: "yes"}, None)],
    ids=["classifier", "without names", "no classifier"],
)  # fmt: skip
def test_a_ready_classifier_names_its_classes(tmp_path, architecture, names, ready):
    BertConfig(architectures=[architecture], **({"id2label": names} if names else {})).save_pretrained(tmp_path)
    assert build.ready_labels(quickstart(f"teacher={{kind: local, model: {tmp_path}}}")) == ready
    trained_first = quickstart(f"teacher={{kind: finetune, model: {tmp_path}, training: {{epochs: 1}}}}")
    assert build.ready_labels(trained_first) is None
    assert build.ready_labels(quickstart("teacher={kind: recorded, path: said.csv, label: a}")) is None


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.CAUSAL])
def test_a_blank_model_is_of_the_class_that_its_role_asks_for(role):
    model = build.blank_model(BERT, "student.model", role)
    assert isinstance(model, build.AUTO_CLASSES[role]._model_mapping[BertConfig])
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_config_of_another_kind_of_model_is_refused_with_its_key():
    llama = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=16)
    with pytest.raises(ModelError) as caught:
        build.blank_model(llama, "student.model", Role.MASKED)
    assert str(caught.value).startswith("student.model: LlamaConfig is not the config of a model for masked language")
    assert str(caught.value).endswith("Use an encoder such as BERT, RoBERTa, DistilBERT, ELECTRA or ModernBERT.")


def test_a_model_drops_what_its_own_training_says_and_else_what_its_config_says():
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, attention_dropout=0.5)
    recipe, own = quickstart("training.dropout=0.0"), quickstart("training.dropout=0.25").training
    for training, share in ((None, 0.0), (own, 0.25), (quickstart().training, 0.5)):
        model = build.blank_model(config, "student.model", Role.CAUSAL)
        build.build_trainable(recipe, model, training)
        assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {share}


def test_dropout_is_refused_where_there_is_none():
    config = MambaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1)
    model = build.blank_model(config, "student.model", Role.CAUSAL)
    recipe = quickstart("training.dropout=0.1")
    with pytest.raises(RecipeError, match=r"teacher\.training\.dropout=0\.1: MambaForCausalLM has nothing to drop"):
        build.check_trainable(recipe, recipe.training, model, "teacher.training")
    build.check_trainable(recipe, quickstart("training.dropout=0.0").training, model)
