"""What cannot be learned from what is kept is refused before any weight is loaded; who spoke is known by content."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from potstill.errors import MissingExtra, RecipeError, StoreError
from potstill.pipeline import build, cast, recall
from potstill.pipeline.inspection import inspect_recipe
from potstill.pipeline.recall import (
    PLAN,
    check_signals,
    explain_store,
    load_plan,
    place_for,
    salt_for,
    spec_for,
    stamp_for,
    temperature_of,
)
from potstill.recipes import load_recipe
from potstill.signals import open_store

CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=48))
MIXTURE = "teacher={kind: mixture, dtype: fp32, members: [{model: a}, {model: b, sources: {'code*': 3}}]}"
SOFT = "losses=[{kind: forward_kl}]"
SAMPLED, TOPK, HIDDEN = "signals={kind: sampled, k: 8}", "signals={kind: topk, k: 8}", "signals={kind: hidden}"


@pytest.fixture
def load(tiny_recipe):
    return lambda *overrides: load_recipe(tiny_recipe, overrides)


REFUSED = {
    "no soft loss": (
        [SAMPLED, "losses=[{kind: cross_entropy}]"],
        ["signals.kind: sampled keeps what the teacher says, but no loss compares with it", "add a loss"],
    ),
    "hidden layers": (
        [HIDDEN, "losses=[{kind: forward_kl}, {kind: hidden_mse}]"],
        ["losses[1].kind=hidden_mse needs hidden layers, which signals.kind=hidden does not keep", "online"],
    ),
    "hidden of a mixture": ([HIDDEN, MIXTURE], ["signals.kind: hidden keeps the states of one model", "Use sampled"]),
    "softened mixture": (
        [SAMPLED, MIXTURE, "losses=[{kind: forward_kl, temperature: 2}]"],
        ["losses[0].temperature", "mean of several teachers is stored at temperature 1", "Use 1"],
    ),
    "moving mixture": (
        [
            "signals={kind: dense}",
            MIXTURE,
            "losses=[{kind: forward_kl, temperature: {kind: linear, start: 1, end: 2}}]",
        ],
        ["losses[0].temperature", "mean of several teachers"],
    ),
    "moving temperature": (
        [TOPK, "losses=[{kind: forward_kl, temperature: {kind: cosine, start: 4, end: 1}}]"],
        ["losses[0].temperature: moves over the training", "signals.kind=topk keeps lists", "signals.kind=hidden"],
    ),
    "two temperatures": (
        [
            "signals={kind: topk, k: 8, temperatures: [1, 2]}",
            "losses=[{kind: cross_entropy}, {kind: forward_kl}, {kind: jsd, biased: true, temperature: 2}]",
        ],
        ["losses[2].temperature: 2, but losses[1] is at 1", "is read at one"],
    ),
    "other temperature": (
        ["signals={kind: sampled, temperatures: [1, 4]}", "losses=[{kind: forward_kl, temperature: 2}]"],
        ["losses[0].temperature: 2, but signals.temperatures is [1.0, 4.0]", "log-sum-exp", "Add it."],
    ),
    "reverse of samples": (
        [SAMPLED, "losses=[{kind: reverse_kl, biased: true}]"],
        ["losses[0].kind=reverse_kl has no unbiased form for signals.kind=sampled", "Use forward_kl"],
    ),
    "reverse of a list": (
        [TOPK, "losses=[{kind: reverse_kl}]"],
        ["losses[0].kind=reverse_kl has no unbiased form for the 8 likeliest", "say losses[0].biased: true"],
    ),
    "jsd of renormalised": (
        ["signals={kind: topk_renormalised}", "losses=[{kind: jsd, biased: true}]"],
        ["losses[0].kind=jsd has no unbiased form for signals.kind=topk_renormalised"],
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_is_kept_must_teach_the_losses(load, mistake):
    overrides, words = REFUSED[mistake]
    with pytest.raises(RecipeError) as caught:
        check_signals(load(*overrides))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["losses=[{kind: cross_entropy}]"],  # online: nothing is kept, so nothing can lack
        [SAMPLED],
        [SAMPLED, "losses=[{kind: forward_kl, temperature: 2}, {kind: cross_entropy}]"],
        ["signals={kind: sampled, temperatures: [1, 2]}", "losses=[{kind: forward_kl, temperature: 2}]"],
        [TOPK, "losses=[{kind: reverse_kl, biased: true}]"],
        [HIDDEN, "losses=[{kind: jsd}, {kind: forward_kl, temperature: {kind: linear, start: 4, end: 1}}]"],
        [HIDDEN, "losses=[{kind: forward_kl, temperature: 2}, {kind: reverse_kl}]"],
        ["signals={kind: dense}", "losses=[{kind: total_variation, temperature: 3}]"],
        [SAMPLED, MIXTURE],
    ],
)
def test_what_can_be_taught_is_let_through(load, overrides):
    check_signals(load(*overrides))


def forbid(*_, **__):
    raise AssertionError("weights were loaded")


def test_all_is_refused_before_any_weight_is_loaded(load, monkeypatch):
    monkeypatch.setattr(cast, "load_model", forbid)
    with pytest.raises(RecipeError, match=r"^losses\[0\]\.kind=reverse_kl"):
        inspect_recipe(load(SAMPLED, "losses=[{kind: reverse_kl}]"))
    with pytest.raises(RecipeError, match=r"^signals\.k=301: the vocabulary has 300 tokens\. Use a k of 1 to 300\."):
        inspect_recipe(load("signals={kind: topk, k: 301}"))
    assert inspect_recipe(load("signals={kind: topk, k: 300}")).record_bytes > 0
    assert inspect_recipe(load()).record_bytes == 0
    assert inspect_recipe(load(HIDDEN)).record_bytes == 4 * 32


def test_a_place_that_cannot_be_reached_is_refused_before_any_weight_is_loaded(load, monkeypatch, tmp_path):
    monkeypatch.setattr(cast, "load_model", forbid)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match=r"^signals\.store: .*cannot be written"):
        inspect_recipe(load(SAMPLED, f"signals.store={tmp_path / 'file' / 'store'}"))
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(MissingExtra, match=r"^signals\.store: s3://nobody-has-this/place"):
        inspect_recipe(load(SAMPLED, "signals.store=s3://nobody-has-this/place"))


# What is kept


def test_a_list_is_read_at_the_temperature_of_the_losses(load):
    warm = "losses=[{kind: cross_entropy}, {kind: forward_kl, temperature: 2}]"
    assert temperature_of(load(SAMPLED, warm)) == 2.0
    assert temperature_of(load(SAMPLED)) == 1.0
    assert temperature_of(load(HIDDEN, warm)) == 1.0
    assert spec_for(load(SAMPLED, warm), 300, CONFIG).temperatures == (2.0,)
    named = load("signals={kind: topk, temperatures: [4, 2]}", warm)
    assert spec_for(named, 300, CONFIG).temperatures == (2.0, 4.0)


def test_the_spec_says_what_the_recipe_says(load):
    some = "signals.positions={kind: random, share: 0.25}"
    spec = spec_for(load(HIDDEN, some, "teacher.dtype=bf16"), 300, CONFIG)
    assert (spec.kind, spec.width, spec.dtype, spec.positions, spec.share) == ("hidden", 48, "bf16", "random", 0.25)
    dense = spec_for(load("signals={kind: dense}"), 300, CONFIG)
    assert (dense.kind, dense.vocabulary, dense.k, dense.share) == ("dense", 300, 0, 1.0)
    with pytest.raises(ValueError, match="online keeps nothing"):
        spec_for(load(), 300, CONFIG)
    with pytest.raises(RecipeError, match=r"signals\.k=16: the vocabulary has 9"):
        spec_for(load("signals={kind: sampled}"), 9, CONFIG)


def test_of_a_mixture_each_say_has_a_salt_of_its_own(load):
    salt = salt_for(load(SAMPLED, MIXTURE))
    assert salt("code.jsonl") != salt("talk.jsonl")
    assert salt("talk.jsonl") == salt("else.jsonl")
    assert salt_for(load(SAMPLED)) is None


# Who spoke


@pytest.fixture
def stamp(load):
    def stamp(*overrides):
        recipe = load(SAMPLED, *overrides)
        return stamp_for(recipe, spec_for(recipe, 300, build.teacher_config(recipe)))

    return stamp


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_a_copy_elsewhere_is_the_same_teacher(stamp, tiny_llama, tmp_path):
    copy = copied(tiny_llama, tmp_path / "copy")
    there, here = stamp(f"teacher.model={copy}"), stamp()
    assert (there.teacher, there.tokenizer, there.spec, there.template) == (
        here.teacher,
        here.tokenizer,
        here.spec,
        here.template,
    )
    assert str(tiny_llama) in here.words["teacher"]
    (copy / "README.md").write_text("a card that came later")
    assert stamp(f"teacher.model={copy}").teacher == here.teacher


def test_one_byte_of_weights_or_config_is_another_teacher(stamp, tiny_llama, tmp_path):
    weights, config = copied(tiny_llama, tmp_path / "weights"), copied(tiny_llama, tmp_path / "config")
    raw = bytearray((weights / "model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (weights / "model.safetensors").write_bytes(raw)
    content = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(content | {"rms_norm_eps": 1e-3}))
    found = {stamp(*more).teacher for more in ([], [f"teacher.model={weights}"], [f"teacher.model={config}"])}
    found.add(stamp("teacher.dtype=bf16").teacher)
    assert len(found) == 4


def test_another_template_or_vocabulary_is_told(stamp, tiny_llama, tmp_path):
    copy = copied(tiny_llama, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    there, here = stamp(f"teacher.model={copy}"), stamp()
    assert there.template != here.template
    assert there.tokenizer == here.tokenizer


def test_what_is_kept_decides_the_place_and_where_the_run_is_does_not(load, stamp, tmp_path):
    recipe, same = load(SAMPLED), load(SAMPLED, f"run_dir={recipe_folder(load).parent / 'other'}", "training.steps=3")
    assert place_for(recipe, stamp()) == place_for(same, stamp())
    assert Path(place_for(recipe, stamp())).parent == recipe.folder.parent / "signals"
    places = {place_for(recipe, stamp(*more)) for more in ([], ["signals.k=9"], ["teacher.dtype=bf16"])}
    assert len(places) == 3
    named = load(SAMPLED, "signals.store=gs://bucket/here")
    assert place_for(named, stamp()) == "gs://bucket/here"


def recipe_folder(load) -> Path:
    return load().folder


@pytest.fixture
def left(tmp_path, stamp):
    """A store, and the folder and facts of a capture that left three pieces there."""
    store = open_store(tmp_path / "store", stamp(), 17)
    with store.writer() as writer:
        for number in range(3):
            writer.append(bytes([number]) * 16, np.full((3, 17), 7, np.uint8))
    keys = np.repeat(np.arange(3, dtype=np.uint8), 16).reshape(3, 16)
    np.savez(tmp_path / PLAN, keys=keys, planned=np.ones(3, bool))
    return store, tmp_path, {"store": store.place, "spec": {"kind": "sampled"}}


def test_a_store_that_is_as_it_was_left_needs_no_words(load, left):
    _, folder, facts = left
    assert explain_store(load(SAMPLED), folder, facts) is None
    assert "is gone" in (explain_store(load(SAMPLED), folder, facts | {"store": str(folder / "gone")}) or "")
    elsewhere = load(SAMPLED, "signals.store=/elsewhere")
    assert "is another place now" in (explain_store(elsewhere, folder, facts) or "")


def test_a_store_that_grew_is_as_good_and_one_that_lost_what_the_run_needs_is_not(load, left):
    store, folder, facts = left
    (shard,) = (folder / "store" / "shards").iterdir()
    with store.writer() as writer:
        writer.append(b"another of a run", np.full((3, 17), 7, np.uint8))
    (other,) = set((folder / "store" / "shards").iterdir()) - {shard}
    assert explain_store(load(SAMPLED), folder, facts) is None
    other.unlink()
    assert explain_store(load(SAMPLED), folder, facts) is None  # what another run needs
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xa5")
    assert explain_store(load(SAMPLED), folder, facts) is None  # nobody has looked at that byte
    store.refresh()
    store.quarantine(store.verify())
    words = "has lost 3 of the pieces since; they will be captured again"
    assert words in (explain_store(load(SAMPLED), folder, facts) or "")


def test_a_store_of_hidden_states_without_its_head_is_not_whole(load, left):
    _, folder, facts = left
    assert "head" in (explain_store(load(SAMPLED), folder, facts | {"spec": {"kind": "hidden"}}) or "")


def test_a_store_that_cannot_be_read_is_no_store_that_is_gone(load, left):
    _, folder, facts = left
    (folder / "store" / "store.json").write_text("{")
    with pytest.raises(StoreError, match=r"store\.json is damaged"):
        explain_store(load(SAMPLED), folder, facts)


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 100])
def test_a_plan_that_is_not_whole_is_none(tmp_path, content):
    (tmp_path / PLAN).write_bytes(content)
    assert [len(part) for part in load_plan(tmp_path)] == [0, 0]


def test_a_change_of_a_step_of_a_large_file_is_another_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "WHOLE_BYTES", 0)
    path, step = tmp_path / "model.safetensors", recall.STEP_BYTES
    whole = bytes(5 * step + 17)
    path.write_bytes(whole)
    before = recall._look_into(path)
    for start in (0, step // 2, 3 * step + 5, len(whole) - step):
        path.write_bytes(whole[:start] + b"\x01" * step + whole[start + step :])
        assert recall._look_into(path) != before
