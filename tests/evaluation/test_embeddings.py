"""What vectors keep of the teacher's: nothing that turning or scaling them would change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.errors import NonFiniteError
from potstill.evaluation import compare_embeddings, compare_likeness, embeddings, likeness
from potstill.evaluation.embeddings import rank


def values(vectors, **changes):
    found = compare_embeddings(vectors, **{"resamples": 100, "seed": 0, **changes})
    return {(one.arm, one.name): one for one in found}


def vectors(seed, texts=60, width=8):
    return np.random.default_rng(seed).normal(size=(texts, width)).astype(np.float32)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, -3.0, 7.0]), min_size=1, max_size=12))
def test_a_rank_is_one_more_than_what_is_below_and_half_of_the_other_equals(numbers):
    expected = [sum(b < a for b in numbers) + (sum(b == a for b in numbers) + 1) / 2 for a in numbers]
    assert rank(np.array(numbers)).tolist() == expected


def test_the_teachers_own_vectors_keep_everything():
    teacher = vectors(0)
    found = values({"teacher": teacher, "student": 3.0 * teacher})
    assert {name: one.value for (_, name), one in found.items()} == pytest.approx(
        {"cosine_to_teacher": 1.0, "spearman_to_teacher": 1.0, "neighbours_kept": 1.0}
    )


def test_turned_vectors_keep_all_likeness_but_not_their_directions():
    teacher = vectors(1)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(8, 8)))
    found = values({"teacher": teacher, "student": teacher @ turn})
    assert found["student", "spearman_to_teacher"].value == pytest.approx(1.0)
    assert found["student", "neighbours_kept"].value == 1.0
    assert abs(found["student", "cosine_to_teacher"].value) < 0.5


def test_where_widths_differ_only_likeness_is_compared():
    found = values({"teacher": vectors(0), "student": vectors(0, width=4)})
    assert {name for _, name in found} == {"spearman_to_teacher", "neighbours_kept"}


def test_vectors_that_know_nothing_keep_no_more_than_chance():
    found = values({"teacher": vectors(0, 400), "student": vectors(1, 400)}, resamples=400)
    for name, chance in (("cosine_to_teacher", 0.0), ("spearman_to_teacher", 0.0), ("neighbours_kept", 10 / 399)):
        one = found["student", name]
        assert one.low - 0.01 <= chance <= one.high + 0.01


def test_neighbours_and_rank_correlation_are_those_of_their_definitions():
    teacher, student = vectors(3, 30), vectors(4, 30) + 0.5 * vectors(3, 30)
    found = values({"teacher": teacher, "student": student})

    def cosines(rows):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit @ unit.T

    ours, theirs = cosines(student), cosines(teacher)
    kept = []
    for text in range(30):
        near = [
            set(sorted((j for j in range(30) if j != text), key=lambda j: -c[text, j])[:10]) for c in (ours, theirs)
        ]
        kept.append(len(near[0] & near[1]) / 10)
    assert found["student", "neighbours_kept"].value == pytest.approx(np.mean(kept))
    pairs = np.triu_indices(30, 1)
    expected = np.corrcoef(rank(ours[pairs]), rank(theirs[pairs]))[0, 1]
    assert found["student", "spearman_to_teacher"].value == pytest.approx(expected, abs=1e-9)


def test_a_sample_of_the_pairs_is_seeded_and_near_to_all_of_them(monkeypatch):
    both = {"teacher": vectors(5, 120), "student": vectors(6, 120) + vectors(5, 120)}
    whole = values(both)["student", "spearman_to_teacher"].value
    monkeypatch.setattr(embeddings, "MOST_PAIRS", 2000)
    part = values(both)["student", "spearman_to_teacher"].value
    assert part != whole
    assert part == pytest.approx(whole, abs=0.05)
    assert values(both)["student", "spearman_to_teacher"].value == part


def test_neighbours_are_looked_for_among_some_texts_where_there_are_many(monkeypatch):
    monkeypatch.setattr(embeddings, "MOST_TEXTS", 20)
    teacher = vectors(7, 50)
    found = values({"teacher": teacher, "student": teacher})["student", "neighbours_kept"]
    assert (found.value, found.n) == (1.0, 20)


@pytest.mark.parametrize("texts", [0, 1, 2])
def test_few_texts_are_no_trouble(texts):
    found = values({"teacher": vectors(0, texts), "student": vectors(1, texts)})
    assert all(np.isfinite(one.value) for one in found.values())
    assert bool(found) == bool(texts)


def test_vectors_of_zeros_are_like_nothing():
    assert likeness(np.zeros((2, 3)), np.ones((2, 3)), "student").tolist() == [0.0, 0.0]


def test_what_is_not_finite_is_named_and_other_texts_are_refused():
    broken = vectors(1)
    broken[7, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"student gives text 7 .*fp32"):
        values({"teacher": vectors(0), "student": broken})
    with pytest.raises(ValueError, match="different texts"):
        values({"teacher": vectors(0), "student": vectors(0, 10)})


def test_likeness_as_people_judge_it_is_a_matter_of_order():
    judged = np.array([0.0, 1.0, 2.0, 3.0, 4.0] * 8)
    cosines = {"up": judged**3, "down": -judged, "flat": np.ones(40)}
    found = {one.arm: one for one in compare_likeness(cosines, judged, resamples=200, seed=0)}
    assert found["up"].value == pytest.approx(1.0)
    assert found["down"].value == pytest.approx(-1.0)
    assert "flat" not in found
