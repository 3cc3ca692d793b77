"""The teacher that writes: an endpoint or a model of this process, with the ledger in which its answers stay.

Refuses to begin where the key is not there, or where the terms of the teacher forbid what the recipe does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from potstill.engines import ApiAuthor, LocalAuthor, pick_device
from potstill.engines.asking import Terms, job_of
from potstill.engines.ledger import Budget, Ledger, Spend
from potstill.engines.openai import MOST_BYTES, Endpoint
from potstill.engines.prices import Price, find_price, price_of
from potstill.engines.tally import Tally
from potstill.errors import BudgetError, RecipeError
from potstill.pipeline.build import build_engine
from potstill.pipeline.chain import runs_folder
from potstill.pipeline.places import identify, resolve_model
from potstill.pipeline.stopping import Stopping
from potstill.recipes import Recipe
from potstill.recipes.endpoints import Budget as Spending
from potstill.recipes.schema import LocalTeacher, OpenAITeacher
from potstill.types import Request

__all__ = [
    "build_endpoint",
    "check_spent",
    "ledger_place",
    "limits_of",
    "opened_author",
    "read_key",
    "token_price",
    "worst_case",
    "writing_teacher",
]


@contextmanager
def opened_author(
    recipe: Recipe, advance: Callable[[int], None], stopping: Stopping, *, most_bytes: int = MOST_BYTES
) -> Iterator[ApiAuthor | LocalAuthor]:
    """The teacher of this recipe, ready to be asked; `advance` is told of requests that have ended.

    `most_bytes` of an answer are read.
    """
    with Ledger(ledger_place(recipe)) as ledger:
        teacher = recipe.teacher
        if isinstance(teacher, LocalTeacher):
            yield _local_author(recipe.name, teacher, ledger, advance=advance, stopping=stopping)
            return
        yield _api_author(recipe, ledger, advance, stopping, most_bytes=most_bytes)


def _api_author(
    recipe: Recipe, ledger: Ledger, advance: Callable[[int], None], stopping: Stopping, *, most_bytes: int
) -> ApiAuthor:
    teacher = writing_teacher(recipe)
    limits = Budget(usd=teacher.budget.usd, requests=teacher.budget.requests, tokens=teacher.budget.tokens)
    return ApiAuthor(
        build_endpoint(teacher, most_bytes),
        ledger,
        Terms(run=recipe.name, price=token_price(teacher), budget=limits, attempts=teacher.attempts),
        concurrency=teacher.limits.concurrency,
        requests_per_minute=teacher.limits.requests_per_minute,
        tokens_per_minute=teacher.limits.tokens_per_minute,
        batch=teacher.batch,
        stopping=stopping,
        advance=advance,
    )


def _local_author(
    run: str, teacher: LocalTeacher, ledger: Ledger, *, advance: Callable[[int], None], stopping: Stopping
) -> LocalAuthor:
    model = resolve_model(teacher.model, "teacher.model")
    engine = build_engine(model, teacher.dtype, pick_device(teacher.device, "teacher.device"), "teacher.model")
    name = f"{teacher.model} ({identify(teacher.model)[:12]})"
    return LocalAuthor(engine, engine.tokenizer, ledger, name=name, run=run, stopping=stopping, advance=advance)


def check_spent(recipe: Recipe, tally: Tally, *, partial: bool = True) -> None:
    """Raises BudgetError where the budget was used up before the last request, unless the recipe goes on then.

    With `partial` false it never does: an evaluation must be whole.
    """
    if not isinstance(recipe.teacher, OpenAITeacher):
        return
    budget = recipe.teacher.budget
    if tally.stopped_by == "budget" and not (partial and budget.partial):
        limits = ", ".join(f"{name}={value:g}" for name, value in limits_of(budget).items())
        raise BudgetError(
            f"teacher.budget: {limits} was used up with {tally.left:,} of {tally.asked:,} requests to go. Raise it: "
            "what was answered is not asked again. Or set teacher.budget.partial: true to go on with what there is."
        )


def limits_of(budget: Spending) -> dict[str, float]:
    """What a budget limits, by name."""
    return {name: value for name, value in budget.model_dump(exclude={"partial"}).items() if value is not None}


def writing_teacher(recipe: Recipe) -> OpenAITeacher:
    """The teacher, as one behind an endpoint."""
    if not isinstance(recipe.teacher, OpenAITeacher):
        raise ValueError(f"teacher.kind={recipe.teacher.kind} is not behind an endpoint")
    return recipe.teacher


def build_endpoint(teacher: OpenAITeacher, most_bytes: int = MOST_BYTES) -> Endpoint:
    """The endpoint, with the key from the environment, and the most bytes that are read of an answer."""
    return Endpoint(
        teacher.model,
        base_url=teacher.base_url,
        key=read_key(teacher),
        api=teacher.api,
        reasoning=teacher.reasoning,
        timeout_s=teacher.timeout_s,
        most_bytes=most_bytes,
    )


def worst_case(teacher: OpenAITeacher, request: Request, price: Price | None) -> Spend:
    """The most that one attempt at a request can take."""
    endpoint = Endpoint(teacher.model, base_url=teacher.base_url, key=None, api=teacher.api)
    return job_of(endpoint, request, Terms("plan", price, Budget(), 1)).worst


def read_key(teacher: OpenAITeacher) -> str | None:
    """The key; None where the endpoint needs none. Raises RecipeError naming the variable that is not set."""
    if teacher.api_key is None:
        return None
    key = os.environ.get(teacher.api_key, "").strip()
    if not key:
        raise RecipeError(
            f"teacher.api_key: the environment variable {teacher.api_key} is not set. Put the endpoint's key there, or "
            "set teacher.api_key: null for one without."
        )
    return key


def ledger_place(recipe: Recipe) -> Path:
    """The SQLite file of all requests: the recipe's, or one that all runs beside this one share."""
    named = getattr(recipe.teacher, "ledger", None)
    return Path(named).expanduser() if named else runs_folder(recipe) / "ledger.sqlite"


def token_price(teacher: OpenAITeacher) -> Price | None:
    """What tokens cost there: as the recipe says, else as it is listed; None where nobody knows."""
    if teacher.price is not None:
        return price_of(teacher.price.input_usd, teacher.price.output_usd)
    return find_price(teacher.model, teacher.base_url, batch=teacher.batch)
