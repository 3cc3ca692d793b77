"""The six numbers to look at first, task by task, each with a word on what it is.

Refuses: filling a hole. What was not measured is None here and is called "not measured" there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from potstill.report.facts import Cell, cell_of
from potstill.report.headline import main_measure
from potstill.report.metrics import metric_of
from potstill.report.numbers import format_measurement, format_value
from potstill.report.story import Story, find, kind_of

__all__ = ["Tile", "tiles"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One number in large type, or None where it was not measured, and what it is."""

    label: str
    cell: Cell | None
    note: str


def tiles(story: Story) -> list[Tile]:
    """The six numbers to look at first."""
    return _TILES[kind_of(story.task)](story)


def _language_tiles(story: Story) -> list[Tile]:
    return [
        _tile(story, "Agreement with the teacher", "agreement", "same most probable next token"),
        _gain_tile(story, "agreement", "agreement"),
        _tile(story, "KL to the teacher", "kl_to_teacher", "per token; 0 is the teacher itself"),
        _tile(story, "Gap closed", "recovered_kl", "of the untrained student's KL to the teacher"),
        _tile(story, "Parameters", "parameters", _share_of_teacher(story)),
        _tile(story, "Decode speed", "decode_tokens_per_s", _times_the_teacher(story, "decode_tokens_per_s")),
    ]


def _written_tiles(story: Story) -> list[Tile]:
    return [
        _tile(story, "pass@1", "pass_at_1", _untrained(story, "pass_at_1")),
        _tile(story, "Gain from training", "pass_gain_over_untrained", "pass@1, over the untrained student"),
        _gain_tile(story, "pass", "pass@1", "Gain from verification"),
        _tile(story, "Of the teacher's pass@1", "retention", _teachers(story, "pass_at_1")),
        _tile(story, "Parameters", "parameters", _share_of_teacher(story)),
        _tile(story, "Decode speed", "decode_tokens_per_s", "on the machine named below"),
    ]


def _unverified_tiles(story: Story) -> list[Tile]:
    return [
        _tile(story, "NLL of the teacher's answers", "nll", _untrained(story, "nll")),
        _tile(story, "Gain from training", "nll_gain_over_untrained", "NLL, over the untrained student"),
        _tile(story, "Parameters", "parameters", _share_of_teacher(story)),
        _tile(story, "Size on disk", "folder_bytes", ""),
        _tile(story, "Peak memory", "peak_memory_bytes", "on the machine named below"),
        _tile(story, "Decode speed", "decode_tokens_per_s", "on the machine named below"),
    ]


def _masked_tiles(story: Story) -> list[Tile]:
    return [
        _tile(story, "Agreement with the teacher", "agreement", "same most probable token at a mask"),
        _gain_tile(story, "agreement", "agreement"),
        _tile(story, "KL to the teacher", "kl_to_teacher", "per masked token; 0 is the teacher itself"),
        _tile(story, "Masked-token loss", "nll", _teachers(story, "nll")),
        _tile(story, "Parameters", "parameters", _share_of_teacher(story)),
        _tile(story, "Reading speed", "prefill_tokens_per_s", _times_the_teacher(story, "prefill_tokens_per_s")),
    ]


def _class_tiles(story: Story) -> list[Tile]:
    main = main_measure(story)
    name = main.name if main else "accuracy"
    label = metric_of(main, story.task).label if main else "Accuracy"
    of = "texts with all labels right" if kind_of(story.task) == "multi_label" else "accuracy"
    return [
        _tile(story, label, name, _teachers(story, name)),
        _gain_tile(story, name, label[0].lower() + label[1:]),
        _tile(story, "Retention", "retention", f"of the teacher's {of}"),
        _tile(story, "Agreement with the teacher", "agreement", "same answer, right or wrong"),
        _tile(story, "Parameters", "parameters", _share_of_teacher(story)),
        _tile(story, "Throughput", "throughput_per_s", _served(story)),
    ]  # fmt: skip


def _vector_tiles(story: Story) -> list[Tile]:
    judged = find(story, "student", "sts_spearman")
    last = _tile(story, "Cosine to the teacher", "cosine_to_teacher", "mean over texts")
    if judged:
        last = _tile(story, "Likeness as people judge it", "sts_spearman", _teachers(story, "sts_spearman"))
    return [
        _tile(story, "Similarities as the teacher's", "spearman_to_teacher", "rank correlation over pairs of texts"),
        _tile(story, "Neighbours kept", "neighbours_kept", "of the teacher's 10 nearest"),
        last,
        _tile(story, "Latency", "latency_p50_ms", _one_text(story)),
        _tile(story, "Parameters", "parameters", _share_of_teacher(story)),
        _tile(story, "Throughput", "throughput_per_s", _times_the_teacher(story, "throughput_per_s")),
    ]


_TILES: dict[str, Callable[[Story], list[Tile]]] = {
    "language_model": _language_tiles,
    "masked_lm": _masked_tiles,
    "written": _written_tiles,
    "unverified": _unverified_tiles,
    "classification": _class_tiles,
    "multi_label": _class_tiles,
    "token_classification": _class_tiles,
    "embedding": _vector_tiles,
}


def _tile(story: Story, label: str, name: str, note: str) -> Tile:
    measurement = find(story, "student", name)
    return Tile(label, cell_of(measurement), note if measurement else "")


def _gain_tile(story: Story, name: str, words: str, label: str = "Gain from distillation") -> Tile:
    if not story.has_control:
        return Tile(label, None, "unknown: this run has no control arm")
    return _tile(story, label, f"{name}_gain_over_control", f"{words}, over the control arm")


def _untrained(story: Story, name: str) -> str:
    measured = find(story, "untrained", name)
    return f"untrained: {format_measurement(measured)}" if measured else ""


def _ratio(story: Story, name: str) -> float | None:
    own, teachers = find(story, "student", name), find(story, "teacher", name)
    return None if own is None or teachers is None or not teachers.value > 0 else own.value / teachers.value


def _teachers(story: Story, name: str) -> str:
    own = find(story, "teacher", name)
    return f"teacher: {format_measurement(own)}" if own else ""


def _share_of_teacher(story: Story) -> str:
    share, folder = _ratio(story, "parameters"), find(story, "student", "folder_bytes")
    parts = [] if share is None else [f"{share:.1%}".replace("%", " %") + " of the teacher's"]
    return "; ".join(parts + ([] if folder is None else [f"{format_value(folder)} on disk"]))


def _times_the_teacher(story: Story, name: str) -> str:
    paired = find(story, "student", "throughput_vs_teacher") if name == "throughput_per_s" else None
    times = paired.value if paired else _ratio(story, name)
    return "on the machine named below" if times is None else f"{times:.2f} times the teacher's, same machine"


def _served(story: Story) -> str:
    latency = find(story, "student", "latency_p50_ms")
    alone = f"; one text alone in {format_value(latency)}" if latency else ""
    return f"{_times_the_teacher(story, 'throughput_per_s')}{alone}"


def _one_text(story: Story) -> str:
    own = find(story, "teacher", "latency_p50_ms")
    return "one text alone, median" + (f"; teacher: {format_value(own)}" if own else "")
