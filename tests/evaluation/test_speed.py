"""Speed by a clock that only the engine moves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from potstill.evaluation import Speed, folder_bytes, measure_speed
from potstill.types import Batch, Measurement, Offer, Sampling, Signal, Wants

BATCH = Batch(
    *(torch.zeros(2, 5, dtype=torch.long) for _ in range(2)), torch.tensor([[1, 1, 2, 2, 0], [1, 1, 0, 0, 0]])
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedEngine:
    """Takes the seconds that the script says, one number a call, and says nothing."""

    offers = frozenset({Offer.TEXT})

    def __init__(self, clock: Clock, reading: Sequence[float], writing: Sequence[float]) -> None:
        self.clock = clock
        self.reading: Iterator[float] = iter(reading)
        self.writing: Iterator[float] = iter(writing)
        self.asked: list[object] = []

    def read(self, batch: Batch, wants: Wants) -> Signal:
        self.asked.append((batch, wants))
        self.clock.now += next(self.reading)
        return Signal()

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        self.asked.append((tuple(prompts), sampling))
        self.clock.now += next(self.writing)
        return [""] * len(prompts)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_medians_and_ranges_after_a_warm_up(clock):
    engine = ScriptedEngine(clock, [50.0, 1.0, 2.0, 4.0], [50.0, 1.0, 8.0, 4.0])
    speed = measure_speed(engine, BATCH, ["a", "b"], new_tokens=4)
    assert speed == Speed(prefill=(3.0, 1.5, 6.0), decode=(2.0, 1.0, 8.0), n=3)


def test_every_arm_is_asked_the_same(clock):
    engine = ScriptedEngine(clock, [1.0] * 3, [1.0] * 3)
    measure_speed(engine, BATCH, ["a", "b"], new_tokens=7, runs=2)
    assert engine.asked == [(BATCH, Wants(final=True))] * 3 + [(("a", "b"), Sampling(7, min_new_tokens=7))] * 3


def test_the_clock_waits_until_a_gpu_has_finished(clock, monkeypatch):
    def synchronize() -> None:
        clock.now += 2.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    speed = measure_speed(ScriptedEngine(clock, [1.0] * 2, [1.0] * 2), BATCH, ["a"], runs=1)
    assert speed.prefill == (2.0, 2.0, 2.0)


def test_measurements_say_what_was_measured_and_how_often():
    rows = Speed((3.0, 1.5, 6.0), (2.0, 1.0, 8.0), n=3).measurements("student")
    assert rows == [
        Measurement("student", "prefill_tokens_per_s", "test", 3.0, 1.5, 6.0, 3, "tokens/s"),
        Measurement("student", "decode_tokens_per_s", "test", 2.0, 1.0, 8.0, 3, "tokens/s"),
    ]


def test_a_folder_weighs_as_much_as_all_files_below_it(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 10)
    (tmp_path / "inner" / "b.bin").write_bytes(b"x" * 32)
    assert folder_bytes(tmp_path) == 42
