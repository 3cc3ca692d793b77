"""What the page explains: the task, the arms, every quantity, and what no number speaks of.

Refuses: a definition of what the run's task does not measure.
"""

from __future__ import annotations

from potstill.report.metrics import gains_of, metrics_of
from potstill.report.story import Story, TaskFacts, find, kind_of
from potstill.report.wording import wording_of

__all__ = ["define", "explain_arms", "name_task", "sum_up_price", "task_rows"]

_NAMED = 8
"""Labels that are named; of more, the others are counted."""


def name_task(task: TaskFacts | None) -> str:
    """The task in words, for example "classification, 150 classes"."""
    match kind_of(task):
        case "masked_lm":
            return "saying masked tokens"
        case "written" | "unverified":
            return "answering prompts as the teacher's answers do"
        case "classification":
            return f"saying the class of a text{_count(task, 'classes')}"
        case "multi_label":
            return f"saying which labels a text bears{_count(task, 'labels')}"
        case "token_classification":
            return f"saying the class of every word{_count(task, 'classes')}"
        case "embedding":
            return "giving a text a vector"
    return "saying the next token"


def _count(task: TaskFacts | None, what: str) -> str:
    return f", {len(task.labels):,} {what}" if task and task.labels else ""


def task_rows(story: Story) -> list[tuple[str, str]]:
    """The task and how the teacher came to know it, as (what, how much); empty for the next token."""
    task, rows = story.task, []
    if task is not None and kind_of(task) != "language_model":
        rows = [("task", f"{_capital(name_task(task))}{_name_labels(task)}.{_shape(task)}")]
    if story.teacher_training:
        rows.append(("teacher first", _tell_training(story)))
    return rows


def _name_labels(task: TaskFacts) -> str:
    if not task.labels:
        return ""
    more = len(task.labels) - _NAMED
    return f": {', '.join(task.labels[:_NAMED])}" + (f" and {more:,} more" if more > 0 else "")


def _shape(task: TaskFacts) -> str:
    pooled = {"cls": "the first token's state", "mean": "the mean of all tokens' states"}.get(task.pooling)
    parts = [f"read from {pooled}"] if pooled else []
    parts += ["scaled to length 1"] if task.normalise else []
    scope = f" Texts labelled {task.out_of_scope} belong to no class." if task.out_of_scope is not None else ""
    length = f" At most {task.length:,} tokens of a text are read." if task.length else ""
    return (f" {_capital(', '.join(parts))}." if parts else "") + length + scope


_LEARNING = {
    "all": "all weights",
    "body": "all weights but the token embeddings",
    "head": "a new head alone, its body as it was,",
}


def _tell_training(story: Story) -> str:
    training = story.teacher_training
    if training is None:
        return ""
    what = _LEARNING[training.learns]
    length = "" if training.steps is None else f", {training.steps:,} steps"
    own = find(story, "teacher", "accuracy")
    reached = f"; on the test split its accuracy is {own.value * 100:.1f} %" if own else ""
    return f"{training.base_model}: {what} trained on hard labels before it taught{length}{reached}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def sum_up_price(story: Story) -> str:
    """What the cost of queries follows from; empty where nobody stated a price."""
    if story.task is None or not story.task.price:
        return ""
    return f"The cost of 1,000 queries follows from {story.task.price}."


def explain_arms(story: Story) -> str:
    """Who is asked the same questions."""
    words = [
        "Teacher is the large model; untrained is the student as it was made, before any training; "
        f"{_explain_control(story)}; student is the distilled model."
    ]
    if any(measurement.arm == "static" for measurement in story.measurements):
        words.append(
            "Static is a classifier without attention beside the student, trained from the same lessons: the mean of "
            "static token embeddings, and a linear layer."
        )
    return " ".join(words)


def _explain_control(story: Story) -> str:
    if kind_of(story.task) == "embedding":
        return "there is no control arm, since vectors have no hard labels"
    if kind_of(story.task) == "unverified":
        return "there is no control arm, since nothing verifies the teacher's answers"
    if kind_of(story.task) == "written":
        return _explain_unverified(story)
    if not story.has_control:
        return (
            "a control arm (the same student trained on hard labels only) was not run, so that what distillation added "
            "beyond plain training is unknown"
        )
    if story.data is not None and story.data.unlabelled:
        return (
            "control is the same initial student, trained for as many steps with hard labels only, on the labelled "
            "texts, so that the difference to it is what the teacher's answers, also on unlabelled texts, added"
        )
    return (
        "control is the same initial student, trained on the same batches in the same order with hard labels only, so "
        "that the difference to it is what the teacher's signal added"
    )


def _explain_unverified(story: Story) -> str:
    if not story.has_control:
        return "a control arm (the same student trained on unverified answers) was not run"
    return (
        "control is the same initial student, trained for as many steps on as many of the teacher's answers to the "
        "same prompts, cleaned and chosen by the same rule, right or wrong, so that the difference to it is what "
        "verifying them added"
    )


def define(story: Story) -> list[tuple[str, str]]:
    """(term, meaning) of the task's quantities, of the intervals, and of what was not measured."""
    task = story.task
    asked = _asked(task)
    found = [(metric.label, metric.meaning + asked.get(metric.name, "")) for metric in metrics_of(task)]
    paired = "; ".join(gain.meaning for gain in gains_of(task) if gain.name.endswith("_over_control"))
    if paired:
        found.append(
            ("Gains", f"Paired on the same {wording_of(task).documents}: {paired}. Positive: the student is better.")
        )
    return [*_relevant(story, found), *_reading(story)]


def _asked(task: TaskFacts | None) -> dict[str, str]:
    """What a recipe adds to definitions."""
    if task is None:
        return {}
    precision = "" if task.precision is None else f" Asked for: {task.precision * 100:g} %."
    price = f" Here: {task.price}." if task.price else ""
    scope = "" if task.out_of_scope is None else " Texts out of scope are left out, as in all that is said of classes."
    return {"accuracy": scope, "oos_threshold": precision, "cost_usd_per_1000": price}


def _relevant(story: Story, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without what a run over texts did not ask: out of scope, cost, temperature."""
    if story.task is None:
        return found
    measured = {measurement.name for measurement in story.measurements}
    optional = {
        metric.label
        for metric in metrics_of(story.task)
        if metric.name.startswith(("oos_", "cost_", "sts_", "temperature", "ece_", "entity_", "cosine_"))
        and metric.name not in measured
    }
    return [(term, meaning) for term, meaning in found if term not in optional]


def _reading(story: Story) -> list[tuple[str, str]]:
    words = wording_of(story.task)
    drawn = (
        f"whole held-out {words.documents} are drawn again with replacement, many times, and the number is computed on "
        f"each draw. Both sides of a gain and of a gap share each draw. Another set of {words.documents} would move a "
        "number about so far. A gain whose interval holds 0 is not shown to differ from chance."
    )
    if words.documents == "texts":
        intervals = (
            f"95 %. Of shares of independent texts exact ones, from the binomial distribution; else bootstrap: {drawn} "
            "Calibration errors have none: resampling would raise them. Those of latencies are from their ranks."
        )
    else:
        intervals = f"95 % bootstrap intervals: {drawn} Intervals of speeds, where given, are over repeated timings."
    resampled = "the texts" if words.documents == "texts" else "the documents that are resampled"
    return [
        ("Intervals", intervals),
        ("n", f"How many observations a number rests on; for quality these are {resampled}."),
        (
            "What the intervals leave out",
            "The luck of training: one seed was run, and another seed, order of data or learning rate could move each "
            "arm.",
        ),
        ("What is not measured", words.unmeasured),
    ]
