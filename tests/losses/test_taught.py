"""Where the teacher speaks at some positions only: soft terms count these, hard labels count all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from potstill.losses import HeadLoss, HeadTerm, Objective
from potstill.types import IGNORE, Batch, Head, Lesson, Logits, Signal, States, StudentView

B, T, V, D = 3, 7, 11, 5
SOFT, HARD = HeadTerm("forward_kl", 0.7, temperature=2.0), HeadTerm("cross_entropy", 0.3)


def make_batch(seed: int) -> Batch:
    """Some positions are supervised, of these some are taught. Seeds all that is drawn after it, too."""
    torch.manual_seed(seed)
    ids_BT = torch.randint(0, V, (B, T))
    supervised_BT = torch.rand(B, T) < 0.7
    taught_BT = supervised_BT & (torch.rand(B, T) < 0.5)
    return Batch(ids_BT, torch.where(supervised_BT, ids_BT, IGNORE), torch.ones_like(ids_BT), taught_BT=taught_BT)


def make_lesson(batch: Batch, dense: bool = False) -> tuple[StudentView, Lesson]:
    """A student in float64 at every supervised position, a teacher where it speaks."""
    count, heard = int(batch.supervised_BT.sum()), int(batch.taught_BT.sum())
    view = StudentView(torch.randn(count, D).double().requires_grad_(), Head(torch.randn(V, D).double()))
    said = States(torch.randn(heard, D).double(), Head(torch.randn(V, D).double()))
    spoken = Logits(said.rows_ND @ said.head.weight_VD.T) if dense else said
    return view, Lesson(batch, Signal(spoken))


def by_hand(view: StudentView, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of forward KL at temperature 2, and of cross-entropy, in float64 and without any of the code under test."""
    batch, said = lesson.batch, lesson.signal.logits
    student_NV = view.final_ND @ view.head.weight_VD.T
    teacher_nV = said.logits_NV if isinstance(said, Logits) else said.rows_ND @ said.head.weight_VD.T
    taught = [place for place, heard in enumerate(batch.taught_BT[batch.supervised_BT].tolist()) if heard]
    log_p, log_q = (teacher_nV / 2).log_softmax(-1), (student_NV[taught] / 2).log_softmax(-1)
    hard = -student_NV.log_softmax(-1).gather(1, batch.targets_N[:, None]).sum()
    return (log_p.exp() * (log_p - log_q)).sum(), hard


@pytest.mark.parametrize("dense", [False, True])
@settings(deadline=None, max_examples=20)  # the first call imports what torch needs
@given(seed=st.integers(0, 10**6))
def test_soft_terms_sum_over_taught_positions_and_hard_ones_over_all(dense, seed):
    batch = make_batch(seed)
    view, lesson = make_lesson(batch, dense)
    soft, hard = HeadLoss([SOFT], V), HeadLoss([HARD], V)
    assert soft.count(batch) == batch.taught_BT.sum()
    assert hard.count(batch) == batch.supervised_BT.sum()
    kl, entropy = by_hand(view, lesson)
    found = [soft(view, lesson), hard(view, lesson)]
    assert [one.count for one in found] == [soft.count(batch), hard.count(batch)]
    assert_close(found[0].terms["forward_kl"], kl.detach())
    assert_close(found[1].terms["cross_entropy"], entropy.detach())
    total = found[0].total + found[1].total
    expected = 0.7 * 4 * kl + 0.3 * entropy
    assert_close(total, expected)
    (ours,) = torch.autograd.grad(total, view.final_ND)
    (theirs,) = torch.autograd.grad(expected, view.final_ND)
    assert_close(ours, theirs)


@settings(deadline=None, max_examples=20)  # the first call imports what torch needs
@given(seed=st.integers(0, 10**6))
def test_every_term_is_divided_by_a_count_of_its_own(seed):
    first, second = make_batch(seed), make_batch(seed + 1)
    objective = Objective([HeadLoss([HARD], V), HeadLoss([SOFT], V)])
    counts = objective.counts([first, second])
    taught, supervised = (int(a.sum() + b.sum()) for a, b in zip(masks_of(first), masks_of(second), strict=True))
    assert counts.tolist() == [supervised, taught]
    share, expected = 0.0, 0.0
    for batch in (first, second):
        view, lesson = make_lesson(batch)
        share += objective(view, lesson, counts)[0].item()
        kl, entropy = by_hand(view, lesson)
        expected += 0.7 * 4 * kl.item() / max(taught, 1) + 0.3 * entropy.item() / max(supervised, 1)
    assert share == pytest.approx(expected)


def masks_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.taught_BT, batch.supervised_BT


def test_taught_everywhere_is_as_if_nobody_had_said_where():
    batch = make_batch(3)
    everywhere = replace(batch, taught_BT=batch.supervised_BT)
    view, lesson = make_lesson(everywhere)
    loss = HeadLoss([SOFT], V)
    marked, unmarked = (
        loss(view, replace(lesson, batch=replace(batch, taught_BT=m))) for m in (batch.supervised_BT, None)
    )
    assert torch.equal(marked.total, unmarked.total)
    assert marked.count == unmarked.count


def test_taught_nowhere_is_a_total_of_zero_with_a_graph():
    batch = make_batch(4)
    view, lesson = make_lesson(replace(batch, taught_BT=torch.zeros_like(batch.taught_BT)))
    found = HeadLoss([SOFT], V)(view, lesson)
    assert (found.total.item(), found.count) == (0.0, 0)
    (gradient,) = torch.autograd.grad(found.total, view.final_ND)
    assert not gradient.any()


def test_hard_and_soft_terms_cannot_share_a_count():
    batch = make_batch(5)
    view, lesson = make_lesson(batch)
    loss = HeadLoss([SOFT, HARD], V)
    words = r"terms \['forward_kl', 'cross_entropy'\] mix hard labels with a teacher who speaks at some positions only"
    with pytest.raises(ValueError, match=words):
        loss(view, lesson)
    with pytest.raises(ValueError, match=words):
        loss.count(batch)


def test_rows_and_devices_keep_the_marks():
    batch = make_batch(6)
    assert torch.equal(batch.rows(1, 3).taught_BT, batch.taught_BT[1:3])
    assert torch.equal(batch.to("cpu").taught_BT, batch.taught_BT)
    assert torch.equal(batch.taught_N, batch.taught_BT[batch.supervised_BT])
    assert replace(batch, taught_BT=None).taught_N is None


def test_the_teacher_may_speak_where_nothing_is_supervised():
    """As in masked language modelling: hard labels at the masked tokens, soft ones at every attended position."""
    batch = make_batch(7)
    everywhere = torch.ones_like(batch.taught_BT)
    everywhere[2, 4:] = False
    batch = replace(batch, taught_BT=everywhere, targets_BT=batch.targets_BT.clone())
    batch.targets_BT[2, 5] = 3  # supervised, and not taught
    count, heard = int(batch.spoken_BT.sum()), int(everywhere.sum())
    view = StudentView(torch.randn(count, D).double().requires_grad_(), Head(torch.randn(V, D).double()))
    said = States(torch.randn(heard, D).double(), Head(torch.randn(V, D).double()))
    lesson = Lesson(batch, Signal(said))
    soft, hard = HeadLoss([SOFT], V), HeadLoss([HARD], V)
    assert (soft.count(batch), hard.count(batch)) == (heard, int(batch.supervised_BT.sum()))
    spoken, positions = batch.spoken_BT.nonzero().tolist(), everywhere.nonzero().tolist()
    logits_NV = view.final_ND @ view.head.weight_VD.T
    log_p = (said.rows_ND @ said.head.weight_VD.T / 2).log_softmax(-1)
    log_q = (logits_NV[[spoken.index(place) for place in positions]] / 2).log_softmax(-1)
    own = [spoken.index(place) for place in batch.supervised_BT.nonzero().tolist()]
    nll = -logits_NV[own].log_softmax(-1).gather(1, batch.targets_N[:, None]).sum()
    expected = 0.7 * 4 * (log_p.exp() * (log_p - log_q)).sum() + 0.3 * nll
    total = soft(view, lesson).total + hard(view, lesson).total
    assert_close(total, expected)
    assert_close(*(torch.autograd.grad(one, view.final_ND)[0] for one in (total, expected)))
