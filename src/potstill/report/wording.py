"""The page's own words, task by task: what is answered, counted and shown, and what nobody measured.

Refuses: a word of one task on the page of another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from potstill.report.story import TaskFacts, kind_of

__all__ = ["Wording", "wording_of"]


@dataclass(frozen=True, slots=True)
class Wording:
    """The words of a task.

    answer, answers   what a model says at one place, one and many
    places            what these answers are counted by
    documents         what is held out, and drawn again for the intervals
    amount            what a training's length is counted in, as "with the same ..."
    per               of a number in nats
    seen              the horizontal axis of the learning curves
    samples           what stands side by side, as a sentence
    sample, truth     headings of one of them and of what is true of it
    silent            said of an arm whose answer is empty
    speed             the sentence above the pictures of speed
    unmeasured        what no number of the page speaks of
    no_control        first words of a report without a control arm
    pipeline          the hub's name of what the model does
    library           the library that loads it
    """

    answer: str
    answers: str
    places: str
    documents: str
    amount: str
    per: str
    seen: str
    samples: str
    sample: str
    truth: str
    silent: str
    speed: str
    unmeasured: str
    no_control: str
    pipeline: str
    library: str = "transformers"


_NO_CONTROL = "The gain from distillation is unknown: this run has no control arm."
_LANGUAGE = Wording(
    answer="next token",
    answers="next tokens",
    places="positions",
    documents="documents",
    amount="tokens",
    per="token",
    seen="tokens seen (packed positions)",
    samples="Greedy continuations of held-out beginnings. Anecdotes, not evidence: the numbers above are the evidence.",
    sample="Prompt",
    truth="how the document goes on",
    silent="nothing: it stopped at once",
    speed="Speed on the machine named below; another one differs.",
    unmeasured="Downstream tasks, factual accuracy, calibration of whole answers, safety, other domains or languages "
    "than the held-out split, and speed on other machines, batch sizes or serving software.",
    no_control=_NO_CONTROL,
    pipeline="text-generation",
)
_MASKED = replace(
    _LANGUAGE,
    answer="token at a mask",
    answers="masked tokens",
    places="masked positions",
    per="masked token",
    samples="Held-out texts with masks. Anecdotes, not evidence: the numbers above are the evidence.",
    sample="Text",
    truth="what the masks hide",
    silent="nothing",
    unmeasured="Tasks that the encoder could be trained for, safety, other domains or languages than the held-out "
    "split, and speed on other machines, batch sizes or serving software.",
    pipeline="fill-mask",
)
_TEXTS = Wording(
    answer="class",
    answers="classes",
    places="texts",
    documents="texts",
    amount="texts",
    per="text",
    seen="tokens read, padding included",
    samples="Held-out texts and what every arm answers, with its confidence; texts on which arms differ come first, so "
    "that they are harder than most. Anecdotes, not evidence: the numbers above are the evidence.",
    sample="Text",
    truth="its label",
    silent="no label",
    speed="From raw text to answer, tokenisation included, on the machine named below; another one differs.",
    unmeasured="Whether the labels of the data are right, texts of other kinds, times or languages than the held-out "
    "split, fairness towards groups of people, safety, and speed on other machines, at other batch sizes or in serving "
    "software.",
    no_control=_NO_CONTROL,
    pipeline="text-classification",
)
_WRITTEN = replace(
    _LANGUAGE,
    answer="answer",
    answers="answers",
    places="prompts",
    documents="prompts",
    samples="Held-out prompts and every arm's first answer. Anecdotes, not evidence: the numbers above are the "
    "evidence.",
    truth="the answer that its row holds",
    silent="nothing, or an answer that was cut off",
    unmeasured="Prompts of other kinds than the held-out ones, abilities that the student had before and may have "
    "lost, safety, other languages, and speed on other machines, batch sizes or serving software.",
    no_control="What verification added is unknown: this run has no control arm.",
)
_WORDINGS = {
    "language_model": _LANGUAGE,
    "written": _WRITTEN,
    "unverified": replace(
        _WRITTEN,
        no_control="What the teacher's answers are worth is unknown: nothing verifies them, so that there is no "
        "control arm.",
    ),
    "masked_lm": _MASKED,
    "classification": _TEXTS,
    "multi_label": replace(
        _TEXTS, answer="answer to a label", answers="labels", places="labels", per="label", truth="its labels"
    ),
    "token_classification": replace(
        _TEXTS,
        answer="class of a word",
        places="words",
        per="word",
        samples="Held-out texts and the label that every arm gives each word, a dash where it no longer reads; texts "
        "on which arms differ come first, so that they are harder than most. Anecdotes, not evidence: the numbers "
        "above are the evidence.",
        truth="its labels, word by word",
        pipeline="token-classification",
    ),
    "embedding": replace(
        _TEXTS,
        samples="Held-out texts and the other text that every arm holds for most alike; texts on which arms differ "
        "come first. Anecdotes, not evidence: the numbers above are the evidence.",
        truth="its label",
        silent="nothing",
        unmeasured="Search, clustering and other uses of the vectors, texts of other kinds, times or languages than "
        "the held-out split, safety, and speed on other machines, at other batch sizes or in serving software.",
        no_control="The gain from distillation over hard labels is unknown: vectors have none that a control arm could "
        "learn.",
        pipeline="sentence-similarity",
        library="sentence-transformers",
    ),
}


def wording_of(task: TaskFacts | None) -> Wording:
    """The words of this task's page."""
    return _WORDINGS[kind_of(task)]
