"""What single divergences promise: limits of the families, bounds, name traps, bad settings; and the cross-entropy."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.losses.divergence import (
    DIVERGENCES,
    adaptive_kl,
    alpha_beta,
    cross_entropy,
    forward_kl,
    jsd,
    normalised_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)

WIDE = torch.float64
some_examples = settings(deadline=None, max_examples=30)


def random_pair(rows: int = 3, vocabulary: int = 11, dtype: torch.dtype = WIDE) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(rows, vocabulary, dtype=dtype), 3 * torch.randn(rows, vocabulary, dtype=dtype)


def value_and_gradient(divergence, student_NV, teacher_NV):
    student_NV = student_NV.detach().clone().requires_grad_()
    values_N = divergence(student_NV, teacher_NV)
    (gradient_NV,) = torch.autograd.grad(values_N.sum(), student_NV)
    return values_N.detach(), gradient_NV


def assert_same(one, other, pair, **tolerance):
    assert_close(value_and_gradient(one, *pair), value_and_gradient(other, *pair), **tolerance)


EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize(
    ("family", "member"),
    [
        (partial(skew_forward_kl, alpha=0.0), forward_kl),
        (partial(skew_reverse_kl, alpha=0.0), reverse_kl),
        (partial(normalised_jsd, beta=0.0), forward_kl),
        (partial(normalised_jsd, beta=1.0), reverse_kl),
    ],
)
def test_at_its_end_a_family_is_exactly_the_kl(family, member):
    assert_same(family, member, random_pair(), **EXACT)


@pytest.mark.parametrize(
    ("family", "member"),
    [
        (partial(alpha_beta, alpha=1.0, beta=0.0), forward_kl),
        (partial(alpha_beta, alpha=0.0, beta=1.0), reverse_kl),
        (jsd, lambda student_NV, teacher_NV: normalised_jsd(student_NV, teacher_NV) / 4),
    ],
)
def test_members_of_families_that_have_another_name(family, member):
    assert_same(family, member, random_pair(), **ROUNDING)


@pytest.mark.parametrize(
    ("family", "member"),
    [
        (lambda tiny: partial(skew_forward_kl, alpha=tiny), forward_kl),
        (lambda tiny: partial(skew_reverse_kl, alpha=tiny), reverse_kl),
        (lambda tiny: partial(normalised_jsd, beta=tiny), forward_kl),
        (lambda tiny: partial(normalised_jsd, beta=1.0 - tiny), reverse_kl),
        (lambda tiny: partial(alpha_beta, alpha=1.0, beta=tiny), forward_kl),
        (lambda tiny: partial(alpha_beta, alpha=tiny, beta=1.0), reverse_kl),
        (lambda tiny: partial(alpha_beta, alpha=0.4, beta=tiny), partial(alpha_beta, alpha=0.4, beta=0.0)),
        (lambda tiny: partial(alpha_beta, alpha=tiny, beta=2.0), partial(alpha_beta, alpha=0.0, beta=2.0)),
        (lambda tiny: partial(jsd, beta=tiny), partial(jsd, beta=0.0)),
        (lambda tiny: partial(jsd, beta=1.0 - tiny), partial(jsd, beta=1.0)),
    ],
)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_families_reach_their_limits_without_a_jump(family, member, dtype, rounding):
    pair = tuple(logits_NV / 3 for logits_NV in random_pair(dtype=dtype))
    at_limit = value_and_gradient(member, *pair)
    before = math.inf
    for tiny in (1e-2, 1e-4, 1e-6, 1e-9, 1e-12):
        near = value_and_gradient(family(tiny), *pair)
        away = max((x - y).abs().max().item() for x, y in zip(near, at_limit, strict=True))
        assert away <= max(100 * tiny, rounding)
        assert away <= max(before, rounding)
        before = away


@pytest.mark.parametrize("exponent", [0.4, 1.0, 2.5])
def test_the_limits_of_alpha_beta_carry_the_square_of_the_exponent(exponent):
    student_NV, teacher_NV = random_pair()
    log_q, log_p = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)

    def limit(a: Tensor, b: Tensor) -> Tensor:  # 1/c^2 sum a^c log(a^c / b^c) - a^c + b^c
        powers = (exponent * a).exp(), (exponent * b).exp()
        return (powers[0] * exponent * (a - b) - powers[0] + powers[1]).sum(-1) / exponent**2

    assert_close(alpha_beta(student_NV, teacher_NV, alpha=exponent, beta=0.0), limit(log_p, log_q))
    assert_close(alpha_beta(student_NV, teacher_NV, alpha=0.0, beta=exponent), limit(log_q, log_p))


def test_small_exponents_lose_only_the_digits_they_are_said_to_lose():
    pair = random_pair()
    # With alpha = beta = c -> 0 it tends to half the sum of the squared log-ratios.
    limit_N = (pair[0].log_softmax(-1) - pair[1].log_softmax(-1)).square().sum(-1) / 2
    for tiny in (1e-3, 1e-6, 1e-9):
        values_N = alpha_beta(*pair, alpha=tiny, beta=tiny)
        assert_close(values_N, limit_N, rtol=50 * tiny + 1e-14 / tiny, atol=0.0)


@some_examples
@given(st.floats(0.0, 4.0), st.floats(0.0, 4.0))
def test_alpha_beta_with_its_roles_and_exponents_swapped_is_the_same(alpha, beta):
    student_NV, teacher_NV = random_pair()
    if alpha + beta < 1e-2:
        alpha += 0.5
    assert_close(
        alpha_beta(student_NV, teacher_NV, alpha=alpha, beta=beta),
        alpha_beta(teacher_NV, student_NV, alpha=beta, beta=alpha),
        rtol=1e-11,
        atol=1e-13,
    )


@pytest.mark.parametrize(
    ("one", "mirrored"),
    [
        (forward_kl, reverse_kl),
        (symmetric_kl, symmetric_kl),
        (total_variation, total_variation),
        (partial(jsd, beta=0.2), partial(jsd, beta=0.8)),
        (partial(normalised_jsd, beta=0.2), partial(normalised_jsd, beta=0.8)),
        (partial(skew_forward_kl, alpha=0.3), partial(skew_reverse_kl, alpha=0.3)),
    ],
)
def test_mirror_images(one, mirrored):
    student_NV, teacher_NV = random_pair()
    assert_close(one(student_NV, teacher_NV), mirrored(teacher_NV, student_NV))


def test_the_two_directions_of_kl_and_the_two_ends_of_jsd_are_not_the_same():
    pair = random_pair()
    assert not torch.allclose(forward_kl(*pair), reverse_kl(*pair))
    assert not torch.allclose(jsd(*pair, beta=0.1), jsd(*pair, beta=0.9))


def test_the_beta_of_jsd_weighs_the_teacher():
    # The teacher is sure of a token, the student splits: M = (0.1 + 0.45, 0.45) for beta = 0.1.
    student_NV, teacher_NV = torch.zeros(1, 2, dtype=WIDE), torch.tensor([[0.0, -math.inf]], dtype=WIDE)
    expected = 0.1 * math.log(1 / 0.55) + 0.9 * (0.5 * math.log(0.5 / 0.55) + 0.5 * math.log(0.5 / 0.45))
    assert jsd(student_NV, teacher_NV, beta=0.1).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_jsd_at_its_ends_is_a_zero_with_a_graph(beta):
    student_NV, teacher_NV = random_pair()
    student_NV[:, -1] = teacher_NV[:, -1] = -math.inf
    values_N, gradient_NV = value_and_gradient(partial(jsd, beta=beta), student_NV, teacher_NV)
    assert torch.equal(values_N, torch.zeros_like(values_N))
    assert torch.equal(gradient_NV, torch.zeros_like(gradient_NV))


@some_examples
@given(st.floats(1e-6, 1.0, exclude_max=True), st.floats(0.1, 200.0))
def test_bounded_divergences_keep_their_bounds(weight, size):
    student_NV, teacher_NV = (size * logits_NV for logits_NV in random_pair())
    slack = 1e-12
    assert (skew_forward_kl(student_NV, teacher_NV, alpha=weight) <= -math.log(weight) + slack).all()
    assert (skew_reverse_kl(student_NV, teacher_NV, alpha=weight) <= -math.log(weight) + slack).all()
    entropy = -weight * math.log(weight) - (1 - weight) * math.log1p(-weight)
    assert (jsd(student_NV, teacher_NV, beta=weight) <= entropy + slack).all()
    assert (total_variation(student_NV, teacher_NV) <= 1.0 + slack).all()


def test_total_variation_is_flat_where_the_sides_agree():
    logits_NV = random_pair()[0]
    _, gradient_NV = value_and_gradient(total_variation, logits_NV, logits_NV)
    assert torch.equal(gradient_NV, torch.zeros_like(logits_NV))


def test_what_the_teacher_rules_out_costs_forward_kl_nothing_and_reverse_kl_everything():
    teacher_NV, student_NV = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    values_N, gradient_NV = value_and_gradient(forward_kl, student_NV, teacher_NV)
    assert_close(values_N, torch.tensor([math.log(2)]))
    assert_close(gradient_NV, torch.tensor([[-0.5, 0.5]]))
    assert reverse_kl(student_NV, teacher_NV).item() == math.inf


@pytest.mark.parametrize("ruled_out_by", ["teacher", "student"])
@pytest.mark.parametrize(
    "divergence",
    [
        jsd,
        normalised_jsd,
        skew_forward_kl,
        skew_reverse_kl,
        total_variation,
        partial(alpha_beta, alpha=0.5, beta=0.5),
        partial(alpha_beta, alpha=0.2, beta=0.7),
    ],
)
def test_what_one_side_rules_out_costs_bounded_divergences_what_a_tiny_probability_does(divergence, ruled_out_by):
    pair = random_pair()
    side = pair[ruled_out_by == "teacher"]
    side[:, 3] = -1e4
    nearly = value_and_gradient(divergence, *pair)
    side[:, 3] = -math.inf
    assert_close(value_and_gradient(divergence, *pair), nearly)


@pytest.mark.parametrize(
    ("probabilities", "mu", "head"),
    [
        ([0.5, 0.3, 0.2], 0.4, [0]),
        ([0.3, 0.6, 0.1], 0.7, [0, 1]),  # the token that crosses mu belongs to the head
        ([0.4, 0.2, 0.2, 0.2], 0.5, [0, 1, 2, 3]),  # and so do those that tie with it
        ([0.9, 0.1], 0.5, [0]),
    ],
)
def test_the_head_of_adaptive_kl(probabilities, mu, head):
    teacher_NV, student_NV = torch.tensor([probabilities], dtype=WIDE).log(), random_pair(1, len(probabilities))[0]
    errors_V = (student_NV.softmax(-1) - teacher_NV.softmax(-1)).abs()[0]
    share = (errors_V[head].sum() / errors_V.sum()).item()

    def expected(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        return share * forward_kl(student_NV, teacher_NV) + (1.0 - share) * reverse_kl(student_NV, teacher_NV)

    assert_same(partial(adaptive_kl, mu=mu), expected, (student_NV, teacher_NV), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("divergence", "given_settings", "needed"),
    [
        (jsd, {"beta": -0.1}, r"jsd: got beta=-0\.1, needs 0 <= beta <= 1"),
        (jsd, {"beta": math.nan}, "jsd: got beta=nan"),
        (normalised_jsd, {"beta": 1.5}, r"normalised_jsd: got beta=1\.5, needs 0 <= beta <= 1"),
        (skew_forward_kl, {"alpha": 1.0}, r"skew_forward_kl: got alpha=1\.0, needs 0 <= alpha < 1"),
        (skew_reverse_kl, {"alpha": -0.5}, r"skew_reverse_kl: got alpha=-0\.5, needs 0 <= alpha < 1"),
        (alpha_beta, {"alpha": 0.0, "beta": 0.0}, r"alpha_beta: got alpha=0\.0, beta=0\.0, needs both at least 0"),
        (alpha_beta, {"alpha": 1.0, "beta": -0.5}, r"alpha_beta: got alpha=1\.0, beta=-0\.5"),
        (alpha_beta, {"alpha": math.inf, "beta": 1.0}, "alpha_beta: got alpha=inf"),
        (adaptive_kl, {"mu": 0.0}, r"adaptive_kl: got mu=0\.0, needs 0 < mu < 1"),
        (adaptive_kl, {"mu": 1.0}, r"adaptive_kl: got mu=1\.0, needs 0 < mu < 1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(divergence, given_settings, needed):
    with pytest.raises(ValueError, match=needed):
        divergence(*random_pair(), **given_settings)


def test_alpha_beta_has_no_default_that_would_choose_for_the_user():
    with pytest.raises(TypeError, match="alpha"):
        DIVERGENCES["alpha_beta"](*random_pair())


def cross_entropy_by_hand(row: list[float], target: int, eps: float) -> float:
    log_total = math.log(math.fsum(math.exp(value) for value in row if value > -math.inf))
    costs = [log_total - value for value in row if value > -math.inf]
    return (1 - eps) * (log_total - row[target]) + eps * math.fsum(costs) / len(costs)


@some_examples
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.9]))
def test_cross_entropy_is_its_formula_with_or_without_padding(rows, vocabulary, pads, eps):
    logits_NV, targets_N = random_pair(rows, vocabulary)[0], torch.randint(0, vocabulary, (rows,))
    padded_NV = torch.cat([logits_NV, torch.full((rows, pads), -math.inf, dtype=WIDE)], -1).requires_grad_()
    values_N = cross_entropy(padded_NV, targets_N, eps)
    by_hand = [cross_entropy_by_hand(*row, eps) for row in zip(padded_NV.tolist(), targets_N.tolist(), strict=True)]
    assert_close(values_N.detach(), torch.tensor(by_hand, dtype=WIDE), rtol=1e-11, atol=1e-12)
    (gradient_NV,) = torch.autograd.grad(values_N.sum(), padded_NV)
    wanted_NV = (1 - eps) * torch.nn.functional.one_hot(targets_N, vocabulary).double() + eps / vocabulary
    assert_close(gradient_NV[:, :vocabulary], logits_NV.softmax(-1) - wanted_NV, rtol=1e-9, atol=1e-12)
    assert torch.equal(gradient_NV[:, vocabulary:], torch.zeros(rows, pads, dtype=WIDE))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch(eps):
    logits_NV, targets_N = random_pair()[0], torch.randint(0, 11, (3,))
    theirs_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=eps)
    assert_close(cross_entropy(logits_NV, targets_N, eps), theirs_N)


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_cross_entropy_gradcheck(eps):
    logits_NV, targets_N = random_pair()[0].requires_grad_(), torch.randint(0, 11, (3,))
    assert torch.autograd.gradcheck(lambda rows_NV: cross_entropy(rows_NV, targets_N, eps), logits_NV)


def test_cross_entropy_bears_padding_ids_and_large_logits():
    logits_NV = torch.tensor([[1e4, 0.0, -math.inf], [0.0, -1e4, -math.inf]], requires_grad=True)
    for eps, expected, gradient in [
        (0.0, [1e4, 0.0], [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]),
        (0.5, [7500.0, 2500.0], [[0.75, -0.75, 0.0], [0.25, -0.25, 0.0]]),
    ]:
        values_N = cross_entropy(logits_NV, torch.tensor([1, 0]), eps)
        (gradient_NV,) = torch.autograd.grad(values_N.sum(), logits_NV)
        assert_close(values_N.detach(), torch.tensor(expected))
        assert_close(gradient_NV, torch.tensor(gradient))


def test_cross_entropy_without_smoothing_does_nothing_extra(watch):
    logits_NV, targets_N = random_pair()[0], torch.zeros(3, dtype=torch.int64)
    with watch:
        cross_entropy(logits_NV, targets_N)
    assert set(watch.operations) - {"promote_types"} <= {"_log_softmax", "unsqueeze", "gather", "squeeze", "neg"}


@pytest.mark.parametrize("eps", [-0.1, 1.0, math.nan])
def test_cross_entropy_refuses_a_smoothing_that_leaves_no_label(eps):
    with pytest.raises(ValueError, match=r"cross_entropy: got label_smoothing=.*, needs 0 <= label_smoothing < 1"):
        cross_entropy(torch.zeros(1, 4), torch.tensor([0]), eps)


def test_cross_entropy_refuses_a_token_beyond_the_vocabulary():
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy(torch.zeros(1, 4), torch.tensor([4]))
