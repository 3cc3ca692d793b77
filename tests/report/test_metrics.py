"""Laws of how numbers are written."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.report.metrics import GAINS, METRICS
from potstill.report.numbers import format_duration, format_measurement, format_value
from potstill.types import Measurement


def measured(name: str, value: float, low: float | None = None, high: float | None = None) -> Measurement:
    return Measurement("student", name, "test", value, low, high, 10, "unit")


@pytest.mark.parametrize(
    ("measurement", "text"),
    [
        (measured("agreement", 0.4542, 0.4432, 0.4652), "45.4 % [44.3, 46.5]"),
        (measured("agreement", 0.0004), "0.04 %"),
        (measured("agreement", 0.0), "0.0 %"),
        (measured("kl_to_teacher", 1.381, 1.351, 1.412), "1.38 nats [1.35, 1.41]"),
        (measured("kl_to_teacher", 1.381, 1.3807, 1.3812), "1.3810 nats [1.3807, 1.3812]"),
        (measured("agreement_gain_over_control", 0.0851, 0.0741, 0.0962), "+8.5 points [7.4, 9.6]"),
        (measured("kl_gain_over_control", -0.229, -0.251, -0.207), "−0.229 nats [−0.251, −0.207]"),
        (measured("parameters", 81_411_264), "81.4M"),
        (measured("parameters", 999_600), "1.00M"),
        (measured("parameters", 812), "812"),
        (measured("folder_bytes", 162.9e6), "163 MB"),
        (measured("peak_memory_bytes", 4.31e9), "4.31 GB"),
        (measured("prefill_tokens_per_s", 2813.0), "2,810 tokens/s"),
        (measured("decode_tokens_per_s", 9.999), "10.0 tokens/s"),
        (measured("perplexity", 354.6, 334.1, 378.0), "355 [334, 378]"),
        (measured("perplexity", math.inf), "infinite"),
        (measured("nll", math.nan), "not a number nats"),
        (measured("something_new", 2.5), "2.50"),
    ],
)
def test_a_number_is_written_as_people_write_it(measurement, text):
    assert format_measurement(measurement) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (9.0, "9.00 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (252.6, "4 min 13 s"),
     (3599.7, "1 h 00 min"), (3900, "1 h 05 min")],
)  # fmt: skip
def test_wall_time_is_written_in_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text


@given(st.floats(min_value=1e-3, max_value=1e9), st.sampled_from(["nll", "perplexity", "decode_tokens_per_s"]))
def test_what_is_written_is_within_half_a_unit_of_the_third_digit(value, name):
    written = float(re.sub(r"[^0-9.]", "", format_value(measured(name, value)).removesuffix("tokens/s")))
    assert written == pytest.approx(value, rel=0.0051)


@given(st.floats(), st.none() | st.floats(), st.none() | st.floats(), st.sampled_from(METRICS + GAINS))
def test_every_float_can_be_written(value, low, high, metric):
    assert format_measurement(measured(metric.name, value, low, high))
