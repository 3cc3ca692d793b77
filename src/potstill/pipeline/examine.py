"""The evaluate stage of tasks over texts: every arm answers the same test texts, alone in memory, and is timed.

Refuses to time a teacher that is not here: recorded answers, and an API, have no speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.data import LabelledText
from potstill.engines import pick_device
from potstill.errors import DataError
from potstill.evaluation import AT_ONCE, Latency, Quantity, cost_usd_per_1000, measure_latency
from potstill.pipeline.answers import draw_test_texts
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.findings import Findings, Questions, Said, find, heard_by_all, needs_validation, raw_text
from potstill.pipeline.footprint import measure_peak, measure_sizes, peak_bytes, reset_peak
from potstill.pipeline.memory import release_memory
from potstill.pipeline.progress import Meter, metered
from potstill.pipeline.rundir import Stage
from potstill.pipeline.texts import open_labels, open_texts
from potstill.recipes import Recipe
from potstill.recipes.schema import OpenAITeacher, Price
from potstill.recipes.tasks import Embedding
from potstill.types import Measurement

__all__ = ["Answerer", "evaluate_texts"]

SIDE_BY_SIDE = 500_000_000
"""Parameters of all arms together up to which they are loaded at once, to be timed in turns: 2 GB in float32."""

TIMED_TEXTS = 512
"""Test texts that arms are timed with."""


class Answerer(Protocol):
    """An arm that answers texts.

    name        of the arm
    parameters  weights of all its models
    places      model folders or hub ids
    query       answers raw texts end to end and returns when the answers are there; None where no model of it is here
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def parameters(self) -> int: ...  # noqa: D102
    @property
    def places(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def query(self) -> Callable[[Sequence[str]], object] | None: ...  # noqa: D102

    def scores(self, texts: Sequence[LabelledText], meter: Meter | None = None) -> NDArray[np.float32]:
        """Finite logits [N, C] or vectors [N, D] of N texts; where words have labels, a row a word, in text order.

        A word that is beyond what the arm reads has a row of NaN. The meter is advanced by every text.
        """
        ...

    def cut(self, texts: Sequence[LabelledText]) -> int:
        """How many of these texts are longer than the arm reads."""
        ...


Answerers = Callable[[str], AbstractContextManager[Answerer]]
"""From an arm's name to its answerer, which is in memory while the context lasts."""


@dataclass(frozen=True, slots=True)
class _Heard:
    """What one arm said, what it takes up, whether it can be timed; how many test texts are longer than it reads."""

    said: Said
    costs: Sequence[Measurement]
    parameters: int
    timed: bool
    cut: int


def evaluate_texts(recipe: Recipe, stage: Stage, prepared: Path, *, answerers: Answerers, arms: Sequence[str]) -> None:
    """Ask every arm, the teacher among them, and write what the answers come to.

    measurements.json, calibration.json, samples.json; of tasks with classes also classes.json, confusions.json and
    slices.json. What was not measured, and why, stands in the notes of the manifest. Raises DataError where there is no
    test text.
    """
    questions, notes = _ask_what(recipe, prepared)
    total = len(arms) * (len(_asked(recipe, questions)) + len(questions.validation))
    with metered("evaluate", total, "texts") as meter:
        heard = {arm: _hear(recipe, stage, questions, answerer=answerers(arm), meter=meter) for arm in arms}
    said, silent = {arm: one.said for arm, one in heard.items()}, list[str]()
    if isinstance(recipe.teacher, OpenAITeacher):
        questions, said, silent = heard_by_all(questions, said)
    found = find(recipe, questions, said)
    speeds, more = _time_arms(recipe, questions, answerers, heard)
    costs = [cost for one in heard.values() for cost in one.costs]
    rows = [asdict(measurement) for measurement in (*found.measurements, *costs, *speeds)]
    files = {"measurements": rows, "calibration": {}, **found.files, "samples": _samples(recipe, questions, found)}
    for name, content in files.items():
        write_json_atomic(stage.folder / f"{name}.json", content)
    told = [*notes, *silent, *_cut_notes(recipe, questions, heard), *found.notes, *more]
    stage.finish(rows=len(questions.test), documents=len(questions.test), notes=[*told])


def _ask_what(recipe: Recipe, prepared: Path) -> tuple[Questions, list[str]]:
    """The texts, and what is to be noted of their choice."""
    texts, total = draw_test_texts(recipe, prepared)
    if not texts:
        raise DataError(
            "data.splits.test: the test split holds no text, so nothing can be measured. Raise data.splits.test, or "
            "give a file with a test part."
        )
    validation = open_texts(prepared, "validation") if needs_validation(recipe) else []
    labels = open_labels(prepared)
    notes = [f"{len(texts)} of {total} test texts were asked, drawn by the seed (evaluation.max_documents)"]
    questions = Questions(texts, validation, labels.names if labels else ())
    return questions, notes if len(texts) < total else []


def _asked(recipe: Recipe, questions: Questions) -> list[LabelledText]:
    """The test texts; where each gets a vector, the second texts of pairs on their own after all first ones."""
    if not isinstance(recipe.task, Embedding):
        return list(questions.test)
    firsts = [replace(text, pair=None) for text in questions.test]
    return firsts + [replace(text, text=text.pair, pair=None) for text in questions.test if text.pair is not None]


def _hear(
    recipe: Recipe,
    stage: Stage,
    questions: Questions,
    *,
    answerer: AbstractContextManager[Answerer],
    meter: Meter,
) -> _Heard:
    """Load an arm, ask it, and let it go."""
    device, peak = pick_device(recipe.teacher.device, "teacher.device"), 0
    with answerer as arm:
        test = arm.scores(_asked(recipe, questions), meter)
        validation = arm.scores(questions.validation, meter) if questions.validation else test[:0]
        name, parameters, query = arm.name, arm.parameters, arm.query
        costs, cut = measure_sizes(name, parameters, arm.places) if query else [], arm.cut(questions.test)
        if query and recipe.evaluation.speed:
            peak = _work(stage, query, questions, device)
        timed = query is not None
        del arm, query  # the last references: the next arm must not find it in memory
    release_memory()
    return _Heard(Said(test, validation), [*costs, *measure_peak(name, peak, device)], parameters, timed, cut)


def _cut_notes(recipe: Recipe, questions: Questions, heard: Mapping[str, _Heard]) -> list[str]:
    """Of how many test texts arms heard the beginning only: `task.overlong` is for those to learn from."""
    arms = {
        count: [arm for arm, one in heard.items() if one.cut == count] for count in {one.cut for one in heard.values()}
    }
    return [
        f"{count:,} of {len(questions.test):,} test texts have more than {recipe.data.sequence_length:,} tokens: "
        f"{', '.join(names)} answered by their beginnings"
        for count, names in sorted(arms.items())
        if count
    ]


def _work(stage: Stage, query: Callable[[Sequence[str]], object], questions: Questions, device: torch.device) -> int:
    """The largest memory in use, in bytes, while the arm answers AT_ONCE at a time; 0 where that cannot be known."""
    stage.keep_peak()
    fresh = reset_peak(device)
    texts = [raw_text(text) for text in questions.test[: 8 * AT_ONCE]]
    for begin in range(0, len(texts), AT_ONCE):
        query(texts[begin : begin + AT_ONCE])
    return peak_bytes(device) if fresh else 0


def _time_arms(
    recipe: Recipe, questions: Questions, answerers: Answerers, heard: Mapping[str, _Heard]
) -> tuple[list[Measurement], list[str]]:
    """Speed and cost of every arm that can be timed, and how that was done."""
    if not recipe.evaluation.speed:
        return [], []
    arms = [arm for arm, one in heard.items() if one.timed]
    notes = [f"{arm} has no speed: no model of it is here" for arm in heard if arm not in arms]
    together = sum(heard[arm].parameters for arm in arms) <= SIDE_BY_SIDE
    if "teacher" in arms and recipe.teacher.dtype != recipe.training.precision:
        notes.append(
            f"the teacher answered in {recipe.teacher.dtype} and its students in {recipe.training.precision}, as they "
            "were trained: a part of what their speeds differ by may be that"
        )
    if not together:
        notes.append("the arms were timed one after another: together they would not fit into 2 GB")
    order = np.random.default_rng(recipe.seed).permutation(len(questions.test))[:TIMED_TEXTS]
    texts = [raw_text(questions.test[place]) for place in order]
    timed: dict[str, Latency] = {}
    for group in [arms] if together else [[arm] for arm in arms]:
        with ExitStack() as opened:
            queries = {arm: opened.enter_context(answerers(arm)).query for arm in group}
            timed.update(measure_latency({arm: query for arm, query in queries.items() if query}, texts))
            queries.clear()
        release_memory()
    return _tell_speeds(timed, recipe.evaluation.price), [*notes, *_price_notes(recipe, arms)]


def _tell_speeds(timed: Mapping[str, Latency], price: Price | None) -> list[Measurement]:
    teacher = timed.get("teacher")
    found = []
    for arm, latency in timed.items():
        rows = latency.measurements(arm, None if arm == "teacher" else teacher)
        found += rows
        if price and not (arm == "teacher" and price.teacher_usd_per_1000):
            found += [_cost(price, row) for row in rows if row.name == "throughput_per_s"]
    if price and price.teacher_usd_per_1000:
        found.append(Quantity("teacher", "cost_usd_per_1000", 1, "usd").measured(price.teacher_usd_per_1000))
    return found


def _cost(price: Price, throughput: Measurement) -> Measurement:
    """What 1,000 queries cost at this throughput; its upper end is the cost's lower one."""
    value, *ends = (
        None if rate is None else cost_usd_per_1000(price.machine_usd_per_hour, rate)
        for rate in (throughput.value, throughput.high, throughput.low)
    )
    quantity = Quantity(throughput.arm, "cost_usd_per_1000", throughput.n, "usd")
    return replace(quantity.measured(value or 0.0), low=ends[0], high=ends[1])


def _price_notes(recipe: Recipe, timed: Sequence[str]) -> list[str]:
    price = recipe.evaluation.price
    if price is None or price.teacher_usd_per_1000 or "teacher" in timed:
        return []
    return ["what the teacher's queries cost is not known: state evaluation.price.teacher_usd_per_1000"]


def _samples(recipe: Recipe, questions: Questions, found: Findings) -> list[dict[str, Any]]:
    """Some texts with every arm's answer, first those on which the arms differ most."""
    answers = list(zip(*found.told.values(), strict=True))
    order = np.random.default_rng(recipe.seed).permutation(len(answers)).tolist()
    order.sort(key=lambda place: -len({answer.rpartition(" (")[0] or answer for answer in answers[place]}))
    return [
        {
            "prompt": raw_text(questions.test[place]),
            "reference": _reference(questions.test[place]),
            "completions": dict(zip(found.told, answers[place], strict=True)),
        }
        for place in order[: recipe.evaluation.sample_prompts]
    ]


def _reference(text: LabelledText) -> str:
    """Its label or labels, by name."""
    if text.label is None:
        return "(no label)"
    if isinstance(text.text, tuple):
        return " ".join(name or "-" for name in text.label)
    return ", ".join(text.labels) or "none"
