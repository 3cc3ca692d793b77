"""Laws of the reliability picture."""

from __future__ import annotations

import json
from dataclasses import replace

from potstill.report import ReliabilityPoint
from potstill.report.reliability import reliability_figure


def point(confidence, accuracy, n):
    return ReliabilityPoint(0.0, 1.0, confidence, accuracy, n)


def test_all_arms_and_the_diagonal_are_drawn_in_the_order_of_every_picture(story):
    figure = reliability_figure(story)
    assert figure.arms == ("teacher", "untrained", "control", "student")
    diagonal, *arms = json.loads(figure.spec)["data"]
    assert diagonal["x"] == diagonal["y"] == [0, 1]
    assert arms[3]["x"] == [row.confidence for row in story.reliability["student"]]
    assert arms[3]["y"] == [row.accuracy for row in story.reliability["student"]]
    assert len(figure.rows) == 4 * 15


def test_the_area_of_a_mark_is_its_share_of_the_positions(story):
    points = (point(0.2, 0.2, 100), point(0.8, 0.7, 400))
    _, marks = json.loads(reliability_figure(replace(story, reliability={"student": points})).spec)["data"]
    few, many = marks["marker"]["size"]
    assert many == 2 * few


def test_the_words_say_how_sure_and_how_often_right_over_all_positions(story):
    points = (point(0.2, 0.1, 300), point(0.6, 0.5, 100))
    figure = reliability_figure(replace(story, reliability={"student": points}))
    assert figure.summary == "student is 30.0 % sure on average and right 20.0 % of the time."
    assert figure.rows[0] == ("student", "0.0 to 100.0 %", "20.0 %", "10.0 %", "300")


def test_empty_bins_and_numbers_that_are_none_are_not_drawn(story):
    hollow = (point(0.2, 0.2, 0), point(float("nan"), 0.2, 5))
    assert reliability_figure(replace(story, reliability={"student": hollow})) is None
    assert reliability_figure(replace(story, reliability={})) is None
    figure = reliability_figure(replace(story, reliability={"student": (*hollow, point(0.5, 0.4, 3))}))
    assert len(figure.rows) == 1
    assert "NaN" not in figure.spec
