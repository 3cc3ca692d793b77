"""The stage capture where the teacher of a language model is an endpoint: it scores given text, and no model runs here.

What it says of training and validation rows goes into the same store as a local teacher's likeliest tokens. Refuses to
go on without the log-probabilities of a single piece: a store with gaps cannot be trained from.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress
from typing import cast
from urllib.parse import urlsplit

import numpy as np
import torch
from pydantic import JsonValue

from potstill.data import PackedRows
from potstill.engines import ApiAuthor
from potstill.engines.scoring import answer_bytes, read_scores, score_request
from potstill.engines.tally import Tally
from potstill.errors import BudgetError, TeacherError
from potstill.pipeline.authors import limits_of, opened_author, token_price, writing_teacher
from potstill.pipeline.capture import (
    Wanted,
    capture_facts,
    check_room,
    count_wanted,
    keep_plan,
    open_signals,
    rows_to_train,
)
from potstill.pipeline.lessons import Inputs
from potstill.pipeline.licence import check_terms, describe_terms
from potstill.pipeline.progress import metered
from potstill.pipeline.recall import PLAN
from potstill.pipeline.rundir import Stage
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.transcribe import Captured, Text, choose_at_random, texts_to_read
from potstill.recipes import Recipe
from potstill.recipes.signals import TruncatedSignals
from potstill.signals import Encoding, Store, Writer, select_listed
from potstill.types import IGNORE, Completion, Request

__all__ = ["capture_scored", "scoring_rows"]

Part = tuple[PackedRows, Sequence[int]]
"""Rows, and the numbers of those that are asked about."""

Heard = tuple[Captured, Tally]
"""What was stored, and how the requests for it ended."""


def capture_scored(recipe: Recipe, stage: Stage, inputs: Inputs, stopping: Stopping) -> None:
    """Have the endpoint score those pieces of the training and validation rows that the store lacks, and store that.

    Raises RecipeError where its terms forbid that, TeacherError, BudgetError, StoreError, and Interrupted: what was
    answered is in the ledger, and the same command continues.
    """
    check_terms(recipe)
    store, encoding = open_signals(recipe, inputs.vocabulary)
    parts = _parts(recipe, inputs)
    wanted = _joined([count_wanted(recipe, rows, numbers, store) for rows, numbers in parts])
    check_room(store, wanted.tokens * encoding.stride)
    planned_P = keep_plan(stage.folder, wanted)
    heard: list[Heard] = []
    if wanted.missing:
        heard = _ask(recipe, parts, store, encoding, pieces=wanted.missing, stopping=stopping)
    done = functools.reduce(Captured.plus, (kept for kept, _ in heard), Captured())
    facts = capture_facts(store, wanted, done, captured=int(planned_P.sum()))
    told: dict[str, JsonValue] = {"stride": encoding.stride, "spec": encoding.spec.to_json(), "fidelity": None}
    stage.finish(PLAN, **facts, **told, **_told([tally for _, tally in heard]))


def scoring_rows(recipe: Recipe, tokens: int) -> Iterator[tuple[str, str, str]]:
    """(what, how much, from) of asking about so many tokens, for the plan. Raises RecipeError where terms forbid it."""
    finding, teacher = check_terms(recipe), writing_teacher(recipe)
    yield "teacher", f"{teacher.model} at {urlsplit(teacher.base_url).hostname}, scores given text", "recipe"
    for line in describe_terms(finding):
        yield "terms", line.strip(), "terms.yaml"
    price = token_price(teacher)
    limit = ", ".join(f"{value:g} {name}" for name, value in limits_of(teacher.budget).items()) or "none"
    cost = "price unknown: state teacher.price" if price is None else f"about {price.worst(tokens, 0) / 1e12:,.4f} USD"
    yield "money", f"{cost}; budget: {limit}", "prices"


def _parts(recipe: Recipe, inputs: Inputs) -> list[Part]:
    """The validation rows first, which draw every arm's curves; then those of the training."""
    held_out, train = (PackedRows(inputs.prepared / split) for split in ("validation", "train"))
    some = range(min(len(held_out), recipe.training.validation_rows))
    return [(held_out, some), (train, rows_to_train(recipe, train))]


def _joined(parts: Sequence[Wanted]) -> Wanted:
    return Wanted(
        np.concatenate([part.keys_P16 for part in parts]),
        np.concatenate([part.missing_P for part in parts]),
        sum(part.positions for part in parts),
        sum(part.tokens for part in parts),
    )


def _within_limits(recipe: Recipe) -> Recipe:
    """With no more requests open at once than `signals.batch_tokens` allows, each as long as any may be."""
    teacher, signals = writing_teacher(recipe), cast(TruncatedSignals, recipe.signals)
    most = max(1, signals.batch_tokens // recipe.data.sequence_length)
    limits = teacher.limits.model_copy(update={"concurrency": min(most, teacher.limits.concurrency)})
    return recipe.model_copy(update={"teacher": teacher.model_copy(update={"limits": limits})})


def _ask(
    recipe: Recipe,
    parts: Sequence[Part],
    store: Store,
    encoding: Encoding,
    *,
    pieces: int,
    stopping: Stopping,
) -> list[Heard]:
    """Window by window, and of each one piece alone before the others: what the endpoint cannot do shows there."""
    most_bytes = answer_bytes(recipe.data.sequence_length + 1, encoding.spec.k)
    heard: list[Heard] = []
    with (
        metered("capture", pieces, "texts") as meter,
        opened_author(_within_limits(recipe), meter.advance, stopping, most_bytes=most_bytes) as author,
        stopping.held(),
        store.writer() as writer,
    ):
        for rows, numbers in parts:
            for window in texts_to_read(rows, numbers, store):
                heard.extend(
                    _score(recipe, texts, cast(ApiAuthor, author), encoding, writer=writer)
                    for texts in filter(None, (window[:1], window[1:]))
                )
                # Before the next window is compared with the store: equal pieces are asked about once.
                writer.commit()
                store.refresh()
    return heard


def _score(recipe: Recipe, texts: Sequence[Text], author: ApiAuthor, encoding: Encoding, *, writer: Writer) -> Heard:
    """Ask about these texts, and store what is said; raises where of some nothing is."""
    began, done = time.monotonic(), Captured()
    requests = [_request(text, encoding.spec.k) for text in texts]
    for text, answer in zip(texts, author.ask(requests), strict=True):
        if answer is not None:
            done = done.plus(_keep(recipe, text, answer, encoding, writer=writer))
    if done.pieces < len(texts):
        writer.commit()
        raise _missing(recipe, author.tally, len(texts) - done.pieces, len(texts))
    author.note_use(requests, recipe.folder, "capture")
    return replace(done, seconds=time.monotonic() - began), author.tally


def _request(text: Text, k: int) -> Request:
    following = int(text.targets_T[-1])
    return score_request(text.ids_T.tolist(), None if following == IGNORE else following, k)


def _keep(recipe: Recipe, text: Text, answer: Completion, encoding: Encoding, *, writer: Writer) -> Captured:
    """Store what was said at the supervised positions of one text, or at those of them that the recipe draws."""
    spec, signals = encoding.spec, cast(TruncatedSignals, recipe.signals)
    positions = torch.nonzero(text.targets_T != IGNORE).flatten().tolist()
    keep_N = choose_at_random(signals.positions, [text], [len(positions)])
    note = b""
    if keep_N is not None:
        positions, note = list(compress(positions, keep_N.tolist())), np.packbits(keep_N.numpy()).tobytes()
    selected = select_listed(spec, *read_scores(answer, positions, k=spec.k, vocabulary=spec.vocabulary))
    writer.append(text.key, encoding.pack(selected), note)
    return Captured(1, len(positions), len(text))


def _missing(recipe: Recipe, tally: Tally, absent: int, asked: int) -> Exception:
    teacher, length = writing_teacher(recipe), recipe.data.sequence_length
    if tally.stopped_by == "budget":
        limits = ", ".join(f"{name}={value:g}" for name, value in limits_of(teacher.budget).items())
        return BudgetError(
            f"teacher.budget: {limits} was used up with {absent:,} of {asked:,} texts to go. Raise it: what was "
            "answered is not asked again."
        )
    k = cast(TruncatedSignals, recipe.signals).k
    then = "the same command asks again"
    if tally.quarantined:
        then = "answers that cannot be used stay in the ledger: mend the server, then name another teacher.ledger"
    return TeacherError(
        f"teacher.base_url: {teacher.base_url} gave no log-probabilities of {absent:,} of {asked:,} texts "
        f"({' '.join(tally.remarks())}). It must take {k} of them a token (signals.k; vLLM: --max-logprobs) and "
        f"{length + 2} tokens (data.sequence_length + 2; vLLM: --max-model-len); {then}."
    )


def _told(tallies: Sequence[Tally]) -> dict[str, JsonValue]:
    """What the report may tell of the asking."""
    served = sum((Counter(tally.served) for tally in tallies), Counter[str]())
    paid = [tally.usd for tally in tallies]
    told: dict[str, JsonValue] = {
        "answered_before": sum(tally.answered_before for tally in tallies),
        "tokens": sum(tally.tokens for tally in tallies),
        "usd": None if None in paid else sum(usd for usd in paid if usd is not None),
        "served": dict(served),
    }
    names = ", ".join(f"{name or 'without a name'} ({count:,})" for name, count in served.items())
    return {
        "scoring": told,
        "notes": [f"the endpoint changed the model that answers: {names}"] if len(served) > 1 else [],
    }
