"""Laws of every divergence, against formulas written again in plain Python floats, and their closed gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.losses.divergence import (
    DIVERGENCES,
    Divergence,
    adaptive_kl,
    alpha_beta,
    forward_kl,
    jsd,
    normalised_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)

Row = list[float]
TEMPERATURES = [0.5, 1.0, 2.0, 7.0]
WIDE = torch.float64

few_examples = settings(deadline=None, max_examples=15)


class Case(NamedTuple):
    """A divergence, and by hand: its value and the a of its gradient (a - q sum a) / T, from p and q."""

    divergence: Divergence
    value: Callable[[Row, Row], float]
    a: Callable[[Row, Row], Row]

    @property
    def name(self) -> str:
        function = getattr(self.divergence, "func", self.divergence)
        given_settings = getattr(self.divergence, "keywords", {})
        return "-".join([function.__name__, *(f"{key}{value}" for key, value in given_settings.items())])


def kl(a: Row, b: Row) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def mix(weight: float, a: Row, b: Row) -> Row:
    return [weight * x + (1 - weight) * y for x, y in zip(a, b, strict=True)]


def forward_a(p: Row, q: Row) -> Row:
    return [-x for x in p]


def reverse_a(p: Row, q: Row) -> Row:
    return [y * math.log(y / x) for x, y in zip(p, q, strict=True)]


def jsd_case(beta: float, scale: float, divergence: Divergence) -> Case:
    def value(p: Row, q: Row) -> float:
        return scale * (beta * kl(p, mix(beta, p, q)) + (1 - beta) * kl(q, mix(beta, p, q)))

    def a(p: Row, q: Row) -> Row:
        return [scale * (1 - beta) * y * math.log(y / m) for y, m in zip(q, mix(beta, p, q), strict=True)]

    return Case(partial(divergence, beta=beta), value, a)


def skew_forward_case(alpha: float) -> Case:
    def a(p: Row, q: Row) -> Row:
        return [-(1 - alpha) * x * y / m for x, y, m in zip(p, q, mix(alpha, p, q), strict=True)]

    return Case(partial(skew_forward_kl, alpha=alpha), lambda p, q: kl(p, mix(alpha, p, q)), a)


def skew_reverse_case(alpha: float) -> Case:
    def a(p: Row, q: Row) -> Row:
        return [y * (math.log(y / m) - alpha * y / m) for y, m in zip(q, mix(alpha, q, p), strict=True)]

    return Case(partial(skew_reverse_kl, alpha=alpha), lambda p, q: kl(q, mix(alpha, q, p)), a)


def alpha_beta_case(alpha: float, beta: float) -> Case:
    total = alpha + beta

    def value(p: Row, q: Row) -> float:
        return math.fsum(
            (alpha * x**total + beta * y**total) / total - x**alpha * y**beta for x, y in zip(p, q, strict=True)
        ) / (alpha * beta)

    def a(p: Row, q: Row) -> Row:
        return [(y**total - x**alpha * y**beta) / alpha for x, y in zip(p, q, strict=True)]

    return Case(partial(alpha_beta, alpha=alpha, beta=beta), value, a)


def adaptive_case(mu: float) -> Case:
    def head_share(p: Row, q: Row) -> float:
        head, mass = set(), 0.0
        for v in sorted(range(len(p)), key=lambda v: -p[v]):
            tied = head and p[v] == min(p[u] for u in head)
            if mass < mu or tied:
                head.add(v)
                mass += p[v]
        errors = [abs(x - y) for x, y in zip(p, q, strict=True)]
        return sum(errors[v] for v in head) / (sum(errors) or 1.0)

    def value(p: Row, q: Row) -> float:
        share = head_share(p, q)
        return share * kl(p, q) + (1 - share) * kl(q, p)

    def a(p: Row, q: Row) -> Row:
        return mix(head_share(p, q), forward_a(p, q), reverse_a(p, q))

    return Case(partial(adaptive_kl, mu=mu), value, a)


CASES = [
    Case(forward_kl, kl, forward_a),
    Case(reverse_kl, lambda p, q: kl(q, p), reverse_a),
    Case(
        symmetric_kl,
        lambda p, q: (kl(p, q) + kl(q, p)) / 2,
        lambda p, q: mix(0.5, forward_a(p, q), reverse_a(p, q)),
    ),
    *(jsd_case(beta, 1.0, jsd) for beta in (0.5, 0.1, 0.999)),
    *(jsd_case(beta, 1 / (beta * (1 - beta)), normalised_jsd) for beta in (0.5, 0.02, 0.9)),
    *(skew_forward_case(alpha) for alpha in (0.1, 0.7)),
    *(skew_reverse_case(alpha) for alpha in (0.1, 0.7)),
    Case(
        total_variation,
        lambda p, q: math.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2,
        lambda p, q: [y / 2 * ((y > x) - (y < x)) for x, y in zip(p, q, strict=True)],
    ),
    *(alpha_beta_case(*pair) for pair in ((0.5, 0.5), (0.2, 0.7), (1.5, 0.3), (1.0, 1.0))),
    *(adaptive_case(mu) for mu in (0.5371, 0.8893)),  # no mass that simple ties add up to
]

every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
smooth = [case for case in CASES if "adaptive" not in case.name]  # its weights are constants to the gradient only
every_smooth_case = pytest.mark.parametrize("case", smooth, ids=[case.name for case in smooth])


def softmax(row: Row, temperature: float) -> Row:
    top = max(row)
    powers = [math.exp((value - top) / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


def by_hand(case: Case, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Values [N] and gradients [N, V], float64."""
    values, gradients = [], []
    for student, teacher in zip(student_NV.tolist(), teacher_NV.tolist(), strict=True):
        q, p = softmax(student, temperature), softmax(teacher, temperature)
        a = case.a(p, q)
        values.append(case.value(p, q))
        gradients.append([(x - y * math.fsum(a)) / temperature for x, y in zip(a, q, strict=True)])
    return torch.tensor(values, dtype=WIDE), torch.tensor(gradients, dtype=WIDE)


def value_and_gradient(divergence: Divergence, student_NV: Tensor, teacher_NV: Tensor, temperature=1.0):
    student_NV = student_NV.detach().clone().requires_grad_()
    values_N = divergence(student_NV, teacher_NV, temperature)
    (gradient_NV,) = torch.autograd.grad(values_N.sum(), student_NV)
    return values_N.detach(), gradient_NV


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    # Sixteenths: logits are tied exactly or clearly apart, so that rounding never decides who is in a head.
    number = st.integers(-320, 320).map(lambda sixteenths: sixteenths / 16)
    row = st.lists(number, min_size=vocabulary, max_size=vocabulary)
    pair = [draw(st.lists(row, min_size=rows, max_size=rows)) for _ in range(2)]
    return torch.tensor(pair[0], dtype=WIDE), torch.tensor(pair[1], dtype=WIDE)


def random_pair(rows: int = 3, vocabulary: int = 11, dtype: torch.dtype = WIDE) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(rows, vocabulary, dtype=dtype), 3 * torch.randn(rows, vocabulary, dtype=dtype)


def test_every_divergence_of_the_table_is_tested_here():
    assert {case.name.split("-")[0] for case in CASES} == set(DIVERGENCES)


@every_case
@few_examples
@given(logit_pairs(), st.sampled_from(TEMPERATURES))
def test_values_and_gradients_are_those_of_the_formulas(case, pair, temperature):
    values_N, gradient_NV = value_and_gradient(case.divergence, *pair, temperature)
    expected_N, expected_NV = by_hand(case, *pair, temperature)
    assert_close(values_N, expected_N, rtol=1e-9, atol=1e-12)
    if "total_variation" in case.name:  # where p = q up to rounding the sign is anybody's
        clear_NV = (pair[0].softmax(-1) - pair[1].softmax(-1)).abs() > 1e-9
        gradient_NV, expected_NV = gradient_NV[clear_NV.all(-1)], expected_NV[clear_NV.all(-1)]
    assert_close(gradient_NV, expected_NV, rtol=1e-8, atol=1e-11)


@every_case
@few_examples
@given(logit_pairs(), st.sampled_from(TEMPERATURES))
def test_never_below_zero(case, pair, temperature):
    assert (case.divergence(*pair, temperature) >= -1e-13).all()


@every_case
@few_examples
@given(logit_pairs(), st.sampled_from(TEMPERATURES), st.floats(-50, 50))
def test_zero_and_flat_where_the_distributions_agree(case, pair, temperature, shift):
    logits_NV = pair[0]
    values_N, gradient_NV = value_and_gradient(case.divergence, logits_NV, logits_NV.clone(), temperature)
    assert torch.equal(values_N, torch.zeros_like(values_N))
    assert_close(gradient_NV, torch.zeros_like(gradient_NV), rtol=0.0, atol=1e-14)
    shifted_N = case.divergence(logits_NV + shift, logits_NV, temperature)
    assert_close(shifted_N, torch.zeros_like(shifted_N), rtol=0.0, atol=1e-12)


@every_smooth_case
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradcheck(case, temperature):
    student_NV, teacher_NV = random_pair(2, 7)
    student_NV.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits_NV: case.divergence(logits_NV, teacher_NV, temperature), student_NV)


@every_smooth_case
def test_second_derivatives_are_right_too(case):
    student_NV, teacher_NV = random_pair(2, 5)
    if case.divergence is not total_variation:  # whose gradient jumps where the sides agree
        student_NV[1] = teacher_NV[1]
    student_NV.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda logits_NV: case.divergence(logits_NV, teacher_NV, 2.0), student_NV)


@every_case
def test_a_temperature_divides_the_logits_of_both_sides(case):
    student_NV, teacher_NV = random_pair()
    cooled_N = case.divergence(student_NV / 3.0, teacher_NV / 3.0)
    assert_close(case.divergence(student_NV, teacher_NV, 3.0), cooled_N)
    assert not torch.allclose(case.divergence(student_NV, teacher_NV), cooled_N)


@every_case
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_in_a_tensor_equals_one_in_a_float(case, temperature, dtype):
    pair = random_pair(dtype=dtype)
    in_float = value_and_gradient(case.divergence, *pair, temperature)
    in_tensor = value_and_gradient(case.divergence, *pair, torch.tensor(temperature, dtype=dtype))
    assert_close(in_tensor, in_float, rtol=0.0, atol=0.0)


@every_case
@few_examples
@given(st.lists(st.booleans(), min_size=3, max_size=3))
def test_leaving_rows_out_changes_no_other_row(case, kept):
    student_NV, teacher_NV = random_pair()
    kept_N = torch.tensor(kept)
    whole_N = case.divergence(student_NV, teacher_NV)
    assert_close(whole_N[kept_N], case.divergence(student_NV[kept_N], teacher_NV[kept_N]), rtol=1e-14, atol=0.0)


@every_case
def test_the_order_of_the_tokens_does_not_matter(case):
    student_NV, teacher_NV = random_pair()
    teacher_NV[:, 4:8] = teacher_NV[:, 4:5]  # ties
    order_V = torch.randperm(student_NV.shape[1])
    assert_close(
        case.divergence(student_NV[:, order_V], teacher_NV[:, order_V]), case.divergence(student_NV, teacher_NV)
    )


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_ids_change_neither_value_nor_gradient(case, dtype):
    student_NV, teacher_NV = random_pair(dtype=dtype)
    pads_NV = torch.full((len(student_NV), 3), -math.inf, dtype=dtype)
    padded = torch.cat([student_NV, pads_NV], -1), torch.cat([teacher_NV, pads_NV], -1)
    plain_N, plain_NV = value_and_gradient(case.divergence, student_NV, teacher_NV, 2.0)
    padded_N, padded_NV = value_and_gradient(case.divergence, *padded, 2.0)
    assert_close(padded_N, plain_N)
    assert_close(padded_NV[:, :-3], plain_NV)
    assert torch.equal(padded_NV[:, -3:], torch.zeros_like(pads_NV))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4, 150.0])
def test_large_logits_stay_finite_and_right(case, size, dtype):
    student_NV = torch.tensor([[size, 0.0, 1.0], [0.0, size, 2.0], [size, size, -size]], dtype=dtype)
    teacher_NV = torch.tensor([[0.0, size, 1.0], [0.0, size, 2.0], [-size, 0.0, -size]], dtype=dtype)
    values_N, gradient_NV = value_and_gradient(case.divergence, student_NV, teacher_NV)
    assert torch.isfinite(gradient_NV).all()
    assert (values_N >= 0.0).all()
    assert torch.isfinite(values_N).all()
    assert values_N[1] == 0.0
    # At a temperature that makes them small, the same logits say the same as small ones.
    cooled_N, cooled_NV = value_and_gradient(case.divergence, student_NV, teacher_NV, abs(size))
    expected_N, expected_NV = by_hand(case, student_NV, teacher_NV, abs(size))
    assert_close(cooled_N, expected_N.to(dtype), rtol=1e-4, atol=1e-6)
    assert_close(cooled_NV[0], expected_NV[0].to(dtype), rtol=1e-4, atol=1e-6)


@every_case
@pytest.mark.parametrize("distance", [3.0, 0.02])
def test_float32_agrees_with_float64(case, distance):
    teacher_NV = 3 * torch.randn(4, 1000, dtype=WIDE)
    student_NV = teacher_NV + distance * torch.randn(4, 1000, dtype=WIDE)
    student_NV, teacher_NV = student_NV.float(), teacher_NV.float()
    narrow_N, narrow_NV = value_and_gradient(case.divergence, student_NV, teacher_NV)
    wide_N, wide_NV = value_and_gradient(case.divergence, student_NV.double(), teacher_NV.double())
    assert narrow_N.dtype == torch.float32
    assert_close(narrow_N.double(), wide_N, rtol=1e-3, atol=2e-6)
    assert (narrow_NV - wide_NV).norm() <= 3e-4 * wide_NV.norm()


@every_case
def test_half_precision_logits_are_widened_first(case):
    student_NV, teacher_NV = (logits_NV.bfloat16() for logits_NV in random_pair())
    assert torch.equal(
        case.divergence(student_NV, teacher_NV, 3.0), case.divergence(student_NV.float(), teacher_NV.float(), 3.0)
    )


@every_case
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_torch_func_gives_the_gradient_of_autograd(case, temperature):
    student_NV, teacher_NV = random_pair(dtype=torch.float32)
    student_NV[:, -1] = teacher_NV[:, -1] = -math.inf
    softness = torch.tensor(temperature)

    def total(logits_NV: Tensor) -> Tensor:
        return case.divergence(logits_NV, teacher_NV, softness).sum()

    gradient_NV, value = torch.func.grad_and_value(total)(student_NV)
    values_N, expected_NV = value_and_gradient(case.divergence, student_NV, teacher_NV, temperature)
    assert_close(value, values_N.sum())
    assert_close(gradient_NV, expected_NV)


@every_case
def test_a_compiler_sees_one_graph_whatever_the_temperature_and_the_number_of_rows(case):
    torch.compiler.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(case.divergence, fullgraph=True, dynamic=True, backend=backend)
    for rows, temperature in [(3, 2.0), (4, 0.7), (7, 1.0)]:
        pair = random_pair(rows)
        assert_close(traced(*pair, torch.tensor(temperature)), case.divergence(*pair, torch.tensor(temperature)))
    assert len(graphs) == 1


@every_case
def test_the_inputs_are_left_as_they_were(case):
    student_NV, teacher_NV = random_pair()
    before = student_NV.clone(), teacher_NV.clone()
    case.divergence(student_NV, teacher_NV, 1.0)
    assert torch.equal(student_NV, before[0])
    assert torch.equal(teacher_NV, before[1])


@every_case
def test_no_rows_give_no_values(case):
    assert case.divergence(torch.zeros(0, 5), torch.zeros(0, 5), 2.0).shape == (0,)


@every_case
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(case, temperature):
    with pytest.raises(ValueError, match=r"softening: got temperature=.*, needs a finite number above 0"):
        case.divergence(*random_pair(), temperature)


@every_case
def test_vocabularies_of_different_sizes_are_refused(case):
    with pytest.raises(ValueError, match=r"student logits \(3, 11\) and teacher logits \(3, 1\) differ"):
        case.divergence(random_pair()[0], torch.zeros(3, 1, dtype=WIDE))
