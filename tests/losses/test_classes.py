"""Scores of classes, and of several labels: the same losses as over a vocabulary, with rows that nobody labelled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from potstill.losses import DIVERGENCES, HeadLoss, HeadTerm, Objective, distillation_loss
from potstill.types import (
    IGNORE,
    Batch,
    Head,
    Lesson,
    Logits,
    Mixture,
    Signal,
    SparseLogits,
    States,
    StudentView,
    TeacherLogits,
)

N, C, D = 9, 5, 4
SETTINGS: dict[str, dict[str, float]] = {
    "jsd": {"beta": 0.3},
    "normalised_jsd": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "alpha_beta": {"alpha": 0.4, "beta": 0.7},
    "adaptive_kl": {"mu": 0.5},
}
TERMS = [HeadTerm(name, temperature=2.0, settings=SETTINGS.get(name, {})) for name in sorted(DIVERGENCES)]
HARD = HeadTerm("cross_entropy", 0.4, settings={"label_smoothing": 0.1})

some_examples = settings(deadline=None, max_examples=20)


def scores(seed: int, rows: int = N, classes: int = C) -> tuple[Tensor, Tensor]:
    """The student's, with a gradient, and the teacher's; float64."""
    generator = torch.Generator().manual_seed(seed)
    both = [3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2)]
    return both[0].requires_grad_(), both[1]


# ------------------------------------------------------------------------------------------ logits in place of states


@pytest.mark.parametrize("term", [*TERMS, HARD, HeadTerm("forward_kl"), HeadTerm("adaptive_kl", settings={"mu": 0.9})])
@pytest.mark.parametrize("weighted", [False, True])
def test_logits_are_states_with_an_identity_for_a_head(term, weighted):
    own_NC, its_NC = scores(1)
    targets_N = torch.arange(N) % C
    weights_N = torch.linspace(0, 2, N).double() if weighted else None
    dense, chunked = (
        distillation_loss(student, targets_N, [term], teacher=Logits(its_NC), weights_N=weights_N)
        for student in (Logits(own_NC), States(own_NC, Head(torch.eye(C).double())))
    )
    assert_close(dense.total, chunked.total)
    assert_close(dense.terms, chunked.terms)
    assert dense.count == chunked.count == N
    assert_close(*(torch.autograd.grad(one.total, own_NC)[0] for one in (dense, chunked)))
    assert not any(value.requires_grad for value in dense.terms.values())


def teachers() -> dict[str, TeacherLogits]:
    """Every form in which a teacher may speak of five classes."""
    _, its_NC = scores(2)
    states = States(
        its_NC[:, :D].contiguous(), Head(torch.randn(C, D, generator=torch.Generator().manual_seed(3)).double())
    )
    listed = its_NC.log_softmax(-1).topk(2)
    rest_N = torch.log1p(-listed.values.exp().sum(-1))
    mixture = Mixture((states, states), torch.tensor([[0.25, 0.75]]).double().expand(N, 2))
    return {"states": states, "mixture": mixture, "sparse": SparseLogits(listed.indices, listed.values, rest_N)}


@pytest.mark.parametrize("form", ["states", "mixture", "sparse"])
def test_a_teacher_may_speak_in_every_form(form):
    own_NC, _ = scores(4)
    sides = [Logits(own_NC), States(own_NC, Head(torch.eye(C).double()))]
    both = [distillation_loss(side, None, [HeadTerm("forward_kl")], teacher=teachers()[form]) for side in sides]
    assert_close(both[0].total, both[1].total)
    assert_close(*(torch.autograd.grad(one.total, own_NC)[0] for one in both))


def test_bfloat16_scores_are_compared_in_float32():
    own_NC, its_NC = (part.detach().bfloat16() for part in scores(5))
    own_NC.requires_grad_()
    found = distillation_loss(Logits(own_NC), None, [HeadTerm("forward_kl")], teacher=Logits(its_NC))
    exact = distillation_loss(Logits(own_NC.double()), None, [HeadTerm("forward_kl")], teacher=Logits(its_NC.double()))
    assert found.total.dtype is torch.float32
    assert_close(found.total.double(), exact.total, rtol=1e-5, atol=1e-5)
    found.total.backward()
    assert own_NC.grad.dtype is torch.bfloat16


def test_no_rows_are_a_total_of_zero_with_a_graph():
    own_NC = torch.zeros(0, C, requires_grad=True)
    found = distillation_loss(
        Logits(own_NC), torch.zeros(0, dtype=torch.long), [*TERMS, HARD], teacher=Logits(torch.zeros(0, C))
    )
    found.total.backward()
    assert (found.total.item(), found.count) == (0.0, 0)
    assert own_NC.grad.shape == (0, C)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_row_without_weight_spoils_nothing_where_it_is_infinite(kind):
    own_NC, its_NC = (part.detach().clone() for part in scores(6, rows=2))
    own_NC[0, 0], its_NC[0, 1] = -torch.inf, -torch.inf
    own_NC.requires_grad_()
    found = distillation_loss(
        Logits(own_NC), None, [HeadTerm(kind)], teacher=Logits(its_NC), weights_N=torch.tensor([0.0, 1.0]).double()
    )
    found.total.backward()
    assert torch.isfinite(found.total)
    assert torch.equal(own_NC.grad[0], torch.zeros(C).double())


@pytest.mark.parametrize(
    ("student", "teacher", "targets", "words"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2, 4),
            None,
            r"teacher's logits \(2, 4\).* do not fit the student's 2 rows and 3",
        ),
        (torch.zeros(2, 3), torch.zeros(3, 3), None, r"teacher's logits \(3, 3\).* do not fit"),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3),
            torch.tensor([0, 3]),
            r"targets_N holds 0\.\.3, but the head has tokens 0",
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, IGNORE]), r"targets_N holds -100\.\.0"),
        (
            torch.zeros(2, 3).long(),
            torch.zeros(2, 3),
            None,
            r"the student's logits are \(2, 3\), torch.int64: needs float",
        ),
        (torch.zeros(2), torch.zeros(2, 3), None, r"the student's logits are \(2,\)"),
        (torch.zeros(2, 0), torch.zeros(2, 0), None, r"at least one class"),
    ],
)
def test_what_does_not_fit_is_told(student, teacher, targets, words):
    with pytest.raises(ValueError, match=words):
        distillation_loss(Logits(student), targets, [HeadTerm("forward_kl")], teacher=Logits(teacher))


def test_somebody_else_is_no_student():
    listed = SparseLogits(torch.zeros(2, 1).long(), torch.zeros(2, 1))
    with pytest.raises(
        ValueError, match=r"student is a SparseLogits: needs States\(rows_ND, Head\(weight_VD\)\), or Log"
    ):
        distillation_loss(listed, None, [HeadTerm("forward_kl")], teacher=Logits(torch.zeros(2, 3)))


# -------------------------------------------------------------------------------- one class a text, some of them known


def texts(labels: list[int], several: Tensor | None = None) -> Batch:
    """One text a row of three tokens, whose answer stands at position 0; the teacher speaks of every one."""
    targets_BT = torch.full((len(labels), 3), IGNORE)
    targets_BT[:, 0] = torch.tensor(labels)
    first_BT = torch.zeros(len(labels), 3, dtype=torch.bool)
    first_BT[:, 0] = True
    ids_BT = torch.ones(len(labels), 3, dtype=torch.long)
    return Batch(ids_BT, targets_BT, ids_BT, taught_BT=first_BT, labels_BC=several)


def see(own_NC: Tensor, its_NC: Tensor | None, batch: Batch) -> tuple[StudentView, Lesson]:
    return StudentView(own_NC, None), Lesson(batch, Signal(None if its_NC is None else Logits(its_NC)))


@some_examples
@given(st.lists(st.sampled_from([IGNORE, 0, 1, 2, 3, 4]), min_size=1, max_size=6), st.integers(0, 10**6))
def test_hard_labels_teach_the_labelled_texts_and_the_teacher_all(labels, seed):
    own_NC, its_NC = scores(seed, len(labels))
    batch = texts(labels)
    view, lesson = see(own_NC, its_NC, batch)
    soft, hard = HeadLoss([HeadTerm("forward_kl", 0.7, 2.0)], C), HeadLoss([HeadTerm("cross_entropy", 0.3)], C)
    known = [row for row, label in enumerate(labels) if label != IGNORE]
    assert (soft.count(batch), hard.count(batch)) == (len(labels), len(known))
    log_p, log_q = (its_NC / 2).log_softmax(-1), (own_NC / 2).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    nll = -sum((own_NC.log_softmax(-1)[row, labels[row]] for row in known), start=0 * own_NC.sum())
    found = soft(view, lesson), hard(view, lesson)
    assert_close(found[0].terms["forward_kl"], kl.detach())
    assert_close(found[1].terms["cross_entropy"], nll.detach())
    total, expected = found[0].total + found[1].total, 0.7 * 4 * kl + 0.3 * nll
    assert_close(*(torch.autograd.grad(one, own_NC, retain_graph=True)[0] for one in (total, expected)))


def test_hard_labels_alone_ask_no_teacher():
    own_NC, _ = scores(8, 3)
    assert torch.isfinite(HeadLoss([HARD], C)(*see(own_NC, None, texts([1, IGNORE, 2]))).total)
    with pytest.raises(ValueError, match="compare with a teacher: pass teacher"):
        HeadLoss([HeadTerm("forward_kl")], C)(*see(own_NC, None, texts([1, IGNORE, 2])))


def test_where_nobody_marks_the_teacher_both_share_a_pass():
    own_NC, its_NC = scores(9, 3)
    batch = texts([1, 0, 2])
    view, lesson = see(own_NC, its_NC, replace(batch, taught_BT=None))
    both = HeadLoss([HeadTerm("forward_kl"), HARD], C)(view, lesson)
    alone = [HeadLoss([term], C)(*see(own_NC, its_NC, batch)) for term in (HeadTerm("forward_kl"), HARD)]
    assert_close(both.total, alone[0].total + alone[1].total)


@pytest.mark.parametrize("classes", [C - 1, C + 1])
@pytest.mark.parametrize("binary", [False, True])
def test_scores_of_other_classes_are_refused_and_never_cut(classes, binary):
    own_NC, its_NC = scores(10, 2)
    batch = texts([0, 1], torch.zeros(2, classes, dtype=torch.long))
    for terms in ([HARD], [HeadTerm("forward_kl")]):
        with pytest.raises(
            ValueError, match=rf"the student gives scores \(2, {C}\): needs scores of {classes} classes"
        ):
            HeadLoss(terms, classes, binary=binary)(*see(own_NC, its_NC, batch))
    right = torch.zeros(2, classes).double().requires_grad_()
    with pytest.raises(ValueError, match=rf"the teacher('s logits| gives) \(2, {C}\)"):
        HeadLoss([HeadTerm("forward_kl")], classes, binary=binary)(*see(right, its_NC, batch))


# ------------------------------------------------------------------------------------------------ several labels a text


def labelled(seed: int, rows: int = 4) -> tuple[Batch, Tensor, list[int]]:
    """Texts with several labels, every other one unlabelled; the labels; the labelled rows."""
    labels_BC = torch.randint(0, 2, (rows, C), generator=torch.Generator().manual_seed(seed))
    labels_BC[1::2] = IGNORE
    counts = [int(row.sum()) if row[0] != IGNORE else IGNORE for row in labels_BC]
    return texts(counts, labels_BC), labels_BC, [row for row in range(rows) if row % 2 == 0]


@some_examples
@given(st.integers(0, 10**6))
def test_hard_labels_are_binary_cross_entropies(seed):
    own_NC, _ = scores(seed, 4)
    batch, labels_BC, known = labelled(seed)
    loss = HeadLoss([HeadTerm("cross_entropy")], C, binary=True)
    found = loss(*see(own_NC, None, batch))
    expected = functional.binary_cross_entropy_with_logits(own_NC[known], labels_BC[known].double(), reduction="sum")
    assert_close(found.total, expected)
    assert_close(*(torch.autograd.grad(one, own_NC)[0] for one in (found.total, expected)))
    assert found.count == loss.count(batch) == 2 * C


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_labels_are_kl_divergences_of_every_label(temperature):
    own_NC, its_NC = scores(12, 4)
    batch, _, _ = labelled(12)
    loss = HeadLoss([HeadTerm("forward_kl", temperature=temperature)], C, binary=True)
    found = loss(*see(own_NC, its_NC, batch))
    p, q = (its_NC / temperature).sigmoid(), (own_NC / temperature).sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert_close(found.terms["forward_kl"], expected.detach())
    assert_close(found.total, temperature**2 * expected)
    assert found.count == loss.count(batch) == 4 * C


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_every_divergence_is_zero_where_all_labels_agree_and_no_label_moves_another(term):
    own_NC, its_NC = scores(13, 4)
    loss, batch = HeadLoss([term], C, binary=True), labelled(13)[0]
    assert abs(loss(*see(own_NC, own_NC.detach(), batch)).total.item()) < 1e-9
    moved_NC = its_NC.clone()
    moved_NC[2, 3] = 2 * own_NC.detach()[2, 3] - its_NC[2, 3]
    parts = [torch.autograd.grad(loss(*see(own_NC, said, batch)).total, own_NC)[0] for said in (its_NC, moved_NC)]
    assert (parts[0] != parts[1]).nonzero().tolist() == [[2, 3]]


def test_class_1_is_to_have_the_label():
    batch = texts([1], torch.tensor([[1, 0]]))
    right, wrong = (
        HeadLoss([HeadTerm("cross_entropy")], 2, binary=True)(*see(own, None, batch)).total.item()
        for own in (torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]]))
    )
    assert right < 1e-3
    assert wrong == pytest.approx(18.0, abs=1e-2)


def test_several_labels_are_divided_by_texts_times_labels():
    own_NC, its_NC = scores(14, 4)
    batch, labels_BC, known = labelled(14)
    losses = [HeadLoss([term], C, binary=True) for term in (HeadTerm("cross_entropy"), HeadTerm("forward_kl"))]
    objective = Objective(losses)
    counts = objective.counts([batch.rows(0, 3), batch.rows(3, 4)])
    assert counts.tolist() == [2 * C, 4 * C]
    terms = objective(*see(own_NC, its_NC, batch), counts)[1]
    expected = functional.binary_cross_entropy_with_logits(own_NC[known], labels_BC[known].double())
    assert_close(terms["cross_entropy"], expected.detach())


def test_states_and_missing_labels_are_refused_where_every_label_is_asked_for():
    own_NC, its_NC = scores(15, 2)
    loss: Any = HeadLoss([HeadTerm("cross_entropy")], C, binary=True)
    with pytest.raises(ValueError, match=rf"labels_BC is None: hard labels need \[B, {C}\]"):
        loss(*see(own_NC, its_NC, texts([0, 1])))
    with pytest.raises(ValueError, match="the student gives states and a head: needs scores of 5 classes"):
        loss(StudentView(own_NC, Head(torch.eye(C))), Lesson(texts([0, 1], torch.zeros(2, C).long())))
    with pytest.raises(ValueError, match=r"targets_N holds -100\.\.1"):
        loss(*see(own_NC, its_NC, texts([0, 1], torch.tensor([[0, 1, IGNORE, 0, 1]] * 2))))
