"""The temperature against a search over a grid, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import DataError
from potstill.evaluation import HIGHEST, LOWEST, fit_temperature
from potstill.evaluation.temperature import log_sigmoid, log_softmax


def planted(seed, texts=400, classes=5, multi_label=False):
    """Logits that are right at temperature 1: labels are drawn from their own probabilities."""
    generator = np.random.default_rng(seed)
    logits_NC = 2.0 * generator.normal(size=(texts, classes))
    if multi_label:
        return logits_NC, generator.random(logits_NC.shape) < np.exp(log_sigmoid(logits_NC))
    chances_NC = np.exp(log_softmax(logits_NC))
    label_N = (generator.random((texts, 1)) > chances_NC.cumsum(-1)).sum(-1)
    return logits_NC, label_N[:, None] == np.arange(classes)


def nll(logits_NC, true_NC, temperature, multi_label):
    if multi_label:
        return -np.where(true_NC, log_sigmoid(logits_NC / temperature), log_sigmoid(-logits_NC / temperature)).mean()
    return -log_softmax(logits_NC / temperature)[true_NC].mean()


@given(st.integers(0, 10**6), st.booleans())
def test_no_other_temperature_makes_the_labels_likelier(seed, multi_label):
    logits_NC, true_NC = planted(seed, 40, 3, multi_label)
    best = fit_temperature(logits_NC, true_NC, multi_label=multi_label)
    grid = np.geomspace(LOWEST, HIGHEST, 400)
    others = min(nll(logits_NC, true_NC, temperature, multi_label) for temperature in grid)
    assert nll(logits_NC, true_NC, best, multi_label) <= others + 1e-9


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_logits_that_are_too_large_by_a_factor_get_it_as_their_temperature(scale, multi_label):
    logits_NC, true_NC = planted(1, 20_000, multi_label=multi_label)
    fitted = fit_temperature(scale * logits_NC, true_NC, multi_label=multi_label)
    assert fitted == pytest.approx(scale, rel=0.05)
    assert fitted == pytest.approx(scale * fit_temperature(logits_NC, true_NC, multi_label=multi_label), rel=1e-6)


def test_neither_order_nor_a_shift_of_all_logits_of_a_text_nor_the_precision_changes_it():
    logits_NC, true_NC = planted(2)
    fitted = fit_temperature(logits_NC, true_NC)
    order = np.random.default_rng(0).permutation(len(logits_NC))
    shifted_NC = logits_NC + np.arange(len(logits_NC))[:, None]
    assert fit_temperature(logits_NC[order], true_NC[order]) == pytest.approx(fitted, rel=1e-9)
    assert fit_temperature(shifted_NC, true_NC) == pytest.approx(fitted, rel=1e-6)
    assert fit_temperature(logits_NC.astype(np.float32), true_NC) == pytest.approx(fitted, rel=1e-4)


def test_texts_that_do_not_bound_it_give_a_bound():
    true_NC = np.eye(3, dtype=np.bool_)
    assert fit_temperature(5.0 * np.eye(3), true_NC) == pytest.approx(LOWEST, rel=1e-6)
    assert fit_temperature(-5.0 * np.eye(3), true_NC) == pytest.approx(HIGHEST, rel=1e-6)


def test_logits_beyond_the_range_of_exp_are_no_trouble():
    logits_NC, true_NC = planted(3)
    assert fit_temperature(1e4 * logits_NC, true_NC) == pytest.approx(HIGHEST, rel=1e-6)


def test_without_a_text_there_is_nothing_to_fit():
    with pytest.raises(DataError, match=r"^evaluation\.calibrate: .* set evaluation\.calibrate to false"):
        fit_temperature(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.bool_))
