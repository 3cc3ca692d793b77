"""What a recipe says about its losses is what the objective does; and what the teacher lacks is refused by name."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
import torch
from transformers import BertConfig, DistilBertConfig, LlamaConfig

from potstill.errors import RecipeError
from potstill.losses import (
    DIVERGENCES,
    AttentionLoss,
    HeadLoss,
    HeadTerm,
    HiddenLoss,
    Objective,
    PooledLoss,
    SimilarityLoss,
    VectorsLoss,
)
from potstill.pipeline import objective as room
from potstill.pipeline.objective import Answers, build_examiner, build_objective, check_losses, terms_of, wants_of
from potstill.recipes import Recipe, load_recipe
from potstill.recipes.losses import LossTerm, SimilarityTerm, VectorTerm, VocabularyTerm
from potstill.types import IGNORE, Batch, Head, Lesson, Logits, Offer, Signal, States, StudentView, Wants

SIZES = {"num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
STUDENT = LlamaConfig(num_hidden_layers=2, hidden_size=4, **SIZES)
TEACHER = LlamaConfig(num_hidden_layers=4, hidden_size=6, **SIZES)
WORDS = Answers(16)
CLASSES = Answers(3, causal=False, everywhere=False)
KINDS = {get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(LossTerm)[0])}
NEEDED = {"alpha_beta": ", alpha: 0.7, beta: 0.4", "minilm_v2": ", relation_heads: 2"}
ROOMS = {
    "hidden": HiddenLoss, "attention": AttentionLoss, "minilm": VectorsLoss, "rkd": SimilarityLoss,
    "gram": SimilarityLoss, "linear": SimilarityLoss, "vector": PooledLoss,
}  # fmt: skip


def terms(losses: str) -> list[Any]:
    return load_recipe("quickstart", [f"losses={losses}"]).losses


def objective(losses: str, answers: Answers = WORDS, student: Any = STUDENT, teacher: Any = TEACHER) -> Objective:
    return build_objective(terms(losses), answers, student, teacher)


def head_terms(losses: str) -> tuple[HeadTerm, ...]:
    (loss,) = objective(losses).losses
    return loss.terms


def over_texts(tmp_path, *changes: str, losses: str = "[{kind: forward_kl}, {kind: cross_entropy}]") -> Recipe:
    (tmp_path / "recipe.yaml").write_text(
        "name: intent\ntask: {kind: classification}\ndata: {source: q.jsonl}\nteacher: {kind: local, model: big}\n"
        f"student: {{kind: model, model: small}}\nlosses: {losses}\ntraining: {{epochs: 1}}\n",
        encoding="utf-8",
    )
    return load_recipe(tmp_path / "recipe.yaml", changes)


# ------------------------------------------------------------------------------------------------------ what is built


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_loss_can_be_built_and_asks_for_what_it_said(kind):
    (term,) = terms(f"[{{kind: {kind}, weight: 0.5{NEEDED.get(kind, '')}}}]")
    built = build_objective([term], WORDS, STUDENT, TEACHER)
    (loss,) = built.losses
    assert built.needs == (frozenset() if term.needs is None else {Offer(term.needs)})
    if issubclass(KINDS[kind], VocabularyTerm):
        assert loss.terms == (HeadTerm(kind, 0.5, settings=term.settings),)
    else:
        assert (type(loss), loss.kind, loss.weight) == (ROOMS[kind.split("_")[0]], kind, 0.5)


def test_recipes_and_formulas_know_the_same_divergences_with_the_same_settings():
    over_vocabulary = {kind for kind, model in KINDS.items() if issubclass(model, VocabularyTerm)}
    assert over_vocabulary == {*DIVERGENCES, "cross_entropy"}
    for kind in DIVERGENCES:
        (term,) = terms(f"[{{kind: {kind}{NEEDED.get(kind, '')}}}]")
        taken = inspect.signature(DIVERGENCES[kind]).parameters.values()
        settings = {one.name: one.default for one in taken if one.kind is one.KEYWORD_ONLY}
        assert set(term.settings) == set(settings), kind
        for name, default in settings.items():
            assert default in (term.settings[name], inspect.Parameter.empty), (kind, name)


def test_settings_temperatures_and_flags_arrive():
    losses = "[{kind: skew_forward_kl, alpha: 0.3, temperature: 2, weight: 0.7, times_temperature_squared: false},"
    losses += " {kind: cross_entropy, label_smoothing: 0.1}]"
    assert head_terms(losses) == (
        HeadTerm("skew_forward_kl", 0.7, 2.0, False, {"alpha": 0.3}),
        HeadTerm("cross_entropy", settings={"label_smoothing": 0.1}),
    )


def test_what_moves_in_a_recipe_moves_in_the_objective():
    built = objective(
        "[{kind: jsd, weight: {kind: linear, start: 0, end: 0.8}, temperature: {kind: cosine, start: 3, end: 1}},"
        " {kind: cross_entropy, weight: {kind: constant, value: 0.4}},"
        " {kind: hidden_mse, weight: {kind: linear, start: 2, end: 0}},"
        " {kind: minilm, weight: {kind: cosine, start: 1, end: 0}}]"
    )
    assert built.scheduled(0.0) == {
        "weight_jsd": 0.0, "temperature_jsd": 3.0, "weight_hidden_mse": 2.0, "weight_minilm": 1.0,
    }  # fmt: skip
    half = {"weight_jsd": 0.4, "temperature_jsd": 2.0, "weight_hidden_mse": 1.0, "weight_minilm": 0.5}
    assert built.scheduled(0.5) == pytest.approx(half)
    assert [term.weight for term in built.losses[0].terms] == [1.0, 0.4]


def test_a_loss_that_starts_at_weight_0_asks_the_teacher_from_the_start():
    built = objective("[{kind: cross_entropy}, {kind: forward_kl, weight: {kind: linear, start: 0, end: 1}}]")
    assert wants_of(built).final


def test_a_recipe_of_all_divergences_gives_one_pass_and_a_finite_loss():
    every = ", ".join(f"{{kind: {kind}{NEEDED.get(kind, '')}, temperature: 2}}" for kind in DIVERGENCES)
    built = objective(f"[{every}, {{kind: cross_entropy}}]")
    assert [type(loss) for loss in built.losses] == [HeadLoss]
    torch.manual_seed(0)
    batch = Batch(torch.randint(16, (2, 5)), torch.randint(16, (2, 5)), torch.ones(2, 5, dtype=torch.long))
    student = StudentView(torch.randn(10, 4, requires_grad=True), Head(torch.randn(18, 4)))
    lesson = Lesson(batch, Signal(States(torch.randn(10, 6), Head(torch.randn(16, 6)))))
    share, parts = built(student, lesson, built.counts([batch]))
    assert list(parts) == [*DIVERGENCES, "cross_entropy"]
    assert all(value > 0.0 for value in parts.values())
    factors = {name: 1.0 if name == "cross_entropy" else 4.0 for name in parts}
    assert float(share.detach()) == pytest.approx(sum(factors[name] * float(parts[name]) for name in parts), rel=1e-5)


def test_where_teacher_and_labels_speak_at_other_answers_each_has_a_count_of_its_own():
    built = objective("[{kind: forward_kl, weight: 0.9}, {kind: cross_entropy, weight: 0.1}]", CLASSES)
    assert [[term.name for term in loss.terms] for loss in built.losses] == [["forward_kl"], ["cross_entropy"]]
    assert [type(loss) for loss in objective("[{kind: forward_kl}]", CLASSES).losses] == [HeadLoss]


def texts(targets: list[int], *, labels_BC: torch.Tensor | None = None) -> Batch:
    rows = len(targets)
    targets_BT = torch.full((rows, 2), IGNORE)
    targets_BT[:, 0] = torch.tensor(targets)
    taught_BT = torch.zeros(rows, 2, dtype=torch.bool)
    taught_BT[:, 0] = True
    ones_BT = torch.ones(rows, 2, dtype=torch.long)
    return Batch(ones_BT, targets_BT, ones_BT, taught_BT=taught_BT, labels_BC=labels_BC)


def test_soft_answers_count_every_text_and_hard_labels_the_labelled_ones():
    built = objective("[{kind: forward_kl}, {kind: cross_entropy}]", CLASSES)
    assert built.counts([texts([2, IGNORE, 0])]).tolist() == [3.0, 2.0]


def test_of_several_labels_every_label_is_an_answer_of_its_own():
    """KL of Bernoullis by hand: p log(p / q) + (1 - p) log((1 - p) / (1 - q)), the mean over texts and labels."""
    built = objective("[{kind: forward_kl}]", Answers(3, causal=False, everywhere=False, binary=True))
    torch.manual_seed(0)
    student_NC, teacher_NC = torch.randn(2, 3), torch.randn(2, 3)
    batch = texts([1, IGNORE], labels_BC=torch.tensor([[1, 0, 0], [IGNORE] * 3]))
    share, _ = built(StudentView(student_NC, None), Lesson(batch, Signal(Logits(teacher_NC))), built.counts([batch]))
    p, q = teacher_NC.double().sigmoid(), student_NC.double().sigmoid()
    by_hand = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert float(share) == pytest.approx(float(by_hand), rel=1e-5)


def test_the_control_arm_learns_hard_labels_whatever_the_losses():
    recipe = load_recipe("quickstart", ["losses=[{kind: forward_kl}, {kind: hidden_mse}]"])
    assert [term.kind for term in terms_of(recipe, "control")] == ["cross_entropy"]
    assert terms_of(recipe, "student") == recipe.losses


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("{kind: classification}", Answers(5, causal=False, everywhere=False)),
        ("{kind: classification, multi_label: true}", Answers(5, causal=False, everywhere=False, binary=True)),
        ("{kind: token_classification}", Answers(5, causal=False, everywhere=False)),
        ("{kind: embedding}", Answers(5, causal=False, everywhere=False, vectors=True)),
        ("{kind: masked_lm}", Answers(5, causal=False, everywhere=False)),
        ("{kind: language_model}", Answers(5)),
    ],
)
def test_the_task_decides_what_answers_are(tmp_path, task, expected):
    assert Answers.of(over_texts(tmp_path, f"task={task}"), 5) == expected


# ------------------------------------------------------------------------------------------------------------- layers

MAPPED = {
    "hidden_mse": "layers", "hidden_cosine": "layers", "gram_mse": "layers", "linear_cka": "layers",
    "attention_mse": "attentions", "attention_kl": "attentions", "minilm": "vectors", "minilm_v2": "vectors",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "part"), MAPPED.items())
@pytest.mark.parametrize(
    ("layers", "student", "teacher"),
    [("last", (2,), (4,)), ("even", (1, 2), (2, 4)), ("{1: 1, 2: 3}", (1, 2), (1, 3)), ("{2: 1}", (2,), (1,))],
)
def test_a_layer_map_decides_what_is_read_of_both(kind, part, layers, student, teacher):
    built = objective(f"[{{kind: {kind}, layers: {layers}{NEEDED.get(kind, '')}}}]")
    asked, its = built.wants()
    assert getattr(asked, part) == student
    assert getattr(its, part) == teacher
    assert its == Wants(**{part: teacher})


def test_the_embeddings_output_is_a_layer_of_states_and_no_block():
    assert wants_of(objective("[{kind: hidden_mse, layers: {0: 0}}]")).layers == (0,)
    for kind in ("attention_kl", "minilm"):
        with pytest.raises(RecipeError) as caught:
            objective(f"[{{kind: {kind}, layers: {{0: 1}}}}]")
        assert str(caught.value) == (
            "losses[0].layers: {0: 1}, but the student has layers 1..2 (the embeddings have no attention). Use a layer "
            "in that range."
        )


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("{3: 1}", r"losses\[1\]\.layers: \{3: 1\}, but the student has layers 0\.\.2 \(0 is the embeddings' output\)"),
        ("{2: 5}", r"losses\[1\]\.layers: \{2: 5\}, but the teacher has layers 0\.\.4 "),
    ],
)
def test_a_layer_that_a_model_does_not_have_is_refused_by_name(layers, words):
    with pytest.raises(RecipeError, match=words):
        objective(f"[{{kind: cross_entropy}}, {{kind: hidden_cosine, layers: {layers}}}]")


@pytest.mark.parametrize("kind", ["hidden_mse", "minilm"])
def test_a_student_deeper_than_its_teacher_is_matched_evenly_too(kind):
    """Blocks nearest to the embeddings' output learn from it; of attention, from the first block."""
    _, its = objective(f"[{{kind: {kind}, layers: even}}]", student=TEACHER, teacher=STUDENT).wants()
    assert (its.layers, its.vectors) == (((0, 1, 2), ()) if kind == "hidden_mse" else ((), (1, 2)))


def test_widths_that_differ_get_projections_and_equal_ones_none():
    (lifted,) = objective("[{kind: hidden_mse, layers: even}]").losses
    assert {name: tuple(one.weight.shape) for name, one in lifted.projections.items()} == {"1": (6, 4), "2": (6, 4)}
    (equal,) = objective("[{kind: hidden_mse, layers: even}]", teacher=STUDENT).losses
    assert list(equal.parameters()) == []


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ("[{kind: minilm}]",
         "losses[0].kind=minilm compares head by head, but the student has 2 heads and the teacher 3. Use minilm_v2, "
         "or a student with as many heads."),
        ("[{kind: attention_mse}]",
         "losses[0].kind=attention_mse compares head by head, but the student has 2 heads and the teacher 3. Use "
         "losses[0].heads=averaged, or a student with as many heads."),
        ("[{kind: minilm_v2}]",
         "losses[0].relation_heads: 12 does not divide the widths of queries and keys, 4 and 4 in the student, 6 and 2 "
         "in the teacher. Use a divisor of 2."),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused_before_any_weight_is_loaded(losses, words):
    teacher = LlamaConfig(
        num_hidden_layers=4, hidden_size=6, intermediate_size=8, num_attention_heads=3, num_key_value_heads=1
    )
    with pytest.raises(RecipeError) as caught:
        objective(losses, teacher=teacher)
    assert str(caught.value) == words


def test_heads_may_differ_where_maps_are_averaged_or_split_anew():
    teacher = BertConfig(num_hidden_layers=4, hidden_size=12, num_attention_heads=6)
    student = DistilBertConfig(n_layers=2, dim=12, n_heads=3)
    built = objective(
        "[{kind: attention_kl, heads: averaged}, {kind: minilm_v2}]", CLASSES, student=student, teacher=teacher
    )
    assert built.wants()[0] == Wants(final=True, attentions=(2,), vectors=(2,))


# ----------------------------------------------------------------------------------------------------------- examiner


def test_validation_asks_every_arm_the_same():
    (alike,) = build_examiner(WORDS, STUDENT, TEACHER).losses
    assert alike.terms == (HeadTerm("forward_kl"), HeadTerm("cross_entropy"))
    apart = build_examiner(CLASSES, None, None).losses
    assert [loss.terms for loss in apart] == [(HeadTerm("forward_kl"),), (HeadTerm("cross_entropy"),)]
    binary = build_examiner(Answers(3, causal=False, everywhere=False, binary=True), None, None).losses
    assert all(loss.binary for loss in binary)


@pytest.mark.parametrize(("teacher", "kind"), [(STUDENT, "vector_cosine"), (TEACHER, "rkd_distance")])
def test_vectors_are_examined_without_a_projection_that_nobody_trained(teacher, kind):
    examiner = build_examiner(Answers(4, causal=False, everywhere=False, vectors=True), STUDENT, teacher)
    assert [loss.kind for loss in examiner.losses] == [kind]
    assert list(examiner.parameters()) == []
    assert wants_of(examiner) == Wants(pooled=True)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("kind", "need"), [("total_variation", "LOGITS"), ("vector_mse", "POOLED")])
def test_a_teacher_that_cannot_offer_what_a_loss_needs_is_refused_by_name(monkeypatch, kind, need):
    monkeypatch.setattr(room.LocalEngine, "offers", frozenset({Offer.TEXT}))
    recipe = load_recipe("quickstart", [f"losses=[{{kind: cross_entropy}}, {{kind: {kind}}}]"])
    words = (
        rf"^losses\[1\].kind={kind} needs {need}, but teacher.kind=local offers ATTENTION, HIDDEN, TEXT, VECTORS. "
        "Remove this loss, or use another"
    )
    with pytest.raises(RecipeError, match=words):
        check_losses(recipe)
    check_losses(load_recipe("quickstart", ["losses=[{kind: cross_entropy}]"]))


BEHIND = [kind for kind, model in KINDS.items() if not issubclass(model, VocabularyTerm)]


@pytest.mark.parametrize("kind", BEHIND)
def test_recorded_answers_have_nothing_behind_them(tmp_path, kind):
    losses = f"[{{kind: forward_kl}}, {{kind: {kind}{NEEDED.get(kind, '')}}}]"
    recipe = over_texts(tmp_path, "teacher={kind: recorded, path: said.csv, label: a}", losses=losses)
    need = KINDS[kind].needs.upper()
    with pytest.raises(RecipeError, match=rf"^losses\[1\].kind={kind} needs {need}, but teacher.kind=recorded offers"):
        check_losses(recipe)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BEHIND])
def test_vectors_have_no_probabilities_to_compare(tmp_path, kind):
    losses = f"[{{kind: {kind}{NEEDED.get(kind, '')}}}]"
    recipe = over_texts(tmp_path, "task={kind: embedding}", losses=losses)
    with pytest.raises(RecipeError, match=rf"^losses\[0\].kind={kind} "):
        check_losses(recipe)


@pytest.mark.parametrize(
    "kind", [kind for kind, model in KINDS.items() if issubclass(model, SimilarityTerm | VectorTerm)]
)
def test_whole_texts_are_compared_only_where_there_are_texts(tmp_path, kind):
    over = ", over: texts" if issubclass(KINDS[kind], SimilarityTerm) else ""
    losses = f"[{{kind: {kind}{over}}}]"
    check_losses(over_texts(tmp_path, losses=losses))
    for task in ("language_model", "masked_lm"):
        with pytest.raises(RecipeError, match=rf"^losses\[0\].kind={kind} (needs POOLED|compares the vectors)"):
            check_losses(over_texts(tmp_path, f"task={{kind: {task}}}", losses=losses))


def test_texts_are_compared_without_layers():
    built = objective("[{kind: gram_mse, over: texts}]", CLASSES)
    assert built.wants() == (Wants(final=True, pooled=True), Wants(pooled=True))
