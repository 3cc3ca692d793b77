from __future__ import annotations

import logging
import time

from potstill.samples import progress


def test_quick_work_is_not_spoken_of(caplog):
    with caplog.at_level(logging.INFO), progress.tell_if_slow("brewing"):
        pass
    assert caplog.records == []


def test_slow_work_is_announced_while_it_runs_and_timed_at_its_end(caplog, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.02)
    with caplog.at_level(logging.INFO):
        with progress.tell_if_slow("brewing"):
            time.sleep(0.2)
            during = [record.getMessage() for record in caplog.records]
        after = [record.getMessage() for record in caplog.records]
    assert during == ["brewing ..."]
    assert after[1].startswith("brewing took ")
