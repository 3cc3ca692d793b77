from __future__ import annotations

import pytest

from potstill.errors import MissingExtra
from potstill.pipeline import metrics
from potstill.pipeline.metrics import MetricsLog, check_trackers, read_metrics, start_trackers


def test_lines_are_read_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        log.log({"step": step, "loss": step / 3})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": step, "loss": step / 3} for step in (1, 2)]


def test_a_continued_training_keeps_the_lines_of_steps_that_it_does_not_take_again(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.log({"step": step})
    log.rewind(3)
    log.log({"step": 4})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_torn_last_line_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsLog(file).rewind(9)
    assert file.read_text() == '{"step": 1}\n'


def test_without_a_file_there_are_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(MissingExtra, match=r"training\.trackers\[1\]: wandb is not installed.*'potstill\[wandb\]'"):
        check_trackers(["tensorboard", "wandb"])


def test_without_trackers_none_are_started(tmp_path):
    assert start_trackers([], "run", tmp_path) is None
