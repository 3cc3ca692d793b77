"""Scores per document against a loop over positions, and what is made of them by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.errors import NonFiniteError
from potstill.evaluation import BINS, DocumentScores, Resampling, compare_arms, score_arm
from potstill.types import IGNORE, Batch, Head, Lesson, Measurement, Signal, States, Wants

NAMES = ("nll", "kl_to_teacher", "agreement")
HEAD = Head(torch.eye(2))


class Reader:
    """Says the token ids of the supervised positions, as states [N, 2]."""

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def read(self, batch: Batch, wants: Wants) -> Signal:
        assert wants == Wants(final=True)
        return Signal(States(said(batch) + self.offset, HEAD))


def said(batch: Batch) -> Tensor:
    ids_N = batch.ids_BT[batch.supervised_BT].double()
    return torch.stack([ids_N, -ids_N], -1)


def scorer(arm: States, teacher: States, targets_N: Tensor) -> Mapping[str, Tensor]:
    """Any function of a position's own numbers will do."""
    return {
        "nll": (arm.rows_ND[:, 0] + 0.5 * targets_N).float(),
        "kl_to_teacher": (arm.rows_ND - teacher.rows_ND)[:, 0].square() + 0.25,
        "agreement": (targets_N % 2 == 0).float(),
        "confidence": (targets_N % 7 + 1) / 7,
        "correct": (targets_N % 3 == 1).float(),
    }


@st.composite
def packed(draw: st.DrawFn) -> list[Batch]:
    """Batches whose rows hold pieces of documents; documents go on in later rows and later batches."""
    batches = []
    for _ in range(draw(st.integers(1, 3))):
        rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
        names, segments = [], []
        for _ in range(rows):
            pieces = sorted(draw(st.lists(st.integers(0, 4), min_size=length, max_size=length)))
            first = pieces[0]
            segments.append([piece - first + 1 for piece in pieces])
            names.append(tuple(f"doc-{draw(st.integers(0, 5))}" for _ in range(segments[-1][-1])))
        flags = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
        numbers = torch.arange(rows * length).reshape(rows, length) + 100 * len(batches)
        targets_BT = (3 * numbers).where(torch.tensor(flags).reshape(rows, length), torch.tensor(IGNORE))
        batches.append(Batch(numbers, targets_BT, torch.tensor(segments), tuple(names)))
    return batches


@settings(deadline=None, max_examples=60)
@given(packed())
def test_sums_per_document_are_those_of_a_loop_over_positions(batches):
    lessons = [Lesson(batch, Signal(States(said(batch), HEAD))) for batch in batches]
    scores = score_arm(Reader(0.5), lessons, scorer)
    expected: dict[str, list[float]] = {}
    for batch in batches:
        for row in range(len(batch)):
            for column in range(batch.ids_BT.shape[1]):
                target = int(batch.targets_BT[row, column])
                if target != IGNORE:
                    document = batch.examples[row][int(batch.segments_BT[row, column]) - 1]
                    sums = expected.setdefault(document, [0.0] * 6)
                    sums[0] += 1
                    sums[1] += int(batch.ids_BT[row, column]) + 0.5 + 0.5 * target
                    sums[2] += 0.5**2 + 0.25
                    sums[3] += target % 2 == 0
                    sums[4] += (target % 7 + 1) / 7
                    sums[5] += target % 3 == 1
    assert scores.documents == tuple(expected)
    table = np.array(list(expected.values())).reshape(-1, 6)
    assert np.allclose(scores.counts_D, table[:, 0])
    for index, name in enumerate(NAMES):
        assert np.allclose(scores.sums[name], table[:, index + 1])
    assert np.allclose(scores.bins_DM3.sum(1), table[:, [0, 4, 5]])


def test_a_document_cut_over_rows_and_batches_is_one_document():
    ids_BT = torch.tensor([[1, 2], [3, 4]])
    names = (("a", "b"), ("b",))
    segments_BT = torch.tensor([[1, 2], [1, 1]])
    batch = Batch(ids_BT, ids_BT, segments_BT, names)
    lessons = [Lesson(batch, Signal(States(said(batch), HEAD)))] * 2
    scores = score_arm(Reader(), lessons, scorer)
    assert scores.documents == ("a", "b")
    assert scores.counts_D.tolist() == [2.0, 6.0]
    assert scores.sums["nll"].tolist() == [2 * 1.5, 2 * (2 + 3 + 4) * 1.5]


def test_nothing_supervised_gives_no_document():
    ids_BT = torch.tensor([[1, 2]])
    batch = Batch(ids_BT, torch.full_like(ids_BT, IGNORE), torch.ones_like(ids_BT), (("a",),))
    scores = score_arm(Reader(), [Lesson(batch, Signal(States(said(batch), HEAD)))], scorer)
    assert (scores.documents, scores.counts_D.tolist()) == ((), [])
    assert [scores.sums[name].tolist() for name in NAMES] == [[], [], []]
    assert scores.bins_DM3.shape == (0, BINS, 3)


def test_a_lesson_without_final_states_is_refused():
    ids_BT = torch.tensor([[1, 2]])
    batch = Batch(ids_BT, ids_BT, torch.ones_like(ids_BT), (("a",),))
    with pytest.raises(ValueError, match="final hidden states and heads of both sides"):
        score_arm(Reader(), [Lesson(batch)], scorer)


@pytest.mark.parametrize(("name", "bad"), [("nll", math.nan), ("nll", math.inf), ("confidence", math.nan)])
def test_a_score_that_is_no_number_is_an_error_that_names_the_document(name, bad):
    ids_BT = torch.tensor([[1, 2, 3]])
    batch = Batch(ids_BT, ids_BT, torch.tensor([[1, 2, 2]]), (("good", "bad"),))

    def broken(arm: States, teacher: States, targets_N: Tensor) -> Mapping[str, Tensor]:
        return {**scorer(arm, teacher, targets_N), name: torch.tensor([1.0, bad, 1.0])}

    with pytest.raises(NonFiniteError, match="the scores of bad are not finite"):
        score_arm(Reader(), [Lesson(batch, Signal(States(said(batch), HEAD)))], broken)


# ----------------------------------------------------------------------------------------------------- comparing arms


def scores_of(nll: list[float], kl: list[float], agreement: list[float], counts: list[float]) -> DocumentScores:
    """From means per document."""
    counts_D = np.array(counts)
    sums = {name: counts_D * np.array(means) for name, means in zip(NAMES, (nll, kl, agreement), strict=True)}
    bins_DM3 = np.zeros((len(counts), BINS, 3))
    bins_DM3[:, 9] = np.stack([counts_D, 0.62 * counts_D, sums["agreement"]], axis=1)
    return DocumentScores(tuple(f"doc-{index}" for index in range(len(counts))), counts_D, sums, bins_DM3)


def arms(documents: int = 40, seed: int = 0) -> dict[str, DocumentScores]:
    """A teacher, and three students of it that find the same documents hard."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(5, 60, size=documents).astype(np.float64).tolist()
    hard_D = generator.normal(3.0, 0.7, size=documents)

    def arm(nll: float, kl: float, agreement: float) -> DocumentScores:
        noise_3D = generator.normal(0.0, 0.02, size=(3, documents))
        rows = (nll + hard_D, kl + 0.3 * hard_D, agreement - 0.05 * hard_D)
        return scores_of(*((row + noise).tolist() for row, noise in zip(rows, noise_3D, strict=True)), counts)

    return {
        "teacher": replace(arm(0.0, 0.0, 1.0), sums=arm(0.0, 0.0, 1.0).sums | {"kl_to_teacher": np.zeros(documents)}),
        "untrained": arm(4.0, 3.0, 0.3),
        "control": arm(0.6, 1.0, 0.6),
        "student": arm(0.5, 0.4, 0.7),
    }


def by_name(measurements: list[Measurement], arm: str) -> dict[str, Measurement]:
    mine = [measurement for measurement in measurements if measurement.arm == arm]
    assert len({measurement.name for measurement in mine}) == len(mine)
    return {measurement.name: measurement for measurement in mine}


def mean(scores: DocumentScores, name: str) -> float:
    return float(scores.sums[name].sum() / scores.counts_D.sum())


def test_every_number_of_the_student_is_what_its_name_says():
    scores = arms()
    found = by_name(compare_arms(scores, 200, seed=0), "student")
    nll, kl, top = ({arm: mean(s, name) for arm, s in scores.items()} for name in NAMES)
    expected = {
        "nll": (nll["student"], "nats/token"),
        "perplexity": (math.exp(nll["student"]), ""),
        "ece": (abs(top["student"] - 0.62), "share"),
        "kl_to_teacher": (kl["student"], "nats/token"),
        "agreement": (top["student"], "share"),
        "retention": (math.exp(-nll["student"]) / math.exp(-nll["teacher"]), "share"),
        "recovered_nll": ((nll["untrained"] - nll["student"]) / (nll["untrained"] - nll["teacher"]), "share"),
        "recovered_kl": (1 - kl["student"] / kl["untrained"], "share"),
        "recovered_agreement": ((top["student"] - top["untrained"]) / (1 - top["untrained"]), "share"),
        "kl_gain_over_control": (kl["control"] - kl["student"], "nats/token"),
        "nll_gain_over_control": (nll["control"] - nll["student"], "nats/token"),
        "agreement_gain_over_control": (top["student"] - top["control"], "share"),
        "kl_gain_over_untrained": (kl["untrained"] - kl["student"], "nats/token"),
        "nll_gain_over_untrained": (nll["untrained"] - nll["student"], "nats/token"),
        "agreement_gain_over_untrained": (top["student"] - top["untrained"], "share"),
    }
    assert {name: (m.value, m.unit) for name, m in found.items()} == {
        name: (pytest.approx(value), unit) for name, (value, unit) in expected.items()
    }
    assert {(m.slice, m.n) for m in found.values()} == {("test", 40)}


def test_arms_get_the_numbers_that_make_sense_for_them():
    found = compare_arms(arms(), 100, seed=0)
    assert set(by_name(found, "teacher")) == {"nll", "perplexity", "ece"}
    basic = {"nll", "perplexity", "ece", "kl_to_teacher", "agreement", "retention"}
    assert set(by_name(found, "untrained")) == basic
    assert set(by_name(found, "control")) == basic | {"recovered_nll", "recovered_kl", "recovered_agreement"}


def test_intervals_hold_their_value_and_are_those_of_the_resampling():
    scores = arms()
    found = by_name(compare_arms(scores, 500, seed=3), "student")
    assert all(m.low <= m.value <= m.high for name, m in found.items() if name != "ece")
    resampling = Resampling(scores["teacher"].counts_D, 500, 3)
    _, low, high = resampling.interval(resampling.means(scores["student"].sums["nll"]))
    assert (found["nll"].low, found["nll"].high) == (low, high)


def test_a_paired_gain_is_known_better_than_the_two_arms_that_it_compares():
    found = compare_arms(arms(), 1000, seed=0)
    student, control = by_name(found, "student"), by_name(found, "control")
    gain = student["nll_gain_over_control"]
    unpaired = math.hypot(*(m.high - m.low for m in (student["nll"], control["nll"])))
    assert gain.high - gain.low < 0.2 * unpaired
    assert gain.low > 0.0
    assert student["nll"].high > control["nll"].low


def test_documents_count_and_tokens_do_not():
    scores = arms()
    longer = {
        arm: DocumentScores(
            s.documents, 100 * s.counts_D, {name: 100 * sums for name, sums in s.sums.items()}, 100 * s.bins_DM3
        )
        for arm, s in scores.items()
    }
    for few, many in zip(compare_arms(scores, 200, seed=0), compare_arms(longer, 200, seed=0), strict=True):
        assert (few.name, few.n) == (many.name, many.n)
        assert (few.value, few.low, few.high) == pytest.approx((many.value, many.low, many.high))


def test_a_single_document_has_values_but_no_intervals():
    found = compare_arms(arms(documents=1), 100, seed=0)
    assert found
    assert all((m.low, m.high, m.n) == (None, None, 1) for m in found)


def test_without_a_control_arm_there_is_no_gain_over_it():
    scores = {arm: s for arm, s in arms().items() if arm != "control"}
    names = {m.name for m in compare_arms(scores, 100, seed=0)}
    assert "kl_gain_over_untrained" in names
    assert not any(name.endswith("control") for name in names)


@pytest.mark.parametrize("ahead", [0.0, 0.5])
def test_where_the_teacher_is_not_ahead_there_is_no_share_of_the_gap(ahead):
    """0 / 0, and a negative gap, in which becoming worse would count as recovered."""
    scores = arms()
    teacher = scores["teacher"]
    nll_D = scores["untrained"].sums["nll"] + ahead * teacher.counts_D
    perfect = scores["untrained"].sums | {"kl_to_teacher": np.zeros(40), "agreement": teacher.counts_D}
    scores |= {
        "teacher": replace(teacher, sums=teacher.sums | {"nll": nll_D}),
        "untrained": replace(scores["untrained"], sums=perfect),
    }
    found = compare_arms(scores, 100, seed=0)
    assert not [m.name for m in found if m.name.startswith("recovered")]
    assert "kl_gain_over_control" in by_name(found, "student")


def test_a_gap_that_many_resamples_lack_gives_a_share_without_an_interval():
    scores = arms()
    counts_D = scores["teacher"].counts_D
    gap_D = np.where(np.arange(40) % 2 == 0, 1.0, -0.9) * counts_D
    untrained = scores["teacher"].sums["nll"] + gap_D
    scores["untrained"] = replace(scores["untrained"], sums=scores["untrained"].sums | {"nll": untrained})
    assert gap_D.sum() > 0
    share = by_name(compare_arms(scores, 500, seed=0), "student")["recovered_nll"]
    assert math.isfinite(share.value)
    assert (share.low, share.high) == (None, None)


def test_what_is_written_is_json_that_every_reader_takes():
    scores = arms()
    huge = scores["untrained"].sums | {"nll": 1e6 * scores["untrained"].counts_D}
    scores["untrained"] = replace(scores["untrained"], sums=huge)
    found = compare_arms(scores, 100, seed=0)
    json.dumps([asdict(m) for m in found], allow_nan=False)
    assert set(by_name(found, "untrained")) == {"nll", "ece", "kl_to_teacher", "agreement", "retention"}


@pytest.mark.parametrize("change", ["documents", "order", "counts"])
def test_arms_that_were_asked_different_questions_are_not_compared(change):
    scores = arms()
    student = scores["student"]
    names = student.documents
    scores["student"] = {
        "documents": replace(student, documents=(*names[:-1], "another")),
        "order": replace(student, documents=names[::-1]),
        "counts": replace(student, counts_D=student.counts_D + 1),
    }[change]
    with pytest.raises(ValueError, match="the teacher and student were scored on different documents"):
        compare_arms(scores, 100, seed=0)


@settings(max_examples=25)
@given(packed())
def test_without_a_teacher_an_arm_has_its_likelihood_and_nothing_that_compares(batches):
    bare, taught = (
        [Lesson(batch) for batch in batches],
        [Lesson(batch, Signal(States(said(batch), HEAD))) for batch in batches],
    )
    own, other = score_arm(Reader(1.0), bare, scorer, alone=True), score_arm(Reader(1.0), taught, scorer)
    assert own.documents == other.documents
    np.testing.assert_array_equal(own.sums["nll"], other.sums["nll"])
    np.testing.assert_array_equal(own.bins_DM3, other.bins_DM3)
    if own.documents:
        arms = {"untrained": own, "control": own, "student": score_arm(Reader(0.0), bare, scorer, alone=True)}
        found = compare_arms(arms, resamples=20, seed=0)
        assert {one.name for one in found} <= {
            "nll", "perplexity", "ece", "nll_gain_over_control", "nll_gain_over_untrained"
        }  # fmt: skip
        assert {one.arm for one in found if one.name == "nll"} == set(arms)
