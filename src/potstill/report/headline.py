"""The one sentence that a reader takes away, computed from the measurements.

Refuses: praise. A gain whose interval holds zero is told as such, and a run without a control arm says so first. A
student that learned from biased estimates is said to have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from potstill.report.metrics import format_interval, format_measurement, format_value
from potstill.report.story import Story, find
from potstill.types import Measurement

__all__ = ["NO_CONTROL", "Verdict", "judge", "write_caveat", "write_headline"]

Verdict = Literal["better", "worse", "not told apart", "no interval"]

NO_CONTROL = "The gain from distillation is unknown: this run has no control arm."
_SAME_STUDENT = "the same student trained on hard labels with the same tokens"

_ACHIEVED: tuple[tuple[str, str, Callable[[Measurement], str]], ...] = (
    ("agreement", "agreement_gain_over_control",
     lambda m: f"agrees with its teacher on {format_value(m)} of next tokens"),
    ("kl_to_teacher", "kl_gain_over_control", lambda m: f"is {format_value(m)} per token (KL) away from its teacher"),
    ("nll", "nll_gain_over_control", lambda m: f"predicts held-out text at {format_value(m)} per token (NLL)"),
)  # fmt: skip
"""What to lead with, best first: measurement, its paired gain, and how it is said."""

_SHORT = {"agreement": "agreement", "kl_to_teacher": "KL to the teacher", "nll": "NLL"}


def judge(gain: Measurement) -> Verdict:
    """Whether a paired gain's 95 % interval lies above zero, below it, or holds it."""
    if gain.low is None or gain.high is None:
        return "no interval"
    if gain.low > 0:
        return "better"
    return "worse" if gain.high < 0 else "not told apart"


def write_headline(story: Story) -> str:
    """One sentence (two without a control arm): what the student kept, and what distillation added."""
    for name, gain_name, say in _ACHIEVED:
        measured = find(story, "student", name)
        if measured is not None:
            achieved = " ".join(filter(None, (f"The {_introduce(story)} {say(measured)}", format_interval(measured))))
            if not story.has_control:
                return f"{NO_CONTROL} {achieved}."
            return f"{achieved}; {_say_gain(find(story, 'student', gain_name))}."
    nothing = f"Nothing was measured of the {story.student}'s quality."
    return nothing if story.has_control else f"{NO_CONTROL} {nothing}"


def write_caveat(story: Story) -> str:
    """On those gains over the control arm that the headline leaves out and that are none, and on biased signals.

    Empty where there is neither.
    """
    return " ".join(filter(None, (_say_worse(story), _say_biased(story))))


def _say_worse(story: Story) -> str:
    measured = [(name, find(story, "student", gain)) for name, gain, _ in _ACHIEVED if find(story, "student", name)]
    others = [(_SHORT[name], gain) for name, gain in measured[1:] if gain is not None]
    said = []
    for verdict, phrase in (("worse", "is worse than"), ("not told apart", "is not told apart from")):
        against = [f"{short} ({format_measurement(gain)})" for short, gain in others if judge(gain) == verdict]
        if against:
            said.append(f"{phrase} the control arm by {' and '.join(against)}")
    return f"But the student {', and '.join(said)}." if said else ""


def _say_biased(story: Story) -> str:
    if story.signals is None or not story.signals.biased:
        return ""
    because = f": {story.signals.bias}" if story.signals.bias else ""
    return f"The student learned from a biased estimate of its teacher{because}."


def _introduce(story: Story) -> str:
    own, teachers = (find(story, arm, "parameters") for arm in ("student", "teacher"))
    if own is None:
        return story.student
    if teachers is None or not teachers.value > 0:
        return f"{story.student} ({format_value(own)} parameters)"
    return (
        f"{story.student} ({format_value(own)}, {own.value / teachers.value * 100:.1f} % of the teacher's parameters)"
    )


def _say_gain(gain: Measurement | None) -> str:
    if gain is None:
        return "what distillation added over the control arm was not measured"
    amount = format_measurement(gain)
    match judge(gain):
        case "better":
            return f"distillation added {amount} over {_SAME_STUDENT}"
        case "worse":
            return f"distillation did harm: {amount} against {_SAME_STUDENT}"
        case "not told apart":
            return f"no gain from distillation is shown: {amount} against {_SAME_STUDENT}, an interval that includes 0"
        case "no interval":
            return (
                f"against {_SAME_STUDENT} it stands at {amount}, without an interval, so that chance is not ruled out"
            )
