"""The measured quantities: what each is called, and how it is defined, for every task.

Refuses: one word for two things. What has the same name in two tasks is defined anew in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from potstill.report.story import TaskFacts, kind_of
from potstill.types import Measurement

__all__ = [
    "GAINS",
    "METRICS",
    "Kind",
    "Metric",
    "gains_of",
    "kind_of_number",
    "metric_of",
    "metrics_of",
]

Kind = Literal[
    "plain", "plain_gain", "nats", "share", "points", "nats_gain", "count", "bytes", "rate", "text_rate", "ms", "times",
    "usd",
]  # fmt: skip
ARMS_COMPARED = ("control", "untrained")


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity: `better` is "higher", "lower" or empty; `meaning` is its definition with the formula."""

    name: str
    label: str
    kind: Kind
    better: str
    meaning: str


def _metrics(*rows: tuple[str, str, Kind, str, str]) -> tuple[Metric, ...]:
    return tuple(Metric(*row) for row in rows)


_SIZES = _metrics(
    ("parameters", "Parameters", "count", "", "Weights of the model, tied ones counted once."),
    ("folder_bytes", "Size on disk", "bytes", "",
     "Bytes of the model folder as saved, tokenizer included (1 MB = 10^6 bytes)."),
)  # fmt: skip

_MEMORY = _metrics(
    ("peak_memory_bytes", "Peak memory", "bytes", "lower",
     "What the arm itself needed while its speed was measured (weights, caches, activations of one batch): the "
     "peak of the process meanwhile, minus what it held once the arm was unloaded. On a GPU, the GPU's memory."),
)  # fmt: skip

_GAP = _metrics(
    ("recovered_agreement", "Gap closed: agreement", "share", "higher",
     "(A_arm - A_untrained) / (A_teacher - A_untrained), A the agreement; A_teacher = 1."),
    ("recovered_kl", "Gap closed: KL", "share", "higher",
     "(KL_untrained - KL_arm) / KL_untrained: 0 % is the untrained student, 100 % the teacher."),
    ("recovered_nll", "Gap closed: NLL", "share", "higher",
     "(NLL_untrained - NLL_arm) / (NLL_untrained - NLL_teacher)."),
)  # fmt: skip

_LANGUAGE = (
    *_metrics(
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
    ),
    *_GAP,
    *_SIZES,
    *_metrics(
        ("prefill_tokens_per_s", "Prefill speed", "rate", "higher",
         "Prompt tokens read per second on this machine, in evaluation."),
        ("decode_tokens_per_s", "Decode speed", "rate", "higher",
         "Tokens written per second on this machine, in evaluation."),
    ),
    *_MEMORY,
)  # fmt: skip

_MASKED = (
    *_metrics(
        ("agreement", "Agreement with the teacher", "share", "higher",
         "Share of held-out masked positions where the arm's most probable token is the teacher's: "
         "(1/N) sum_t [argmax q_t = argmax p_t]. Every arm sees the same masks."),
        ("kl_to_teacher", "KL to the teacher", "nats", "lower",
         "Mean over held-out masked positions of KL(p || q) = sum_v p(v) (log p(v) - log q(v)), p the teacher, q the "
         "arm, temperature 1. Nats per masked token; 0 means the same predictions."),
        ("nll", "Masked-token loss (NLL)", "nats", "lower",
         "-(1/N) sum_t log q(x_t | the masked text) of the tokens that the masks hide. Nats per masked token. Devlin "
         "et al. (2019), arXiv:1810.04805."),
        ("perplexity", "Perplexity", "plain", "lower",
         "exp(NLL): the number of equally likely tokens that would surprise as much. Of masked tokens: not to be "
         "compared with a causal model's."),
        ("ece", "Calibration error", "share", "lower",
         "Expected calibration error of the most probable token at a mask: sum_m (n_m / N) |accuracy_m - confidence_m| "
         "over 15 bins of confidence of equal width. Few positions make it larger than it is."),
        ("retention", "Retention", "share", "higher",
         "exp(NLL_teacher - NLL_arm): geometric-mean probability of the hidden token, arm / teacher. "
         "Above 100 % the arm predicts this text better than its teacher."),
    ),
    *_GAP,
    *_SIZES,
    *_metrics(
        ("prefill_tokens_per_s", "Reading speed", "rate", "higher",
         "Tokens read per second on this machine, in evaluation."),
    ),
    *_MEMORY,
)  # fmt: skip

_WRITTEN = (
    *_metrics(
        ("pass_at_1", "pass@1", "share", "higher",
         "Share of answers to a held-out prompt that the verifier calls right, and its mean over prompts: "
         "(1/P) sum_p c_p / n_p. Chen et al. (2021), arXiv:2107.03374. An answer that was cut off, or of which nobody "
         "knows whether it is right, is not right."),
        ("retention", "Of the teacher's pass@1", "share", "higher", "pass@1 of the arm / pass@1 of the teacher."),
        ("nll", "NLL of the teacher's answers", "nats", "lower",
         "-(1/N) sum_t log q(x_t | x_<t) over the tokens of the teacher's kept answers to held-out prompts. Nats per "
         "token."),
    ),
    *_SIZES,
    *_metrics(
        ("prefill_tokens_per_s", "Prefill speed", "rate", "higher",
         "Prompt tokens read per second on this machine, in evaluation."),
        ("decode_tokens_per_s", "Decode speed", "rate", "higher",
         "Tokens written per second on this machine, in evaluation."),
    ),
    *_MEMORY,
)  # fmt: skip

_SERVED = (
    *_metrics(
        ("throughput_per_s", "Throughput", "text_rate", "higher",
         "Held-out texts answered per second, 32 at a time, tokenisation included, on this machine, in evaluation."),
        ("throughput_vs_teacher", "Throughput, against the teacher", "times", "higher",
         "Throughput of the arm / throughput of the teacher, both in this evaluation."),
        ("latency_p50_ms", "Latency, p50", "ms", "lower",
         "Median time to answer one text that comes alone, tokenisation included, over held-out texts of all lengths."),
        ("latency_p95_ms", "Latency, p95", "ms", "lower", "Time within which 95 % of single texts were answered."),
        ("latency_vs_teacher", "Latency, against the teacher", "times", "lower",
         "p50 of the arm / p50 of the teacher, both in this evaluation."),
        ("cost_usd_per_1000", "Cost of 1,000 queries", "usd", "lower",
         "Of a machine kept busy: price an hour / 3600 / throughput x 1000. Of an API: what it charges."),
    ),
    *_SIZES,
    *_MEMORY,
)  # fmt: skip

_SOFT = _metrics(
    ("agreement", "Agreement with the teacher", "share", "higher",
     "Share of held-out texts for which the arm's most probable class is the teacher's, right or wrong: "
     "(1/N) sum_i [argmax q_i = argmax p_i]."),
    ("kl_to_teacher", "KL to the teacher", "nats", "lower",
     "Mean over held-out texts of KL(p || q) = sum_c p(c) (log p(c) - log q(c)) over the classes, p the teacher, q the "
     "arm, temperature 1. Nats per text; 0 means the same probabilities."),
    ("nll", "Negative log-likelihood", "nats", "lower",
     "-(1/N) sum_i log q(the true class of text i). Nats per text."),
    ("ece", "Calibration error", "share", "lower",
     "Expected calibration error of the most probable class: how far its probability (confidence) is from the share of "
     "texts for which it is right. sum_m (n_m / N) |accuracy_m - confidence_m| over 15 bins of confidence of equal "
     "width; Guo et al. (2017), arXiv:1706.04599. Few texts make it larger than it is."),
    ("ece_calibrated", "Calibration error, with temperature", "share", "lower",
     "The same once the arm's scores are divided by its temperature, which changes no answer."),
    ("temperature", "Temperature", "plain", "",
     "The number by which the arm's scores are divided to be calibrated; above 1 the arm was too sure. Fitted on the "
     "validation split alone, to the least negative log-likelihood; Guo et al. (2017), section 4.2."),
)  # fmt: skip

_SCOPE = _metrics(
    ("oos_auroc", "Out of scope: AUROC", "share", "higher",
     "Probability that a text that belongs to no class gets a lower confidence than one that does, ties counted half: "
     "50 % is a coin. Confidence is the probability of the most probable class, after the arm's temperature where one "
     "was fitted; Hendrycks and Gimpel (2017), "
     "arXiv:1610.02136."),
    ("oos_recall", "Out of scope: recall", "share", "higher",
     "Share of the out-of-scope test texts whose confidence lies below the threshold."),
    ("oos_precision", "Out of scope: precision", "share", "higher",
     "Of the test texts below the threshold, the share that is out of scope. It was asked for on the validation split; "
     "on the test split it is what it turns out to be."),
    ("oos_threshold", "Out of scope: threshold", "plain", "",
     "The confidence below which a text is taken for out of scope: chosen on the validation split for the highest "
     "recall at the precision that was asked for."),
)  # fmt: skip

_CLASSES = (
    *_metrics(
        ("accuracy", "Accuracy", "share", "higher",
         "Share of held-out texts whose most probable class is the true one."),
        ("macro_f1", "Macro F1", "share", "higher",
         "Mean over classes of F1 = 2 P R / (P + R), P the precision and R the recall of a class: every class counts "
         "alike, however rare; Opitz and Burst (2019), arXiv:1911.03347."),
        ("retention", "Retention", "share", "higher",
         "Accuracy of the arm / accuracy of the teacher, on the same texts."),
    ),
    *_SOFT,
    *_SCOPE,
    *_SERVED,
)  # fmt: skip

_LABELS = (
    *_metrics(
        ("macro_f1", "Macro F1", "share", "higher",
         "Mean over labels of F1 = 2 P R / (P + R), each label being given where its probability is above one half; "
         "Opitz and Burst (2019), arXiv:1911.03347."),
        ("micro_f1", "Micro F1", "share", "higher", "F1 of all pairs of a text and a label together."),
        ("accuracy", "All labels right", "share", "higher",
         "Share of held-out texts that got all of their labels and no other."),
        ("retention", "Retention", "share", "higher",
         "Share of texts with all labels right, of the arm / of the teacher, on the same texts."),
    ),
    *(
        replace(metric, meaning=meaning) if (meaning := {
            "agreement": "Share of held-out texts that got the same set of labels from the arm as from the teacher.",
            "kl_to_teacher": "Mean over held-out texts and labels of KL(p || q), p and q the probabilities of teacher "
            "and arm that the text bears the label, temperature 1. Nats per label; 0 means the same probabilities.",
            "nll": "-(1/N) sum_i log q(whether text i bears the label), over texts and labels. Nats per label.",
            "ece": "Expected calibration error: how far the probability of the more probable answer (the label is "
            "borne, or not) is from the share of times that it is right, over 15 bins of confidence of equal width; "
            "Guo et al. (2017), arXiv:1706.04599.",
        }.get(metric.name)) else metric
        for metric in _SOFT
    ),
    *_SERVED,
)  # fmt: skip

_WORDS = (
    *_metrics(
        ("accuracy", "Accuracy", "share", "higher",
         "Share of held-out words whose most probable class is the true one."),
        ("macro_f1", "Macro F1", "share", "higher",
         "Mean over classes of F1 = 2 P R / (P + R) over words; Opitz and Burst (2019), arXiv:1911.03347."),
        ("entity_f1", "Entity F1", "share", "higher",
         "F1 of whole entities, as B- and I- labels mark them: one is found where its first word, its last word and "
         "its type are all right; Tjong Kim Sang and De Meulder (2003), arXiv:cs/0306050."),
        ("retention", "Retention", "share", "higher",
         "Accuracy of the arm / accuracy of the teacher, on the same words."),
    ),
    *(
        replace(metric, meaning=metric.meaning.replace("texts", "words").replace("text", "word")) for metric in _SOFT
    ),
    *_SERVED,
)  # fmt: skip

_VECTORS = (
    *_metrics(
        ("spearman_to_teacher", "Similarities as the teacher's", "plain", "higher",
         "Spearman's rank correlation, over pairs of held-out texts, of the cosine that the arm gives a pair with the "
         "one that the teacher gives it: 1 means the same order of all pairs."),
        ("neighbours_kept", "Neighbours kept", "share", "higher",
         "Of the teacher's 10 nearest neighbours of a held-out text, the mean share that is among the arm's 10."),
        ("cosine_to_teacher", "Cosine to the teacher", "plain", "higher",
         "Mean cosine of the arm's vector of a held-out text with the teacher's; measured only where both are of the "
         "same width."),
        ("sts_spearman", "Likeness as people judge it", "plain", "higher",
         "Spearman's rank correlation of the cosine of two texts with the number that their label gives their "
         "likeness; Reimers and Gurevych (2019), arXiv:1908.10084, section 4.1."),
    ),
    *_SERVED,
)  # fmt: skip

_QUANTITIES: dict[str, tuple[Metric, ...]] = {
    "language_model": _LANGUAGE,
    "written": _WRITTEN,
    "unverified": tuple(metric for metric in _WRITTEN if metric.name not in ("pass_at_1", "retention")),
    "masked_lm": _MASKED,
    "classification": _CLASSES,
    "multi_label": _LABELS,
    "token_classification": _WORDS,
    "embedding": _VECTORS,
}

_Compared = tuple[str, str, Kind, str]
_AGREEMENT: _Compared = (
    "agreement", "Agreement", "points", "agreement of the student minus that of the other arm, in percentage points",
)  # fmt: skip
_KL: _Compared = ("kl", "KL to the teacher", "nats_gain", "KL of the other arm minus that of the student, nats {per}")
_NLL: _Compared = ("nll", "NLL", "nats_gain", "NLL of the other arm minus that of the student, nats {per}")
_PASS: _Compared = ("pass", "pass@1", "points", "pass@1 of the student minus that of the other arm, percentage points")
_F1: _Compared = (
    "macro_f1", "Macro F1", "points", "macro F1 of the student minus that of the other arm, in percentage points",
)  # fmt: skip
_RIGHT: _Compared = (
    "accuracy", "Accuracy", "points", "accuracy of the student minus that of the other arm, in percentage points",
)  # fmt: skip
_ENTITIES: _Compared = (
    "entity_f1", "Entity F1", "points", "entity F1 of the student minus that of the other arm, in percentage points",
)  # fmt: skip
_ALL_RIGHT: _Compared = (
    "accuracy", "All labels right", "points",
    "share of texts with all labels right, of the student minus of the other arm, in percentage points",
)  # fmt: skip
_PAIRED: dict[str, tuple[str, tuple[_Compared, ...]]] = {
    "language_model": ("per token", (_AGREEMENT, _KL, _NLL)),
    "written": ("per token", (_PASS, _NLL)),
    "unverified": ("per token", (_NLL,)),
    "masked_lm": ("per masked token", (_AGREEMENT, _KL, _NLL)),
    "classification": ("per text", (_RIGHT, _F1, _AGREEMENT, _KL, _NLL)),
    "multi_label": ("per label", (_F1, _ALL_RIGHT, _AGREEMENT, _KL, _NLL)),
    "token_classification": ("per word", (_RIGHT, _F1, _ENTITIES, _AGREEMENT, _KL, _NLL)),
    "embedding": ("", ()),
}
"""Of each task: per what its nats are, and what is compared text by text."""


def _gains(per: str, compared: tuple[_Compared, ...]) -> Iterator[Metric]:
    for arm in ARMS_COMPARED:
        for short, label, kind, meaning in compared:
            yield Metric(f"{short}_gain_over_{arm}", label, kind, "higher", meaning.format(per=per))


_GAINS = {kind: tuple(_gains(*paired)) for kind, paired in _PAIRED.items()}

METRICS = _LANGUAGE
"""All quantities of an arm of a language model, in the order of the tables."""

GAINS = _GAINS["language_model"]
"""Paired differences on the same documents; positive means that the student is better."""

_NUMBERS: dict[str, Kind] = {
    metric.name: metric.kind for found in (*_QUANTITIES.values(), *_GAINS.values()) for metric in found
}


def metrics_of(task: TaskFacts | None) -> tuple[Metric, ...]:
    """All quantities of an arm in this task, in the order of the tables."""
    return _QUANTITIES[kind_of(task)]


def gains_of(task: TaskFacts | None) -> tuple[Metric, ...]:
    """Paired differences on the same documents in this task; positive means that the student is better."""
    return _GAINS[kind_of(task)]


def metric_of(measurement: Measurement, task: TaskFacts | None = None) -> Metric:
    """The quantity of a measurement; one outside the task's vocabulary stands under its own name, with its own unit."""
    for metric in (*metrics_of(task), *gains_of(task)):
        if metric.name == measurement.name:
            return metric
    return Metric(measurement.name, measurement.name, "plain", "", measurement.unit)


def kind_of_number(name: str) -> Kind:
    """How numbers of this name are written, in whatever task; plainly where none knows the name."""
    return _NUMBERS.get(name, "plain")
