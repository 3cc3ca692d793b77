"""An API as the teacher of classes: which texts it is asked about, and what became of that.

Held-out texts are asked about first: where the budget ends midway, it is training texts that lack answers. Refuses to
go on where more answers are missing than the recipe allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from potstill.data import LabelledText, Split
from potstill.engines import ApiAuthor, LocalAuthor
from potstill.engines.labeller import LabelAnswer, Labeller, LabelQuestion
from potstill.engines.prices import Price
from potstill.engines.tally import Tally
from potstill.errors import TeacherError
from potstill.pipeline.authors import check_spent, opened_author, token_price, writing_teacher
from potstill.pipeline.cast import Cast
from potstill.pipeline.licence import check_terms
from potstill.pipeline.progress import metered
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe

__all__ = ["Asked", "ask_labels", "opened_labeller", "plan_rows", "priced", "question_of"]

Texts = Mapping[Split, Sequence[LabelledText]]

LABELLING, USD_PER_1000 = "labelling", "usd_per_1000"
"""Facts of a capture: what became of the asking; and what 1,000 answered texts cost, failed attempts left out."""


SAMPLED_TEXTS = 400
"""Texts by which a plan estimates what a request takes."""

BYTES_A_TOKEN = 4
"""Of English text, about."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What became of one text. `answer` is None where there is none that can be used."""

    split: Split
    answer: LabelAnswer | None


def question_of(recipe: Recipe, cast: Cast) -> LabelQuestion:
    """What the recipe's teacher is asked about a text. Raises RecipeError where it cannot be asked so."""
    teacher = writing_teacher(recipe)
    asked = teacher.labelling
    return LabelQuestion(
        cast.labels,
        cast.out_of_scope,
        answers=asked.answers,
        votes=asked.votes,
        prompt=asked.prompt,
        max_tokens=asked.max_tokens,
        api=teacher.api,
    )


@contextmanager
def opened_labeller(
    recipe: Recipe, cast: Cast, advance: Callable[[int], None], stopping: Stopping
) -> Iterator[tuple[Labeller, ApiAuthor | LocalAuthor]]:
    """The teacher, ready to be asked for labels; `advance` is told of every answer.

    Raises RecipeError where its terms forbid that, or its key is not there.
    """
    check_terms(recipe)
    question = question_of(recipe, cast)
    with opened_author(recipe, advance, stopping) as author:
        yield Labeller(author, question), author


def ask_labels(
    recipe: Recipe,
    cast: Cast,
    texts: Texts,
    totals: Mapping[Split, int],
    *,
    keep: Callable[[LabelledText, NDArray[np.float32]], None],
    stage: str,
    stopping: Stopping,
) -> dict[str, JsonValue]:
    """Ask about these texts, split by split in their order; `keep` gets every answer, log p of the classes [C].

    `totals` count all texts of each split, those among them that were answered before. Returns what the report tells.
    Raises TeacherError where too many answers are missing, and what the endpoint and the budget raise.
    """
    places = [(split, text) for split, some in texts.items() for text in some]
    votes = writing_teacher(recipe).labelling.votes
    heard: list[Asked] = []
    with (
        metered("ask the teacher", votes * len(places), "answers") as meter,
        opened_labeller(recipe, cast, meter.advance, stopping) as (labeller, author),
    ):
        answers = labeller.label([text for _, text in places])
        for (split, text), answer in zip(places, answers, strict=True):
            if answer is not None:
                keep(text, answer.scores_C)
            heard.append(Asked(split, answer))
        author.note_use(labeller.requests([text for _, text in places]), recipe.folder, stage)
    check_spent(recipe, author.tally)
    unanswered = {split: sum(one.split == split and one.answer is None for one in heard) for split in totals}
    _check(recipe, totals, unanswered, author.tally)
    return _facts(heard, totals, unanswered, author.tally, price=token_price(writing_teacher(recipe)))


def plan_rows(recipe: Recipe, cast: Cast, texts: Texts) -> Iterator[tuple[str, str, str]]:
    """(what, how much, from) of what the teacher will be asked at most, and what that may cost, for the plan.

    Raises RecipeError where it cannot be asked so.
    """
    teacher, question = writing_teacher(recipe), question_of(recipe, cast)
    asked = [text for some in texts.values() for text in some if text.origin is None]
    requests = teacher.labelling.votes * len(asked)
    yield "teacher", f"{teacher.model} at {urlsplit(teacher.base_url).hostname}", "recipe"
    yield "requests", f"{requests:,} at most: answers in the ledger are not asked for again", "data"
    price, limit = token_price(teacher), teacher.budget.usd
    if price is None:
        yield "money", "unknown: state teacher.price", "genai-prices"
        return
    some = [question.request(text) for text in asked[:: max(1, len(asked) // SAMPLED_TEXTS)]]
    bytes_in = [len(str(one.prompt or one.messages).encode()) for one in some]
    tokens_in = sum(bytes_in) / max(1, len(bytes_in)) / BYTES_A_TOKEN
    usd = requests * price.worst(round(tokens_in), max((one.max_tokens for one in some), default=0)) / 1e12
    within = f", never more than {limit:g} (teacher.budget.usd)" if limit is not None else ""
    yield "money", f"{usd:,.2f} USD{within}", "estimated"


def priced(recipe: Recipe, facts: Mapping[str, Any]) -> Recipe:
    """The recipe with what its teacher was paid for 1,000 texts, where it states no price of these.

    `facts` are those of its capture.
    """
    price, paid = recipe.evaluation.price, facts.get(LABELLING, {}).get(USD_PER_1000)
    if price is None or price.teacher_usd_per_1000 is not None or not paid:
        return recipe
    stated = price.model_copy(update={"teacher_usd_per_1000": paid})
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"price": stated})})


def _check(recipe: Recipe, totals: Mapping[Split, int], unanswered: Mapping[Split, int], tally: Tally) -> None:
    """Raises TeacherError; a budget that is used up may leave training texts without answers, but not all of them."""
    spent, most = tally.stopped_by == "budget", writing_teacher(recipe).labelling.missing
    splits = [split for split in totals if not (spent and split == "train")]
    missing, total = sum(unanswered[split] for split in splits), sum(totals[split] for split in splits)
    if spent and (missing > most * total or unanswered["train"] == totals["train"]):
        raise TeacherError(
            f"teacher.budget: used up with {missing:,} of {total:,} held-out texts and {unanswered['train']:,} of "
            f"{totals['train']:,} training texts unanswered, so that nothing can be learned and measured. Raise it: "
            "what was answered is not asked again."
        )
    if missing > most * total:
        raise TeacherError(
            f"teacher.labelling.missing: {missing:,} of {total:,} texts have no answer that can be used, more than "
            f"{most:.1%} ({'; '.join(tally.remarks()) or 'none of the answers names a label'}). Look at them with "
            "`potstill ledger export`, then change teacher.labelling.prompt or raise the share."
        )


def _facts(
    heard: Sequence[Asked],
    totals: Mapping[Split, int],
    unanswered: Mapping[Split, int],
    tally: Tally,
    *,
    price: Price | None,
) -> dict[str, JsonValue]:
    answers = [one.answer for one in heard if one.answer is not None]
    outside = float(np.mean([1.0 - answer.inside for answer in answers])) if answers else 0.0
    costs = [_cost(answer, price) for answer in answers]
    known = [cost for cost in costs if cost is not None]
    told: dict[str, JsonValue] = {
        "texts": {str(split): count for split, count in totals.items()},
        "unanswered": {str(split): count for split, count in unanswered.items()},
        "outside": outside,
        USD_PER_1000: 1000 * sum(known) / len(known) if known and len(known) == len(costs) else None,
        "tally": {**asdict(tally), "remarks": list(tally.remarks())},
    }
    return {LABELLING: told, "notes": [*_notes(totals, unanswered, outside), *tally.remarks()]}


def _cost(answer: LabelAnswer, price: Price | None) -> float | None:
    """Dollars that the answers to one text took; None where that is not known."""
    if price is None or None in answer.usages:
        return None
    return sum(price.cost(usage) for usage in answer.usages if usage is not None) / 1e12


def _notes(totals: Mapping[Split, int], unanswered: Mapping[Split, int], outside: float) -> Iterator[str]:
    if count := unanswered["train"]:  # of held-out texts the evaluation tells
        yield (
            f"the teacher has no answer to {count:,} of {totals['train']:,} training texts: there, nothing of it was "
            "learned"
        )
    if outside > 0.0005:
        yield (
            f"{outside:.1%} of the teacher's probability was on tokens that are no label; the rest was made to sum to 1"
        )
