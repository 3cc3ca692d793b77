"""A teacher behind an API: where it is, how hard it may be asked, what it may cost, under whose terms.

Refuses keys and secrets: a recipe names the environment variable that holds one.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from potstill.recipes.numbers import Count, Fraction, Positive, Real, Whole
from potstill.recipes.part import Part
from potstill.recipes.training import Precision

__all__ = ["Budget", "Labelling", "Limits", "OpenAITeacher", "TokenPrice"]

Money = Annotated[Real, Field(ge=0.0)]


class Limits(Part):
    """How hard the endpoint may be asked. Within these the pace finds itself: slowly up, and halved on overload."""

    concurrency: Count = 32
    """Requests that are open at once, at most."""
    requests_per_minute: Positive | None = None
    """null: as many as it takes."""
    tokens_per_minute: Positive | None = None
    """Input and output together; null: as many as it takes."""


class TokenPrice(Part):
    """What a million tokens cost."""

    input_usd: Money
    """A million tokens of prompts."""
    output_usd: Money
    """A million tokens of answers, reasoning included."""


class Budget(Part):
    """What the run may spend, all that it has spent before included. The worst case is set aside before sending."""

    usd: Positive | None = None
    """Money. Needs a known price."""
    requests: Count | None = None
    """Requests, repeated ones included."""
    tokens: Count | None = None
    """Input and output together."""
    partial: bool = False
    """Where it is used up, go on with the answers that there are. With false the run stops there, and continues once
    the budget is raised."""


class Labelling(Part):
    """How the endpoint is asked for the class of a text, for tasks over texts."""

    answers: Literal["label", "probabilities"] = "label"
    """`label`: it names a label, which is then certain. `probabilities`: every label gets a letter, and the
    log-probabilities of the answer's first token are those of the labels; of 25 labels at most."""
    votes: Annotated[Whole, Field(ge=1, le=100)] = 1
    """With `label`: answers to each text; of several, sampled at temperature 1, the shares are the probabilities."""
    prompt: str | None = None
    """What is asked, with {text} where that belongs, and {labels} where they are listed; null for a question of ours. A
    prompt that shows examples of all labels may do without the list, but not with `probabilities`."""
    max_tokens: Count | None = None
    """With `label`: longest answer, reasoning included; null for what the longest label may take, without reasoning."""
    missing: Fraction = 0.02
    """Largest share of texts without an answer that can be used: with more the run stops, else these are left out."""

    @model_validator(mode="after")
    def _answers_can_be_read(self) -> Labelling:
        needed = ("{labels}", "{text}") if self.answers == "probabilities" else ("{text}",)
        absent = [name for name in needed if self.prompt is not None and name not in self.prompt]
        if absent:
            raise ValueError(f"prompt: {' and '.join(absent)} is not in it; put it where the question needs it")
        if self.answers == "probabilities" and (self.votes > 1 or self.max_tokens is not None):
            raise ValueError(
                "answers: probabilities are read from one token of one answer; leave votes and max_tokens out, or use "
                "`label`"
            )
        return self


class OpenAITeacher(Part):
    """Any endpoint that speaks OpenAI's protocol: OpenAI, vLLM, SGLang, llama.cpp, LiteLLM and others."""

    kind: Literal["openai"]
    model: str
    """As the endpoint names it."""
    base_url: str = "https://api.openai.com/v1"
    """Where it is."""
    api_key: str | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; null for endpoints without one."""
    api: Literal["chat", "completion"] = "chat"
    """Whether it takes messages or plain prompts."""
    reasoning: Literal["raw", "summary"] = "raw"
    """What the endpoint shows of reasoning, where it shows any: the chain itself, or a summary of it."""
    limits: Limits = Limits()
    """How hard it may be asked."""
    budget: Budget = Budget()
    """What it may cost."""
    price: TokenPrice | None = None
    """null: as `genai-prices` lists it; an endpoint on this machine costs nothing."""
    batch: bool = False
    """Through the provider's batch API: half the price, hours later."""
    timeout_s: Positive = 120.0
    """Longest wait for one answer."""
    attempts: Count = 6
    """How often a request is sent before it is given up."""
    ledger: str | None = None
    """SQLite file in which every request and answer stays. Default: ledger.sqlite beside the run folder, which further
    runs share: nothing is paid twice."""
    permission: str | None = None
    """On what ground its answers may train a model, where the terms that potstill knows do not say so: a contract, a
    licence, the clause that allows it. It goes into the model card."""
    labelling: Labelling = Labelling()
    """How it is asked for the classes of texts."""
    tokenizer: str | None = None
    """Hub id or folder of its tokenizer, for losses over log-probabilities of tokens."""

    device: ClassVar[str] = "auto"
    dtype: ClassVar[Precision] = "fp32"

    @model_validator(mode="after")
    def _place(self) -> OpenAITeacher:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: {self.base_url!r} must begin with http:// or https://")
        return self
