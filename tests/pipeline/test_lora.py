"""Adapters from a recipe to a student's folder: trained alone, continued exactly, merged, or refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from potstill.errors import RecipeError
from potstill.pipeline.inspection import inspect_recipe
from potstill.pipeline.run import run_recipe
from potstill.recipes import load_recipe
from potstill.training import CheckpointStore

LORA = "training.lora={rank: 4, alpha: 8, dropout: 0.2, targets: [q_proj, down_proj]}"


@pytest.fixture
def load(tiny_recipe):
    return lambda *overrides: load_recipe(tiny_recipe, overrides)


def weights(recipe, stage):
    return load_file(recipe.folder / stage / "student" / "model.safetensors")


def kill_after(monkeypatch, step):
    """As good as `kill -9` right after the checkpoint of this step."""
    save = CheckpointStore.save

    def save_and_die(self, at, state):
        path = save(self, at, state)
        if at == step:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(CheckpointStore, "save", save_and_die)


def test_only_what_the_adapters_touch_moves_in_both_arms_and_plain_transformers_loads_it(load):
    from transformers import AutoModelForCausalLM

    recipe = load(LORA, "losses=[{kind: forward_kl}, {kind: cross_entropy}]")
    run_recipe(recipe, until="control")
    start = weights(recipe, "initialise")
    for stage in ("train", "control"):
        end = weights(recipe, stage)
        assert end.keys() == start.keys()
        moved = {name for name in start if not torch.equal(start[name], end[name])}
        assert moved == {name for name in start if "q_proj" in name or "down_proj" in name}
        loaded, notes = AutoModelForCausalLM.from_pretrained(
            recipe.folder / stage / "student", output_loading_info=True
        )  # fmt: skip
        assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not hasattr(loaded, "peft_config")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_20_steps_are_10_and_a_kill_and_10_more_bitwise(load, tmp_path, monkeypatch, precision):
    settings = (LORA, f"training.precision={precision}", "training.checkpoint.every_steps=10")
    whole = load(*settings)
    run_recipe(whole, until="train")
    killed = load(*settings, f"run_dir={tmp_path / 'killed'}")
    kill_after(monkeypatch, 10)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(killed, until="train")
    monkeypatch.undo()
    torch.rand(7)
    run_recipe(killed, until="train")
    expected, found = weights(whole, "train"), weights(killed, "train")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert (found["model.layers.0.self_attn.q_proj.weight"].dtype is torch.bfloat16) == (precision == "bf16")


def test_saving_memory_changes_nothing(load):
    plain = load(LORA.replace("0.2", "0"), "training.steps=3", "training.compile=false")
    run_recipe(plain, until="train")
    before = weights(plain, "train")
    again = load(
        LORA.replace("0.2", "0"),
        "training.steps=3",
        "training.compile=false",
        "training.freeze_embeddings=true",
        "training.gradient_checkpointing=true",
        f"run_dir={plain.folder.parent / 'again'}",
    )
    run_recipe(again, until="train")
    for name, value in weights(again, "train").items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-6)


def test_targets_that_are_not_there_are_refused_before_any_weight_is_loaded(load, tmp_path):
    with pytest.raises(RecipeError, match=r"^training\.lora\.targets\[0\]=lm_head: the output layer"):
        inspect_recipe(load("training.lora={targets: [lm_head]}"))
    with pytest.raises(RecipeError, match=r"^training\.lora\.targets\[0\]=wq: LlamaForCausalLM has no linear layer"):
        run_recipe(load("training.lora={targets: [wq]}"))
    assert not (tmp_path / "run" / "prepare").exists()


def test_tasks_with_new_heads_are_refused(task, make_encoder):
    recipe = task(
        teacher={"kind": "local", "model": str(make_encoder("classes", labels=("counting", "finding", "painting")))},
        training={"lora": {"rank": 2}},
    )
    with pytest.raises(RecipeError, match=r"^training\.lora: is for language models, but task\.kind=classification"):
        inspect_recipe(recipe)


@pytest.mark.parametrize("wrong", ["{rank: 0}", "{alpha: 0}", "{dropout: 1.0}", "{targets: []}", "{targets: all}"])
def test_settings_that_make_no_adapter_are_refused(load, wrong):
    with pytest.raises(RecipeError, match=r"training\.lora"):
        load(f"training.lora={wrong}")
