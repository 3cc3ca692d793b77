"""The recipes of published systems: their published settings stand in them, and `check` finds nothing against them.

Models of the hub are stood in for by their configs (no weights) with a tiny tokenizer, their data by a small file.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from itertools import chain
from pathlib import Path

import pytest
from transformers import BertConfig, BertTokenizer, DistilBertConfig, Gemma2Config, GPT2Config, LlamaConfig

from potstill.pipeline import disk
from potstill.pipeline.build import blank_model, count_steps
from potstill.pipeline.chain import phases_of
from potstill.pipeline.inspection import count_parameters, inspect_recipe
from potstill.pipeline.plan import print_plan
from potstill.recipes import load_recipe, shipped_recipe, shipped_recipes

PAGE = Path(__file__).parents[1] / "docs" / "systems.md"

SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
TINYLLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
)
GEMMA = Gemma2Config(
    vocab_size=256_000,
    hidden_size=3584,
    intermediate_size=14_336,
    num_hidden_layers=42,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    query_pre_attn_scalar=256,
    max_position_embeddings=8192,
)
TEACHERS = {
    "distilgpt2": GPT2Config(),
    "tinyllama": TINYLLAMA,
    "gemma": GEMMA,
    **dict.fromkeys(("distilgpt2-sample", "tinyllama-sample", "gemma-sample"), SMOLLM2),
}
MINILM = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
ENCODERS = {"distilbert": BertConfig(), **dict.fromkeys(("intent", "intent-sample", "distilbert-sample"), MINILM)}
PUBLISHED_LAYERS = [0, 2, 4, 7, 9, 11]


@pytest.fixture
def stood_in(tmp_path, tiny_tokenizer, tiny_corpus):
    """A shipped recipe with stand-ins for all that would be fetched."""

    def load(name: str, *overrides: str):
        config = copy.deepcopy(TEACHERS[name])
        config.save_pretrained(tmp_path / "teacher")
        tiny_tokenizer.save_pretrained(tmp_path / "teacher")
        given = [f"run_dir={tmp_path / 'run'}", f"teacher.model={tmp_path / 'teacher'}", f"data.source={tiny_corpus}"]
        splits = "data.splits={validation: 0.1, test: 0.1}"  # of the published corpora far less is held out
        return load_recipe(shipped_recipe(name), [*given, splits, *overrides])

    return load


@pytest.fixture
def encoder(tmp_path):
    """A shipped recipe of an encoder, with stand-ins for all that would be fetched."""

    def load(name: str, *overrides: str):
        model = tmp_path / "teacher"
        copy.deepcopy(ENCODERS[name]).save_pretrained(model)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(50))]
        BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(model)
        recipe = load_recipe(shipped_recipe(name), overrides)
        places = [f"run_dir={tmp_path / 'run'}", f"teacher.model={model}", "data.config=null"]
        places.append(f"data.source={write_texts(tmp_path / 'texts.jsonl', recipe)}")
        if recipe.phases:
            corpus = {"source": str(tmp_path / "texts.jsonl"), "sequence_length": 64, "text": recipe.data.text}
            corpus["splits"] = {"validation": 0.1, "test": 0.1}
            places += [f"phases[0].teacher.model={model}", f"phases[0].data={json.dumps(corpus)}"]
        return load_recipe(shipped_recipe(name), [*places, *overrides])

    return load


def write_texts(file: Path, recipe) -> Path:
    """300 texts in the columns that the recipe names, of two classes; some of the held-out ones out of scope."""
    rows = []
    for number in range(300):
        split, outside = ("train", "validation", "test")[number % 3], number % 10 == 9
        label = recipe.task.out_of_scope if outside and recipe.task.out_of_scope else f"class {number % 2}"
        words = " ".join(f"w{place}" for place in (number % 50, number // 50, *range(10)))
        rows.append({recipe.data.text: words, recipe.data.label: label, "split": split})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ENCODERS)
def test_check_finds_nothing_against_an_encoders_recipe(encoder, name, capsys, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**16, 0, 10**16))
    recipe = encoder(name)
    print_plan(recipe, measure=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "2 classes" in said
    assert "steps" in said
    assert not (recipe.folder / "prepare").exists()


def test_distilbert_is_half_of_bert_with_its_own_architecture(encoder):
    recipe = encoder("distilbert")
    general = phases_of(recipe)[0]
    assert general.student.keep == PUBLISHED_LAYERS
    found = inspect_recipe(general)
    assert isinstance(found.student.config, DistilBertConfig)
    assert found.student.config.n_layers == 6
    assert not any("token_type" in name or "pooler" in name for name, _ in found.student.named_parameters())
    assert round(found.teacher_parameters / 1e6) == 110
    assert round(found.student_parameters / 1e6) == 67


def test_distilbert_masks_steps_and_anneals_as_published():
    general = phases_of(load_recipe(shipped_recipe("distilbert")))[0]
    task, training = general.task, general.training
    assert (task.masked, task.by_mask, task.by_random) == (0.15, 0.8, 0.1)
    assert (training.batch_rows, training.epochs, general.data.sequence_length) == (4000, 3.0, 512)
    assert (training.learning_rate, training.eps, training.clip_norm) == (5e-4, 1e-6, 5.0)
    assert training.schedule.warmup == 0.05


@pytest.mark.parametrize("name", ["distilbert", "distilbert-sample"])
def test_distilbert_has_the_triple_loss_then_a_second_distillation(name):
    recipe = load_recipe(shipped_recipe(name))
    general = phases_of(recipe)[0]
    terms = {term.kind: term for term in general.losses}
    assert {kind: term.weight for kind, term in terms.items()} == {
        "forward_kl": 5.0,
        "cross_entropy": 2.0,
        "hidden_cosine": 1.0,
    }
    soft = terms["forward_kl"]
    assert (soft.temperature, soft.times_temperature_squared, terms["hidden_cosine"].layers) == (2.0, True, "last")
    assert (general.task.kind, recipe.task.kind) == ("masked_lm", "classification")
    assert {term.kind for term in recipe.losses} == {"forward_kl", "cross_entropy"}
    assert recipe.teacher.kind == "finetune"


def test_a_teacher_without_a_head_learns_the_language_whole_before_it_teaches():
    general = phases_of(load_recipe(shipped_recipe("distilbert-sample")))[0]
    assert (general.teacher.kind, general.teacher.learns) == ("finetune", "all")


@pytest.mark.parametrize("name", ["intent", "intent-sample"])
def test_an_intent_recipe_has_two_students_of_one_stored_teacher(name):
    recipe = load_recipe(shipped_recipe(name))
    assert (recipe.teacher.kind, recipe.signals.kind) == ("finetune", "dense")
    assert len(recipe.student.keep) == 2
    assert recipe.static is not None


@pytest.mark.parametrize("name", TEACHERS)
def test_check_finds_nothing_against_a_recipe(stood_in, name, capsys, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**16, 0, 10**16))
    recipe = stood_in(name)
    print_plan(recipe, measure=False)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{count_steps(recipe, 1):,} steps" in said or recipe.training.epochs
    assert not (recipe.folder / "prepare").exists()


def student_parameters(name: str) -> int:
    config = copy.deepcopy(TEACHERS[name])
    sizes = load_recipe(shipped_recipe(name)).student.config.model_dump(exclude_none=True)
    if "layer_types" in config.to_dict():
        config.layer_types = config.layer_types[: sizes["num_hidden_layers"]]
    for size, value in sizes.items():
        setattr(config, size, value)
    config.head_dim = sizes.get("head_dim", config.hidden_size // config.num_attention_heads)
    return count_parameters(blank_model(config, "student.config"))


@pytest.mark.parametrize(
    ("name", "millions"), [("tinyllama", 1100), ("gemma", 2614), ("tinyllama-sample", 18), ("gemma-sample", 18)]
)
def test_a_fresh_student_is_as_large_as_its_system_says(name, millions):
    assert round(student_parameters(name) / 1e6) == millions


def test_tinyllama_steps_as_published():
    training = load_recipe(shipped_recipe("tinyllama")).training
    recipe = load_recipe(shipped_recipe("tinyllama"))
    steps = count_steps(recipe, 1)
    assert training.batch_rows * recipe.data.sequence_length == 2**21
    assert round(training.schedule.warmup * steps) == 2000
    assert training.learning_rate * training.schedule.final == pytest.approx(4e-5)
    assert (training.tokens, training.betas, training.weight_decay, training.clip_norm) == (3e12, (0.9, 0.95), 0.1, 1.0)


def test_what_a_recipe_says_how_to_add_can_be_added(stood_in):
    text = shipped_recipe("tinyllama").read_text(encoding="utf-8")
    block = re.findall(r"^#     (\w+): (.+?)(?:  +#.*)?$", text, flags=re.MULTILINE)
    assert [key for key, _ in block] == ["teacher", "signals", "losses", "control"]
    recipe = stood_in("tinyllama", *(f"{key}={value}" for key, value in block if key != "teacher"))
    assert (recipe.signals.kind, len(recipe.losses), recipe.control.enabled) == ("sampled", 2, True)


@pytest.mark.parametrize("name", ["distilgpt2", "distilgpt2-sample"])
def test_distilgpt2_has_the_triple_loss(name):
    recipe = load_recipe(shipped_recipe(name))
    assert {term.kind: term.weight for term in recipe.losses} == {
        "forward_kl": 5.0,
        "cross_entropy": 2.0,
        "hidden_cosine": 1.0,
    }
    soft = recipe.losses[0]
    assert (soft.temperature, soft.times_temperature_squared) == (2.0, True)


@pytest.mark.parametrize("name", ["gemma", "gemma-sample"])
def test_gemma_learns_from_256_sampled_tokens_alone(name):
    recipe = load_recipe(shipped_recipe(name))
    assert (recipe.signals.kind, recipe.signals.k) == ("sampled", 256)
    assert [term.kind for term in recipe.losses] == ["forward_kl"]


def test_every_system_has_both_scales_and_stands_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    shipped, systems = set(shipped_recipes()) - {"quickstart"}, [*TEACHERS, *ENCODERS]
    assert shipped >= set(systems)
    full = [name for name in systems if not name.endswith("-sample")]
    for name in chain(full, (f"{name}-sample" for name in full)):
        assert f"potstill run {name}\n" in page or f"potstill check {name}\n" in page, name
