"""The estimators against plain float64 ones: the same tokens from the same uniform number, and unbiased."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.errors import NonFiniteError
from potstill.signals import entropy_of
from potstill.signals.sparse import likeliest, sample

SHAPES = ["normal", "peaked", "extreme", "uniform", "one-hot", "two", "masked", "ties"]


def logits_of(shape: str, vocabulary: int, seed: int = 0, rows: int = 4) -> torch.Tensor:
    """Rows of logits with the trouble that the name says."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * {"peaked": 6.0, "extreme": 1e4}.get(shape, 2.0)
    if shape == "uniform":
        logits = torch.full_like(logits, -3.0)
    elif shape in ("one-hot", "two"):
        kept = torch.rand(rows, vocabulary, generator=generator).topk(min(vocabulary, 1 + (shape == "two"))).indices
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
    elif shape == "masked":
        logits[:, 1::2] = -math.inf
    elif shape == "ties":
        logits = logits.round()
    return logits


@st.composite
def cases(draw):
    """(logits, k, temperature) with vocabularies that do and do not fit into blocks."""
    vocabulary = draw(st.one_of(st.integers(1, 20), st.sampled_from([64, 127, 128, 129, 300, 1000, 1280])))
    k = draw(st.one_of(st.integers(1, min(vocabulary, 70)), st.just(vocabulary)))
    shape, seed = draw(st.sampled_from(SHAPES)), draw(st.integers(0, 2**32))
    return logits_of(shape, vocabulary, seed), k, draw(st.sampled_from([1.0, 0.5, 2.0, 4.0]))


def softmax(logits: torch.Tensor, temperature: float) -> np.ndarray:
    return (logits.double() / temperature).softmax(-1).numpy()


def threshold(p: np.ndarray, k: int) -> float:
    """Tau of sum_i min(1, p_i / tau) = K by bisection; 0 where fewer than K tokens have a probability.

    With exactly K of them all tau up to the least solve it: the largest is meant, at which the least is drawn.
    """
    if (p > 0).sum() <= k:
        return float(p[p > 0].min()) if (p > 0).sum() == k else 0.0
    low, high = 0.0, 1.0
    for _ in range(200):
        tau = (low + high) / 2
        # Ones are counted, not summed: what is added to them may be less than their rounding.
        low, high = (tau, high) if (p[p < tau] / tau).sum() > k - (p >= tau).sum() else (low, tau)
    return high


def drawn_by(p: np.ndarray, k: int, uniform: float) -> tuple[set[int], set[int]]:
    """(heads, the others) as the definition has it, one token after the other, in float64."""
    tau = threshold(p, k)
    heads = {i for i, value in enumerate(p) if value > tau * (1 + 1e-9)}
    found, running, point = set(), 0.0, uniform * tau
    for i, value in enumerate(p):
        if i not in heads and len(found) < k - len(heads):
            running += value
            if point < running:
                found.add(i)
                point += tau
    return heads, found


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(0, 2**32))
def test_a_row_has_k_distinct_ascending_tokens_with_mass_one(case, seed):
    logits, k, temperature = case
    uniform = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids, heads, tau = sample(logits, uniform, k, temperature)
    assert ids.shape == heads.shape == (len(logits), k)
    assert (ids.diff(dim=-1) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < logits.shape[1]
    drawn = (heads == 0).sum(-1)
    torch.testing.assert_close(heads.sum(-1) + drawn * tau, torch.ones_like(tau), rtol=0, atol=1e-12)
    # What has no probability gets none, and is listed only where there is nothing else.
    p = torch.from_numpy(softmax(logits, temperature)).gather(-1, ids)
    impossible = (logits == -math.inf).gather(-1, ids)
    assert (heads[impossible] == 0).all()
    assert (tau[impossible.any(-1)] == 0).all()
    torch.testing.assert_close(heads, torch.where(heads > 0, p, 0.0), rtol=1e-4, atol=1e-7)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_tau_is_that_of_a_plain_search(case):
    logits, k, temperature = case
    _, _, tau = sample(logits, torch.full((len(logits),), 0.5), k, temperature)
    expected = [threshold(p, k) for p in softmax(logits, temperature)]
    np.testing.assert_allclose(tau.numpy(), expected, rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("vocabulary", [50, 128, 1000, 4096, 5000])
@pytest.mark.parametrize("k", [1, 2, 16, 40])
@pytest.mark.parametrize("shape", ["normal", "peaked", "masked"])
def test_the_same_uniform_number_draws_the_tokens_of_the_definition(shape, k, vocabulary):
    logits = logits_of(shape, vocabulary, seed=k, rows=6)
    uniform = torch.rand(6, dtype=torch.float64)
    ids, heads, _ = sample(logits, uniform, k)
    for row, p in enumerate(softmax(logits, 1.0)):
        kept, found = drawn_by(p, k, float(uniform[row]))
        if len(kept) + len(found) == k:  # else fewer have a probability, and others fill up
            assert set(ids[row, heads[row] > 0].tolist()) == kept
            assert set(ids[row].tolist()) == kept | found


def estimate(logits: torch.Tensor, uniform: torch.Tensor, k: int) -> torch.Tensor:
    ids, heads, tau = sample(logits, uniform, k)
    weights = torch.where(heads > 0, heads, tau.unsqueeze(-1))
    return torch.zeros(logits.shape, dtype=torch.float64).scatter(-1, ids, weights)


@pytest.mark.parametrize("shape", ["normal", "peaked", "uniform", "masked"])
def test_over_all_uniform_numbers_the_mean_is_the_distribution(shape):
    """An even grid of u is an exact integral of the estimate but for its ends: far sharper than chance."""
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    logits = logits_of(shape, 150, rows=1).expand(4000, -1)
    mean = estimate(logits, grid, 8).mean(0).numpy()
    np.testing.assert_allclose(mean, softmax(logits[:1], 1.0)[0], atol=2 / 4000 / 8)


def test_rows_do_not_depend_on_their_neighbours():
    logits, uniform = logits_of("normal", 700, rows=300), torch.rand(300, dtype=torch.float64)
    whole = sample(logits, uniform, 16)
    part = sample(logits[130:170], uniform[130:170], 16)
    for all_rows, some in zip(whole, part, strict=True):
        assert torch.equal(all_rows[130:170], some)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_the_list_is_the_likeliest_and_the_rest_is_all_others(case):
    logits, k, temperature = case
    ids, gaps, odds = likeliest(logits, k, (1.0, temperature + 1))
    assert (ids.diff(dim=-1) > 0).all()
    top = logits.topk(k).values
    torch.testing.assert_close(gaps.sort(descending=True).values, top - top[:, :1])
    p = torch.from_numpy(softmax(logits, temperature + 1))
    listed = p.gather(-1, ids).sum(-1)
    rest = p.scatter(-1, ids, 0.0).sum(-1)
    # In float32 what is below e^-87 of the largest is nothing.
    torch.testing.assert_close(odds[:, 1].exp(), rest / listed, rtol=1e-4, atol=1e-37)


def test_no_rows_are_no_error():
    empty = torch.empty(0, 300)
    assert sample(empty, torch.empty(0), 5)[0].shape == (0, 5)
    assert [part.shape for part in likeliest(empty, 5, (1.0, 2.0))] == [(0, 5), (0, 5), (0, 2)]
    assert entropy_of(empty).shape == (0,)


def test_half_precision_is_widened_first():
    logits = logits_of("normal", 500)
    half, uniform = logits.bfloat16(), torch.rand(4)
    for narrow, wide in zip(sample(half, uniform, 9), sample(half.float(), uniform, 9), strict=True):
        assert torch.equal(narrow, wide)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "read",
    [lambda x: sample(x, torch.zeros(len(x)), 3), lambda x: likeliest(x, 3, (1.0,)), entropy_of],
    ids=["sample", "likeliest", "entropy_of"],
)
def test_what_is_no_distribution_is_refused(read, value):
    logits = logits_of("normal", 200)
    logits[2, 150] = value
    with pytest.raises(NonFiniteError, match="at 1 of 4 positions"):
        read(logits)
    with pytest.raises(NonFiniteError, match="at 4 of 4 positions"):
        read(torch.full((4, 200), -math.inf))


@settings(deadline=None)
@given(cases())
def test_entropy_is_that_of_float64(case):
    logits, _, _ = case
    p = softmax(logits, 1.0)
    expected = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    np.testing.assert_allclose(entropy_of(logits).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpu_draws_what_a_cpu_draws(shape):
    logits, uniform = logits_of(shape, 5000, rows=40), torch.rand(40, dtype=torch.float64)
    for here, there in zip(sample(logits, uniform, 16), sample(logits.cuda(), uniform.cuda(), 16), strict=True):
        torch.testing.assert_close(here, there.cpu(), rtol=1e-4, atol=1e-7)
    for here, there in zip(likeliest(logits, 16, (2.0,)), likeliest(logits.cuda(), 16, (2.0,)), strict=True):
        torch.testing.assert_close(here, there.cpu(), rtol=1e-4, atol=1e-6)
