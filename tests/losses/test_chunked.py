"""The chunked loss against plain autograd over dense logits, written a second time with torch's own loss functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from potstill.losses import HeadTerm, blocks, can_compile, chunked, compiling, distillation_loss, position_scores
from potstill.losses import scores as scores_of
from potstill.losses.arithmetic import Arithmetic
from potstill.losses.sides import Side
from potstill.types import Head, LossSum, States

FORWARD, REVERSE, HARD = HeadTerm("forward_kl"), HeadTerm("reverse_kl"), HeadTerm("cross_entropy")
ALL_TERMS = (
    HeadTerm("forward_kl", 0.7, 2.0),
    HeadTerm("reverse_kl", 1.3, 0.5, times_temperature_squared=False),
    HeadTerm("cross_entropy", 0.4),
)


@dataclass(frozen=True)
class Problem:
    student_ND: Tensor
    head: Head
    targets_N: Tensor
    teacher_ND: Tensor
    teacher_head: Head

    @property
    def learned(self) -> list[Tensor]:
        return [part for part in (self.student_ND, self.head.weight_VD, self.head.bias_V) if part is not None]

    def loss(self, terms: Sequence[HeadTerm], compiled: bool | None = False) -> LossSum:
        student, teacher = sides(self)
        return distillation_loss(student, self.targets_N, terms, teacher=teacher, compiled=compiled)


def sides(problem: Problem) -> tuple[States, States]:
    return States(problem.student_ND, problem.head), States(problem.teacher_ND, problem.teacher_head)


def make_problem(
    rows: int = 7,
    vocabulary: int = 13,
    *,
    widths: tuple[int, int] = (4, 3),
    bias: bool = True,
    finish: tuple[float, float | None] = (1.0, None),
    teacher_finish: tuple[float, float | None] = (1.0, None),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Problem:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device=device, dtype=dtype)

    heads = [
        Head(draw(vocabulary, width), draw(vocabulary) if bias else None, *own_finish)
        for width, own_finish in zip(widths, (finish, teacher_finish), strict=True)
    ]
    problem = Problem(
        draw(rows, widths[0]),
        heads[0],
        torch.randint(0, vocabulary, (rows,), device=device),
        draw(rows, widths[1]),
        heads[1],
    )
    for part in problem.learned:
        part.requires_grad_()
    return problem


def in_float64(problem: Problem) -> Problem:
    """The same numbers, exactly, as leaves of their own."""

    def copy(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach().cpu().double().requires_grad_(part.requires_grad)

    def copy_head(head: Head) -> Head:
        return replace(head, weight_VD=copy(head.weight_VD), bias_V=copy(head.bias_V))

    return Problem(
        copy(problem.student_ND),
        copy_head(problem.head),
        problem.targets_N.cpu(),
        copy(problem.teacher_ND),
        copy_head(problem.teacher_head),
    )


def dense_logits(rows_ND: Tensor, head: Head) -> Tensor:
    logits_NV = functional.linear(rows_ND, head.weight_VD, head.bias_V) * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def dense_loss(problem: Problem, terms: Sequence[HeadTerm]) -> tuple[Tensor, dict[str, Tensor]]:
    student_NV = dense_logits(problem.student_ND, problem.head)
    teacher_NV = dense_logits(problem.teacher_ND, problem.teacher_head)
    total, sums = student_NV.sum() * 0.0, {}
    for term in terms:
        log_q, log_p = (functional.log_softmax(side / term.temperature, -1) for side in (student_NV, teacher_NV))
        if term.kind == "forward_kl":
            value = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        elif term.kind == "reverse_kl":
            value = functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
        else:
            value = functional.cross_entropy(student_NV, problem.targets_N, reduction="sum")
        squared = term.temperature**2 if term.kind != "cross_entropy" and term.times_temperature_squared else 1.0
        total = total + term.weight * squared * value
        sums[term.kind] = value.detach()
    return total, sums


@contextmanager
def chunks_of(rows: int, vocabulary: int, itemsize: int = 8, tile_rows: int = 2) -> Iterator[None]:
    """Blocks of so many rows, and element-wise work on so many of them at once."""
    sizes = (count * vocabulary * itemsize for count in (rows, tile_rows))
    chunk, tile = sizes
    with (
        mock.patch.dict(blocks.CHUNK_BYTES, cpu=chunk),
        mock.patch.dict(blocks.TILE_BYTES, cpu=tile),
        mock.patch.object(blocks, "TILE_ROWS", 1),
    ):
        yield


def gradients(problem: Problem, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, problem.learned))


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())


finishes = st.tuples(st.sampled_from([1.0, 0.25, 3.0]), st.sampled_from([None, 2.0, 30.0]))
"""(scale, softcap)"""


@st.composite
def term_lists(draw: st.DrawFn) -> list[HeadTerm]:
    kinds = draw(st.lists(st.sampled_from(["forward_kl", "reverse_kl", "cross_entropy"]), min_size=1, unique=True))
    return [
        HeadTerm(
            kind, draw(st.sampled_from([0.25, 1.0, 3.0])), draw(st.sampled_from([0.5, 1.0, 2.0])), draw(st.booleans())
        )
        for kind in kinds
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 9),
    st.integers(1, 12),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.booleans(),
    st.tuples(finishes, finishes),
    term_lists(),
    st.tuples(st.integers(1, 10), st.integers(0, 5)),
)
def test_chunked_equals_dense_in_float64(rows, vocabulary, widths, bias, both, terms, sizes):
    problem = make_problem(rows, vocabulary, widths=widths, bias=bias, finish=both[0], teacher_finish=both[1])
    with chunks_of(sizes[0], vocabulary, tile_rows=sizes[1]):
        result = problem.loss(terms)
    total, sums = dense_loss(problem, terms)
    exactly: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}
    assert_close(result.total, total, **exactly)
    assert_close(dict(result.terms), sums, **exactly)
    assert result.count == rows
    assert_close(gradients(problem, result.total), gradients(problem, total), **exactly)


def test_a_tile_has_at_least_four_rows_of_its_block():
    with mock.patch.dict(blocks.TILE_BYTES, cpu=1):
        sizes = [piece.stop - piece.start for piece in blocks.tiles(torch.zeros(85, 10))]
    assert set(sizes) == {3, 4}
    assert sum(sizes) == 85


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11, 21])
def test_tiles_cover_every_row_of_a_block_once_and_none_is_above_its_bytes(rows):
    with chunks_of(1, 10, itemsize=4, tile_rows=4):
        slices = list(blocks.tiles(torch.zeros(rows, 10)))
    covered = [row for piece in slices for row in range(rows)[piece]]
    assert covered == list(range(rows))
    assert max(len(range(rows)[piece]) for piece in slices) <= 4


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 11, 21])
def test_chunks_cover_every_row_once_and_none_is_above_its_bytes(rows):
    side = Side.of(States(torch.zeros(rows, 3), Head(torch.zeros(10, 3))))
    with chunks_of(4, 10, itemsize=4):
        slices = list(blocks._chunks(side))
    covered = [row for piece in slices for row in range(piece.start, piece.stop)]
    sizes = [piece.stop - piece.start for piece in slices]
    assert covered == list(range(rows))
    assert max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1


def test_a_row_larger_than_a_chunk_still_goes_through():
    with chunks_of(0, 13):
        result = make_problem().loss(ALL_TERMS)
    assert torch.isfinite(result.total)


def test_the_inputs_are_not_written_to():
    problem = make_problem()
    inputs = [*problem.learned, problem.targets_N, problem.teacher_ND, problem.teacher_head.weight_VD]
    before = [part.detach().clone() for part in inputs]
    problem.loss(ALL_TERMS).total.backward()
    assert all(torch.equal(part, copy) for part, copy in zip(inputs, before, strict=True))


def test_the_gradient_is_scaled_by_what_comes_from_above():
    problem = make_problem()
    once = gradients(problem, problem.loss(ALL_TERMS).total)
    result = problem.loss(ALL_TERMS).total
    assert_close(gradients(problem, -2.5 * result + result), [-1.5 * gradient for gradient in once])


@pytest.mark.parametrize("terms", [[HARD], [FORWARD], [REVERSE], ALL_TERMS], ids=["hard", "forward", "reverse", "all"])
def test_zero_rows_give_zero_with_a_graph_and_zero_gradients(terms):
    problem = make_problem(rows=0)
    result = problem.loss(terms)
    assert (result.total.item(), result.count) == (0.0, 0)
    assert all(value.item() == 0.0 for value in result.terms.values())
    result.total.backward()
    for part in problem.learned:
        assert torch.equal(part.grad, torch.zeros_like(part))


def test_terms_are_unweighted_sums_without_a_graph():
    result = make_problem().loss(ALL_TERMS)
    weighted = [term.factor * result.terms[term.kind] for term in ALL_TERMS]
    assert_close(result.total.detach(), torch.stack(weighted).sum())
    assert not any(value.requires_grad for value in result.terms.values())


def test_the_factor_is_the_weight_times_temperature_squared_for_soft_terms_only():
    assert HeadTerm("forward_kl", 0.5, 4.0).factor == 8.0
    assert HeadTerm("reverse_kl", 0.5, 4.0, times_temperature_squared=False).factor == 0.5
    assert HeadTerm("cross_entropy", 0.5, 4.0).factor == 0.5


# ---------------------------------------------------------------------------------------------- what is not computed


def test_no_tensor_is_as_large_as_rows_times_vocabulary(watch):
    problem = make_problem(40, 301)
    with chunks_of(5, 301), watch:
        problem.loss(ALL_TERMS).total.backward()
    assert watch.largest == 5 * 301


def test_a_frozen_head_gets_no_gradient_and_costs_no_product(watch):
    problem = make_problem()
    expected = gradients(problem, problem.loss(ALL_TERMS).total)[0]
    frozen = replace(problem, head=Head(problem.head.weight_VD.detach(), problem.head.bias_V.detach()))
    with chunks_of(7, 13), watch:
        frozen.loss(ALL_TERMS).total.backward()
    assert_close(frozen.student_ND.grad, expected)
    assert frozen.head.weight_VD.grad is None
    assert (watch.operations["mm"], watch.operations["addmm"]) == (3, 0)


def test_frozen_hidden_states_get_no_gradient_and_cost_no_product(watch):
    problem = make_problem()
    expected = gradients(problem, problem.loss(ALL_TERMS).total)[1:]
    frozen = replace(problem, student_ND=problem.student_ND.detach())
    with chunks_of(7, 13), watch:
        result = frozen.loss(ALL_TERMS)
    assert_close(list(torch.autograd.grad(result.total, problem.learned[1:])), expected)
    assert (watch.operations["mm"], watch.operations["addmm"]) == (3, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_loss_is_computed(watch, mode):
    problem = make_problem()
    expected = problem.loss(ALL_TERMS)
    with chunks_of(7, 13), mode(), watch:
        result = problem.loss(ALL_TERMS)
    assert not result.total.requires_grad
    assert_close(result.total, expected.total.detach())
    assert_close(dict(result.terms), dict(expected.terms))
    # inference_mode does not take `matmul` apart into `mm`
    assert (watch.operations["mm"] + watch.operations["matmul"], watch.operations["addmm"]) == (2, 0)


def test_the_teacher_never_gets_a_gradient():
    problem = make_problem()
    teacher = [problem.teacher_ND, problem.teacher_head.weight_VD, problem.teacher_head.bias_V]
    for part in teacher:
        part.requires_grad_()
    problem.loss(ALL_TERMS).total.backward()
    assert [part.grad for part in teacher] == [None, None, None]


def test_hard_labels_alone_never_touch_the_teacher():
    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"the teacher was asked for {name}")

    problem = make_problem()
    watched = replace(problem, teacher_ND=Untouchable(), teacher_head=Untouchable())
    assert_close(watched.loss([HARD]).total, dense_loss(problem, [HARD])[0])


@pytest.mark.parametrize("compiled", [False, None])
def test_within_saved_tensor_hooks_it_says_what_to_do(compiled):
    with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError, match=r"inside torch\.utils\.checkpoint"):
        make_problem().loss(ALL_TERMS, compiled=compiled)
    make_problem().loss(ALL_TERMS).total.backward()


def test_backward_twice_says_what_happened():
    total = make_problem().loss(ALL_TERMS).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="distillation_loss: backward ran twice through one call"):
        total.backward()


# ------------------------------------------------------------------------------------------------- tied, padded heads


def test_a_head_shared_with_the_embeddings_gathers_both_gradients():
    problem = make_problem(bias=False)
    ids_N = torch.randint(0, 13, (7,))

    def total(embedding_VD: Tensor, fused: bool) -> Tensor:
        tied = replace(problem, student_ND=embedding_VD[ids_N].tanh(), head=Head(embedding_VD))
        return tied.loss(ALL_TERMS).total if fused else dense_loss(tied, ALL_TERMS)[0]

    found, expected = (problem.head.weight_VD.detach().clone().requires_grad_() for _ in range(2))
    total(found, fused=True).backward()
    total(expected, fused=False).backward()
    assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-11)


def test_padding_rows_of_both_heads_change_nothing_and_get_a_gradient_of_exactly_zero():
    problem = make_problem()

    def padded(head: Head, rows: int) -> Head:
        weight_VD = torch.cat([head.weight_VD.detach(), 100 * torch.randn(rows, head.weight_VD.shape[1]).double()])
        return Head(weight_VD.requires_grad_(), torch.cat([head.bias_V.detach(), torch.ones(rows)]).requires_grad_())

    student, teacher = padded(problem.head, 3), padded(problem.teacher_head, 6)
    sliced = replace(problem, head=student.sliced(13), teacher_head=teacher.sliced(13))
    result, expected = sliced.loss(ALL_TERMS), problem.loss(ALL_TERMS)
    assert torch.equal(result.total, expected.total)
    found = torch.autograd.grad(result.total, [student.weight_VD, student.bias_V])
    for gradient, plain in zip(found, gradients(problem, expected.total)[1:], strict=True):
        assert torch.equal(gradient[:13], plain)
        assert torch.equal(gradient[13:], torch.zeros_like(gradient[13:]))


# ------------------------------------------------------------------------------------------------------- wrong input


def wider(head: Head) -> Head:
    return Head(torch.zeros(head.vocabulary, head.weight_VD.shape[1] + 1).double())


@pytest.mark.parametrize(
    ("change", "terms", "text"),
    [
        (lambda p: {"targets_N": p.targets_N[:-1]}, [HARD], r"targets_N \(6,\) does not fit the student's 7 rows"),
        (lambda p: {"targets_N": p.targets_N[:, None]}, [HARD], r"targets_N \(7, 1\) does not fit"),
        (
            lambda p: {"targets_N": p.targets_N - 100},
            [HARD],
            r"the head has tokens 0\.\.12\. Pass supervised rows only",
        ),
        (lambda p: {"targets_N": p.targets_N + 13}, [FORWARD], r"the head has tokens 0\.\.12"),
        (lambda p: {"targets_N": None}, [FORWARD, HARD], r"cross_entropy needs the tokens that came"),
        (lambda p: {"student_ND": p.student_ND[None]}, [HARD], r"student's rows \(1, 7, 4\) and head \(13, 4\)"),
        (lambda p: {"head": wider(p.head)}, [HARD], r"student's rows \(7, 4\) and head \(13, 5\)"),
        (lambda p: {"head": replace(p.head, bias_V=p.head.bias_V[1:])}, [HARD], r"student's bias \(12,\)"),
        (lambda p: {"teacher_ND": p.teacher_ND[1:]}, [FORWARD], r"teacher's rows \(6, 3\) .* do not fit 7 rows"),
        (lambda p: {"teacher_head": wider(p.teacher_head)}, [REVERSE], r"teacher's rows \(7, 3\) and head \(13, 4\)"),
        (lambda p: {"teacher_head": p.teacher_head.sliced(12)}, [FORWARD], r"13 and 12 tokens: .* with Head\.sliced"),
        (lambda p: {"targets_N": p.targets_N.int()}, [HARD], r"targets_N is torch\.int32: needs int64"),
        (lambda p: {"targets_N": p.targets_N.to("meta")}, [FORWARD, HARD], r"targets_N is on meta, .* rows are on cpu"),
        (lambda p: {"student_ND": p.student_ND.long()}, [HARD], r"student's rows are torch\.int64.*needs floats"),
        (lambda p: {"head": replace(p.head, softcap=0.0)}, [HARD], r"student's softcap 0\.0 must be above 0"),
        (lambda p: {}, ["forward_kl"], r"are not all HeadTerms"),
        (lambda p: {}, [], r"terms is empty"),
        (
            lambda p: {},
            [FORWARD, HeadTerm("forward_kl", temperature=2.0)],
            r"have a name twice.*function with a name of its own",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(change, terms, text):
    problem = make_problem()
    with pytest.raises(ValueError, match=text):
        replace(problem, **change(problem)).loss(terms)


# --------------------------------------------------------------------------------------------------------- precision


def nearly_agreeing(dtype: torch.dtype, device: str) -> Problem:
    """A student whose distributions share .98 of their mass with the teacher's."""
    problem = make_problem(96, 257, widths=(32, 32), bias=False, dtype=dtype, device=device)
    noise_ND = 0.043 * torch.randn(96, 32, device=device)
    student_ND = (problem.teacher_ND.float() + noise_ND).to(dtype).requires_grad_()
    head = Head((0.2 * problem.head.weight_VD.detach()).requires_grad_())
    return replace(problem, student_ND=student_ND, head=head, teacher_head=Head(head.weight_VD.detach()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("term", [FORWARD, REVERSE])
def test_bfloat16_gradients_are_right_where_student_and_teacher_nearly_agree(term, device):
    problem = nearly_agreeing(torch.bfloat16, device)
    exact = in_float64(problem)
    p_NV, q_NV = (
        dense_logits(rows_ND, exact.head).softmax(-1).detach() for rows_ND in (exact.teacher_ND, exact.student_ND)
    )
    assert 0.975 < torch.minimum(p_NV, q_NV).sum(-1).mean() < 0.985
    expected = gradients(exact, dense_loss(exact, [term])[0])
    result = problem.loss([term])
    assert relative_error(result.total, dense_loss(exact, [term])[0].detach()) < 0.005
    for found, right in zip(gradients(problem, result.total), expected, strict=True):
        assert relative_error(found, right) <= 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_wide_and_gradients_have_the_dtype_of_what_they_belong_to(dtype, weight_dtype):
    problem = make_problem(dtype=dtype)
    head = Head(problem.head.weight_VD.detach().to(weight_dtype).requires_grad_(), problem.head.bias_V)
    mixed = replace(problem, head=head)
    result = mixed.loss(ALL_TERMS)
    assert result.total.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert [gradient.dtype for gradient in gradients(mixed, result.total)] == [dtype, weight_dtype, dtype]


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_side_keeps_its_own_dtype(dtype, teacher_dtype):
    problem, other = make_problem(dtype=dtype), make_problem(dtype=teacher_dtype)
    mixed = replace(problem, teacher_ND=other.teacher_ND, teacher_head=other.teacher_head)
    exact = in_float64(mixed)
    assert relative_error(mixed.loss(ALL_TERMS).total, dense_loss(exact, ALL_TERMS)[0].detach()) < 1e-5
    exactly = position_scores(*sides(exact), exact.targets_N)
    assert_close(position_scores(*sides(mixed), mixed.targets_N), exactly, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_float32_agrees_with_float64():
    problem = make_problem(60, 101, widths=(16, 8), dtype=torch.float32)
    exact = in_float64(problem)
    expected = gradients(exact, dense_loss(exact, ALL_TERMS)[0])
    for found, right in zip(gradients(problem, problem.loss(ALL_TERMS).total), expected, strict=True):
        assert relative_error(found, right) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_the_loss_changes_nothing(dtype):
    problem = make_problem(dtype=dtype)
    plain = problem.loss(ALL_TERMS)
    expected = gradients(problem, plain.total)
    with torch.autocast("cpu", torch.bfloat16):
        result = problem.loss(ALL_TERMS)
        found = gradients(problem, result.total)
        scores = position_scores(*sides(problem), problem.targets_N)
    assert torch.equal(result.total, plain.total)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert_close(scores, position_scores(*sides(problem), problem.targets_N), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("legacy", [None, "highest", "high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_global_precision_is_the_same_afterwards(precision_settings, legacy, dtype, fails):
    if legacy is not None:
        torch.set_float32_matmul_precision(legacy)
    before = precision_settings()
    breakage = mock.patch.object(torch, "mm", side_effect=MemoryError("no more"))
    with breakage if fails else nullcontext(), pytest.raises(MemoryError) if fails else nullcontext():
        make_problem(dtype=dtype).loss(ALL_TERMS).total.backward()
    assert precision_settings() == before


@pytest.mark.parametrize("inherited", ["bf16", "tf32", "ieee", "none"])
def test_an_inherited_precision_stays_inherited(precision_settings, inherited):
    torch.backends.fp32_precision = inherited
    make_problem(dtype=torch.bfloat16).loss(ALL_TERMS)
    make_problem(dtype=torch.float32).loss(ALL_TERMS)
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.parametrize(
    ("dtype", "units"), [(torch.bfloat16, "bf16"), (torch.float32, "ieee"), (torch.float64, "ieee")]
)
def test_only_bfloat16_rows_run_on_bfloat16_units(precision_settings, dtype, units):
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    seen = set()
    real = torch.mm

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        made = real(*args, **kwargs)
        seen.add((torch.backends.mkldnn.matmul.fp32_precision, made.dtype))
        return made

    with mock.patch.object(torch, "mm", spy):
        make_problem(dtype=dtype).loss(ALL_TERMS)
    wide = torch.promote_types(dtype, torch.float32)
    # The gradient of bfloat16 rows is all that is rounded, and only once it has been added up.
    assert seen == {(units, wide), (units, Arithmetic.of(torch.zeros(0, dtype=dtype)).narrow)}


# ------------------------------------------------------------------------------------------------------- compilation

# torch's own, on the first import of its compiler
with_a_compiler = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")


@with_a_compiler
@pytest.mark.slow
@pytest.mark.parametrize("finish", [(1.0, None), (0.5, 3.0)])
def test_compiled_agrees_with_plain_to_float32_rounding(finish):
    for rows, vocabulary in ((7, 13), (64, 301), (0, 13)):
        problem = make_problem(rows, vocabulary, widths=(16, 8), finish=finish, dtype=torch.float32)
        with chunks_of(max(1, rows // 3), vocabulary, itemsize=4):
            plain, fused = (problem.loss(ALL_TERMS, compiled=compiled) for compiled in (False, True))
        assert_close(fused.total, plain.total, rtol=1e-5, atol=1e-5)
        assert_close(dict(fused.terms), dict(plain.terms), rtol=1e-5, atol=1e-5)
        assert_close(gradients(problem, fused.total), gradients(problem, plain.total), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert_close(problem.loss(ALL_TERMS, compiled=True).total, plain.total.detach(), rtol=1e-5, atol=1e-5)


@with_a_compiler
@pytest.mark.slow
def test_compiled_scores_agree_with_plain_ones(monkeypatch):
    problem = make_problem(64, 301, dtype=torch.float32)
    plain = position_scores(*sides(problem), problem.targets_N)
    monkeypatch.setattr(compiling, "WORTH_COMPILING", 0)
    assert_close(position_scores(*sides(problem), problem.targets_N), plain, rtol=1e-5, atol=1e-5)


@with_a_compiler
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gpu_agrees_with_float64(compiled):
    problem = make_problem(64, 301, widths=(16, 8), dtype=torch.float32, device="cuda")
    exact = in_float64(problem)
    expected = gradients(exact, dense_loss(exact, ALL_TERMS)[0])
    found = gradients(problem, problem.loss(ALL_TERMS, compiled=compiled).total)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5


# ------------------------------------------------------------------------------------------------ scores of positions


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9), st.integers(1, 12), st.tuples(st.integers(1, 10), st.integers(0, 5)), finishes)
def test_scores_are_those_of_dense_logits_whatever_the_chunks(rows, vocabulary, sizes, finish):
    problem = make_problem(rows, vocabulary, finish=finish)
    with chunks_of(sizes[0], vocabulary, tile_rows=sizes[1]):
        scores = position_scores(*sides(problem), problem.targets_N)
    student_NV = dense_logits(problem.student_ND, problem.head).detach()
    teacher_NV = dense_logits(problem.teacher_ND, problem.teacher_head)
    log_q, log_p = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    expected = {
        "nll": functional.cross_entropy(student_NV, problem.targets_N, reduction="none"),
        "kl_to_teacher": functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
        "agreement": (student_NV.max(-1).indices == teacher_NV.max(-1).indices).double(),
        "confidence": log_q.exp().amax(-1),
        "correct": (student_NV.max(-1).indices == problem.targets_N).double(),
    }
    assert_close(scores, expected, rtol=1e-10, atol=1e-11)


def test_scores_need_no_gradient_and_keep_none():
    problem = make_problem()
    scores = position_scores(*sides(problem), problem.targets_N)
    assert not any(values.requires_grad for values in scores.values())


def test_scores_of_a_bfloat16_head_stay_within_the_chunk_s_bytes(watch):
    problem = make_problem(40, 301, dtype=torch.bfloat16)
    with chunks_of(5, 301, itemsize=4), watch:
        position_scores(*sides(problem), problem.targets_N)
    assert watch.largest == 5 * 301


def test_ties_go_to_the_lower_token_on_both_sides():
    student = States(torch.eye(3), Head(torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])))
    teacher = States(torch.eye(3), Head(torch.tensor([[3.0, 0.0, 0.0], [1.0, 5.0, 0.0], [1.0, 5.0, 9.0]])))
    scores = position_scores(student, teacher, torch.tensor([0, 1, 2]))
    assert scores["agreement"].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: {"teacher_head": p.teacher_head.sliced(12)}, "13 and 12 tokens"),
        (lambda p: {"teacher_ND": p.teacher_ND[1:]}, r"do not fit 7 rows"),
        (lambda p: {"targets_N": p.targets_N[1:]}, r"targets_N \(6,\) does not fit"),
    ],
)
def test_scores_of_sides_that_do_not_fit_are_refused(change, text):
    problem = make_problem()
    changed = replace(problem, **change(problem))
    with pytest.raises(ValueError, match=text):
        position_scores(*sides(changed), changed.targets_N)


def test_where_compiling_fails_it_is_said_once_and_everything_runs_plain(monkeypatch, caplog):
    def refuse(function):
        raise RuntimeError("Python.h: no such file")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(compiling, "WORTH_COMPILING", 1)
    can_compile.cache_clear()
    try:
        with caplog.at_level("INFO", logger="potstill"):
            for _ in range(2):
                student = States(torch.randn(4, 3), Head(torch.randn(5, 3)))
                loss = distillation_loss(student, torch.arange(4), [HeadTerm("cross_entropy")])
                assert torch.isfinite(loss.total)
        assert caplog.text.count("Python.h: no such file") == 1
    finally:
        can_compile.cache_clear()


@pytest.mark.parametrize(("worth", "can", "compiles"), [(1 << 24, True, False), (0, False, False), (0, True, True)])
def test_only_large_problems_are_compiled_and_only_where_a_compiler_is(monkeypatch, worth, can, compiles):
    asked = mock.Mock(side_effect=lambda function, **_: function)
    monkeypatch.setattr(torch, "compile", asked)
    monkeypatch.setattr(compiling, "WORTH_COMPILING", worth)
    monkeypatch.setattr(compiling, "can_compile", lambda device_type: can)
    chunked._kernel.cache_clear()
    scores_of._scores.cache_clear()
    problem = make_problem()
    problem.loss(ALL_TERMS, compiled=None)
    position_scores(*sides(problem), problem.targets_N)
    chunked._kernel.cache_clear()
    scores_of._scores.cache_clear()
    assert asked.call_count == (2 if compiles else 0)
