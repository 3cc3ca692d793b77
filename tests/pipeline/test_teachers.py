"""Several teachers at once, from the recipe to the report: who has a say on what, and who cannot teach together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.data import PackedRows
from potstill.errors import RecipeError, VocabularyMismatch
from potstill.pipeline import build
from potstill.pipeline.inspection import count_parameters, inspect_recipe
from potstill.pipeline.plan import print_plan
from potstill.pipeline.run import explain_run, run_recipe
from potstill.pipeline.rundir import RunDir
from potstill.recipes import Recipe, load_recipe
from potstill.types import Mixture, Wants


@pytest.fixture(scope="module")
def second(tiny_llama, tmp_path_factory) -> Path:
    """Another random model of the same tokenizer: 3 layers, width 16, its head without padding."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "second"
    config = AutoConfig.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    config.num_hidden_layers, config.hidden_size, config.vocab_size = 3, 16, len(tokenizer)
    config.head_dim, config.initializer_range = 4, 0.3
    with torch.random.fork_rng():
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_sources(tiny_corpus, tmp_path_factory) -> Path:
    """A folder of the tiny corpus in two files, code.jsonl and talk.jsonl."""
    folder = tmp_path_factory.mktemp("sources")
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    (folder / "code.jsonl").write_text("".join(lines[::2]))
    (folder / "talk.jsonl").write_text("".join(lines[1::2]))
    return folder


@pytest.fixture
def load(tiny_recipe, tiny_llama, second, two_sources):
    """Loads the tiny recipe with both models as teachers; the second knows more of code."""

    def load(*overrides: str, **member: Any) -> Recipe:
        recipe = json.loads(tiny_recipe.read_text())
        told = {"model": str(second), "weight": 2.0, "sources": {"code*": 3.0, "*": 0.5}} | member
        recipe["teacher"] = {"kind": "mixture", "members": [{"model": str(tiny_llama)}, told], "dtype": "fp32"}
        recipe["data"]["source"] = str(two_sources)
        recipe["control"] = {"enabled": False}
        recipe["training"]["steps"] = 6
        tiny_recipe.write_text(json.dumps(recipe))
        return load_recipe(tiny_recipe, overrides)

    return load


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.folder / "train" / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_teaches_from_end_to_end(load, tiny_llama, second):
    losses = "losses=[{kind: forward_kl, temperature: 2}, {kind: hidden_cosine}]"
    recipe = load("student={kind: layers, keep: greedy, count: 2}", losses, "evaluation.speed=true")
    run_recipe(recipe)
    assert {status.state for status in explain_run(recipe)} == {"done"}
    rows = json.loads((recipe.folder / "evaluate" / "measurements.json").read_text())
    found = {(row["arm"], row["name"]): row["value"] for row in rows}
    both = sum(count_parameters(model) for model in inspect_recipe(recipe).teachers)
    assert found["teacher", "parameters"] == RunDir(recipe.folder).manifest("initialise").facts["teacher_parameters"]
    assert found["teacher", "parameters"] == both
    assert found["teacher", "folder_bytes"] == sum(
        file.stat().st_size for folder in (tiny_llama, second) for file in folder.iterdir()
    )
    assert found["student", "kl_to_teacher"] < found["untrained", "kl_to_teacher"]
    assert found["teacher", "decode_tokens_per_s"] > 0
    words = f"the mean of {tiny_llama} (weight 1) and {second} (weight 2, 3 on code*, 0.5 on *)"
    for page in ("report/index.html", "report/report.md", "train/student/README.md"):
        assert words in (recipe.folder / page).read_text().replace("\\", ""), page


def test_every_row_is_weighed_by_the_file_that_it_comes_from(load, two_sources):
    recipe = load()
    run_recipe(recipe, until="prepare")
    rows = PackedRows(recipe.folder / "prepare" / "train")
    assert rows.sources() == {"code.jsonl", "talk.jsonl"}
    batch = rows.batch(range(4))
    said = build.build_teacher(recipe).read(batch, Wants(final=True)).logits
    assert isinstance(said, Mixture)
    code = {json.loads(line)["id"] for line in (two_sources / "code.jsonl").read_text().splitlines()}
    for (row, position), weights in zip(batch.supervised_BT.nonzero().tolist(), said.weights_NM, strict=True):
        name = batch.examples[row][int(batch.segments_BT[row, position]) - 1]
        expected = [1 / 4, 3 / 4] if name in code else [1 / 1.5, 0.5 / 1.5]
        assert weights.tolist() == pytest.approx(expected), name


def test_a_member_without_a_say_changes_no_loss(load, tiny_recipe, tiny_llama, second, tmp_path):
    """The first member is silent on all files: the student learns as from the second alone."""
    student = f"student={{kind: model, model: {second}}}"
    losses = "losses=[{kind: forward_kl}, {kind: cross_entropy, weight: 0.5}]"
    silent = (
        f"{{kind: mixture, dtype: fp32, members: [{{model: {tiny_llama}, sources: {{'*': 0}}}}, {{model: {second}}}]}}"
    )
    together = load(student, losses, f"teacher={silent}")
    alone = load(
        student, losses, f"teacher={{kind: local, dtype: fp32, model: {second}}}", f"run_dir={tmp_path / 'alone'}"
    )
    for recipe in (together, alone):
        run_recipe(recipe, until="train")
    for ours, theirs in zip(metrics(together), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)


def test_what_a_member_says_more_or_where_makes_the_student_stale_and_not_the_rows(load):
    run_recipe(load(), until="initialise")
    for member in ({"weight": 3.0}, {"sources": {"*": 0.5, "code*": 3.0}}):  # the order of patterns counts
        states = {status.stage: status.state for status in explain_run(load(**member))}
        assert (states["prepare"], states["initialise"]) == ("done", "stale")
    assert {s.stage: s.state for s in explain_run(load("teacher.device=cpu"))}["initialise"] == "done"


def test_the_plan_counts_all_members(load, capsys):
    recipe = load()
    print_plan(recipe, measure=True)
    shown = capsys.readouterr().out
    total = sum(count_parameters(model) for model in build_models(recipe))
    assert f"{total / 1e6:,.1f}M parameters, fp32, 2 models" in shown
    assert "time: evaluate" in shown


def build_models(recipe: Recipe) -> list[Any]:
    return [member.model for member in build.build_teacher(recipe).members]


# Who cannot teach together


def spoilt(second: Path, folder: Path, spoil: Any) -> str:
    shutil.copytree(second, folder)
    spoil(folder)
    return str(folder)


def swap_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            swap_tokens,
            r"its tokenizer has 'b' as number \d+, the first teacher's has 'a' .*use teachers of one family\.$",
        ),
        (other_template, r"its chat template differs from the first teacher's"),
    ],
)
def test_members_of_different_tongues_are_refused_before_anything_is_done(load, second, tmp_path, spoil, words):
    recipe = load(model=spoilt(second, tmp_path / "spoilt", spoil))
    for act in (run_recipe, lambda recipe: print_plan(recipe, measure=False)):
        with pytest.raises(VocabularyMismatch, match=rf"^teacher\.members\[1\]\.model: {words}"):
            act(recipe)
    assert not recipe.folder.joinpath("prepare").exists()


def fewer_positions(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))


def test_a_member_too_short_for_the_samples_is_refused(load, second, tmp_path):
    recipe = load("evaluation.sample_tokens=20", model=spoilt(second, tmp_path / "short", fewer_positions))
    with pytest.raises(
        RecipeError, match=r"^teacher\.members\[1\]\.model: has 40 positions, but .* may take 52\. Lower"
    ):
        inspect_recipe(recipe)
    inspect_recipe(load("evaluation.sample_tokens=8", "data.sequence_length=16", model=str(tmp_path / "short")))


def test_a_source_on_which_nobody_has_a_say_is_refused_at_once(load, tiny_llama, second):
    mute = f"[{{model: {tiny_llama}, sources: {{'talk*': 0}}}}, {{model: {second}, sources: {{'*.jsonl': 0}}}}]"
    words = r"^teacher\.members: every weight is 0 for the source 'talk\.jsonl'\. Raise one of them, or take"
    for act in (run_recipe, lambda recipe: print_plan(recipe, measure=False)):
        with pytest.raises(RecipeError, match=words):
            act(load(f"teacher.members={mute}"))
    run_recipe(load(), until="prepare")
    with pytest.raises(RecipeError, match=words):  # prepared before, with other weights
        run_recipe(load(f"teacher.members={mute}"), until="initialise")


def test_a_pattern_that_fits_no_source_is_refused(load, two_sources):
    recipe = load(sources={"code*": 3.0, "Talk*": 2.0, str(two_sources / "talk.jsonl"): 1.0})
    with pytest.raises(
        RecipeError, match=r"members\[1\]\.sources: Talk\*, .*talk\.jsonl fits none.*code\.jsonl, talk\.jsonl"
    ):
        run_recipe(recipe)
