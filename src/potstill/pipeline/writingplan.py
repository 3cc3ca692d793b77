"""What a run whose teacher writes will ask and cost, before anything is sent.

Refuses to promise: what is estimated says so, and an endpoint that does not answer is told, not assumed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

from potstill.data.prompts import split_prompts
from potstill.errors import PotstillError
from potstill.pipeline import build
from potstill.pipeline.authors import build_endpoint, ledger_place, limits_of, token_price, worst_case, writing_teacher
from potstill.pipeline.generate import requests_for
from potstill.pipeline.grading import opened_grader
from potstill.pipeline.inspection import Inspection
from potstill.pipeline.licence import check_terms, describe_terms
from potstill.pipeline.questions import read_prompts
from potstill.recipes import Recipe
from potstill.recipes.generate import EvolvedPrompts, SelfInstructPrompts

__all__ = ["writing_rows"]

SAMPLED_PROMPTS = 200

Row = tuple[str, str, str]


def writing_rows(recipe: Recipe, found: Inspection) -> Iterator[Row]:
    """(what, how much, from) of the plan. Raises what is wrong with the terms, the prompts and the verifier."""
    finding = check_terms(recipe)
    spec = recipe.generate
    if spec is None:
        raise ValueError("the recipe asks no teacher to write")
    opened_grader(spec).close()
    teacher = writing_teacher(recipe)
    yield "teacher", f"{teacher.model} at {teacher.base_url}", "recipe"
    yield "endpoint", _endpoint(recipe), "asked now"
    for line in describe_terms(finding):
        yield "terms", line.strip(), "terms.yaml"
    yield "student", f"{found.student_parameters / 1e6:,.1f}M parameters", "config"
    yield from _asking(recipe)
    yield "ledger", str(ledger_place(recipe)), "recipe"
    steps = recipe.training
    length = f"{steps.epochs:g} epochs" if steps.epochs else f"{build.count_steps(recipe, 0):,} steps"
    yield "training", f"{length} of {steps.batch_rows} rows of {recipe.data.sequence_length} tokens", "recipe"
    unverified = recipe.generate is not None and recipe.generate.verify is None
    alone = "student (nothing is verified)" if unverified else "student (control.enabled: false)"
    arms = "student, and control on unverified answers" if recipe.has_control else alone
    yield "arms", arms, "recipe"


def _endpoint(recipe: Recipe) -> str:
    """Whether it answers; a plan can be made without it, a run cannot."""
    teacher = writing_teacher(recipe)
    if teacher.api_key is not None and not os.environ.get(teacher.api_key, "").strip():
        return f"not asked: the environment variable {teacher.api_key} is not set, which a run needs"
    try:
        return asyncio.run(_greet(recipe))
    except PotstillError as error:
        return f"not ready: {error}"


async def _greet(recipe: Recipe) -> str:
    async with build_endpoint(writing_teacher(recipe)) as endpoint:
        served = await endpoint.preflight()
    return f"answers{f', and serves {len(served.models)} models' if served.models else ''}"


def _asking(recipe: Recipe) -> Iterator[Row]:
    """How many requests, and what they can cost at most."""
    spec, teacher = recipe.generate, writing_teacher(recipe)
    if spec is None:
        return
    prompts, dropped = read_prompts(recipe)
    count = len(prompts)
    if isinstance(spec.prompts, SelfInstructPrompts):
        count = spec.prompts.count
    elif isinstance(spec.prompts, EvolvedPrompts):
        count = (1 + spec.prompts.rounds) * count
    shares = recipe.data.splits
    held_out = spec.held_out
    split = split_prompts(prompts, seed=recipe.seed, validation=shares.validation, test=shares.test, held_out=held_out)
    left_out = f", {sum(dropped.values()):,} rows cannot be asked" if dropped else ""
    yield "prompts", f"{count:,}, of which about {len(split['test']):,} are held out{left_out}", "data"
    tested = len(split["test"]) * recipe.evaluation.attempts
    requests = count * spec.samples + tested
    yield "requests", f"{requests:,}: {spec.samples} answers a prompt, and {tested:,} for the evaluation", "recipe"
    price = token_price(teacher)
    some = prompts[:: max(1, len(prompts) // SAMPLED_PROMPTS)]
    worst = [worst_case(teacher, next(requests_for(prompt, spec)), price) for prompt in some]
    longest = sum(one.input_tokens for one in worst) / max(1, len(worst))
    tokens = round(requests * longest), requests * spec.sampling.max_tokens
    yield "tokens", f"{tokens[0]:,} in and {tokens[1]:,} out at most", "some prompts"
    budget = ", ".join(f"{value:g} {name}" for name, value in limits_of(teacher.budget).items()) or "none"
    cost = "price unknown" if price is None else f"{price.worst(*tokens) / 1e12:,.4f} USD at most"
    yield "money", f"{cost}; budget: {budget}", "prices"
    if teacher.limits.requests_per_minute:
        minutes = requests / teacher.limits.requests_per_minute
        yield "time: generate", f"{minutes:,.0f} minutes at least", "teacher.limits"
