"""Laws of the comparison between what a store gives back and what the teacher said."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from potstill.losses import DIVERGENCES
from potstill.pipeline.fidelity import DRAWS, describe_fidelity, measure_fidelity
from potstill.signals.encodings import draw_uniforms, encoding_of
from potstill.signals.spec import SignalSpec
from potstill.types import Head, Mixture, SparseLogits, States

V, N = 257, 24


def make_states(width, seed, *, dtype=torch.float32, vocabulary=V, rows=N):
    generator = torch.Generator().manual_seed(seed)
    rows_ND, weight_VD = (torch.randn(n, width, generator=generator) for n in (rows, vocabulary))
    return States(rows_ND.to(dtype), Head((weight_VD * 2 / math.sqrt(width)).to(dtype)))


STUDENT, TEACHER = make_states(6, 0), make_states(9, 1)
LISTED = {kind: SignalSpec(kind, V, k=16) for kind in ("sampled", "topk", "topk_renormalised")}
EXACT = {"hidden": SignalSpec("hidden", V, width=9, dtype="fp32"), "dense": SignalSpec("dense", V)}


def logits(states):
    return states.rows_ND @ states.head.weight_VD.T


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_exact_store_differs_by_exactly_nothing(kind, temperature):
    found = measure_fidelity(STUDENT, TEACHER, EXACT[kind], temperature=temperature)
    assert found.kl_error == found.rows_gradient_error == found.head_gradient_error == found.head_gradient_bias == 0.0
    assert found.head_gradient_cosine == 1.0
    assert found.kl_dense > 0.1
    assert (found.draws, found.kl_error_stderr, found.head_gradient_bias_stderr) == (1, None, None)


def test_hidden_states_in_bfloat16_are_exact_for_a_bfloat16_teacher():
    teacher = make_states(9, 1, dtype=torch.bfloat16)
    spec = SignalSpec("hidden", V, width=9, dtype="bf16")
    found = measure_fidelity(replace(STUDENT, rows_ND=STUDENT.rows_ND.bfloat16()), teacher, spec)
    assert found.kl_error == found.rows_gradient_error == found.head_gradient_error == 0.0
    assert found.bytes_per_token == 18


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_dense_side_is_the_forward_kl_of_the_chosen_positions(temperature):
    found = measure_fidelity(STUDENT, TEACHER, EXACT["dense"], temperature=temperature, rows=N)
    values_N = DIVERGENCES["forward_kl"](logits(STUDENT).double(), logits(TEACHER).double(), temperature)
    assert found.kl_dense == pytest.approx(float(values_N.mean()), rel=1e-5)


def test_errors_are_those_of_a_plain_gradient_in_float64():
    """Of a list without randomness: q - p in the place of q - p_listed, times the head and the states."""
    spec = LISTED["topk_renormalised"]
    encoding = encoding_of(spec)
    selected = encoding.select(logits(TEACHER), draw_uniforms(b"", N, encoding.randoms))
    listed = encoding.unpack(encoding.pack(selected))
    assert isinstance(listed, SparseLogits)
    p_NV = logits(TEACHER).double().softmax(-1)
    q_NV = logits(STUDENT).double().softmax(-1)
    listed_NV = torch.zeros_like(p_NV).scatter(-1, listed.ids_NK, listed.logprobs_NK.double().exp())
    dense_NV, biased_NV = q_NV - p_NV, q_NV * listed_NV.sum(-1, keepdim=True) - listed_NV
    rows_ND, weight_VD = STUDENT.rows_ND.double(), STUDENT.head.weight_VD.double()
    exact, got = dense_NV.T @ rows_ND, biased_NV.T @ rows_ND
    found = measure_fidelity(STUDENT, TEACHER, spec, rows=N)
    assert found.head_gradient_error == pytest.approx(float((got - exact).norm() / exact.norm()), rel=1e-4)
    assert found.head_gradient_cosine == pytest.approx(float((got * exact).sum() / got.norm() / exact.norm()), rel=1e-4)
    along = ((got - exact) * exact).sum() / exact.square().sum()
    assert found.head_gradient_bias == pytest.approx(float(along), rel=1e-4)
    rows_error = ((biased_NV - dense_NV) @ weight_VD).norm() / (dense_NV @ weight_VD).norm()
    assert found.rows_gradient_error == pytest.approx(float(rows_error), rel=1e-4)


def test_noise_of_drawn_tokens_stays_for_a_position_and_averages_out_over_a_step():
    """The same positions 9 times, drawn anew: 9 times the gradient of the head, 3 times its noise."""
    once = measure_fidelity(STUDENT, TEACHER, LISTED["sampled"])
    often = [replace(side, rows_ND=side.rows_ND.repeat(9, 1)) for side in (STUDENT, TEACHER)]
    found = measure_fidelity(*often, LISTED["sampled"], rows=9 * N)
    assert (once.draws, found.draws, found.rows) == (DRAWS, DRAWS, 9 * N)
    assert found.kl_dense == pytest.approx(once.kl_dense, rel=1e-5)
    assert found.rows_gradient_error == pytest.approx(once.rows_gradient_error, rel=0.1)
    assert found.head_gradient_error == pytest.approx(once.head_gradient_error / 3, rel=0.1)
    assert found.kl_error_stderr > 0


def test_more_tokens_are_nearer_to_the_teacher():
    few, many = (measure_fidelity(STUDENT, TEACHER, replace(LISTED["sampled"], k=k)) for k in (16, 96))
    assert many.head_gradient_error < 0.6 * few.head_gradient_error
    assert many.rows_gradient_error < 0.6 * few.rows_gradient_error
    assert many.bytes_per_token > few.bytes_per_token


def test_drawn_tokens_lean_to_no_side_and_renormalised_ones_do():
    student, teacher = make_states(6, 0, rows=96), make_states(9, 1, rows=96)
    drawn, cut = (
        measure_fidelity(student, teacher, replace(LISTED[kind], k=4)) for kind in ("sampled", "topk_renormalised")
    )
    assert abs(drawn.head_gradient_bias) < 4 * drawn.head_gradient_bias_stderr < 0.02
    assert cut.head_gradient_bias > 0.06


def test_a_tail_in_one_class_bounds_the_distance_from_below_and_says_so():
    found = measure_fidelity(STUDENT, TEACHER, LISTED["topk"])
    assert 0 < found.kl_estimate < found.kl_dense
    meanings = {measure: meaning for measure, _, meaning in describe_fidelity(found)}
    assert meanings["KL, stored"].startswith("a lower bound")


def test_the_seed_decides_positions_and_draws():
    first, again, other = (
        measure_fidelity(STUDENT, TEACHER, LISTED["sampled"], rows=10, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first.kl_dense != other.kl_dense
    assert first.rows == 10


def test_several_teachers_are_compared_with_their_mean():
    mixture = Mixture((TEACHER, make_states(5, 7)), torch.full((N, 2), 0.5))
    found = measure_fidelity(STUDENT, mixture, EXACT["dense"])
    p_NV = (logits(TEACHER).softmax(-1) + logits(make_states(5, 7)).softmax(-1)) / 2
    values_N = DIVERGENCES["forward_kl"](logits(STUDENT).double(), p_NV.double().log())
    assert found.kl_dense == pytest.approx(float(values_N.mean()), rel=1e-5)
    assert found.head_gradient_error == 0.0
    with pytest.raises(ValueError, match=r"signals\.kind=hidden: got several teachers, needs one"):
        measure_fidelity(STUDENT, mixture, EXACT["hidden"])


def test_padding_rows_of_both_heads_change_nothing():
    padded = [replace(side, head=replace(side.head, weight_VD=torch.cat([side.head.weight_VD, torch.ones(7, width)])))
              for side, width in ((STUDENT, 6), (TEACHER, 9))]  # fmt: skip
    assert measure_fidelity(*padded, LISTED["sampled"]) == measure_fidelity(STUDENT, TEACHER, LISTED["sampled"])


def test_what_was_read_in_inference_mode_can_be_compared():
    with torch.inference_mode():
        student, teacher = make_states(6, 0), make_states(9, 1)
        found = measure_fidelity(student, teacher, LISTED["sampled"])
    assert found == measure_fidelity(student, teacher, LISTED["sampled"])
    assert found == measure_fidelity(STUDENT, TEACHER, LISTED["sampled"])


def test_a_student_who_has_nothing_to_learn_gives_no_share_of_nothing():
    """One token in the vocabulary: the dense gradient is 0 and so is every other."""
    student, teacher = make_states(6, 0, vocabulary=1), make_states(9, 1, vocabulary=1)
    found = measure_fidelity(student, teacher, SignalSpec("dense", 1))
    assert (found.kl_dense, found.rows_gradient_error, found.head_gradient_error) == (0.0, 0.0, 0.0)


def test_no_position_is_refused():
    empty = [replace(side, rows_ND=side.rows_ND[:0]) for side in (STUDENT, TEACHER)]
    with pytest.raises(ValueError, match="fidelity: got no position, needs at least one"):
        measure_fidelity(*empty, LISTED["sampled"])


@pytest.mark.parametrize("spec", [*LISTED.values(), *EXACT.values()], ids=lambda spec: spec.kind)
def test_what_is_found_is_json_and_rows_of_words(spec):
    found = measure_fidelity(STUDENT, TEACHER, spec, rows=8)
    json.dumps(asdict(found), allow_nan=False)
    rows = describe_fidelity(found)
    assert all(len(row) == 3 and all(row) for row in rows)
    values = {measure: value for measure, value, _ in rows}
    assert values["bytes a position"] == f"{encoding_of(spec, TEACHER.head).stride:,}"
    assert ("±" in values["gradient bias"]) == (spec.kind == "sampled")
    if spec.kind in EXACT:
        assert values["gradient error of a step"] == values["gradient bias"] == "0 %"
        assert values["KL, stored minus dense"] == "0 nats"
        assert values["cosine of the gradients"] == "1"


def test_a_share_that_is_undefined_is_called_so():
    found = replace(measure_fidelity(STUDENT, TEACHER, EXACT["dense"]), head_gradient_error=None)
    assert ("gradient error of a step", "undefined") in [row[:2] for row in describe_fidelity(found)]
