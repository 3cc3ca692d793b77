"""Prompts to ask a teacher: from rows, from grids of seeds, from reasoning-gym; and which of them are held out.

A prompt keeps the row that it was made of, for whoever judges its answers, and the group of prompts that must not part
when some are held out. Refuses to give fewer prompts than were asked for.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import count as numbers
from itertools import product
from random import Random
from typing import Any, Literal

from potstill.data.clean import mend
from potstill.data.load import identity, unique_name
from potstill.data.split import Split, check_shares, place_of
from potstill.data.templates import columns_of, fill
from potstill.errors import DataError, MissingExtra, RecipeError

__all__ = ["Origin", "Prompt", "grid_prompts", "gym_prompts", "row_prompts", "split_prompts"]

Origin = Literal["row", "grid", "self_instruct", "evolved", "reasoning_gym"]

IDLE_DRAWS = 1000
"""Problems drawn in a row that are all known already, after which a task is taken to hold no others."""

_SET_BY_US = ("seed", "size")


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to ask. Exactly one of `text` and `messages` is set.

    row         columns for whoever judges the answers; of a prompt that a teacher wrote, only what it wrote: the
                answer that stood in the seed's row answers another question
    group       id of the prompt that it goes back to; prompts of one group are held out together
    provenance  who wrote it, and from what
    """

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    row: Mapping[str, object] = field(default_factory=dict)
    group: str = ""
    origin: Origin = "row"
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError where there is not exactly one of text and messages."""
        if (self.messages is None) == (self.text is None):
            raise ValueError("a prompt needs exactly one of text, messages")

    @property
    def normal_form(self) -> str:
        """What equal prompts have in common: their words in lower case, one space apart."""
        if self.text is not None:
            return " ".join(self.text.casefold().split())
        turns = ([turn["role"], " ".join(turn["content"].casefold().split())] for turn in self.messages or ())
        return json.dumps(list(turns))


def row_prompts(
    records: Iterable[tuple[str, Mapping[str, object]]], *, template: str, messages: str = "messages"
) -> tuple[list[Prompt], Counter[str]]:
    """A prompt for each row (place, cells) that can be asked, and how many could not be, by reason.

    A row with anything in its column `messages` is asked as it is, without the assistant turns at its end; any other
    fills the template.

    Raises:
        DataError: the template is none, there are no rows, or not one can be asked.
    """
    columns_of(template)
    found, dropped, uses = list[Prompt](), Counter[str](), dict[str, int]()
    first = ""
    for place, cells in records:
        name = unique_name(identity(cells.get("id")) or place, uses)
        try:
            found.append(_row_prompt(name, cells, template, cells.get(messages)))
        except DataError as error:
            first = first or str(error)
            dropped["messages cannot be asked" if cells.get(messages) else "the template cannot be filled"] += 1
    if not found:
        raise DataError(first or "data.source: holds no rows. Give a source with at least a few rows.")
    return found, dropped


def grid_prompts(axes: Mapping[str, Sequence[str]], template: str, *, count: int | None, seed: int) -> Iterator[Prompt]:
    """A prompt for every combination of the axes' values, in order; or for `count` of them, drawn without repetition.

    A value that an axis has twice counts once. Nothing is held in memory but what was drawn, so that a product of any
    size can be drawn from (Li et al. (2023), arXiv:2309.05463: topics, audiences, styles).

    Raises:
        DataError: the template names a column that is no axis.
        RecipeError: an axis is empty, or there are fewer combinations than `count`.
    """
    values = {name: list(dict.fromkeys(axis)) for name, axis in axes.items()}
    for name, axis in values.items():
        if not axis:
            raise RecipeError(f"generate.prompts.axes.{name}: has no values. Give at least one, or remove the axis.")
    fill(template, dict.fromkeys(values, ""))
    sizes = [len(axis) for axis in values.values()]
    total = math.prod(sizes)
    if count is not None and count > total:
        raise RecipeError(
            f"generate.prompts.count: {count}, but the axes have only {total} combinations. Lower it, leave it out for "
            "all, or add values."
        )
    if count is None:
        return (_grid_prompt(i, row, template) for i, row in enumerate(_rows_of(values)))
    return (_grid_prompt(i, _row_at(i, values), template) for i in _draw(total, count, Random(seed)))


def gym_prompts(
    task: str, count: int, *, seed: int, settings: Mapping[str, object], template: str = "{prompt}"
) -> list[Prompt]:
    """`count` distinct problems of a reasoning-gym task; `row` is the problem's entry, which its judge needs.

    Problems that are equal word for word are taken once: a task with small settings has few.

    Raises:
        MissingExtra: reasoning-gym is not installed.
        RecipeError: there is no such task, its settings are wrong, or it holds fewer than `count` distinct problems.
        DataError: the template names anything but {prompt}, {question} or {answer}.
    """
    found: dict[str, Prompt] = {}
    idle = 0
    for number, entry in enumerate(_gym_entries(task, count, seed, settings)):
        row = {"prompt": entry["question"], **entry}
        prompt = Prompt(
            id=f"{task}:{seed}:{number}",
            text=mend(fill(template, row)),
            row=row,
            group=f"{task}:{seed}:{number}",
            origin="reasoning_gym",
            provenance={"written_by": "reasoning-gym", "task": task, "seed": seed, "number": number},
        )
        idle = 0 if found.setdefault(prompt.normal_form, prompt) is prompt else idle + 1
        if len(found) == count or idle >= IDLE_DRAWS:
            break
    if len(found) < count:
        raise RecipeError(
            f"generate.prompts.count: {count}, but {task} gave only {len(found)} distinct problems with these "
            f"settings. Lower it to {len(found)}, or widen generate.prompts.settings."
        )
    return list(found.values())


def split_prompts(
    prompts: Sequence[Prompt], *, seed: int, validation: float, test: float, held_out: int | None = None
) -> dict[Split, tuple[Prompt, ...]]:
    """The prompts of each split, in the order in which they came; groups stay together, and so do equal prompts.

    A group's place in [0, 1) is a hash of what it goes back to, so that adding prompts moves no others: test takes the
    lower end and validation the upper one. With `held_out`, test takes whole groups from the lower end until it has
    so many prompts at least, whatever its share.

    Raises:
        DataError: the shares leave nothing, or nothing is left to train on.
    """
    check_shares(validation, 0.0 if held_out is not None else test)
    roots = _roots(prompts)
    families = _families(prompts, roots)
    places = {root: place_of(content, seed) for root, content in families.items()}
    homes: dict[str, Split] = {root: "validation" if p >= 1 - validation else "train" for root, p in places.items()}
    sizes = Counter(roots)
    taken = 0
    for root in sorted(places, key=lambda one: (places[one], families[one])):
        if places[root] < test if held_out is None else taken < held_out:
            homes[root] = "test"
            taken += sizes[root]
    split: dict[Split, list[Prompt]] = {"train": [], "validation": [], "test": []}
    for prompt, root in zip(prompts, roots, strict=True):
        split[homes[root]].append(prompt)
    if prompts and not split["train"]:
        raise DataError(
            f"generate.held_out: of {len(prompts)} prompts {len(split['test'])} are held out for the test and "
            f"{len(split['validation'])} for validation, and none is left to train on. Hold out fewer, or ask more."
        )
    return {name: tuple(rows) for name, rows in split.items()}


def _row_prompt(name: str, cells: Mapping[str, object], template: str, messages: object) -> Prompt:
    turns = _turns(messages)
    if turns is not None:
        return Prompt(name, messages=turns, row=cells, group=name, provenance={"written_by": "row"})
    text = mend(fill(template, cells))
    if not text.strip():
        raise DataError("generate.prompts.template: filled from the row it is empty. Name a column that holds text.")
    return Prompt(name, text=text, row=cells, group=name, provenance={"written_by": "row"})


def _turns(cell: object) -> tuple[Mapping[str, Any], ...] | None:
    """The conversation up to its last question; None where the cell holds nothing."""
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            cell = "broken"
    if cell is None or cell == "" or (isinstance(cell, list | tuple) and not cell):
        return None
    turns = [turn for turn in cell if _is_turn(turn)] if isinstance(cell, list | tuple) else []
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    complete = isinstance(cell, list | tuple) and all(map(_is_turn, cell))
    if not complete or not turns or turns[-1]["role"] == "system":
        raise DataError(
            "data.messages: the row's messages hold no question: each needs a role and text content, and one of the "
            "user's must stand there. Mend the row."
        )
    return tuple(mend({key: value for key, value in turn.items() if value is not None}) for turn in turns)


def _is_turn(turn: object) -> bool:
    return isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _rows_of(values: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    return (dict(zip(values, row, strict=True)) for row in product(*values.values()))


def _row_at(number: int, values: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The combination of this number in the order of `_rows_of`: the last axis turns fastest."""
    row = {}
    for name in reversed(list(values)):
        number, place = divmod(number, len(values[name]))
        row[name] = values[name][place]
    return dict(reversed(row.items()))


def _draw(total: int, count: int, random: Random) -> Iterator[int]:
    """`count` different numbers below `total`, which may be too large for a range."""
    if total < 2**53:
        yield from random.sample(range(total), count)
        return
    drawn: set[int] = set()
    while len(drawn) < count:
        number = random.randrange(total)
        if number not in drawn:
            drawn.add(number)
            yield number


def _grid_prompt(number: int, row: Mapping[str, str], template: str) -> Prompt:
    name = f"grid:{number}"
    return Prompt(
        name, mend(fill(template, row)), row=row, group=name, origin="grid", provenance={"written_by": "grid"}
    )


def _gym_entries(task: str, count: int, seed: int, settings: Mapping[str, object]) -> Iterator[dict[str, Any]]:
    """Problems without end: batches whose seeds lie so far apart that none repeats another's draws."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise MissingExtra(
            "generate.prompts.kind: reasoning_gym needs a package that is not installed. "
            'Run pip install "potstill[reasoning]".'
        ) from None
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=5, cutoff=0.4)
        raise RecipeError(
            f"generate.prompts.task: reasoning-gym has no task {task!r}. Nearest are: {', '.join(near or DATASETS)}."
        )
    known = [one.name for one in fields(DATASETS[task][1]) if one.name not in _SET_BY_US]
    if wrong := [name for name in settings if name not in known]:
        raise RecipeError(
            f"generate.prompts.settings.{wrong[0]}: {task} has no such setting. It has: {', '.join(known) or 'none'}."
        )
    try:
        for batch in numbers():
            yield from create_dataset(task, seed=(seed + batch * count) % 2**32, size=count, **settings)
    except (TypeError, ValueError, AssertionError, AttributeError, LookupError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RecipeError(
            f"generate.prompts.settings: {task} makes no problems of them ({reason}). Change or remove them."
        ) from None


def _roots(prompts: Sequence[Prompt]) -> list[str]:
    """For each prompt the name of its family: prompts of one group, and equal prompts, are of one family."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for prompt in prompts:
        parent[root(f"group {prompt.group or prompt.id}")] = root(f"words {prompt.normal_form}")
    return [root(f"words {prompt.normal_form}") for prompt in prompts]


def _families(prompts: Sequence[Prompt], roots: Sequence[str]) -> dict[str, str]:
    """{family: what it goes back to}: the least of the prompts that others came from, which no version changes."""
    contents: dict[str, tuple[bool, str]] = {}
    for prompt, root in zip(prompts, roots, strict=True):
        content = (prompt.group not in ("", prompt.id), prompt.normal_form)
        contents[root] = min(contents.get(root, content), content)
    return {root: content for root, (_, content) in contents.items()}
