"""Laws of the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from potstill.report import CurvePoint
from potstill.report.curves import training_figures, validation_figures
from potstill.report.figures import recovered_figure
from potstill.report.story import TaskFacts
from potstill.report.tradeoff import _dodge, speed_figures


@given(st.lists(st.floats(0, 300), min_size=1, max_size=8))
def test_names_beside_marks_never_overlap_and_never_leave_the_picture(wanted):
    placed = sorted(_dodge(wanted, 8.0, 292.0))
    assert all(below - above >= 18.99 for above, below in pairwise(placed))
    assert placed[0] >= 8.0
    assert placed[-1] <= 292.0


def test_each_training_loss_has_a_panel_of_its_own(story):
    figures = training_figures(story)
    assert [figure.arms for figure in figures] == [("control",), ("student",)]
    assert all(len(json.loads(figure.spec)["data"]) == 1 for figure in figures)


def test_validation_panels_hold_all_arms(story):
    figures = validation_figures(story)
    assert [figure.title for figure in figures] == [
        "Validation: NLL", "Validation: KL to the teacher", "Validation: agreement with the teacher",
    ]  # fmt: skip
    assert all(figure.arms == ("control", "student") for figure in figures)


def test_terms_are_drawn_apart_when_there_are_several(story):
    points = tuple(CurvePoint(i, i, 1.0, 1.0, {"forward_kl": 1.0, "cross_entropy": 2.0}) for i in range(1, 5))
    (figure,) = training_figures(replace(story, curves={"student": points}))
    assert [trace["name"] for trace in json.loads(figure.spec)["data"]] == [
        "weighted sum", "forward_kl", "cross_entropy",
    ]  # fmt: skip


def test_a_long_curve_is_averaged_and_says_so(story):
    points = tuple(CurvePoint(i, i * 10, float(i), float(i % 2)) for i in range(1, 1001))
    (figure,) = training_figures(replace(story, curves={"student": points}))
    (trace,) = json.loads(figure.spec)["data"]
    assert len(trace["x"]) == 334
    assert trace["x"][-1] == 10_000
    assert abs(sum(trace["y"]) / len(trace["y"]) - 0.5) < 0.01
    assert "mean of 3 steps" in figure.caption
    assert len(figure.rows) == 12


def test_the_teacher_stands_in_the_speed_picture_by_definition(story):
    decode, prefill = speed_figures(story)
    assert {row[0] for row in decode.rows} == {"teacher", "untrained", "control", "student"}
    assert decode.rows[0] == ("teacher", "24.1 tokens/s [23.3, 24.8]", "100.0 %")
    assert "prefill" in prefill.title


def test_without_agreement_the_speed_picture_shows_kl(story):
    kept = tuple(m for m in story.measurements if m.name != "agreement")
    figures = speed_figures(replace(story, measurements=kept))
    assert figures[0].title == "KL to the teacher against decode speed"
    assert figures[0].caption.startswith("Down and to the right")


def test_where_no_teacher_can_be_compared_with_the_speed_picture_shows_what_was_measured(story):
    kept = tuple(m for m in story.measurements if m.name not in ("agreement", "kl_to_teacher"))
    assert speed_figures(replace(story, measurements=kept))[0].title == "Negative log-likelihood against decode speed"
    solved = tuple(
        replace(m, name="pass_at_1", unit="share") if m.name == "agreement" else m for m in story.measurements
    )
    decode, prefill = speed_figures(replace(story, measurements=solved, task=TaskFacts("written")))
    assert (decode.title, prefill.title) == ("pass@1 against decode speed", "pass@1 against prefill speed")


def test_what_was_not_measured_is_not_drawn(story):
    bare = replace(story, measurements=(), curves={})
    assert speed_figures(bare) == training_figures(bare) == validation_figures(bare) == []
    assert recovered_figure(bare) is None
