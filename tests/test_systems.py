"""The recipes of published systems: their published settings stand in them, and `check` finds nothing against them.

Models of the hub are stood in for by their configs (no weights) with a tiny tokenizer, their data by a small file.
"""

from __future__ import annotations

import copy
import re
import shutil
from itertools import chain
from pathlib import Path

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig

from potstill.pipeline import disk
from potstill.pipeline.build import blank_model, count_steps
from potstill.pipeline.inspection import count_parameters
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
    shipped = set(shipped_recipes()) - {"quickstart"}
    assert shipped >= set(TEACHERS)
    full = [name for name in TEACHERS if not name.endswith("-sample")]
    for name in chain(full, (f"{name}-sample" for name in full)):
        assert f"potstill run {name}\n" in page or f"potstill check {name}\n" in page, name
