"""The whole objective on a toy model: sums and counts, whatever the batches are cut into, and one shift only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from potstill.losses import (
    AttentionLoss,
    HeadLoss,
    HeadTerm,
    HiddenLoss,
    Objective,
    PooledLoss,
    Ramp,
    Schedule,
    SimilarityLoss,
    VectorsLoss,
)
from potstill.types import (
    IGNORE,
    Batch,
    Head,
    Lesson,
    Logits,
    Mixture,
    Offer,
    Signal,
    SparseLogits,
    States,
    StudentView,
    Wants,
)

VOCABULARY, PADDED, WIDTHS, LENGTH = 11, 14, (4, 6), 9
SOFT = HeadTerm("forward_kl", 0.6, 2.0)
HARD = HeadTerm("cross_entropy", 0.4)

some_examples = settings(deadline=None, max_examples=15)


class Toy(nn.Module):
    """Every position is read by itself, so that rows cannot disturb each other; float64. The head has padding rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, dtype=torch.float64)
        self.body = nn.Linear(width, width, dtype=torch.float64)
        self.head = nn.Linear(width, PADDED, dtype=torch.float64)

    def forward(self, batch: Batch) -> StudentView:
        hidden = {0: self.embedding(batch.ids_BT)}
        hidden[1] = self.body(hidden[0]).tanh()
        return StudentView(hidden[1][batch.supervised_BT], Head(self.head.weight, self.head.bias), hidden)

    @torch.no_grad()
    def teach(self, batch: Batch) -> Lesson:
        view = self(batch)
        return Lesson(batch, Signal(States(view.final_ND, view.head), view.hidden))


def make_batch(counts: Sequence[int], length: int = LENGTH, padding: int = 0) -> Batch:
    """One row a count, with so many supervised positions in it; the last `padding` columns are padding."""
    shape = len(counts), length
    ids_BT, next_BT = (torch.randint(0, VOCABULARY, shape) for _ in range(2))
    supervised_BT = torch.zeros(shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        supervised_BT[row, torch.randperm(length)[:count]] = True
    batch = Batch(ids_BT, next_BT.where(supervised_BT, torch.tensor(IGNORE)), torch.ones(shape, dtype=torch.long))
    return pad(batch, padding)


def pad(batch: Batch, columns: int) -> Batch:
    return replace(
        batch,
        ids_BT=functional.pad(batch.ids_BT, (0, columns), value=3),
        targets_BT=functional.pad(batch.targets_BT, (0, columns), value=IGNORE),
        segments_BT=functional.pad(batch.segments_BT, (0, columns), value=0),
    )


def make_objective() -> Objective:
    """Everything at once: soft, hard and hidden terms. The projections are seeded, so that two objectives are alike."""
    torch.manual_seed(7)
    hidden = [HiddenLoss("hidden_mse", {1: 1}, WIDTHS, 0.5), HiddenLoss("hidden_cosine", {0: 1}, WIDTHS)]
    return Objective([HeadLoss([SOFT, HARD], VOCABULARY), *hidden]).double()


@pytest.fixture
def student() -> Toy:
    return Toy(WIDTHS[0])


@pytest.fixture
def teacher() -> Toy:
    return Toy(WIDTHS[1])


def learn(
    objective: Objective, student: Toy, teacher: Toy, batches: Sequence[Batch], *, progress: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The step's loss and terms over these micro-batches; gradients are left on student and objective."""
    student.zero_grad()
    objective.zero_grad()
    counts = objective.counts(batches)
    loss, terms = torch.zeros(()), {}
    for batch in batches:
        share, parts = objective(student(batch), teacher.teach(batch), counts, progress)
        share.backward()
        loss = loss + share.detach()
        terms = {name: terms.get(name, 0.0) + value for name, value in parts.items()}
    return loss, terms


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    return {f"{i}.{n}": p.grad.clone() for i, module in enumerate(modules) for n, p in module.named_parameters()}


def assert_same_step(one: tuple, other: tuple) -> None:
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("counts", [(9, 1, 4, 0, 2, 7, 3, 5), (0, 0, 9, 9, 0, 0, 1, 1)])
def test_one_batch_of_eight_rows_equals_four_of_two(student, teacher, counts):
    objective, whole = make_objective(), make_batch(counts)
    steps = []
    for rows in (8, 2, 1):
        cut = [whole.rows(start, start + rows) for start in range(0, 8, rows)]
        steps.append((*learn(objective, student, teacher, cut), gradients(student, objective)))
    assert_same_step(steps[1], steps[0])
    assert_same_step(steps[2], steps[0])


@some_examples
@given(st.lists(st.integers(0, LENGTH), min_size=2, max_size=6), st.integers(1, 5))
def test_it_does_not_matter_where_a_batch_is_cut(counts, cut):
    objective, student, teacher, whole = make_objective(), Toy(WIDTHS[0]), Toy(WIDTHS[1]), make_batch(counts)
    pieces = [piece for piece in (whole.rows(0, cut), whole.rows(cut, len(whole))) if len(piece)]
    one = (*learn(objective, student, teacher, [whole]), gradients(student, objective))
    assert_same_step((*learn(objective, student, teacher, pieces), gradients(student, objective)), one)


def test_a_mean_of_means_would_be_something_else(student, teacher):
    objective = Objective([HeadLoss([SOFT], VOCABULARY)])
    batches = [make_batch([9]), make_batch([1])]
    whole, _ = learn(objective, student, teacher, batches)
    apart = [learn(objective, student, teacher, [batch])[0] for batch in batches]
    assert_close(whole, (9 * apart[0] + apart[1]) / 10)
    assert not torch.allclose(whole, (apart[0] + apart[1]) / 2)


@some_examples
@given(st.integers(0, 8))
def test_masking_a_position_equals_leaving_it_out(masked):
    objective = Objective([HeadLoss([SOFT, HARD], VOCABULARY)])
    student, teacher, batch = Toy(WIDTHS[0]), Toy(WIDTHS[1]), make_batch([LENGTH])
    targets_BT = batch.targets_BT.clone()
    targets_BT[0, masked] = IGNORE
    kept = [column for column in range(LENGTH) if column != masked]
    without = Batch(batch.ids_BT[:, kept], batch.targets_BT[:, kept], batch.segments_BT[:, kept])
    one = (*learn(objective, student, teacher, [replace(batch, targets_BT=targets_BT)]), gradients(student))
    assert_same_step((*learn(objective, student, teacher, [without]), gradients(student)), one)


@pytest.mark.parametrize("columns", [1, 7])
def test_padding_changes_nothing(student, teacher, columns):
    objective, batch = make_objective(), make_batch([4, 9, 0])
    one = (*learn(objective, student, teacher, [batch]), gradients(student, objective))
    padded = (*learn(objective, student, teacher, [pad(batch, columns)]), gradients(student, objective))
    assert_same_step(padded, one)


@some_examples
@given(st.integers(0, 2 * LENGTH - 1), st.integers(1, VOCABULARY - 1))
def test_another_target_changes_the_loss_of_its_own_position_only(position, shift):
    loss, student, teacher = HeadLoss([HARD, SOFT], VOCABULARY), Toy(WIDTHS[0]), Toy(WIDTHS[1])
    batch = make_batch([LENGTH, LENGTH])
    targets_BT = batch.targets_BT.clone()
    targets_BT.view(-1)[position] = (targets_BT.view(-1)[position] + shift) % VOCABULARY
    changed = replace(batch, targets_BT=targets_BT)
    gradients_ND, totals = [], []
    for which in (batch, changed):
        view = student(which)
        total = loss(view, teacher.teach(which)).total
        gradients_ND.append(torch.autograd.grad(total, view.final_ND, retain_graph=True)[0])
        totals.append(total.detach())
    moved_N = (gradients_ND[0] != gradients_ND[1]).any(-1)
    assert moved_N.nonzero().flatten().tolist() == [position]
    log_q_V = student.head(student(batch).final_ND[position])[:VOCABULARY].log_softmax(-1).detach()
    before, after = batch.targets_BT.view(-1)[position], targets_BT.view(-1)[position]
    assert_close(totals[1] - totals[0], HARD.weight * (log_q_V[before] - log_q_V[after]))


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0001, 1.0), (0.3, 2.0), (0.9, 4.0)])
def test_soft_and_hard_terms_add_up_to_the_published_rule(student, teacher, alpha, temperature):
    """L = alpha CE + (1 - alpha) T^2 KL, each a mean over supervised positions."""
    terms = [HeadTerm("cross_entropy", alpha), HeadTerm("forward_kl", 1 - alpha, temperature)]
    batch = make_batch([5, 2, 0, 8])
    loss, parts = learn(Objective([HeadLoss(terms, VOCABULARY)]), student, teacher, [batch])
    found = gradients(student)
    student.zero_grad()
    mask_BT = batch.supervised_BT
    logits_NV, teacher_NV = (
        (model.head(model.body(model.embedding(batch.ids_BT)).tanh()))[mask_BT][:, :VOCABULARY]
        for model in (student, teacher)
    )
    hard = -logits_NV.log_softmax(-1)[torch.arange(15), batch.targets_N].sum() / 15
    log_q, log_p = (side_NV.div(temperature).log_softmax(-1) for side_NV in (logits_NV, teacher_NV))
    soft = (log_p.exp() * (log_p - log_q)).sum() / 15
    by_hand = alpha * hard + (1 - alpha) * temperature**2 * soft
    by_hand.backward()
    assert_close(loss, by_hand.detach())
    assert_close(parts, {"cross_entropy": hard.detach(), "forward_kl": soft.detach()})
    assert_close(found, gradients(student))


def test_padding_rows_of_the_head_learn_nothing(student, teacher):
    learn(make_objective(), student, teacher, [make_batch([4, 9])])
    assert torch.equal(student.head.weight.grad[VOCABULARY:], torch.zeros(PADDED - VOCABULARY, WIDTHS[0]).double())
    assert torch.equal(student.head.bias.grad[VOCABULARY:], torch.zeros(PADDED - VOCABULARY).double())


def test_nothing_supervised_anywhere_gives_a_loss_of_zero_and_no_nan(student, teacher):
    objective = Objective([HeadLoss([SOFT, HARD], VOCABULARY)])
    loss, terms = learn(objective, student, teacher, [make_batch([0, 0]), make_batch([0])])
    assert loss.item() == 0.0
    assert {name: value.item() for name, value in terms.items()} == {"forward_kl": 0.0, "cross_entropy": 0.0}
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients(student).values())


def test_every_loss_is_divided_by_its_own_count(student, teacher):
    objective = make_objective()
    batches = [make_batch([4, 0]), make_batch([9], padding=2)]
    assert objective.counts(batches).tolist() == [13.0, 27.0, 27.0]
    assert objective.counts([]).tolist() == [0.0, 0.0, 0.0]
    assert objective.counts(batches).dtype is torch.float64
    share, terms = objective(student(batches[0]), teacher.teach(batches[0]), torch.tensor([2.0, 4.0, 8.0]))
    again, more = objective(student(batches[0]), teacher.teach(batches[0]), torch.tensor([4.0, 8.0, 16.0]))
    assert_close(share, 2 * again)
    assert_close(terms, {name: 2 * value for name, value in more.items()})


def test_all_terms_are_named_and_unweighted(student, teacher):
    _, terms = learn(make_objective(), student, teacher, [make_batch([3])])
    assert set(terms) == {"forward_kl", "cross_entropy", "hidden_mse", "hidden_cosine"}
    light = Objective([HeadLoss([replace(SOFT, weight=0.001), HARD], VOCABULARY)])
    torch.manual_seed(0)
    batch = make_batch([5])
    heavy = Objective([HeadLoss([SOFT, HARD], VOCABULARY)])
    assert_close(learn(light, student, teacher, [batch])[1], learn(heavy, student, teacher, [batch])[1])


def test_an_objective_asks_for_what_its_losses_need():
    hard, soft = HeadLoss([HARD], VOCABULARY), HeadLoss([HARD, SOFT], VOCABULARY)
    hidden = HiddenLoss("hidden_mse", {4: 2, 1: 9}, (3, 3))
    assert Objective([hard]).needs == frozenset()
    assert Objective([soft]).needs == {Offer.LOGITS}
    assert Objective([hard, hidden]).needs == {Offer.HIDDEN}
    assert Objective([soft, hidden]).needs == {Offer.LOGITS, Offer.HIDDEN}


def test_what_to_read_is_what_all_losses_want_in_order_and_once():
    losses = [
        HeadLoss([SOFT], VOCABULARY),
        HiddenLoss("hidden_mse", {4: 2, 1: 9}, (3, 3)),
        HiddenLoss("hidden_cosine", {4: 9, 3: 0}, (3, 3)),
        AttentionLoss("attention_kl", {2: 6, 1: 3}, causal=True),
        VectorsLoss("minilm", {2: 6}, causal=True),
        SimilarityLoss("gram_mse", {5: 9}),
        PooledLoss("vector_mse", (3, 3)),
    ]
    student = Wants(final=True, layers=(1, 3, 4, 5), attentions=(1, 2), vectors=(2,), pooled=True)
    teacher = Wants(final=True, layers=(0, 2, 9), attentions=(3, 6), vectors=(6,), pooled=True)
    objective = Objective(losses)
    assert objective.wants() == (student, teacher)
    assert objective.needs == {Offer.LOGITS, Offer.HIDDEN, Offer.ATTENTION, Offer.VECTORS, Offer.POOLED}
    assert Objective([HeadLoss([SOFT], VOCABULARY)]).wants() == (Wants(final=True), Wants(final=True))
    assert Objective([HeadLoss([HARD], VOCABULARY)]).wants() == (Wants(final=True), Wants())
    assert Objective(losses[6:]).wants() == (Wants(final=True, pooled=True), Wants(pooled=True))


def test_a_schedule_moves_the_weight_of_any_term(student, teacher):
    batch, half = make_batch([4, 2]), {"gram_mse": Schedule(Ramp(1.0, 0.0))}
    view, lesson = student(batch), teacher.teach(batch)
    fixed, moving = (Objective([SimilarityLoss("gram_mse", {1: 1}, weight=3.0)], s) for s in ({}, half))
    counts = fixed.counts([batch])
    assert_close(moving(view, lesson, counts, 0.25)[0], 0.75 * fixed(view, lesson, counts)[0])
    assert_close(moving(view, lesson, counts, 0.25)[1], fixed(view, lesson, counts)[1])


def test_hard_labels_alone_need_no_signal(student):
    batch = make_batch([4, 2])
    objective = Objective([HeadLoss([HARD], VOCABULARY)])
    share, _ = objective(student(batch), Lesson(batch), objective.counts([batch]))
    assert torch.isfinite(share)


def test_a_soft_loss_without_a_signal_says_what_is_missing(student):
    batch = make_batch([4, 2])
    objective = Objective([HeadLoss([SOFT], VOCABULARY)])
    with pytest.raises(ValueError, match="compare with a teacher"):
        objective(student(batch), Lesson(batch), objective.counts([batch]))


def test_projections_are_parameters_of_the_objective_and_of_nobody_else():
    names = dict(make_objective().named_parameters())
    assert set(names) == {"losses.1.projections.1.weight", "losses.2.projections.0.weight"}


# Teachers of other forms


def said_by(teachers: Sequence[Toy], batch: Batch) -> list[States]:
    return [teacher.teach(batch).signal.logits for teacher in teachers]


def test_a_mixture_of_one_teacher_with_itself_is_that_teacher(student, teacher):
    loss, batch = HeadLoss([SOFT, HARD], VOCABULARY), make_batch([5, 3])
    (states,) = said_by([teacher], batch)
    weights_NM = torch.tensor([[0.25, 0.75]], dtype=torch.float64).expand(8, 2)
    alone = loss(student(batch), Lesson(batch, Signal(states)))
    mixed = loss(student(batch), Lesson(batch, Signal(Mixture((states, states), weights_NM))))
    assert_close(mixed.total, alone.total)
    assert_close(mixed.terms, alone.terms)


def test_the_padding_of_no_member_of_a_mixture_enters_a_softmax(student, teacher):
    other = Toy(3)
    loss, batch = HeadLoss([SOFT], VOCABULARY), make_batch([5, 3])
    lesson = Lesson(batch, Signal(Mixture(tuple(said_by([teacher, other], batch)), torch.full((8, 2), 0.5).double())))
    before = loss(student(batch), lesson).total
    with torch.no_grad():
        for model in (teacher, other, student):
            model.head.bias[VOCABULARY:] += 50.0
    assert_close(loss(student(batch), lesson).total, before)


def test_a_list_of_all_tokens_is_as_good_as_the_whole_distribution(student, teacher):
    loss, batch = HeadLoss([HeadTerm("forward_kl"), HARD], VOCABULARY), make_batch([4, 9])
    (states,) = said_by([teacher], batch)
    logits_NV = states.rows_ND @ states.head.weight_VD.T + states.head.bias_V
    logprobs_NK = logits_NV[:, :VOCABULARY].log_softmax(-1)
    listed = SparseLogits(torch.arange(VOCABULARY).expand(13, VOCABULARY), logprobs_NK)
    whole = loss(student(batch), Lesson(batch, Signal(states)))
    assert_close(loss(student(batch), Lesson(batch, Signal(listed))).total, whole.total)


def test_logits_of_a_padded_head_are_cut_to_the_shared_tokens(student, teacher):
    loss, batch = HeadLoss([SOFT], VOCABULARY), make_batch([4, 9])
    (states,) = said_by([teacher], batch)
    spelled = Logits(states.rows_ND @ states.head.weight_VD.T + states.head.bias_V)
    assert spelled.logits_NV.shape[1] == PADDED
    whole = loss(student(batch), Lesson(batch, Signal(states)))
    assert_close(loss(student(batch), Lesson(batch, Signal(spelled))).total, whole.total)


# Numbers that move

numbers = st.just(0.0) | st.floats(1e-6, 100)
progresses = st.floats(0, 1)
shapes = st.sampled_from(["linear", "cosine"])


@given(numbers, numbers, shapes)
def test_a_ramp_begins_and_ends_exactly_where_it_says(start, end, kind):
    ramp = Ramp(start, end, kind)
    assert (ramp.at(0.0), ramp.at(1.0)) == (start, end)
    assert ramp.at(0.5) == pytest.approx((start + end) / 2)


@given(numbers, numbers, shapes, st.tuples(progresses, progresses).map(sorted))
def test_a_ramp_never_turns_back_and_never_leaves_its_ends(start, end, kind, moments):
    earlier, later = (Ramp(start, end, kind).at(progress) for progress in moments)
    slack = 1e-12 * max(start, end)
    assert min(start, end) - slack <= earlier <= max(start, end) + slack
    assert (later - earlier) * (1 if end >= start else -1) >= -slack


def test_the_shapes_of_ramps_are_those_of_their_names():
    assert [Ramp(1.0, 3.0).at(share / 4) for share in range(5)] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert Ramp(0.0, 2.0, "cosine").at(0.25) == pytest.approx(1 - 2**-0.5)
    assert Ramp(2.0, 0.0, "cosine").at(1 / 3) == pytest.approx(1.5)


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_there_is_no_progress_before_the_start_or_after_the_end(progress):
    with pytest.raises(ValueError, match="no share of a training"):
        Ramp(1.0, 2.0).at(progress)


SCHEDULES = {
    "forward_kl": Schedule(Ramp(0.0, 2.0), Ramp(4.0, 1.0, "cosine")),
    "cross_entropy": Schedule(weight=Ramp(1.0, 0.0)),
    "hidden_mse": Schedule(weight=Ramp(3.0, 0.0, "cosine")),
}


def moving_objective() -> Objective:
    return Objective(list(make_objective().losses), SCHEDULES).double()


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_scheduled_objective_is_the_fixed_one_with_the_numbers_of_that_moment(student, teacher, progress):
    share = (1 - math.cos(math.pi * progress)) / 2
    soft = replace(SOFT, weight=SOFT.weight * 2 * progress, temperature=4 - 3 * share)
    hard = replace(HARD, weight=HARD.weight * (1 - progress))
    torch.manual_seed(7)
    hidden = [
        HiddenLoss("hidden_mse", {1: 1}, WIDTHS, 0.5 * 3 * (1 - share)),
        HiddenLoss("hidden_cosine", {0: 1}, WIDTHS),
    ]
    fixed, moving = Objective([HeadLoss([soft, hard], VOCABULARY), *hidden]).double(), moving_objective()
    batches = [make_batch([4, 9, 0]), make_batch([1])]
    one = (*learn(fixed, student, teacher, batches), gradients(student, fixed))
    other = learn(moving, student, teacher, batches, progress=progress)
    assert_same_step((*other, gradients(student, moving)), one)


def test_a_term_whose_weight_is_0_teaches_nothing_and_is_still_logged(student, teacher):
    moving = Objective([HeadLoss([SOFT, HARD], VOCABULARY)], {"forward_kl": Schedule(Ramp(0.0, 1.0))})
    alone, batch = Objective([HeadLoss([HARD], VOCABULARY)]), make_batch([7, 2])
    loss, terms = learn(moving, student, teacher, [batch])
    found = gradients(student)
    expected = learn(alone, student, teacher, [batch])
    assert_close(loss, expected[0])
    assert_close(found, gradients(student))
    assert terms["forward_kl"] > 0.0


def test_a_projection_gets_a_gradient_of_0_where_its_term_is_off(student, teacher):
    moving = moving_objective()
    learn(moving, student, teacher, [make_batch([5])], progress=1.0)
    assert torch.equal(moving.losses[1].projections["1"].weight.grad, torch.zeros(6, 4).double())


def test_what_moves_is_told_as_it_is_and_not_summed_over_micro_batches():
    moving = moving_objective()
    assert moving.scheduled(0.0) == pytest.approx(
        {"weight_forward_kl": 0.0, "temperature_forward_kl": 4.0, "weight_cross_entropy": 0.4, "weight_hidden_mse": 1.5}
    )
    assert moving.scheduled(1.0) == pytest.approx(
        {"weight_forward_kl": 1.2, "temperature_forward_kl": 1.0, "weight_cross_entropy": 0.0, "weight_hidden_mse": 0.0}
    )
    assert make_objective().scheduled(0.5) == {}


def test_whether_a_teacher_is_asked_does_not_move():
    off = Objective([HeadLoss([SOFT, HARD], VOCABULARY)], {"forward_kl": Schedule(Ramp(0.0, 1.0))})
    assert off.needs == {Offer.LOGITS}


@pytest.mark.parametrize(
    ("schedules", "words"),
    [
        ({"forward_lk": Schedule(Ramp(0.0, 1.0))}, r"\['forward_lk'\] are of no term: use the names .*'forward_kl'"),
        ({"cross_entropy": Schedule(temperature=Ramp(1.0, 2.0))}, "a temperature that these terms lack"),
        ({"hidden_mse": Schedule(temperature=Ramp(1.0, 2.0))}, "a temperature that these terms lack"),
    ],
    ids=["no term", "hard", "hidden"],
)
def test_a_schedule_of_what_is_not_there_is_refused(schedules, words):
    with pytest.raises(ValueError, match=words):
        Objective(list(make_objective().losses), schedules)
