"""Laws of the sentence that a reader takes away."""

from __future__ import annotations

from dataclasses import replace

import pytest

from potstill.report.headline import judge, write_caveat, write_headline
from potstill.types import Measurement

ADDED = "over the same student trained on hard labels with the same tokens."


def with_gain(story, value, low, high, name="agreement_gain_over_control"):
    kept = tuple(m for m in story.measurements if m.name != name)
    return replace(story, measurements=(*kept, Measurement("student", name, "test", value, low, high, 115, "")))


def without(story, *names):
    return replace(story, measurements=tuple(m for m in story.measurements if m.name not in names))


def test_a_gain_is_told_with_its_interval(story):
    assert write_headline(story) == (
        "The 15-layer student (81.4M, 60.5 % of the teacher's parameters) agrees with its teacher on 45.4 % of next "
        f"tokens [44.3, 46.5]; distillation added +8.5 points [7.4, 9.6] {ADDED}"
    )


@pytest.mark.parametrize(("low", "high"), [(-0.007, 0.015), (0.0, 0.02), (-0.02, 0.0)])
def test_an_interval_that_holds_zero_is_no_gain(story, low, high):
    headline = write_headline(with_gain(story, (low + high) / 2, low, high))
    assert "no gain from distillation is shown" in headline
    assert "an interval that includes 0" in headline
    assert "added" not in headline


def test_harm_is_called_harm(story):
    headline = write_headline(with_gain(story, -0.021, -0.032, -0.010))
    assert "distillation did harm: −2.1 points [−3.2, −1.0] against the same student" in headline


def test_without_a_control_arm_the_first_words_say_that_the_gain_is_unknown(story):
    headline = write_headline(replace(story, has_control=False))
    assert headline.startswith("The gain from distillation is unknown: this run has no control arm. The 15-layer")
    assert "added" not in headline


def test_a_gain_without_an_interval_is_not_called_a_gain(story):
    headline = write_headline(with_gain(story, 0.0851, None, None))
    assert "+8.5 points, without an interval, so that chance is not ruled out" in headline


def test_a_gain_that_was_not_measured_is_not_made_up(story):
    headline = write_headline(without(story, "agreement_gain_over_control"))
    assert headline.endswith("what distillation added over the control arm was not measured.")


def test_the_headline_falls_back_to_kl_and_then_to_nothing(story):
    assert "is 1.38 nats per token (KL) away from its teacher [1.35, 1.41]; distillation added +0.451 nats" in (
        write_headline(without(story, "agreement"))
    )
    assert write_headline(replace(story, measurements=())) == "Nothing was measured of the 15-layer student's quality."


def test_only_the_test_slice_makes_a_headline(story):
    moved = tuple(replace(m, slice="validation") for m in story.measurements)
    assert write_headline(replace(story, measurements=moved)).startswith("Nothing was measured")


def test_what_the_headline_leaves_out_is_told_where_it_is_no_gain(story):
    assert write_caveat(story) == (
        "But the student is worse than the control arm by NLL (−0.229 nats [−0.251, −0.207])."
    )
    level = with_gain(story, 0.01, -0.02, 0.03, "nll_gain_over_control")
    assert "is not told apart from the control arm by NLL" in write_caveat(level)
    assert write_caveat(with_gain(story, 0.3, 0.2, 0.4, "nll_gain_over_control")) == ""


def test_a_biased_estimate_is_said_beside_the_headline(stored):
    biased = replace(stored.signals, biased=True, bias="the renormalised top 16 leave out the tail")
    assert write_caveat(replace(stored, signals=biased)) == (
        "But the student is worse than the control arm by NLL (−0.229 nats [−0.251, −0.207]). The student learned from "
        "a biased estimate of its teacher: the renormalised top 16 leave out the tail."
    )
    alone = with_gain(replace(stored, signals=replace(biased, bias="")), 0.3, 0.2, 0.4, "nll_gain_over_control")
    assert write_caveat(alone) == "The student learned from a biased estimate of its teacher."


def test_an_unbiased_estimate_needs_no_word_beside_the_headline(story, stored):
    assert write_caveat(stored) == write_caveat(story)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "not told apart"), (None, None, "no interval")],
)
def test_a_verdict_is_the_interval_s_side_of_zero(low, high, verdict):
    assert judge(Measurement("student", "kl_gain_over_control", "test", 0.0, low, high, 5, "")) == verdict
