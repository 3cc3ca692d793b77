"""The one sentence that a reader takes away, computed from the measurements.

Refuses: praise. A gain whose interval holds zero is told as such, and a run without a control arm says so first. A
student that learned from biased estimates is said to have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from potstill.report.numbers import format_interval, format_measurement, format_value
from potstill.report.story import Story, find, kind_of
from potstill.report.wording import wording_of
from potstill.types import Measurement

__all__ = ["Verdict", "judge", "main_measure", "write_caveat", "write_headline", "write_static_headline"]

Verdict = Literal["better", "worse", "not told apart", "no interval"]


@dataclass(frozen=True, slots=True)
class _Lead:
    """What a headline may lead with: a measurement and how it is said; {interval} brings its own space."""

    name: str
    sentence: str
    short: str

    @property
    def gain(self) -> str:
        """The paired gain over the control arm that goes with it."""
        return f"{self.name.removesuffix('_to_teacher').removesuffix('_at_1')}_gain_over_control"


_AGREES = "agrees with its teacher on {value}{interval} of held-out texts"
_LEADS = {
    "language_model": (
        _Lead("agreement", "agrees with its teacher on {value} of next tokens{interval}", "agreement"),
        _Lead("kl_to_teacher", "is {value} per token (KL) away from its teacher{interval}", "KL to the teacher"),
        _Lead("nll", "predicts held-out text at {value} per token (NLL){interval}", "NLL"),
    ),
    "written": (
        _Lead("pass_at_1", "answers {value} of held-out prompts rightly{interval}", "pass@1"),
        _Lead("nll", "predicts its teacher's answers at {value} per token (NLL){interval}", "NLL"),
    ),
    "unverified": (
        _Lead("nll", "predicts its teacher's answers at {value} per token (NLL){interval}", "NLL"),
    ),
    "masked_lm": (
        _Lead("agreement", "agrees with its teacher on {value} of masked tokens{interval}", "agreement"),
        _Lead("kl_to_teacher", "is {value} per masked token (KL) away from its teacher{interval}", "KL to the teacher"),
        _Lead("nll", "predicts masked tokens at {value} each (NLL){interval}", "NLL"),
    ),
    "classification": (
        _Lead("accuracy", "is right on {value}{interval} of held-out texts", "accuracy"),
        _Lead("macro_f1", "reaches a macro F1 of {value}{interval}", "macro F1"),
        _Lead("agreement", _AGREES, "agreement"),
        _Lead("kl_to_teacher", "is {value} per text (KL){interval} away from its teacher", "KL to the teacher"),
        _Lead("nll", "predicts labels at {value} per text (NLL){interval}", "NLL"),
    ),
    "multi_label": (
        _Lead("macro_f1", "reaches a macro F1 of {value}{interval} on held-out texts", "macro F1"),
        _Lead("accuracy", "gets all labels of {value}{interval} of held-out texts right", "share of all labels right"),
        _Lead("agreement", _AGREES, "agreement"),
        _Lead("kl_to_teacher", "is {value} per label (KL){interval} away from its teacher", "KL to the teacher"),
        _Lead("nll", "predicts labels at {value} each (NLL){interval}", "NLL"),
    ),
    "token_classification": (
        _Lead("accuracy", "is right on {value}{interval} of held-out words", "accuracy"),
        _Lead("macro_f1", "reaches a macro F1 of {value}{interval}", "macro F1"),
        _Lead("entity_f1", "finds entities with an F1 of {value}{interval}", "entity F1"),
        _Lead("agreement", "agrees with its teacher on {value}{interval} of held-out words", "agreement"),
        _Lead("kl_to_teacher", "is {value} per word (KL){interval} away from its teacher", "KL to the teacher"),
        _Lead("nll", "predicts labels at {value} per word (NLL){interval}", "NLL"),
    ),
    "embedding": (
        _Lead("spearman_to_teacher", "orders pairs of held-out texts by likeness as its teacher does with a rank "
              "correlation of {value}{interval}", "likeness"),
        _Lead("neighbours_kept", "keeps {value}{interval} of its teacher's nearest neighbours", "neighbours kept"),
        _Lead("cosine_to_teacher", "points where its teacher does with a cosine of {value}{interval}", "cosine"),
    ),
}  # fmt: skip
"""What to lead with, best first."""

_EXTRAS = {
    "retention": ", {value}{interval} of its teacher's accuracy",
    "entity_f1": ", finds entities with an F1 of {value}{interval}",
    "neighbours_kept": ", keeps {value}{interval} of its nearest neighbours",
    "throughput_vs_teacher": ", at {value} the throughput",
}
"""What a task over texts adds to its lead, in this order, each where it was measured."""


def judge(gain: Measurement) -> Verdict:
    """Whether a paired gain's 95 % interval lies above zero, below it, or holds it."""
    if gain.low is None or gain.high is None:
        return "no interval"
    if gain.low > 0:
        return "better"
    return "worse" if gain.high < 0 else "not told apart"


def main_measure(story: Story, arm: str = "student") -> Measurement | None:
    """What the headline leads with, measured of this arm; None where the student has none of the task's measures."""
    lead = _lead(story, "student")
    return find(story, arm, lead.name) if lead else None


def write_headline(story: Story) -> str:
    """One sentence (two without a control arm): what the student kept, and what distillation added."""
    refusal = wording_of(story.task).no_control
    lead = _lead(story, "student")
    if lead is None:
        nothing = f"Nothing was measured of the {story.student}'s quality."
        return nothing if story.has_control else f"{refusal} {nothing}"
    achieved = f"The {_introduce(story, 'student', story.student)} {_achieve(story, 'student', lead)}"
    if not story.has_control:
        return f"{refusal} {achieved}."
    return f"{achieved}; {_say_gain(story, find(story, 'student', lead.gain))}."


def write_static_headline(story: Story) -> str:
    """One sentence on the static-embedding classifier beside the student."""
    lead = _lead(story, "static")
    if lead is None:
        return "Nothing was measured of the static classifier's quality."
    return f"The {_introduce(story, 'static', 'static classifier')} {_achieve(story, 'static', lead)}."


def write_caveat(story: Story) -> str:
    """On those gains over the control arm that the headline leaves out and that are none, and on biased signals.

    Empty where there is neither.
    """
    return " ".join(filter(None, (_say_worse(story), _say_biased(story))))


def _lead(story: Story, arm: str) -> _Lead | None:
    return next((lead for lead in _LEADS[kind_of(story.task)] if find(story, arm, lead.name)), None)


def _achieve(story: Story, arm: str, lead: _Lead) -> str:
    """What the arm reaches: the lead, and for a task over texts what else belongs to it."""
    said, kind = _fill(lead.sentence, find(story, arm, lead.name)), kind_of(story.task)
    if kind in ("language_model", "masked_lm"):
        return said
    if kind in ("written", "unverified"):
        others = [(arm, find(story, arm, lead.name)) for arm in ("teacher", "untrained")]
        return said + "".join(_fill(f"; {arm}: {{value}}", found) for arm, found in others)
    if story.task is not None and story.task.out_of_scope is not None:
        said = said.replace("held-out texts", "in-scope held-out texts")
    extras = [name for name in _EXTRAS if name != lead.name]
    if kind == "multi_label" or lead.name != "accuracy":
        # Retention is of accuracy: beside another lead it would be read as a share of that.
        extras.remove("retention")
        said += _fill(" (its teacher: {value})", find(story, "teacher", lead.name))
    return said + "".join(_fill(_EXTRAS[name], find(story, arm, name)) for name in extras)


def _fill(sentence: str, measurement: Measurement | None) -> str:
    if measurement is None:
        return ""
    interval = format_interval(measurement)
    return sentence.format(value=format_value(measurement), interval=f" {interval}" if interval else "")


def _say_worse(story: Story) -> str:
    measured = [lead for lead in _LEADS[kind_of(story.task)] if find(story, "student", lead.name)]
    others = [(lead.short, gain) for lead in measured[1:] if (gain := find(story, "student", lead.gain))]
    said = []
    for verdict, phrase in (("worse", "is worse than"), ("not told apart", "is not told apart from")):
        against = [f"{short} ({format_measurement(gain)})" for short, gain in others if judge(gain) == verdict]
        if against:
            said.append(f"{phrase} the control arm by {_join(against)}")
    return f"But the student {', and '.join(said)}." if said else ""


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _say_biased(story: Story) -> str:
    if story.signals is None or not story.signals.biased:
        return ""
    because = f": {story.signals.bias}" if story.signals.bias else ""
    return f"The student learned from a biased estimate of its teacher{because}."


def _introduce(story: Story, arm: str, name: str) -> str:
    own, teachers = (find(story, each, "parameters") for each in (arm, "teacher"))
    if own is None:
        return name
    if teachers is None or not teachers.value > 0:
        return f"{name} ({format_value(own)} parameters)"
    return f"{name} ({format_value(own)}, {own.value / teachers.value * 100:.1f} % of the teacher's parameters)"


def _say_gain(story: Story, gain: Measurement | None) -> str:
    if gain is None:
        added = "verification" if kind_of(story.task) == "written" else "distillation"
        return f"what {added} added over the control arm was not measured"
    same_student = _name_control(story)
    amount, what = format_measurement(gain), "verification" if kind_of(story.task) == "written" else "distillation"
    match judge(gain):
        case "better":
            return f"{what} added {amount} over {same_student}"
        case "worse":
            return f"{what} did harm: {amount} against {same_student}"
        case "not told apart":
            return f"no gain from {what} is shown: {amount} against {same_student}, an interval that includes 0"
        case "no interval":
            return f"against {same_student} it stands at {amount}, without an interval, so that chance is not ruled out"


def _name_control(story: Story) -> str:
    if kind_of(story.task) == "written":
        return "the same student trained on as many unverified answers"
    if story.data is not None and story.data.unlabelled:
        return "the same student trained as many steps on the labelled texts alone"
    return f"the same student trained on hard labels with the same {wording_of(story.task).amount}"
