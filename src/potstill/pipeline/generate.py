"""The stage generate: a teacher writes what the student will learn, and what is right and clean of it is kept.

Answers stay in the ledger, so that whatever ends this stage, the next attempt asks for what is missing only. Refuses to
keep a word of which nobody knows who wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from random import Random
from typing import Any

from pydantic import JsonValue

from potstill.data import Split, encode_example
from potstill.data.prompts import Prompt
from potstill.data.similar import effective_size
from potstill.data.synthesize import Ask
from potstill.engines import ApiAuthor, LocalAuthor
from potstill.engines.tally import Tally
from potstill.errors import DataError
from potstill.pipeline.authors import check_spent, opened_author
from potstill.pipeline.disk import write_json_atomic
from potstill.pipeline.grading import opened_grader
from potstill.pipeline.harvest import Harvest, Picked
from potstill.pipeline.licence import check_terms
from potstill.pipeline.progress import metered
from potstill.pipeline.questions import HELD_OUT, USER, Plan, messages_of, plan_prompts
from potstill.pipeline.rundir import Stage
from potstill.pipeline.solve import teacher_requests
from potstill.pipeline.stages import open_tokenizer
from potstill.pipeline.stopping import Stopping
from potstill.pipeline.survey import SPLITS
from potstill.pipeline.written import QUESTIONS, ROWS, UNVERIFIED, Question, dump_question, write_lines
from potstill.recipes import Recipe
from potstill.recipes.generate import Generate
from potstill.types import Completion, Example, Request

__all__ = ["generate", "requests_for"]

LEAKS, UNSOLVED = "leaks.json", "unsolved.json"
"""Text that was removed because a test has it too, with the text that they share; prompts that were never solved."""

SHOWN_LEAKS = 1000

TRIED = 8
"""Prompts on which the verifier is tried before the teacher is asked."""

SIZED_TEXTS = 20_000
"""Of more prompts than these, so many say how large the data effectively is."""


def generate(recipe: Recipe, stage: Stage, *, stopping: Stopping) -> None:
    """Ask the teacher for `samples` answers to every prompt; keep what is verified, chosen and clean.

    Raises RecipeError where the teacher's terms forbid it, DataError where nothing is left to learn from, and what the
    endpoint and the budget raise.
    """
    spec = recipe.generate
    if spec is None:
        raise ValueError("the recipe asks no teacher to write")
    check_terms(recipe)
    _check_student(recipe)
    opened_grader(spec).close()
    spending = _Spending(recipe, stage, stopping)
    with metered("write prompts", None, "answers") as meter, opened_author(recipe, meter.advance, stopping) as author:
        plan = plan_prompts(recipe, spending.through(author))
    plan = replace(plan, prompts=_rendered(recipe, plan))
    asked = [(split, prompt) for split in SPLITS for prompt in plan.prompts[split]]
    Random(recipe.seed).shuffle(asked)  # where the budget ends midway, every split has its share of what there is
    _check_verifier(spec, [prompt for _, prompt in asked[:TRIED]])
    requests = [one for _, prompt in asked for one in requests_for(prompt, spec)]
    tested = teacher_requests(recipe, _questions(plan, spec))
    with (
        metered("generate", len(requests) + len(tested), "answers") as meter,
        opened_author(recipe, meter.advance, stopping) as author,
    ):
        # The teacher's own answers to the test: asked here, so that nothing after this stage needs its endpoint, and
        # first, so that no budget ends before them.
        spending.through(author, partial=False)(tested)
        ask = spending.through(author)
        answers = ask(requests)
        with Harvest(recipe, asked, answers, tests=plan.tests, ask=ask) as harvest:
            kept = write_lines(stage.folder / ROWS, (_line(recipe, one, author.key_of) for one in harvest.kept()))
            if recipe.has_control:
                drawn = harvest.unverified()
                write_lines(stage.folder / UNVERIFIED, (_line(recipe, one, author.key_of) for one in drawn))
    tally = spending.tally
    _check(harvest, tally)
    write_lines(stage.folder / QUESTIONS, map(dump_question, _questions(plan, spec)))
    write_json_atomic(stage.folder / UNSOLVED, list(harvest.difficulty.never_solved))
    leaks = [*plan.leaks, *harvest.leaks][:SHOWN_LEAKS]
    write_json_atomic(stage.folder / LEAKS, [{"prompt": name, **asdict(leak)} for name, leak in leaks])
    stage.finish(rows=kept, **_facts(plan, harvest, tally))


class _Spending:
    """What all asking of this stage has come to. Every request is noted as used here; no budget ends unnoticed."""

    def __init__(self, recipe: Recipe, stage: Stage, stopping: Stopping) -> None:
        self.recipe, self.stage, self.stopping = recipe, stage, stopping
        self.tally = Tally()

    def through(self, author: ApiAuthor | LocalAuthor, *, partial: bool = True) -> Ask:
        """The author's `ask`. Raises BudgetError where the budget is used up and the recipe does not go on then."""

        def ask(requests: Sequence[Request]) -> Sequence[Completion | None]:
            with self.stopping.held():
                answers = author.ask(requests)
            self.tally = self.tally.plus(author.tally)
            author.note_use(requests, self.recipe.folder, self.stage.folder.name)
            check_spent(self.recipe, author.tally, partial=partial)
            return answers

        return ask


def _rendered(recipe: Recipe, plan: Plan) -> dict[Split, tuple[Prompt, ...]]:
    """The prompts without those conversations that the student's chat template refuses, which are counted."""
    spec, tokenizer = recipe.generate, open_tokenizer(recipe)
    system = spec.system if spec and spec.teach_system else None

    def fits(prompt: Prompt) -> bool:
        if prompt.messages is None:
            return True
        said = {"role": "assistant", "content": "It is this."}
        try:
            encode_example(Example(prompt.id, messages=(*messages_of(prompt, system), said)), tokenizer)
        except DataError:
            plan.dropped["the student's chat template refuses the conversation"] += 1
            return False
        return True

    return {split: tuple(filter(fits, prompts)) for split, prompts in plan.prompts.items()}


def _check_student(recipe: Recipe) -> None:
    """Raises DataError where the student's chat template has no place for an answer, before any is paid for."""
    tokenizer = open_tokenizer(recipe)
    system = recipe.generate.system if recipe.generate else None
    asked = messages_of(Prompt("chat template", text="What is it?"), system)
    said = {"role": "assistant", "content": "It is this.", "reasoning_content": "Let me think."}
    encode_example(Example("chat template", messages=(*asked, said)), tokenizer)


def _check_verifier(spec: Generate, prompts: Sequence[Prompt]) -> None:
    """Raises what is wrong with the verifier, and with the columns that it asks for, before any answer is paid for."""
    with closing(opened_grader(spec)) as grader:
        grader.grade([("", prompt.row) for prompt in prompts])


def requests_for(prompt: Prompt, spec: Generate) -> Iterator[Request]:
    """What is asked about one prompt: as many answers as wanted."""
    for sample in range(spec.samples):
        yield Request(
            messages=messages_of(prompt, spec.system),
            max_tokens=spec.sampling.max_tokens,
            temperature=spec.sampling.temperature,
            top_p=spec.sampling.top_p,
            stop=tuple(spec.sampling.stop),
            sample=sample,
            user=str(prompt.row.get(USER) or ""),
        )


def _line(recipe: Recipe, picked: Picked, key_of: Any) -> dict[str, Any]:
    """A conversation to learn, with who wrote it."""
    spec, answer = recipe.generate, picked.answer
    if spec is None:
        raise ValueError("the recipe asks no teacher to write")
    request = next(one for one in requests_for(picked.prompt, spec) if one.sample == picked.sample)
    return {
        "id": f"{picked.prompt.id}#{picked.sample}",
        "split": picked.split,
        "prompt_id": picked.prompt.id,
        "messages": list(picked.messages),
        "provenance": {
            # An endpoint that does not say who answers is taken at its word: it was asked for this model.
            "written_by": answer.model or getattr(recipe.teacher, "model", ""),
            "via": getattr(recipe.teacher, "base_url", ""),
            "request": key_of(request).hex(),
            "reasoning": answer.reasoning_kind,
            "prompt": dict(picked.prompt.provenance),
        },
    }


def _questions(plan: Plan, spec: Generate) -> list[Question]:
    """The held-out prompts, of which it is known once all answers are read whether training text has shared words."""
    matched = {name for source, name in (plan.tests.matched if plan.tests else ()) if source == HELD_OUT}
    system = spec.system if spec.teach_system else None
    return [
        Question(prompt.id, messages_of(prompt, system), prompt.row, prompt.id in matched)
        for prompt in plan.prompts["test"]
    ]


def _check(harvest: Harvest, tally: Tally) -> None:
    """Raises DataError where a split is left without a row, with what became of the answers."""
    for split in SPLITS:
        if harvest.rows[split]:
            continue
        dropped = (
            "; ".join(f"{why}: {count:,}" for why, count in harvest.dropped.most_common(6) if count)
            or "none was dropped"
        )
        spent = " The budget was used up." if tally.stopped_by == "budget" else ""
        raise DataError(
            f"generate: no answer to the {split} prompts is left of {harvest.seen[split]:,} that came (of all "
            f"splits: {dropped}).{spent} Look at the answers (potstill ledger export), then change the prompt, "
            "the verifier or the cleaning; what was answered is not asked again."
        )


def _facts(plan: Plan, harvest: Harvest, tally: Tally) -> Mapping[str, JsonValue]:
    """What the report tells of this stage."""
    texts = [prompt.text or str(prompt.messages) for prompt in plan.prompts["train"][:SIZED_TEXTS]]
    size = effective_size(texts)
    return {
        "prompts": {split: len(found) for split, found in plan.prompts.items()},
        "prompts_dropped": dict(plan.dropped),
        "effective": {"prompts": size.texts, "clusters": size.clusters, "distinct": size.distinct},
        "kept": {split: harvest.rows[split] for split in SPLITS},
        "dropped": dict(harvest.dropped),
        "masked": dict(harvest.masked),
        "verdicts": dict(harvest.verdicts),
        "difficulty": list(harvest.difficulty.histogram),
        "pass_at": {str(k): share for k, share in harvest.difficulty.pass_at().items()},
        "unsolved": len(harvest.difficulty.never_solved),
        "leaks": len(plan.leaks) + len(harvest.leaks),
        "reasoning": dict(harvest.reasoning),
        "tally": {**asdict(tally), "remarks": list(tally.remarks())},
        "notes": list(plan.notes),
    }
