"""Prompts that a teacher writes: new ones after the manner of a few examples, or rows made harder round by round.

Everything here follows from the arguments and the teacher's answers, so that a run that was cut off asks the same again
and gets what its ledger holds. Refuses to end with fewer prompts than were asked for without saying why.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from potstill.data.load import unique_name
from potstill.data.prompts import Origin, Prompt
from potstill.data.templates import (
    OPERATIONS,
    evolve_prompt,
    fault_of,
    instruct_prompt,
    read_instructions,
    read_task,
)
from potstill.errors import DataError
from potstill.types import Completion, Request

__all__ = ["USER", "Ask", "Grown", "evolve", "self_instruct"]

Ask = Callable[[Sequence[Request]], Sequence[Completion | None]]
"""An author's `ask`: the answers in order, None where there is none."""

USER = "user"
"""Column that says whose data a row is: what is made of one row is theirs, too."""

IDLE_ROUNDS = 3
"""Rounds in a row without anything new after which nothing more is expected."""

ROUND_REQUESTS = 32
"""Requests of a round: enough to keep an endpoint busy, few enough for the next round to show what this one wrote."""

OWN_SHARE = 4
"""One in so many examples shown is the teacher's own (Wang et al. (2022), arXiv:2212.10560, sec. 2.2: 2 of 8)."""

FEWEST_WORDS = 2
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Grown:
    """What a teacher made of the seeds.

    refused   what it wrote and was not taken: {reason: count}
    requests  how often it was asked
    note      one line where less came than was asked for, and why; else empty
    """

    prompts: tuple[Prompt, ...]
    refused: Counter[str]
    requests: int
    note: str = ""


def self_instruct(
    seeds: Sequence[Prompt],
    ask: Ask,
    *,
    count: int,
    shown: int,
    written: int,
    is_new: Callable[[str, str], bool],
    random: Random,
    max_tokens: int,
) -> Grown:
    """`count` new prompts that a teacher writes after the manner of the seeds, which are not among them.

    Wang et al. (2022), arXiv:2212.10560. In each round the teacher sees `shown` examples a request, a quarter of them
    its own where there are some, and is asked for `written`. `is_new(id, text)` is told the seeds first, then every
    candidate in order; it says whether nothing like it came before, and remembers it. Ends with `count` prompts, or
    with less after some rounds that brought nothing: `note` then says why.

    Raises:
        DataError: there are no seeds, or one is a conversation.
    """
    pool = [_text_of(seed, "self_instruct") for seed in seeds]
    if not pool:
        raise DataError(
            "generate.prompts: self_instruct needs rows to begin with, and there are none. Give data.source some."
        )
    for seed, text in zip(seeds, pool, strict=True):
        is_new(seed.id, text)
    found, refused = list[Prompt](), Counter[str]()
    requests = idle = candidates = 0
    while len(found) < count and idle < IDLE_ROUNDS:
        asked = min(ROUND_REQUESTS, math.ceil((count - len(found)) / written))
        own = [prompt.text or "" for prompt in found]
        shows = [instruct_prompt(_show(pool, own, shown, random), written) for _ in range(asked)]
        batch = [_request(text, number, max_tokens) for number, text in enumerate(shows, requests)]
        requests += asked
        before = len(found)
        for text, author in _tasks_of(ask(batch), written, refused):
            candidates += 1
            name = f"self_instruct:{candidates}"
            if len(found) == count:
                break
            if is_new(name, text):
                found.append(_written(name, text, group=name, origin="self_instruct", by={"written_by": author}))
            else:
                refused["too like another"] += 1
        idle = idle + 1 if len(found) == before else 0
    return Grown(tuple(found), +refused, requests, _shortfall(count, len(found), refused))


def evolve(prompts: Sequence[Prompt], ask: Ask, *, rounds: int, random: Random, max_tokens: int) -> Grown:
    """The prompts and what a teacher makes of them in `rounds`: harder, more concrete or broader, each from the last.

    Xu et al. (2023), arXiv:2304.12244. A version that equals any other, refuses, is cut off or repeats the request is
    counted and left out; the next round then tries its original again. Versions have the group of their seed.

    Raises:
        DataError: a prompt is a conversation.
    """
    kept, latest = list(prompts), list(prompts)
    texts = [_text_of(prompt, "evolved") for prompt in prompts]
    seen = {prompt.normal_form for prompt in prompts}
    uses, refused = Counter(prompt.id for prompt in prompts), Counter[str]()
    ways = list(OPERATIONS)
    for number in range(1, rounds + 1):
        changes = [random.choice(ways) for _ in texts]
        batch = [
            _request(evolve_prompt(text, change), number - 1, max_tokens, user=_user_of(seed))
            for text, change, seed in zip(texts, changes, prompts, strict=True)
        ]
        for place, (change, answer) in enumerate(zip(changes, ask(batch), strict=True)):
            text, fault = _version(answer, texts[place])
            seed = prompts[place]
            by: dict[str, object] = {
                "written_by": answer.model if answer else "",
                "operation": change,
                "from": latest[place].id,
            }
            version = _written(f"{seed.id}~{number}", text, group=seed.group or seed.id, origin="evolved", by=by)
            if _user_of(seed):
                version = replace(version, row={**version.row, USER: _user_of(seed)})
            if fault or version.normal_form in seen:
                refused[fault or "it equals another"] += 1
                continue
            seen.add(version.normal_form)
            version = replace(version, id=unique_name(version.id, uses))
            kept.append(version)
            latest[place], texts[place] = version, text
    wanted, made = rounds * len(texts), len(kept) - len(texts)
    return Grown(tuple(kept), +refused, wanted, _shortfall(wanted, made, refused))


def _text_of(prompt: Prompt, kind: str) -> str:
    if prompt.text is None:
        raise DataError(
            f"generate.prompts.kind: {kind} works on texts, and row {prompt.id} is a conversation. Use kind: rows, or "
            "a column of text in generate.prompts.template."
        )
    return prompt.text


def _show(seeds: Sequence[str], own: Sequence[str], shown: int, random: Random) -> list[str]:
    mine = random.sample(own, min(len(own), shown // OWN_SHARE))
    examples = random.sample(seeds, min(len(seeds), shown - len(mine))) + mine
    random.shuffle(examples)
    return examples


def _request(text: str, sample: int, max_tokens: int, user: str = "") -> Request:
    return Request(messages=({"role": "user", "content": text},), sample=sample, max_tokens=max_tokens, user=user)


def _user_of(prompt: Prompt) -> str:
    return str(prompt.row.get(USER) or "")


def _tasks_of(answers: Iterable[Completion | None], written: int, refused: Counter[str]) -> Iterator[tuple[str, str]]:
    """(task, who wrote it) of all answers in order; what is none is counted."""
    for answer in answers:
        if answer is None:
            refused["no answer"] += 1
            continue
        tasks = read_instructions(answer.text)
        if not tasks:
            refused["no list in the answer"] += 1
        elif answer.finish == "length":
            tasks.pop()
            refused["cut off"] += 1
        refused["more than was asked for"] += max(0, len(tasks) - written)
        for task in tasks[:written]:
            fault = "too short" if len(_WORD.findall(task)) < FEWEST_WORDS else fault_of(task, "")
            if fault:
                refused[fault] += 1
            else:
                yield task, answer.model


def _version(answer: Completion | None, original: str) -> tuple[str, str]:
    """The rewritten task, and what speaks against it."""
    if answer is None:
        return "", "no answer"
    text = read_task(answer.text)
    return text, "cut off" if answer.finish == "length" else fault_of(text, original)


def _written(name: str, text: str, *, group: str, origin: Origin, by: Mapping[str, object]) -> Prompt:
    return Prompt(name, text, row={"prompt": text}, group=group, origin=origin, provenance=by)


def _shortfall(wanted: int, made: int, refused: Counter[str]) -> str:
    if made >= wanted:
        return ""
    reasons = "; ".join(f"{reason}: {count}" for reason, count in (+refused).most_common())
    return f"{made} of {wanted} prompts were written; not taken: {reasons or 'nothing'}"
