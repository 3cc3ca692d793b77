"""A student cut from a model that is not the teacher: its layers, its tokenizer, itself as the judge."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from potstill.errors import RecipeError, VocabularyMismatch
from potstill.pipeline.inspection import inspect_recipe
from potstill.pipeline.run import run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.recipes import load_recipe


@pytest.fixture(scope="module")
def own(tiny_llama, tmp_path_factory):
    """A model of five narrower layers with the teacher's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_llama)
    config.num_hidden_layers, config.hidden_size, config.head_dim = 5, 16, 4
    folder = tmp_path_factory.mktemp("own")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture
def load(tiny_recipe):
    return lambda *overrides: load_recipe(tiny_recipe, overrides)


def test_the_layers_are_those_of_the_named_model(load, own):
    recipe = load(f"student={{kind: layers, model: {own}, keep: [0, 2, 4]}}", "training.steps=3")
    run_recipe(recipe, until="train")
    given = load_file(own / "model.safetensors")
    start = load_file(recipe.folder / "initialise" / "student" / "model.safetensors")
    for new, old in enumerate((0, 2, 4)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(start[name.format(new)], given[name.format(old)])
    assert not any(".layers.3." in name for name in start)
    facts = RunDir(recipe.folder).manifest("initialise").facts
    assert facts["layers"] == [0, 2, 4]
    assert facts["parameters"] == sum(value.numel() for value in start.values())


def test_the_model_judges_its_own_layers(load, own, monkeypatch):
    from potstill.pipeline import layers

    judged = []
    search = layers._search

    def remember(spec, teacher, rows, count):
        judged.append(teacher.model.config.num_hidden_layers)
        return search(spec, teacher, rows, count)

    monkeypatch.setattr(layers, "_search", remember)
    recipe = load(f"student={{kind: layers, model: {own}, keep: greedy, count: 3}}")
    run_recipe(recipe, until="initialise")
    facts = RunDir(recipe.folder).manifest("initialise").facts
    assert (judged, len(facts["layers"]), len(facts["removed"])) == ([5], 3, 2)


def test_the_plan_knows_the_size_without_weights(load, own):
    recipe = load(f"student={{kind: layers, model: {own}, keep: even, count: 2}}")
    found = inspect_recipe(recipe)
    assert found.student.config.num_hidden_layers == 2
    assert found.student.device.type == "meta"
    assert found.student.config.hidden_size == 16


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("keep: [0, 5]", r"^student\.keep\[1\]=5: .*own.* has layers 0\.\.4"),
        ("keep: even, count: 6", r"^student\.count: 6 exceeds .*'s 5 layers"),
    ],
)
def test_layers_that_the_model_lacks_are_refused_by_its_name(load, own, student, message):
    with pytest.raises(RecipeError, match=message):
        inspect_recipe(load(f"student={{kind: layers, model: {own}, {student}}}"))


def test_another_vocabulary_than_the_teachers_is_refused(load, own, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in own.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    found = json.loads((own / "tokenizer.json").read_text())
    words = found["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(VocabularyMismatch):
        inspect_recipe(load(f"student={{kind: layers, model: {folder}, keep: even, count: 2}}"))
