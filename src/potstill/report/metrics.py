"""The measured quantities: what each is called, how it is defined, and how its numbers are written.

Every measured number on the page is written by this module, so that it looks the same everywhere. Refuses: rounding a
number that is not finite into one that looks as if it were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from potstill.types import Measurement

__all__ = [
    "GAINS",
    "METRICS",
    "Kind",
    "Metric",
    "format_duration",
    "format_interval",
    "format_measurement",
    "format_rate",
    "format_size",
    "format_value",
    "metric_of",
]

Kind = Literal["plain", "nats", "share", "points", "nats_gain", "count", "bytes", "rate"]
_HUGE = 1e15
_PERCENT = ("share", "points")
_SIGNED = ("points", "nats_gain")
_SUFFIX: dict[Kind, str] = {
    "plain": "", "nats": " nats", "share": " %", "points": " points", "nats_gain": " nats", "rate": " tokens/s",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity: `better` is "higher", "lower" or empty; `meaning` is its definition with the formula."""

    name: str
    label: str
    kind: Kind
    better: str
    meaning: str


METRICS = tuple(
    Metric(*row)
    for row in (
        ("agreement", "Agreement with the teacher", "share", "higher",
         "Share of held-out positions where the arm's most probable next token is the teacher's: "
         "(1/N) sum_t [argmax q_t = argmax p_t]."),
        ("kl_to_teacher", "KL to the teacher", "nats", "lower",
         "Mean over held-out positions of KL(p || q) = sum_v p(v) (log p(v) - log q(v)), p the teacher, q the arm, "
         "temperature 1. Nats per token; 0 means the same predictions."),
        ("nll", "Negative log-likelihood", "nats", "lower",
         "-(1/N) sum_t log q(x_t | x_<t) of the true held-out text. Nats per token."),
        ("perplexity", "Perplexity", "plain", "lower",
         "exp(NLL): the number of equally likely tokens that would surprise as much."),
        ("ece", "Calibration error", "share", "lower",
         "Expected calibration error of the most probable next token: how far its probability (confidence) is from the "
         "share of times that it came (accuracy). sum_m (n_m / N) |accuracy_m - confidence_m| over 15 bins of "
         "confidence of equal width. Few positions make it larger than it is."),
        ("retention", "Retention", "share", "higher",
         "exp(NLL_teacher - NLL_arm): geometric-mean probability of the true token, arm / teacher. "
         "Above 100 % the arm predicts this text better than its teacher."),
        ("recovered_agreement", "Gap closed: agreement", "share", "higher",
         "(A_arm - A_untrained) / (A_teacher - A_untrained), A the agreement; A_teacher = 1."),
        ("recovered_kl", "Gap closed: KL", "share", "higher",
         "(KL_untrained - KL_arm) / KL_untrained: 0 % is the untrained student, 100 % the teacher."),
        ("recovered_nll", "Gap closed: NLL", "share", "higher",
         "(NLL_untrained - NLL_arm) / (NLL_untrained - NLL_teacher)."),
        ("parameters", "Parameters", "count", "", "Weights of the model, tied ones counted once."),
        ("folder_bytes", "Size on disk", "bytes", "",
         "Bytes of the model folder as saved, tokenizer included (1 MB = 10^6 bytes)."),
        ("prefill_tokens_per_s", "Prefill speed", "rate", "higher",
         "Prompt tokens read per second on this machine, in evaluation."),
        ("decode_tokens_per_s", "Decode speed", "rate", "higher",
         "Tokens written per second on this machine, in evaluation."),
        ("peak_memory_bytes", "Peak memory", "bytes", "lower",
         "What the arm itself needed while its speed was measured (weights, caches, activations of one batch): the "
         "peak of the process meanwhile, minus what it held once the arm was unloaded. On a GPU, the GPU's memory."),
    )
)  # fmt: skip
"""All quantities of an arm, in the order of the tables."""

_COMPARED: tuple[tuple[str, str, Kind, str], ...] = (
    ("agreement", "Agreement", "points", "agreement of the student minus that of the other arm, in percentage points"),
    ("kl", "KL to the teacher", "nats_gain", "KL of the other arm minus that of the student, nats per token"),
    ("nll", "NLL", "nats_gain", "NLL of the other arm minus that of the student, nats per token"),
)  # fmt: skip

GAINS = tuple(
    Metric(f"{short}_gain_over_{arm}", label, kind, "higher", meaning)
    for arm in ("control", "untrained")
    for short, label, kind, meaning in _COMPARED
)
"""Paired differences on the same documents; positive means that the student is better."""

_BY_NAME = {metric.name: metric for metric in METRICS + GAINS}


def metric_of(measurement: Measurement) -> Metric:
    """The quantity of a measurement; one outside the vocabulary is shown under its own name, with its own unit."""
    known = _BY_NAME.get(measurement.name)
    return known or Metric(measurement.name, measurement.name, "plain", "", measurement.unit)


def format_value(measurement: Measurement) -> str:
    """The value with its unit: three significant digits, a percentage one decimal; more where the interval is finer."""
    kind = metric_of(measurement).kind
    factor, suffix = _scale(measurement.value, kind)
    value = measurement.value * factor
    sign = "+" if kind in _SIGNED and value > 0 else ""
    return f"{sign}{_number(value, _decimals(measurement, kind, factor))}{suffix}"


def format_interval(measurement: Measurement) -> str:
    """The 95 % interval in brackets, in the unit and with the decimals of the value; empty where there is none."""
    if measurement.low is None or measurement.high is None:
        return ""
    kind = metric_of(measurement).kind
    factor, _ = _scale(measurement.value, kind)
    decimals = _decimals(measurement, kind, factor)
    return f"[{_number(measurement.low * factor, decimals)}, {_number(measurement.high * factor, decimals)}]"


def format_measurement(measurement: Measurement) -> str:
    """Value, unit and interval: `45.4 % [44.3, 46.5]`."""
    return f"{format_value(measurement)} {format_interval(measurement)}".rstrip()


def format_size(count: int) -> str:
    """Bytes: `817 bytes`, `12.4 MB`, `1.02 GB` (10^9)."""
    return format_value(Measurement("", "folder_bytes", "test", count, None, None, 1, "bytes"))


def format_rate(tokens_per_s: float) -> str:
    """Tokens per second: `5,310 tokens/s`."""
    return format_value(Measurement("", "prefill_tokens_per_s", "test", tokens_per_s, None, None, 1, "tokens/s"))


def format_duration(seconds: float) -> str:
    """Wall time: `4.21 s`, `38 s`, `4 min 12 s`, `1 h 05 min`."""
    if not math.isfinite(seconds):
        return _number(seconds, 0)
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _scale(value: float, kind: Kind) -> tuple[float, str]:
    if kind in _PERCENT:
        return 100.0, _SUFFIX[kind]
    if kind not in ("count", "bytes"):
        return 1.0, _SUFFIX[kind]
    plain, big = ("", ("K", "M", "B")) if kind == "count" else (" bytes", (" kB", " MB", " GB"))
    for power, suffix in zip((1e9, 1e6, 1e3), reversed(big), strict=True):
        # 999.6 thousand would be written 1,000K: it is a million.
        if abs(value) >= 0.9995 * power:
            return 1 / power, suffix
    return 1.0, plain


def _decimals(measurement: Measurement, kind: Kind, factor: float) -> int:
    low, high = measurement.low, measurement.high
    width = 0.0 if low is None or high is None else (high - low) * factor
    size = max(abs(measurement.value) * factor, width / 2)
    if not (math.isfinite(size) and math.isfinite(width)) or size == 0 or (kind == "count" and factor == 1):
        return int(kind in _PERCENT)
    if size >= _HUGE:
        return 0
    exponent = math.floor(math.log10(size))
    # A value just under a power of ten is written as that power: it has one digit more before the point.
    exponent += round(size, 2 - exponent) >= 10.0 ** (exponent + 1)
    digits = max(1, -exponent) if kind in _PERCENT else 2 - exponent
    width_digits = -math.floor(math.log10(width)) if width > 0 else digits
    return min(max(digits, width_digits), 6)


def _number(value: float, decimals: int) -> str:
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    if abs(value) >= _HUGE:
        return f"{value:.2e}".replace("-", "−")
    rounded = round(value, decimals)
    text = f"{abs(rounded):,.{max(decimals, 0)}f}"
    return f"−{text}" if rounded < 0 else text
