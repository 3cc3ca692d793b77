"""What is kept of a teacher's answers: finished, verified, clean and chosen ones, with the count of all others.

Answers are read a window of prompts at a time, however many there are. Refuses to drop one uncounted.

Suffixes: S answers that the control arm may learn.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from potstill.data import Split
from potstill.data.decontaminate import Leak, TestText
from potstill.data.privacy import mask_pii
from potstill.data.prompts import Prompt
from potstill.data.quality import Rules, judge_text
from potstill.data.similar import NearDuplicates
from potstill.data.synthesize import Ask
from potstill.pipeline.grading import UNASKED, opened_grader
from potstill.pipeline.preference import preferred
from potstill.pipeline.questions import EXACT, USER, messages_of
from potstill.recipes import Recipe
from potstill.recipes.generate import Generate
from potstill.types import Completion
from potstill.verify import Difficulty, Verdict, choose

__all__ = ["Harvest", "Picked"]

WINDOW = 256
"""Prompts whose answers are verified together."""

UNFINISHED = Verdict(False, "unfinished")

_NAMES = {True: "right", False: "wrong", None: "unknown"}


@dataclass(frozen=True, slots=True)
class Picked:
    """An answer to be learned, in the conversation as the student will see it."""

    prompt: Prompt
    split: Split
    sample: int
    answer: Completion
    messages: tuple[dict[str, Any], ...]
    masked: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Clean:
    """A conversation that may be learned, and what personal data was masked in it, by kind."""

    messages: tuple[dict[str, Any], ...]
    masked: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Answered:
    """An answer that came, where it stands among all, and what the verifier says; None of unfinished ones."""

    place: int
    sample: int
    answer: Completion
    verdict: Verdict | None


class Harvest:
    """A pass over all answers. Its counts are complete when `kept` has been read to its end.

    rows       answers kept, by split; seen: answers that came
    dropped    answers that were not kept, by reason
    masked     spans of personal data that were masked, by kind
    verdicts   answers by what the verifier says: right, wrong, unknown; unfinished ones are not shown to it
    difficulty of the prompts for the teacher; unfinished answers count as wrong
    """

    def __init__(
        self,
        recipe: Recipe,
        asked: Sequence[tuple[Split, Prompt]],
        answers: Sequence[Completion | None],
        *,
        tests: TestText | None,
        ask: Ask,
    ) -> None:
        """`answers` are those to `asked`, `generate.samples` to each, in order; `ask` is the teacher's, as a judge."""
        if recipe.generate is None:
            raise ValueError("the recipe asks no teacher to write")
        self._recipe, self._spec, self._asked, self._answers, self._tests = (
            recipe,
            recipe.generate,
            asked,
            answers,
            tests,
        )
        self._ask, self._grader = ask, opened_grader(recipe.generate)
        self._rules = _rules(recipe.generate)
        self._usable = array("q")
        """Places of clean answers to training prompts, chosen as the right ones are, whether or not they are right."""
        self.rows: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.masked: Counter[str] = Counter()
        self.reasoning: Counter[str] = Counter()
        self.verdicts: dict[str, int] = {"right": 0, "wrong": 0, "unknown": 0, "unfinished": 0}
        self.difficulty = Difficulty()
        self.leaks: list[tuple[str, Leak]] = []

    def __enter__(self) -> Harvest:
        """The verifier's processes are started when first needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the verifier's processes."""
        self._grader.close()

    def kept(self) -> Iterator[Picked]:
        """The answers that the student learns, prompt by prompt in order."""
        for start in range(0, len(self._asked), WINDOW):
            numbers = range(start, min(start + WINDOW, len(self._asked)))
            picked = [self._pick(number, found) for number, found in zip(numbers, self._grade(numbers), strict=True)]
            for one in self._judged(picked):
                self.rows[one.split] += 1
                self.reasoning[one.answer.reasoning_kind] += 1
                self.masked.update(one.masked)
                yield one

    def unverified(self) -> Iterator[Picked]:
        """As many answers to training prompts as are kept, cleaned and chosen alike: right, wrong or unknown."""
        places_S = np.frombuffer(self._usable, dtype=np.int64) if self._usable else np.zeros(0, np.int64)
        count = min(self.rows["train"], len(places_S))
        drawn_S = np.random.default_rng(self._recipe.seed).choice(len(places_S), count, replace=False)
        for place in np.sort(places_S[drawn_S]).tolist():
            number, sample = divmod(place, self._spec.samples)
            answer = self._answers[place]
            if answer is None:
                raise ValueError(f"the answer {place} was there and is gone")
            clean = self._clean(self._asked[number][1], answer, count=False)
            if not isinstance(clean, str):
                yield Picked(self._asked[number][1], "train", sample, answer, clean.messages)

    def _grade(self, numbers: range) -> list[list[_Answered]]:
        """What came for each of these prompts, verified."""
        came: list[tuple[int, int, Completion]] = []
        for number in numbers:
            for sample in range(self._spec.samples):
                place = number * self._spec.samples + sample
                answer = self._answers[place]
                if answer is None:
                    self.dropped["no usable answer came"] += 1
                    continue
                self.seen[self._asked[number][0]] += 1
                came.append((number, place, answer))
        finished = [(number, answer) for number, _, answer in came if answer.finish == "stop"]
        verdicts = iter(self._grader.grade([(answer.text, self._asked[number][1].row) for number, answer in finished]))
        found: dict[int, list[_Answered]] = {number: [] for number in numbers}
        for number, place, answer in came:
            verdict = next(verdicts) if answer.finish == "stop" else None
            found[number].append(_Answered(place, place % self._spec.samples, answer, verdict))
        return list(found.values())

    def _pick(self, number: int, came: list[_Answered]) -> list[Picked]:
        """The right, clean and chosen answers to one prompt."""
        split, prompt = self._asked[number]
        self._count_verdicts(prompt, came)
        clean: list[tuple[_Answered, _Clean]] = []
        for one in came:
            if one.verdict is None:
                self.dropped["cut off at max_tokens" if one.answer.finish == "length" else "unfinished"] += 1
                continue
            found = self._clean(prompt, one.answer)
            if isinstance(found, str):
                self.dropped[found] += 1
                continue
            clean.append((one, found))
        if split == "train":
            self._usable.extend(clean[place][0].place for place in self._choose(clean)[0])
        right = [(one, found) for one, found in clean if one.verdict is not None and one.verdict.right]
        for one, _ in clean:
            if one.verdict is not None and not one.verdict.right:
                self.dropped["wrong" if one.verdict.right is False else "not verified: unknown"] += 1
        places, why = self._choose(right)
        self.dropped.update(why)
        chosen = [right[place] for place in places]
        return [Picked(prompt, split, one.sample, one.answer, own.messages, own.masked) for one, own in chosen]

    def _judged(self, picked: Sequence[Sequence[Picked]]) -> Iterator[Picked]:
        """Those of them that the teacher prefers to the others, where the recipe asks for that."""
        rule = self._spec.cleaning.judge
        if rule is None:
            yield from chain.from_iterable(picked)
            return
        groups = [
            (str(found[0].messages[-2]["content"]) if found else "", [one.answer.text for one in found])
            for found in picked
        ]
        users = [str(found[0].prompt.row.get(USER) or "") if found else "" for found in picked]
        for found, places in zip(picked, preferred(groups, self._ask, rule, users=users), strict=True):
            self.dropped["the judge prefers others"] += len(found) - len(places)
            yield from (found[place] for place in places)

    def _choose(self, clean: Sequence[tuple[_Answered, _Clean]]) -> tuple[list[int], Counter[str]]:
        """Places of those that are kept of clean answers to one prompt, and how many are not, by reason.

        Whether they are right plays no part: those that the control arm may learn are chosen by the same rule.
        """
        known = NearDuplicates(self._spec.cleaning.near_duplicates or EXACT)
        texts = ["\n".join((one.answer.reasoning, one.answer.text)) for one, _ in clean]
        unlike = [place for place, text in enumerate(texts) if known.add(str(place), text) is None]
        chosen = choose(
            [(texts[place], UNASKED) for place in unlike], rule=self._spec.keep.rule, most=self._spec.keep.most
        )
        why = Counter(
            {
                "near duplicate of another answer": len(clean) - len(unlike),
                "not chosen (generate.keep)": len(unlike) - len(chosen),
            }
        )
        return [unlike[place] for place in chosen], +why

    def _count_verdicts(self, prompt: Prompt, came: Sequence[_Answered]) -> None:
        if self._spec.verify is None:
            return
        for one in came:
            name = "unfinished" if one.verdict is None else _NAMES[one.verdict.right]
            self.verdicts[name] += 1
        self.difficulty.add(prompt.id, [one.verdict or UNFINISHED for one in came])

    def _clean(self, prompt: Prompt, answer: Completion, *, count: bool = True) -> _Clean | str:
        """The conversation to learn, or why it is not one."""
        reasoning = answer.reasoning if self._spec.thinking else ""
        fault = judge_text(answer.text, reasoning, self._rules)
        if fault:
            return fault
        said = {"role": "assistant", "content": answer.text}
        if reasoning:
            said["reasoning_content"] = reasoning
        if self._tests is not None:
            leak = self._tests.find("\n".join((reasoning, answer.text)))
            if leak is not None:
                if count:
                    self.leaks.append((prompt.id, leak))
                return "answer shares text with a test"
        system = self._spec.system if self._spec.teach_system else None
        messages = [dict(turn) for turn in messages_of(prompt, system)] + [said]
        return self._without_pii(messages)

    def _without_pii(self, messages: list[dict[str, Any]]) -> _Clean | str:
        cleaning = self._spec.cleaning
        if cleaning.pii == "keep":
            return _Clean(tuple(messages), {})
        found: Counter[str] = Counter()
        for turn in messages:
            for name in ("content", "reasoning_content"):
                if isinstance(turn.get(name), str):
                    turn[name], counts = mask_pii(turn[name], engine=cleaning.pii_engine)
                    found.update(counts)
        if found and cleaning.pii == "drop":
            return "holds personal data"
        return _Clean(tuple(messages), found)


def _rules(spec: Generate) -> Rules:
    rule = spec.cleaning.quality
    return Rules(
        min_words=rule.min_words,
        max_words=rule.max_words,
        language=rule.language,
        repetition=rule.repetition,
        code_in_reasoning=rule.code_in_reasoning,
        max_paragraph_words=rule.max_paragraph_words,
    )
