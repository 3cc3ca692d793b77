"""How measured numbers are written: every one on the page by this module, so that it looks the same everywhere.

Refuses: rounding a number that is not finite into one that looks as if it were.
"""

from __future__ import annotations

import math

from potstill.report.metrics import Kind, kind_of_number
from potstill.types import Measurement

__all__ = [
    "format_duration",
    "format_interval",
    "format_measurement",
    "format_rate",
    "format_size",
    "format_value",
]

_HUGE = 1e15
_PERCENT = ("share", "points")
_SIGNED = ("points", "nats_gain", "plain_gain")
_SUFFIX: dict[Kind, str] = {
    "plain": "", "plain_gain": "", "nats": " nats", "share": " %", "points": " points", "nats_gain": " nats",
    "rate": " tokens/s", "text_rate": " texts/s", "ms": " ms", "times": " times", "usd": " USD",
}  # fmt: skip


def format_value(measurement: Measurement) -> str:
    """The value with its unit: three significant digits, a percentage one decimal; more where the interval is finer."""
    kind = kind_of_number(measurement.name)
    factor, suffix = _scale(measurement.value, kind)
    value = measurement.value * factor
    sign = "+" if kind in _SIGNED and value > 0 else ""
    return f"{sign}{_number(value, _decimals(measurement, kind, factor))}{suffix}"


def format_interval(measurement: Measurement) -> str:
    """The 95 % interval in brackets, in the unit and with the decimals of the value; empty where there is none."""
    if measurement.low is None or measurement.high is None:
        return ""
    kind = kind_of_number(measurement.name)
    factor, _ = _scale(measurement.value, kind)
    decimals = _decimals(measurement, kind, factor)
    return f"[{_number(measurement.low * factor, decimals)}, {_number(measurement.high * factor, decimals)}]"


def format_measurement(measurement: Measurement) -> str:
    """Value, unit and interval: `45.4 % [44.3, 46.5]`."""
    return f"{format_value(measurement)} {format_interval(measurement)}".rstrip()


def format_size(count: int) -> str:
    """Bytes: `817 bytes`, `12.4 MB`, `1.02 GB` (10^9)."""
    return format_value(Measurement("", "folder_bytes", "test", count, None, None, 1, "bytes"))


def format_rate(per_s: float, *, texts: bool = False) -> str:
    """Tokens, or texts, per second: `5,310 tokens/s`."""
    name = "throughput_per_s" if texts else "prefill_tokens_per_s"
    return format_value(Measurement("", name, "test", per_s, None, None, 1, ""))


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
    # What a thousand answers of a small model cost is often less than a millionth of a dollar.
    return min(max(digits, width_digits), 9 if kind == "usd" else 6)


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
