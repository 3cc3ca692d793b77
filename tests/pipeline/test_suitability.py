"""What no data could make right is refused by the recipe's own words; what is shipped is not."""

from __future__ import annotations

import pytest

from potstill.errors import RecipeError
from potstill.pipeline import suitability
from potstill.pipeline.chain import phases_of
from potstill.pipeline.objective import check_losses
from potstill.recipes import Recipe, load_recipe, shipped_recipes

INTENT = """\
name: intent
task: {kind: classification}
data: {source: questions.jsonl}
teacher: {kind: local, model: big}
student: {kind: model, model: small}
losses: [{kind: forward_kl}, {kind: cross_entropy}]
training: {epochs: 1}
"""
NEWS = """\
name: news
data: {source: words.jsonl}
teacher: {kind: local, model: big}
student: {kind: layers, count: 3}
losses: [{kind: forward_kl}]
training: {steps: 3}
"""
STATIC = "static={training: {epochs: 1}}"
FINETUNE = "teacher={kind: finetune, model: m, training: {epochs: 1}}"
RECORDED = "teacher={kind: recorded, path: said.jsonl, label: intent}"
MIXTURE = "teacher={kind: mixture, members: [{model: a}, {model: b}]}"
DENSE = "signals={kind: dense}"
API = "teacher={kind: openai, model: big}"
SCORING = "teacher={kind: openai, model: big, api: completion, tokenizer: t}"
TOPK, OWN = "signals={kind: topk, k: 8}", "student={kind: model, model: s}"


def read(tmp_path, text: str, *changes: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "recipe.yaml", changes)


def refusal(recipe: Recipe) -> str:
    with pytest.raises(RecipeError) as caught:
        suitability.check_task(recipe)
    return str(caught.value)


REFUSALS = [
    # the teacher
    (NEWS, [RECORDED, "student={kind: model, model: s}"],
     "teacher.kind: recorded answers are classes of texts, but task.kind=language_model. Use task.kind=classification, "
     "or another teacher."),
    (INTENT, ["task={kind: token_classification}", RECORDED],
     "teacher.kind: recorded answers are classes of texts, but task.kind=token_classification. Use "
     "task.kind=classification, or another teacher."),
    (INTENT, [RECORDED, "teacher.match=id", "data.noise={}"],
     "teacher.match: id, but data.noise makes copies with ids of their own, of which nothing was recorded. Use "
     "teacher.match=text, which gives a copy the answer to its text; or remove noise."),
    (NEWS, ["task={kind: masked_lm}", MIXTURE, "student.keep=even"],
     "teacher.kind: mixture averages probabilities, which task.kind=masked_lm does not do. Use one model."),
    (INTENT, ["task={kind: embedding}", MIXTURE, "losses=[{kind: vector_mse}]"],
     "teacher.kind: mixture averages probabilities, which task.kind=embedding does not do. Use one model."),
    (INTENT, ["teacher={kind: mixture, members: [{model: a}, {model: b, sources: {'*': 2}}]}"],
     "teacher.members[].sources: weights by source are for language models. Use weight alone."),
    (INTENT, ["task={kind: embedding}", FINETUNE, "losses=[{kind: vector_mse}]"],
     "teacher.kind: finetune needs labels, which task.kind=embedding has none of. Use teacher.kind=local."),
    (NEWS, [FINETUNE, "teacher.learns=head"],
     "teacher.learns: head trains a head that the model lacks, but a language model has its own. Use "
     "teacher.learns=all."),
    # an API
    (INTENT, ["task={kind: token_classification}", API],
     "teacher.kind: openai is asked for one label a text, but task.kind=token_classification wants something else. Use "
     "task.kind=classification with one label a text, or another teacher."),
    (INTENT, ["task.multi_label=true", API],
     "teacher.kind: openai is asked for one label a text, but task.kind=classification with multi_label wants "
     "something else. Use task.kind=classification with one label a text, or another teacher."),
    (INTENT, [API],
     "signals.kind: online would ask the API in every step of the training. Use signals.kind=dense, which asks about "
     "every text once."),
    (INTENT, [API, "signals={kind: dense, features: true}"],
     "signals.features: teacher.kind=openai shows nothing of what lies behind its answers. Leave it out."),
    (INTENT, [API, DENSE, STATIC],
     "static: embeddings are distilled from the teacher's encoder, but teacher.kind=openai has none here. Remove "
     "static, or use another teacher."),
    (INTENT, [API, DENSE, "student={kind: layers, keep: even, count: 2}"],
     "student.kind: layers is made from the teacher's model, but teacher.kind=openai has none here. Use "
     "student.kind=model, or layers of a student.model."),
    (NEWS, [API, "student={kind: model, model: s}"],
     "teacher.kind: openai teaches a language model by what it writes, and generate is not there. Add generate: "
     "{prompts: {kind: rows}}, for example; or, of a vLLM server, signals: {kind: topk, k: 20}."),
    (NEWS, [SCORING, "signals={kind: sampled, k: 8}", OWN],
     "signals.kind: sampled needs all that a teacher says, but an API lists its likeliest tokens. Use "
     "signals.kind=topk."),
    (NEWS, [SCORING, "signals={kind: topk, positions: {kind: highest_entropy, share: 0.5}}", OWN],
     "signals.positions.kind: highest_entropy needs all probabilities, but an API lists those of the likeliest "
     "tokens. Use random, or all."),
    (NEWS, [SCORING, TOPK, OWN, "losses=[{kind: forward_kl, temperature: 2}]"],
     "losses[].temperature: 2, but an API says what all unlisted tokens have together at temperature 1 alone. Use 1, "
     "there and in signals.temperatures."),
    (NEWS, [SCORING, "signals={kind: topk_renormalised, temperatures: [1, 3]}", OWN],
     "losses[].temperature: 3, but an API says what all unlisted tokens have together at temperature 1 alone. Use 1, "
     "there and in signals.temperatures."),
    (NEWS, [SCORING, TOPK, OWN, "teacher.api=chat"],
     "teacher.api: chat takes messages, but given text is scored token by token. Use api: completion."),
    (NEWS, [SCORING, TOPK, OWN, "teacher.tokenizer=null"],
     "teacher.tokenizer: is not set, so that nobody knows whether the student numbers tokens like the teacher. Name "
     "the hub id or folder of the teacher's tokenizer."),
    (NEWS, [SCORING, TOPK, OWN, "teacher.batch=true"],
     "teacher.batch: no provider's batch API scores given text. Leave it out."),
    (NEWS, [SCORING, TOPK, OWN, "teacher.budget.partial=true"],
     "teacher.budget.partial: true, but rows of which the teacher says nothing cannot be learned from. Leave it out, "
     "or lower training.steps."),
    # the student
    (INTENT, [RECORDED, "student={kind: layers, keep: even, count: 2}"],
     "student.kind: layers is made from the teacher's model, but teacher.kind=recorded has none here. Use "
     "student.kind=model, or layers of a student.model."),
    (INTENT, [RECORDED, "student={kind: config}"],
     "student.kind: config is made from the teacher's model, but teacher.kind=recorded has none here. Use "
     "student.kind=model, or layers of a student.model."),
    (INTENT, ["student={kind: layers, count: 2}"],
     "student.keep: greedy judges layers by the next token, but task.kind=classification. Use `even`, or list the "
     "layers."),
    (NEWS, ["task={kind: masked_lm}"],
     "student.keep: greedy judges layers by the next token, but task.kind=masked_lm. Use `even`, or list the layers."),
    (NEWS, ["student.architecture=distilbert"],
     "student.architecture: distilbert is an encoder, but task.kind=language_model. Leave it out."),
    # the static student
    (NEWS, [STATIC], "static: is a classifier, but task.kind=language_model. Remove it."),
    (INTENT, ["task={kind: token_classification}", STATIC],
     "static: is a classifier, but task.kind=token_classification. Remove it."),
    (INTENT, [RECORDED, STATIC],
     "static: embeddings are distilled from the teacher's encoder, but teacher.kind=recorded has none here. Remove "
     "static, or use another teacher."),
    (INTENT, [STATIC],
     "signals.kind: online reads the student's tokens, and static has others. Use signals.kind=dense, which keeps the "
     "teacher's answers by text."),
    (INTENT, [STATIC, DENSE, "losses=[{kind: hidden_mse}]"],
     "static: learns from answers alone, and no loss compares them. Add forward_kl, or remove static."),
    (INTENT, ["static={training: {epochs: 1, dropout: 0.0}}", DENSE],
     "static.training.dropout: there is nothing between embeddings and their mean to drop. Leave it out."),
    # what is kept of the teacher
    (NEWS, ["task={kind: masked_lm}", "student.keep=even", DENSE],
     "signals.kind: dense keeps what was said of fixed tokens, but masks are drawn anew in every epoch. Use "
     "signals.kind=online."),
    (INTENT, ["signals={kind: topk}"],
     "signals.kind: topk is for tokens of a vocabulary; an answer to a text is kept whole. Use signals.kind=dense, or "
     "online."),
    (INTENT, [RECORDED, DENSE], "signals.kind: recorded answers are in a file already. Leave signals out."),
    (INTENT, ["signals={kind: dense, positions: {kind: random, share: 0.5}}"],
     "signals.positions: an answer to a text is kept whole. Leave positions out."),
    (NEWS, ["signals={kind: dense, features: true}"],
     "signals.features: is for tasks over texts, but task.kind=language_model. Leave it out."),
    # the training
    (INTENT, ["training={tokens: 1e6}"],
     "training.tokens: counts packed positions, which task.kind=classification has none of. Use epochs."),
    (INTENT, ["teacher={kind: finetune, model: m, training: {tokens: 5}}"],
     "teacher.training.tokens: counts packed positions, which task.kind=classification has none of. Use epochs."),
    (INTENT, [DENSE, "static={training: {tokens: 5}}"],
     "static.training.tokens: counts packed positions, which task.kind=classification has none of. Use epochs."),
    (INTENT, ["training.compile=true"],
     "training.compile: texts have any length, and each would be compiled anew. Leave compile out."),
    # the data
    (INTENT, ["data.max_tokens=1e6"],
     "data.max_tokens: counts packed tokens, which task.kind=classification has none of. Use data.max_documents."),
    (INTENT, ["task={kind: token_classification}", "data.labels_per_class=5"],
     "data.labels_per_class: is for classification, but task.kind=token_classification. Remove it."),
    (INTENT, ["task={kind: token_classification}", "data.noise={}"],
     "data.noise: is for classification, but task.kind=token_classification. Remove it."),
    (INTENT, ["task.multi_label=true", "data.labels_per_class=5"],
     "data.labels_per_class: counts texts of one label, but task.multi_label is true. Remove it."),
    (INTENT, ["data.unlabelled=logs.jsonl", "losses=[{kind: cross_entropy}]"],
     "data.unlabelled: without labels only a teacher can be learned from, but no loss compares with one. Add "
     "forward_kl, or remove unlabelled."),
    *[(NEWS, [f"data.{key}={value}"], f"data.{key}: is for tasks over texts, but task.kind=language_model. Remove it.")
      for key, value in [("text_pair", "b"), ("slice", "a"), ("unlabelled", "x"), ("labels_per_class", 5),
                         ("noise", "{}")]],
    (NEWS, ["evaluation.price={machine_usd_per_hour: 1}"],
     "evaluation.price: is for tasks over texts, but task.kind=language_model. Remove it."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "changes", "words"), REFUSALS, ids=[words.partition(":")[0] for *_, words in REFUSALS]
)
def test_what_does_not_suit_the_task_is_refused_in_one_line(tmp_path, text, changes, words):
    assert refusal(read(tmp_path, text, *changes)) == words


ALLOWED = [
    (INTENT, []),
    (INTENT, [RECORDED]),
    (INTENT, [MIXTURE]),
    (INTENT, [FINETUNE, DENSE, STATIC]),
    (INTENT, ["signals={kind: dense, features: true}", "losses=[{kind: forward_kl}, {kind: hidden_mse}]"]),
    (INTENT, ["task.multi_label=true", "data.noise={}", "data.slice=channel", "data.unlabelled=logs.jsonl"]),
    (INTENT, ["evaluation.price={machine_usd_per_hour: 1}", "training.compile=false"]),
    (INTENT, ["student={kind: layers, keep: [0, 2], architecture: distilbert}"]),
    (INTENT, ["task={kind: embedding}", "losses=[{kind: vector_mse}]", DENSE]),
    (NEWS, ["task={kind: masked_lm}", "student={kind: layers, keep: even, count: 2, architecture: distilbert}"]),
    (NEWS, ["task={kind: masked_lm}", "student={kind: config}", FINETUNE, "teacher.learns=head"]),
    (NEWS, [MIXTURE, "data.max_tokens=1e9", "signals={kind: sampled}"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "changes"), ALLOWED)
def test_what_suits_the_task_is_not_refused(tmp_path, text, changes):
    recipe = read(tmp_path, text, *changes)
    suitability.check_task(recipe)
    check_losses(recipe)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_suits_its_task(name):
    recipe = load_recipe(name)
    suitability.check_task(recipe)
    check_losses(recipe)


def test_a_student_that_an_earlier_phase_makes_is_judged_there(tmp_path):
    """The recipe's own task would refuse a greedy choice of layers; the first phase, which makes it, does not."""
    phase = "phases=[{name: general, task: {kind: language_model}, training: {steps: 5}}]"
    recipe = read(tmp_path, INTENT, "student={kind: layers, count: 2}", phase)
    suitability.check_task(recipe)
    suitability.check_task(phases_of(recipe)[0])


def test_a_static_classifier_of_pairs_is_refused_where_there_are_phases_too(tmp_path):
    phase = "phases=[{name: general, task: {kind: masked_lm}, data: {source: words.jsonl}, signals: {kind: online}}]"
    recipe = read(tmp_path, INTENT, STATIC, DENSE, "data.text_pair=second", phase)
    assert refusal(recipe) == "static: reads one text, but data.text_pair names a second one. Remove static."


def test_what_queries_cost_is_no_matter_of_a_phase_that_has_none(tmp_path):
    phase = "phases=[{name: general, task: {kind: masked_lm}}, {name: more, losses: [{kind: reverse_kl}]}]"
    recipe = read(tmp_path, INTENT, "evaluation.price={machine_usd_per_hour: 1}", phase)
    general, more = phases_of(recipe)
    suitability.check_task(general)
    assert (general.evaluation.price, more.evaluation.price) == (None, recipe.evaluation.price)
    said = read(tmp_path, INTENT, phase, "phases[0].evaluation={price: {machine_usd_per_hour: 1}}")
    assert refusal(phases_of(said)[0]).startswith("evaluation.price: is for tasks over texts")


def test_an_assistant_of_another_task_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assistant.yaml").write_text(NEWS, encoding="utf-8")
    recipe = read(tmp_path, INTENT, "teacher={kind: run, recipe: assistant.yaml}")
    assert refusal(recipe) == (
        "teacher.recipe: news has task.kind=language_model, this recipe classification. Give both the same task."
    )
