"""Every divergence, one's own, and every form of a teacher through the chunked loss, against dense autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.losses import DIVERGENCES, HeadTerm, blocks, chunked, cross_entropy, distillation_loss, position_scores
from potstill.types import Head, LossSum, Mixture, SparseLogits, States, TeacherLogits

EXACTLY: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
SETTINGS = {"alpha_beta": {"alpha": 0.4, "beta": 0.7}, "jsd": {"beta": 0.2}, "adaptive_kl": {"mu": 0.6}}
V = 13

every_divergence = pytest.mark.parametrize("kind", list(DIVERGENCES))


def term_of(kind: str, *numbers: float) -> HeadTerm:
    return HeadTerm(kind, *numbers, settings=SETTINGS.get(kind, {}))


def make_states(rows: int = 7, width: int = 4, *, learned: bool = False, seed: int = 0) -> States:
    generator = torch.Generator().manual_seed(seed)
    rows_ND, weight_VD = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, V))
    head = Head(weight_VD.requires_grad_(learned), scale=0.7, softcap=9.0)
    return States(rows_ND.requires_grad_(learned), head)


def dense(states: States) -> Tensor:
    raw_NV = states.rows_ND @ states.head.weight_VD.T * states.head.scale
    return raw_NV if states.head.softcap is None else states.head.softcap * (raw_NV / states.head.softcap).tanh()


def gradients(student: States, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, [student.rows_ND, student.head.weight_VD]))


def chunked_loss(student: States, terms: list[HeadTerm], teacher: TeacherLogits, **more: Any) -> LossSum:
    targets_N = torch.arange(len(student.rows_ND)) % V
    return distillation_loss(student, targets_N, terms, teacher=teacher, compiled=False, **more)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(blocks.CHUNK_BYTES, "cpu", 3 * V * 8)
    monkeypatch.setitem(blocks.TILE_BYTES, "cpu", 2 * V * 8)
    monkeypatch.setattr(blocks, "TILE_ROWS", 1)


# ----------------------------------------------------------------------------------------------------- all divergences


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_divergence_is_that_of_dense_logits(kind, temperature):
    student, teacher = make_states(learned=True), make_states(width=3, seed=1)
    term = term_of(kind, 0.6, temperature)
    result = chunked_loss(student, [term], teacher)
    values_N = DIVERGENCES[kind](dense(student), dense(teacher), temperature, **term.settings)
    expected = 0.6 * temperature**2 * values_N.sum()
    assert_close(result.total, expected, **EXACTLY)
    assert_close(result.terms[kind], values_N.sum().detach(), **EXACTLY)
    assert_close(gradients(student, result.total), gradients(student, expected), **EXACTLY)


def test_all_terms_share_one_pass_over_the_same_logits(watch):
    terms = [term_of(kind, 0.1 + i, 1.0 + i % 3) for i, kind in enumerate(DIVERGENCES)]
    terms.append(HeadTerm("cross_entropy", 0.3, settings={"label_smoothing": 0.1}))
    student, teacher = make_states(learned=True), make_states(width=3, seed=1)
    alone = [chunked_loss(student, [term], teacher).total for term in terms]
    expected = torch.stack(alone).sum()
    with watch:
        together = chunked_loss(student, terms, teacher)
    chunks = 3
    assert (watch.operations["mm"], watch.operations["addmm"]) == (3 * chunks + 1, chunks - 1)
    assert_close(together.total, expected, **EXACTLY)
    assert_close(gradients(student, together.total), gradients(student, expected), **EXACTLY)


@every_divergence
def test_at_equality_the_loss_and_its_gradient_are_zero(kind):
    student = make_states(learned=True)
    result = chunked_loss(student, [term_of(kind)], States(student.rows_ND.detach(), student.head))
    assert_close(result.total, torch.zeros_like(result.total), rtol=0.0, atol=1e-13)
    for gradient in gradients(student, result.total):
        assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-13)


@every_divergence
def test_zero_rows_give_zero_with_a_graph(kind):
    student, teacher = make_states(0, learned=True), make_states(0, seed=1)
    result = chunked_loss(student, [term_of(kind)], teacher)
    result.total.backward()
    assert (result.total.item(), result.count) == (0.0, 0)
    assert torch.equal(student.head.weight_VD.grad, torch.zeros(V, 4, dtype=torch.float64))


@every_divergence
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(kind, size):
    student = States(torch.tensor([[size], [1.0]]).requires_grad_(), Head(torch.linspace(-1, 1, V)[:, None]))
    student.head.weight_VD.requires_grad_()
    teacher = States(torch.tensor([[-size], [size]]), Head(torch.linspace(-1, 1, V)[:, None]))
    result = chunked_loss(student, [term_of(kind)], teacher)
    assert torch.isfinite(result.total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(student, result.total))


@every_divergence
def test_padding_ids_at_minus_infinity_change_nothing(kind):
    plain, teacher = make_states(learned=True), make_states(seed=1)

    def padded(states: States) -> States:
        rows_ND, head = states.rows_ND, states.head
        bias_V = torch.tensor([0.0] * V + [-math.inf] * 2, dtype=torch.float64)
        weight_VD = torch.cat([head.weight_VD, torch.ones(2, rows_ND.shape[1], dtype=torch.float64)])
        return States(rows_ND, Head(weight_VD, bias_V, head.scale))

    student, teacher = (replace(states, head=replace(states.head, softcap=None)) for states in (plain, teacher))
    expected = chunked_loss(student, [term_of(kind)], teacher)
    found = chunked_loss(padded(student), [term_of(kind)], padded(teacher))
    assert_close(found.total, expected.total, **EXACTLY)
    assert_close(gradients(plain, found.total), gradients(plain, expected.total), **EXACTLY)


def my_divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: Any = 1.0, *, power: float = 2.0) -> Tensor:
    return ((student_NV / temperature).softmax(-1) - (teacher_NV / temperature).softmax(-1)).abs().pow(power).sum(-1)


def test_a_divergence_of_one_s_own_is_one_plain_function():
    student, teacher = make_states(learned=True), make_states(seed=1)
    term = HeadTerm(my_divergence, 0.5, 2.0, settings={"power": 3.0})
    result = chunked_loss(student, [term, HeadTerm("forward_kl")], teacher)
    values_N = my_divergence(dense(student), dense(teacher), 2.0, power=3.0)
    plain = 0.5 * 4.0 * values_N.sum() + DIVERGENCES["forward_kl"](dense(student), dense(teacher)).sum()
    assert_close(result.total, plain, **EXACTLY)
    assert_close(result.terms["my_divergence"], values_N.sum().detach(), **EXACTLY)
    assert_close(gradients(student, result.total), gradients(student, plain), **EXACTLY)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: HeadTerm("forwardkl"), r"forwardkl is not a known divergence: use one of cross_entropy, forward_kl"),
        (lambda: HeadTerm("jsd", temperature=0.0), r"jsd: temperature 0\.0 must be a number above 0"),
        (lambda: HeadTerm("jsd", temperature=math.inf), r"temperature inf must be"),
        (lambda: HeadTerm("jsd", math.nan), r"jsd: weight nan must be a finite number"),
        (lambda: HeadTerm("jsd", settings={"beta": 1.5}), r"jsd: got beta=1\.5, needs 0 <= beta <= 1"),
        (lambda: HeadTerm("jsd", settings={"alpha": 0.5}), r"jsd: settings \{'alpha': 0\.5\} do not fit"),
        (lambda: HeadTerm("alpha_beta", settings={"alpha": 0.5}), r"alpha_beta: settings .*missing .*beta"),
        (lambda: HeadTerm("cross_entropy", settings={"label_smoothing": 1.0}), r"cross_entropy: got label_smoothing"),
        (lambda: HeadTerm(lambda s, t: s.sum(-1)), r"do not fit .*Needs \(student_logits_NV"),
        (lambda: HeadTerm(Unhashable()), r"unhashable.*to be hashable"),
        (lambda: HeadTerm(lambda s, t, temperature: s, settings={"temperature": 2.0}), r"multiple values"),
    ],
)
def test_a_term_that_could_not_be_computed_is_refused_at_once(make, text):
    with pytest.raises(ValueError, match=text):
        make()


class Unhashable:
    __hash__ = None

    def __call__(self, student_NV: Tensor, teacher_NV: Tensor, temperature: Any) -> Tensor:
        return student_NV.sum(-1)


@pytest.mark.parametrize("shape", ["all", "mean"])
def test_one_s_own_function_must_give_a_value_a_row(shape):
    def wrong(student_NV: Tensor, teacher_NV: Tensor, temperature: Any) -> Tensor:
        return student_NV.sum() if shape == "all" else student_NV.mean().reshape(1)

    with pytest.raises(ValueError, match=r"wrong gave .* for logits \(2, 13\): needs one value a row"):
        chunked_loss(make_states(), [HeadTerm(wrong)], make_states(seed=1))


def test_one_s_own_function_may_know_the_vocabulary():
    by_token_V = torch.linspace(0.5, 1.5, V, dtype=torch.float64)

    def weighted(student_NV: Tensor, teacher_NV: Tensor, temperature: Any) -> Tensor:
        return ((student_NV - teacher_NV).square() * by_token_V).topk(5).values.sum(-1)

    student, teacher = make_states(learned=True), make_states(seed=1)
    result, plain = chunked_loss(student, [HeadTerm(weighted)], teacher), weighted(dense(student), dense(teacher), 1.0)
    assert_close(gradients(student, result.total), gradients(student, plain.sum()), **EXACTLY)


def test_a_divergence_of_ours_may_be_given_as_the_function_that_it_is():
    assert HeadTerm(DIVERGENCES["jsd"], settings={"beta": 0.1}) == HeadTerm("jsd", settings={"beta": 0.1})
    assert not HeadTerm(cross_entropy).needs_teacher


# --------------------------------------------------------------------------------------------------- weights of rows


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=7, max_size=7))
def test_a_row_counts_as_often_as_its_weight_says(weights):
    student, teacher = make_states(learned=True), make_states(seed=1)
    weights_N = torch.tensor(weights)
    terms = [HeadTerm("forward_kl", 0.5, 2.0), HeadTerm("cross_entropy", 0.25)]
    whole = chunked_loss(student, terms, teacher, weights_N=weights_N)
    parts = []
    for row, weight in enumerate(weights):
        one = States(student.rows_ND[row : row + 1], student.head)
        other = States(teacher.rows_ND[row : row + 1], teacher.head)
        loss = distillation_loss(one, torch.tensor([row]), terms, teacher=other, compiled=False)
        parts.append(weight * loss.total)
    assert whole.count == 7
    assert_close(whole.total, torch.stack(parts).sum(), **EXACTLY)
    assert_close(gradients(student, whole.total), gradients(student, torch.stack(parts).sum()), **EXACTLY)


@pytest.mark.parametrize(
    ("weights_N", "text"),
    [
        (torch.ones(6), r"weights_N \(6,\) does not fit the student's 7 rows"),
        (torch.ones(7, requires_grad=True), r"finite and constant"),
        (torch.full((7,), math.nan), r"finite and constant"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights_N, text):
    with pytest.raises(ValueError, match=text):
        chunked_loss(make_states(), [HeadTerm("cross_entropy")], make_states(), weights_N=weights_N)


@pytest.mark.parametrize("kind", ["reverse_kl", "symmetric_kl", "adaptive_kl"])
@pytest.mark.parametrize("muted", ["rows", "term"])
def test_what_has_no_weight_does_no_harm_where_it_is_infinite(kind, muted):
    student, teacher = make_states(learned=True), make_states(seed=1)
    bias_V = torch.tensor([-math.inf] + [0.0] * (V - 1), dtype=torch.float64)
    teacher = States(teacher.rows_ND, Head(teacher.head.weight_VD, bias_V))
    terms = [HeadTerm(kind, 0.0 if muted == "term" else 1.0), HeadTerm("cross_entropy")]
    weights_N = torch.zeros(7, dtype=torch.float64) if muted == "rows" else None
    result = chunked_loss(student, terms, teacher, weights_N=weights_N)
    alone = chunked_loss(student, terms[1:], None, weights_N=weights_N)
    assert_close(result.total, alone.total, **EXACTLY)
    assert_close(gradients(student, result.total), gradients(student, alone.total), **EXACTLY)


# -------------------------------------------------------------------------------------------- what moves in a training


def test_other_weights_and_temperatures_share_a_kernel():
    kernels = {
        chunked._Job(None, None, (HeadTerm("jsd", weight, temperature),), None, None, False).kernel(
            None, with_gradient=True, in_place=True
        )
        for weight, temperature in ((1.0, 2.0), (0.3, 3.7), (0.0, 0.5))
    }
    assert len(kernels) == 1


# -------------------------------------------------------------------------------------------------- heads that are made


def test_a_head_that_is_a_function_of_others_passes_its_gradient_on():
    teacher, student = make_states(seed=1), make_states()
    a_RD, b_VR = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4), (V, 2)))

    def adapted() -> States:
        return States(student.rows_ND, replace(student.head, weight_VD=student.head.weight_VD + 0.5 * b_VR @ a_RD))

    found = torch.autograd.grad(chunked_loss(adapted(), [HeadTerm("forward_kl")], teacher).total, [a_RD, b_VR])
    plain = DIVERGENCES["forward_kl"](dense(adapted()), dense(teacher)).sum()
    assert_close(found, torch.autograd.grad(plain, [a_RD, b_VR]), **EXACTLY)


def test_a_part_of_a_head_is_refused():
    class Shard(Tensor):
        def full_tensor(self) -> Tensor:
            return self

    student = make_states()
    sharded = replace(student, head=replace(student.head, weight_VD=student.head.weight_VD.as_subclass(Shard)))
    for first, second, role in ((sharded, student, "student"), (student, sharded, "teacher")):
        with pytest.raises(ValueError, match=rf"the {role}'s head is a DTensor.*full_tensor"):
            chunked_loss(first, [HeadTerm("forward_kl")], second)


# ---------------------------------------------------------------------------------------------------- several teachers


def make_mixture(rows: int = 7, members: int = 3) -> Mixture:
    weights_NM = torch.rand(rows, members, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights_NM[0] = torch.tensor([1.0] + [0.0] * (members - 1))
    states = tuple(make_states(rows, 2 + i, seed=10 + i) for i in range(members))
    return Mixture(states, weights_NM / weights_NM.sum(-1, keepdim=True))


def mixed_probabilities(mixture: Mixture, temperature: float) -> Tensor:
    softened = [(dense(member) / temperature).softmax(-1) for member in mixture.members]
    return sum(w_N[:, None] * p_NV for w_N, p_NV in zip(mixture.weights_NM.T, softened, strict=True))


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_several_teachers_are_the_mean_of_their_probabilities(kind, temperature):
    student, mixture, term = make_states(learned=True), make_mixture(), term_of(kind, 1.0, temperature)
    result = chunked_loss(student, [term], mixture)
    log_p_NV = mixed_probabilities(mixture, temperature).log()
    function = DIVERGENCES[kind]
    values_N = function(dense(student) / temperature, log_p_NV, **term.settings)
    assert_close(result.total, temperature**2 * values_N.sum(), **EXACTLY)
    assert_close(gradients(student, result.total), gradients(student, temperature**2 * values_N.sum()), **EXACTLY)


def test_several_teachers_are_scored_against_as_one():
    student, mixture, targets_N = make_states(), make_mixture(), torch.arange(7)
    scores = position_scores(student, mixture, targets_N)
    p_NV, log_q_NV = mixed_probabilities(mixture, 1.0), dense(student).log_softmax(-1)
    assert_close(scores["kl_to_teacher"], (p_NV * (p_NV.log() - log_q_NV)).sum(-1), **EXACTLY)
    assert_close(scores["agreement"], (p_NV.argmax(-1) == log_q_NV.argmax(-1)).double())
    assert_close(scores["nll"], -log_q_NV.gather(-1, targets_N[:, None])[:, 0], **EXACTLY)


def test_confidence_is_the_largest_probability_and_correct_says_whether_that_token_came():
    student, teacher = make_states(), make_states(seed=5)
    q_NV = dense(student).softmax(-1)
    targets_N = torch.where(torch.arange(7) % 2 == 0, q_NV.argmax(-1), q_NV.argmin(-1))
    scores = position_scores(student, teacher, targets_N)
    assert_close(scores["confidence"], q_NV.amax(-1), **EXACTLY)
    assert scores["correct"].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert_close(scores["confidence"][::2], (-scores["nll"][::2]).exp(), **EXACTLY)


def test_a_mixture_is_as_sure_as_the_mean_of_its_members():
    mixture, targets_N = make_mixture(), torch.arange(7)
    scores = position_scores(mixture, mixture, targets_N)
    p_NV = mixed_probabilities(mixture, 1.0)
    assert_close(scores["confidence"], p_NV.amax(-1), **EXACTLY)
    assert_close(scores["correct"], (p_NV.argmax(-1) == targets_N).double())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: replace(m, weights_NM=m.weights_NM[:, :2]),
            r"weights_NM \(7, 2\) does not fit 7 rows and 3 teachers",
        ),
        (lambda m: replace(m, weights_NM=2 * m.weights_NM), r"must sum to 1 in every row"),
        (lambda m: replace(m, weights_NM=m.weights_NM - 1.0 + 2.0 / 3.0), r"must not be negative"),
        (
            lambda m: replace(m, members=(m.members[0], m.members[1].sliced(9), m.members[2])),
            r"teacher's member 1 have 13 and 9",
        ),
        (lambda m: replace(m, members=()), r"0 teachers"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        chunked_loss(make_states(), [HeadTerm("forward_kl")], change(make_mixture()))


# ------------------------------------------------------------------------------------------------------ sparse teachers


def listed(teacher: States, k: int, *, tail: bool = True, temperature: float = 1.0) -> SparseLogits:
    """The k most probable tokens; without a tail they are renormalised, as a sampled teacher's sum to 1."""
    log_p_NV = (dense(teacher) / temperature).log_softmax(-1)
    top = log_p_NV.topk(k)
    if not tail:
        return SparseLogits(top.indices, top.values.log_softmax(-1), None, temperature)
    rest_N = (1 - top.values.exp().sum(-1)).clamp_min(0).log()
    return SparseLogits(top.indices, top.values, rest_N, temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_tail_bucket_is_the_kl_of_the_coarser_distributions(k, temperature):
    student, teacher = make_states(learned=True), make_states(seed=1)
    sparse = listed(teacher, k, temperature=temperature)
    result = chunked_loss(student, [HeadTerm("forward_kl", 1.0, temperature)], sparse)
    p_NV, q_NV = ((dense(states) / temperature).softmax(-1) for states in (teacher, student))
    coarse = []
    for x_NV in (p_NV, q_NV):
        x_NK = x_NV.gather(-1, sparse.ids_NK)
        coarse.append(torch.cat([x_NK, 1 - x_NK.sum(-1, keepdim=True)], -1))
    plain = temperature**2 * (coarse[0] * (coarse[0].log() - coarse[1].log())).sum()
    assert_close(result.total, plain, **EXACTLY)
    assert_close(gradients(student, result.total), gradients(student, plain), **EXACTLY)


def test_a_teacher_who_lists_every_token_is_a_dense_one():
    student, teacher = make_states(learned=True), make_states(seed=1)
    exact = chunked_loss(student, [HeadTerm("forward_kl")], teacher)
    whole = listed(teacher, V, tail=False)
    for tail_N in (None, torch.full((7,), -math.inf)):
        found = chunked_loss(student, [HeadTerm("forward_kl")], replace(whole, tail_N=tail_N))
        assert_close(found.total, exact.total, **EXACTLY)
        assert_close(gradients(student, found.total), gradients(student, exact.total), **EXACTLY)
        exact = chunked_loss(student, [HeadTerm("forward_kl")], teacher)


def test_without_a_tail_the_gradient_is_q_minus_p():
    student, teacher = make_states(learned=True), make_states(seed=1)
    sparse = listed(teacher, 4, tail=False)
    plain_NV = dense(student)
    result = chunked_loss(student, [HeadTerm("forward_kl")], sparse)
    p_NV = torch.zeros_like(plain_NV).scatter(-1, sparse.ids_NK, sparse.logprobs_NK.exp())
    gradient_NV = (plain_NV.softmax(-1) - p_NV).detach()
    expected = torch.autograd.grad(plain_NV, [student.rows_ND, student.head.weight_VD], gradient_NV)
    assert_close(gradients(student, result.total), list(expected), **EXACTLY)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_list_filled_up_with_tokens_of_no_probability_is_the_shorter_list(kind):
    student, teacher = make_states(learned=True), make_states(seed=1)
    short = listed(teacher, 3)
    used = torch.zeros(7, V, dtype=torch.bool).scatter(-1, short.ids_NK, True)
    spare_N2 = (~used).double().topk(2).indices
    filled = SparseLogits(
        torch.cat([short.ids_NK, spare_N2], -1),
        torch.cat([short.logprobs_NK, torch.full((7, 2), -math.inf, dtype=torch.float64)], -1),
        short.tail_N,
    )
    term = HeadTerm(kind, biased=True)
    expected, found = chunked_loss(student, [term], short), chunked_loss(student, [term], filled)
    assert_close(found.total, expected.total, **EXACTLY)
    assert_close(gradients(student, found.total), gradients(student, expected.total), **EXACTLY)


@pytest.mark.parametrize("place", [0, 3])
def test_what_fills_up_a_list_may_repeat_a_listed_token(place):
    student, short = make_states(learned=True), listed(make_states(seed=1), 3)

    def put(part_NK: Tensor, filler_N: Tensor) -> Tensor:
        return torch.cat([part_NK[:, :place], filler_N[:, None], part_NK[:, place:]], -1)

    nothing_N = torch.full((7,), -math.inf, dtype=torch.float64)
    filled = SparseLogits(put(short.ids_NK, short.ids_NK[:, 0]), put(short.logprobs_NK, nothing_N), short.tail_N)
    expected, found = (chunked_loss(student, [HeadTerm("forward_kl")], sparse) for sparse in (short, filled))
    assert_close(found.total, expected.total, **EXACTLY)
    assert_close(gradients(student, found.total), gradients(student, expected.total), **EXACTLY)


@every_divergence
def test_a_biased_term_compares_the_coarser_distributions(kind):
    student, teacher = make_states(learned=True), make_states(seed=1)
    sparse, term = listed(teacher, 4), replace(term_of(kind), biased=True)
    result = chunked_loss(student, [term], sparse)
    coarse = []
    for states in (student, teacher):
        p_NK = dense(states).softmax(-1).gather(-1, sparse.ids_NK)
        coarse.append(torch.cat([p_NK, 1 - p_NK.sum(-1, keepdim=True)], -1).log())
    plain = DIVERGENCES[kind](*coarse, **term.settings).sum()
    assert_close(result.total, plain, **EXACTLY)
    assert_close(gradients(student, result.total), gradients(student, plain), **EXACTLY)


@pytest.mark.parametrize(
    ("terms", "change", "text"),
    [
        (["reverse_kl"], {}, r"reverse_kl has no unbiased form for a sparse teacher.*biased=True"),
        (["forward_kl", "jsd"], {}, r"jsd has no unbiased form"),
        (["forward_kl"], {"temperature": 2.0}, r"temperature 1\.0, but the sparse .* hold at 2\.0"),
        (["forward_kl"], {"tail_N": None}, r"probabilities sum to 0\.\d+.*tail_N"),
        (["forward_kl"], {"tail_N": torch.zeros(6)}, r"tail_N \(6,\) does not fit"),
        (["forward_kl"], {"ids_NK": torch.zeros(7, 3, dtype=torch.long)}, r"ids_NK \(7, 3\) and logprobs_NK \(7, 4\)"),
        (["forward_kl"], {"ids_NK": torch.zeros(7, 4, dtype=torch.long)}, r"lists a token twice in row 0"),
        (["forward_kl"], {"ids_NK": torch.full((7, 4), 13)}, r"outside of the head's 0\.\.12"),
    ],
)
def test_a_sparse_teacher_that_cannot_serve_is_refused(terms, change, text):
    sparse = replace(listed(make_states(seed=1), 4), **change)
    with pytest.raises(ValueError, match=text):
        chunked_loss(make_states(), [HeadTerm(kind) for kind in terms], sparse)


def test_scores_against_a_sparse_teacher_are_refused():
    sparse = listed(make_states(seed=1), 4)
    for sides, role in (((make_states(), sparse), "teacher"), ((sparse, make_states()), "arm")):
        with pytest.raises(ValueError, match=f"the {role} is a SparseLogits: scores need whole distributions"):
            position_scores(*sides, torch.arange(7))


def test_hard_labels_beside_a_sparse_teacher_cost_nothing_more_than_their_term():
    student, sparse = make_states(learned=True), listed(make_states(seed=1), 4)
    terms = [HeadTerm("forward_kl", 0.5), HeadTerm("cross_entropy", 0.5)]
    both = chunked_loss(student, terms, sparse).total
    apart = [chunked_loss(student, [term], sparse).total for term in terms]
    assert_close(both, torch.stack(apart).sum(), **EXACTLY)


# ---------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["states", "mixture", "sparse", "sampled"])
def test_compiled_agrees_with_plain_in_every_form_and_for_every_divergence(form):
    student, teacher = make_states(learned=True), make_states(seed=1)
    said: TeacherLogits = {
        "states": teacher,
        "mixture": make_mixture(),
        "sparse": listed(teacher, 4),
        "sampled": listed(teacher, 4, tail=False),
    }[form]
    temperature = 1.0 if form in ("sparse", "sampled") else 2.0
    kinds = ["forward_kl"] if form == "sampled" else list(DIVERGENCES)
    terms = [replace(term_of(kind, 0.1 + i, temperature), biased=True) for i, kind in enumerate(kinds)]
    terms.append(HeadTerm("cross_entropy", 0.3, settings={"label_smoothing": 0.1}))
    weights_N = torch.linspace(0.0, 2.0, 7)
    for _ in range(2):  # other weights and temperatures, the same kernel
        plain, fused = (
            distillation_loss(student, torch.arange(7), terms, teacher=said, weights_N=weights_N, compiled=compiled)
            for compiled in (False, True)
        )
        assert_close(fused.total, plain.total, rtol=1e-9, atol=1e-9)
        assert_close(dict(fused.terms), dict(plain.terms), rtol=1e-9, atol=1e-9)
        assert_close(gradients(student, fused.total), gradients(student, plain.total), rtol=1e-8, atol=1e-9)
        other = 1.5 if temperature != 1.0 else 1.0
        terms = [replace(term, weight=2.0, temperature=other) for term in terms]
