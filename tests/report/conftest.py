"""A run as it really looks, with round-about numbers: the story that the tests of this room vary."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from potstill.report import CurvePoint, DataFacts, ReliabilityPoint, Sample, SignalFacts, StageCost, Story
from potstill.types import Measurement

RECIPE = """\
name: quickstart
description: SmolLM2-135M-Instruct, 30 layers, into 15
seed: 7
data:
  source: sample:news-articles
  sequence_length: 256
  splits: {validation: 0.02, test: 0.03}
teacher:
  kind: local
  model: sample:smollm2-135m-instruct
  dtype: bf16
student:
  kind: layers
  keep: greedy
  count: 15
losses:
- kind: forward_kl
  weight: 1.0
  temperature: 1.0
training:
  steps: 60
  batch_rows: 8
  learning_rate: 0.0005
  schedule: {kind: cosine, warmup: 0.05, final: 0.1}
"""

_ARMS = {
    # nll, kl, agreement, prefill, decode, peak
    "teacher": (3.493, 0.0, 1.0, 2790.0, 24.1, 1.31e9),
    "untrained": (5.871, 2.421, 0.312, 5310.0, 45.6, 0.94e9),
    "control": (4.172, 1.832, 0.3691, 5290.0, 45.2, 0.94e9),
    "student": (4.401, 1.381, 0.4542, 5325.0, 45.9, 0.94e9),
}
_ECE = {"teacher": 0.021, "untrained": 0.112, "control": 0.034, "student": 0.0611}
_SIZES = {"teacher": (134_515_008, 269.1e6), "student": (81_411_264, 162.9e6)}


def _quality() -> list[Measurement]:
    rows = []
    for arm, (nll, kl, agreement, prefill, decode, peak) in _ARMS.items():
        rows += [
            Measurement(arm, "nll", "test", nll, nll - 0.061, nll + 0.064, 115, "nats/token"),
            Measurement(
                arm, "perplexity", "test", math.exp(nll), math.exp(nll - 0.061), math.exp(nll + 0.064), 115, ""
            ),
            Measurement(arm, "prefill_tokens_per_s", "test", prefill, prefill - 60, prefill + 55, 5, "tokens/s"),
            Measurement(arm, "decode_tokens_per_s", "test", decode, decode - 0.8, decode + 0.7, 5, "tokens/s"),
            Measurement(arm, "ece", "test", _ECE[arm], _ECE[arm] - 0.004, _ECE[arm] + 0.005, 115, "share"),
            Measurement(arm, "peak_memory_bytes", "test", peak, None, None, 1, "bytes"),
        ]
        parameters, folder = _SIZES.get(arm, _SIZES["student"])
        rows += [
            Measurement(arm, "parameters", "test", parameters, None, None, 1, ""),
            Measurement(arm, "folder_bytes", "test", folder, None, None, 1, "bytes"),
        ]
        if arm != "teacher":
            kept = math.exp(3.493 - nll)
            rows += [
                Measurement(arm, "kl_to_teacher", "test", kl, kl - 0.03, kl + 0.031, 115, "nats/token"),
                Measurement(arm, "agreement", "test", agreement, agreement - 0.011, agreement + 0.011, 115, "share"),
                Measurement(arm, "retention", "test", kept, kept - 0.012, kept + 0.013, 115, "share"),
            ]
    return rows


def _compared() -> list[Measurement]:
    rows = [
        ("student", "recovered_kl", 0.4296, 0.418, 0.441),
        ("control", "recovered_kl", 0.2433, 0.231, 0.256),
        ("student", "recovered_nll", 0.618, 0.601, 0.634),
        ("control", "recovered_nll", 0.714, 0.699, 0.729),
        ("student", "recovered_agreement", 0.2067, 0.192, 0.221),
        ("control", "recovered_agreement", 0.083, 0.069, 0.097),
        ("student", "kl_gain_over_control", 0.451, 0.427, 0.474),
        ("student", "nll_gain_over_control", -0.229, -0.251, -0.207),
        ("student", "agreement_gain_over_control", 0.0851, 0.0741, 0.0962),
        ("student", "kl_gain_over_untrained", 1.04, 1.01, 1.07),
        ("student", "nll_gain_over_untrained", 1.47, 1.43, 1.51),
        ("student", "agreement_gain_over_untrained", 0.1422, 0.131, 0.1535),
    ]
    return [Measurement(arm, name, "test", value, low, high, 115, "") for arm, name, value, low, high in rows]


def _curve(arm: str, start: float, end: float, term: str, steps: int = 60) -> tuple[CurvePoint, ...]:
    noise = random.Random(arm)
    points = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-step / 13) + noise.gauss(0, 0.05)
        validation = {}
        if step % 6 == 0:
            share = 1 - math.exp(-step / 13)
            nll, kl, agreement = _ARMS[arm][:3]
            validation = {"nll": 5.87 + (nll - 5.87) * share, "kl_to_teacher": 2.42 + (kl - 2.42) * share,
                          "agreement": 0.312 + (agreement - 0.312) * share}  # fmt: skip
        points.append(CurvePoint(step, step * 2040, step * 3.1, loss, {term: loss}, validation))
    return tuple(points)


def _reliability(too_sure: float) -> tuple[ReliabilityPoint, ...]:
    """An arm that is less often right than it says, by this share of its confidence."""
    middles = [(m + 0.5) / 15 for m in range(15)]
    return tuple(
        ReliabilityPoint(m / 15, (m + 1) / 15, middle, middle * (1 - too_sure), round(6000 * (1 - middle) ** 2) + 40)
        for m, middle in enumerate(middles)
    )


SIGNALS = SignalFacts(
    kind="16 sampled tokens a position",
    store="runs/signals/smollm2-135m-instruct-sampled-16",
    pieces=3999,
    positions=2_538_254,
    bytes=101_276_334,
    bytes_per_token=39.9,
    captured=3100,
    found=899,
    rule="30 % at random",
    capture_tokens_per_s=2310.4,
    quarantined=2,
    fidelity=(
        ("KL, dense", "1.38 nats", "mean of a position"),
        ("error of the head's gradient", "6.2 %", "what a step sees"),
    ),
)
"""As a run has it whose teacher spoke into a store."""

SAMPLES = (
    Sample(
        "The central bank said on Thursday that it would keep its main interest rate unchanged, citing",
        " slower growth in exports and a labour market that had begun to cool. Officials left the door open to a cut "
        "later in the year.",
        {
            "teacher": " concerns about the impact of the economic downturn on the country's growth.\n\nThe bank said "
            "that it would maintain its current policy stance until inflation returned to its target.",
            "untrained": " the the the of the the bank bank, the the and the of of the the rate",
            "control": " the need to keep the economy in the market. The bank said the government would be able "
            "to make a new deal with the government to make a new deal.",
            "student": " concerns about the economy and the impact of the financial crisis on growth. The bank said "
            "that it would keep its policy until the end of the year.",
        },
    ),
    Sample(
        "Rescue teams reached the village shortly before dawn,",
        " pulling eleven people from the mud. <b>Two</b> were taken to hospital.",
        {
            "teacher": " and the survivors were taken to a nearby hospital.",
            "untrained": "",
            "control": " and the police said they were killed in the attack.\n  - indented\n    twice",
            "student": " and the villagers were able to reach the hospital, officials said.",
        },
    ),
)


@pytest.fixture(scope="session")
def story() -> Story:
    return Story(
        title="quickstart",
        description="SmolLM2-135M-Instruct, 30 layers, into 15 on English news.",
        teacher="sample:smollm2-135m-instruct",
        student="15-layer student",
        student_origin="Layers 0 to 8, 10, 13, 17, 21, 28 and 29 of the teacher's 30, chosen by greedy search.",
        objective="forward_kl (T = 1)",
        recipe=RECIPE,
        has_control=True,
        measurements=tuple(_quality() + _compared()),
        curves={
            "student": _curve("student", 2.42, 1.4, "forward_kl"),
            "control": _curve("control", 5.9, 4.1, "cross_entropy"),
        },
        samples=SAMPLES,
        stages=(
            StageCost("prepare", 8.41, 0.82),
            StageCost("initialise", 47.2, 2.11),
            StageCost("train", 252.6, 4.31),
            StageCost("train control", 148.9, 3.92),
            StageCost("evaluate", 131.3, 2.74),
        ),
        data=DataFacts(
            source="sample:news-articles",
            documents={"train": 3633, "validation": 76, "test": 115},
            tokens={"train": 2_541_887, "validation": 53_120, "test": 80_443},
            rows={"train": 9947, "validation": 209, "test": 317},
            cleaning={"read": 3824, "empty text": 3, "exact duplicates kept in one split": 12},
            fingerprint="b2:9f3c1d77a0e4428db6c1f5309f3c1d77",
        ),
        versions={"potstill": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        machine="x86-64, 2 cores, 24 GiB, no GPU",
        notes=("3 rows unusable: empty text",),
        reliability={
            "teacher": _reliability(0.04),
            "untrained": _reliability(0.5),
            "control": _reliability(0.08),
            "student": _reliability(0.15),
        },
    )


@pytest.fixture(scope="session")
def stored(story: Story) -> Story:
    """The same run with a teacher who spoke into a store beforehand."""
    return replace(story, signals=SIGNALS)
