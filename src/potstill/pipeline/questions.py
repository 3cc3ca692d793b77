"""What the teacher will be asked: the recipe's prompts without duplicates, split, and none that gives a test away.

Refuses to spend a request on a prompt that would be thrown away afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from potstill.data import Split, read_records
from potstill.data.decontaminate import Leak, TestText
from potstill.data.prompts import Prompt, grid_prompts, gym_prompts, row_prompts, split_prompts
from potstill.data.similar import NearDuplicates, remove_near_duplicates, remove_semantic_duplicates
from potstill.data.synthesize import USER, Ask, evolve, self_instruct
from potstill.data.templates import columns_of
from potstill.errors import DataError, MissingExtra, RecipeError
from potstill.pipeline.places import resolve_data
from potstill.recipes import Recipe
from potstill.recipes.generate import EvolvedPrompts, Generate, GridPrompts, SelfInstructPrompts, TaskPrompts
from potstill.recipes.verify import FunctionVerifier, LabelVerifier
from potstill.verify.label import plain_label

__all__ = ["HELD_OUT", "USER", "Plan", "messages_of", "plan_prompts", "read_prompts"]

HELD_OUT = "held out"
"""Source of the run's own tests among all that no training text may share words with."""

EXACT = 1.0
"""Similarity of shingles that only texts of the same words reach."""

TESTED_CHARACTERS = 20_000
"""Of a foreign test text so much is looked at."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be asked.

    prompts  by split
    tests    what no training text may share words with; None where the recipe leaves that unchecked
    dropped  rows and prompts that will not be asked, by reason
    leaks    prompts that were among them because they give a test away
    notes    what a report must not leave out
    """

    prompts: Mapping[Split, tuple[Prompt, ...]]
    tests: TestText | None
    dropped: Counter[str]
    leaks: Sequence[tuple[str, Leak]]
    notes: tuple[str, ...] = ()


def plan_prompts(recipe: Recipe, ask: Ask) -> Plan:
    """The prompts of this recipe. `ask` is the teacher's, for prompts that it writes itself.

    Raises what is wrong with rows, templates and settings.
    """
    spec, notes = _spec(recipe), list[str]()
    prompts, dropped = read_prompts(recipe)
    if isinstance(spec.prompts, SelfInstructPrompts | EvolvedPrompts):
        prompts, note = _grow(recipe, prompts, ask, dropped)
        notes += [note] if note else []
    prompts = _without_duplicates(recipe, _judgeable(spec, prompts, dropped), dropped)
    shares = recipe.data.splits
    split = split_prompts(
        prompts, seed=recipe.seed, validation=shares.validation, test=shares.test, held_out=spec.held_out
    )
    for name in ("validation", "test"):
        if not split[name]:
            key = "generate.held_out" if name == "test" else f"data.splits.{name}"
            raise DataError(f"{key}: of {len(prompts)} prompts none is held out for {name}. Raise it, or ask more.")
    tests = _tests(recipe, split["test"])
    train, leaks = _without_leaks(split["train"], tests)
    if leaks:
        dropped["prompt shares text with a test"] += len(leaks)
    if not train:
        raise DataError(
            f"generate.cleaning.decontaminate: all {len(split['train'])} training prompts share text with a test, the "
            f"first with {leaks[0][1].source}: {leaks[0][1].matched[:80]!r}. Set it to null where that is a form that "
            "all prompts have, or give other prompts."
        )
    return Plan({**split, "train": train}, tests, dropped, leaks, tuple(notes))


def read_prompts(recipe: Recipe) -> tuple[list[Prompt], Counter[str]]:
    """The prompts that need no teacher, and the rows that cannot be asked, by reason."""
    spec = _spec(recipe).prompts
    if isinstance(spec, TaskPrompts):
        found = gym_prompts(spec.task, spec.count, seed=recipe.seed, settings=spec.settings, template=spec.template)
        return found, Counter()
    if isinstance(spec, GridPrompts):
        return list(grid_prompts(spec.axes, spec.template, count=spec.count, seed=recipe.seed)), Counter()
    data = recipe.data
    columns = columns_of(spec.template)
    judged = _spec(recipe).verify
    own = (name for name in (getattr(judged, "answer", None), getattr(judged, "tests", None)) if name)
    more = judged.columns if isinstance(judged, FunctionVerifier) else ()
    wanted = ("id", next(iter(columns), data.text), data.messages, USER, *columns, *own, *more)
    rows = read_records(
        resolve_data(data.source), config=data.config, split=data.split, format=data.format, wanted=wanted
    )
    some = (row for _, row in zip(range(data.max_documents), rows, strict=False)) if data.max_documents else rows
    return row_prompts(some, template=spec.template, messages=data.messages)


def messages_of(prompt: Prompt, system: str | None) -> tuple[Mapping[str, Any], ...]:
    """What is asked, as a chat."""
    asked = prompt.messages or ({"role": "user", "content": prompt.text or ""},)
    return ({"role": "system", "content": system}, *asked) if system is not None else tuple(asked)


def _spec(recipe: Recipe) -> Generate:
    if recipe.generate is None:
        raise ValueError("the recipe asks no teacher to write")
    return recipe.generate


def _grow(recipe: Recipe, seeds: list[Prompt], ask: Ask, dropped: Counter[str]) -> tuple[list[Prompt], str]:
    """The prompts that the teacher makes of these."""
    spec, random = _spec(recipe), Random(recipe.seed)
    if isinstance(spec.prompts, SelfInstructPrompts):
        grown = self_instruct(
            seeds,
            ask,
            count=spec.prompts.count,
            shown=spec.prompts.shown,
            written=spec.prompts.written,
            is_new=_novelty(spec.cleaning.near_duplicates),
            random=random,
            max_tokens=spec.sampling.max_tokens,
        )
    else:
        rounds = spec.prompts.rounds if isinstance(spec.prompts, EvolvedPrompts) else 0
        grown = evolve(seeds, ask, rounds=rounds, random=random, max_tokens=spec.sampling.max_tokens)
    dropped.update({f"written prompt: {reason}": count for reason, count in grown.refused.items()})
    return list(grown.prompts), grown.note


def _novelty(threshold: float | None) -> Callable[[str, str], bool]:
    known = NearDuplicates(threshold or EXACT)
    return lambda name, text: known.add(name, text) is None


def _judgeable(spec: Generate, prompts: list[Prompt], dropped: Counter[str]) -> list[Prompt]:
    """Those whose rows have what their answers are judged by: an answer that nobody can judge is not paid for."""
    judged = spec.verify
    column = getattr(judged, "answer", None) or getattr(judged, "tests", None)
    if column is None:
        return prompts
    labels = {plain_label(one) for one in judged.labels} if isinstance(judged, LabelVerifier) else None
    found = [prompt for prompt in prompts if _holds(prompt.row.get(column), labels)]
    if prompts and not found:
        columns = ", ".join(map(str, prompts[0].row))
        raise DataError(
            f"generate.verify: no row has a usable value in the column {column!r}, by which answers are judged; the "
            f"first row has {columns or 'no columns'}. Name the right column."
        )
    dropped["row lacks what its answers are judged by"] += len(prompts) - len(found)
    return found


def _holds(value: object, labels: set[str] | None) -> bool:
    return value is not None and (labels is None or plain_label(str(value)) in labels)


def _without_duplicates(recipe: Recipe, prompts: list[Prompt], dropped: Counter[str]) -> list[Prompt]:
    """One of all prompts that are alike. Grids and drawn problems are unlike by construction: templates make them look
    alike, and what tells them apart is a word or a number.
    """
    spec, cleaning = _spec(recipe), _spec(recipe).cleaning
    if isinstance(spec.prompts, GridPrompts | TaskPrompts):
        return prompts
    words = [_own_words(recipe, prompt) for prompt in prompts]
    kept = remove_near_duplicates(words, cleaning.near_duplicates or EXACT).kept
    dropped["near duplicate of another prompt"] += len(prompts) - len(kept)
    if cleaning.semantic is not None:
        rule = cleaning.semantic
        own = remove_semantic_duplicates([words[place] for place in kept], rule.cosine, _encoder(rule.model))
        dropped["says the same as another prompt"] += len(kept) - len(own.kept)
        kept = tuple(kept[place] for place in own.kept)
    return [prompts[place] for place in kept]


def _encoder(model: str) -> Any:
    try:
        from model2vec import StaticModel

        return StaticModel.from_pretrained(model)
    except ImportError:
        raise MissingExtra(
            'generate.cleaning.semantic needs model2vec and semhash. Run pip install "potstill[semantic]".'
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"generate.cleaning.semantic.model: {model} cannot be loaded ({str(error).splitlines()[0][:200]}). Give a "
            "model2vec folder or hub id."
        ) from None


def _own_words(recipe: Recipe, prompt: Prompt) -> str:
    """What is the prompt's own: without the template that all share."""
    template = getattr(_spec(recipe).prompts, "template", "")
    if prompt.text is None:
        return "\n".join(str(turn["content"]) for turn in prompt.messages or ())
    if prompt.origin != "row" or not template:
        return prompt.text
    return "\n".join(str(prompt.row.get(name, "")) for name in columns_of(template))


def _tests(recipe: Recipe, held_out: Sequence[Prompt]) -> TestText | None:
    """All that the student is tested on: held-out prompts, and what else the recipe names."""
    rule = _spec(recipe).cleaning.decontaminate
    if rule is None:
        return None
    tests = TestText(rule.ngram, rule.similarity)
    for template in (getattr(_spec(recipe).prompts, "template", None), _spec(recipe).system):
        if template:
            tests.ignore(template)
    if not isinstance(_spec(recipe).prompts, GridPrompts | TaskPrompts):
        # Those are unlike by construction, and their form, which all of them have, would look like a leak.
        for prompt in held_out:
            tests.add(HELD_OUT, prompt.id, _own_words(recipe, prompt))
    for source in rule.against:
        wanted = ("id", "text", *rule.columns)
        for place, cells in read_records(resolve_data(source), config=None, split="test", format="auto", wanted=wanted):
            words = "\n".join(cell for name in rule.columns if isinstance(cell := cells.get(name), str))
            tests.add(Path(source).name, place, words[:TESTED_CHARACTERS])
    return tests


def _without_leaks(
    prompts: Sequence[Prompt], tests: TestText | None
) -> tuple[tuple[Prompt, ...], list[tuple[str, Leak]]]:
    if tests is None:
        return tuple(prompts), []
    found = [
        (prompt, tests.find("\n".join(str(turn["content"]) for turn in messages_of(prompt, None))))
        for prompt in prompts
    ]
    clean = tuple(prompt for prompt, leak in found if leak is None)
    return clean, [(prompt.id, leak) for prompt, leak in found if leak is not None]
