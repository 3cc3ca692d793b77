"""What is asked of a teacher that writes, and what it answers. Refuses a request that is neither a chat nor a prompt.

Log-probabilities are nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["Author", "Completion", "Request", "Usage"]


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is asked for. Exactly one of `messages`, `prompt` and `prompt_ids` is set.

    messages     dicts with `role` and `content`: a chat
    prompt       text to go on with, without a chat template
    prompt_ids   the same as token numbers, for servers that take them
    max_tokens   longest answer, reasoning included
    temperature, top_p   of the sampling; temperature 0 is greedy
    stop         the answer ends before any of these
    sample       number of this answer among several to the same question: another number is another answer
    choices      the answer must be one of these, word for word; empty for any answer
    schema       JSON Schema that the answer must fit; None for any answer
    top_logprobs log-probabilities of so many tokens at each position of the answer; 0 for none
    user         whose data it is, so that it can be forgotten on request; empty for nobody's
    prompt_logprobs  log-probabilities of so many tokens at each position of `prompt_ids`; 0 for none
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    sample: int = 0
    choices: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    top_logprobs: int = 0
    user: str = ""
    prompt_ids: tuple[int, ...] | None = None
    prompt_logprobs: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where there is not exactly one of the prompts, or scores are asked for of another kind."""
        if sum(given is not None for given in (self.messages, self.prompt, self.prompt_ids)) != 1:
            raise ValueError("a request needs exactly one of messages, prompt, prompt_ids")
        if self.prompt_logprobs and self.prompt_ids is None:
            raise ValueError("a request for prompt_logprobs needs prompt_ids")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that an answer took, as the teacher counts them; reasoning is part of the output."""

    input_tokens: int
    output_tokens: int
    reasoning_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    text            what it says, without its reasoning
    reasoning       what it thought before, where the teacher shows it; else empty
    reasoning_kind  `raw` as it was thought, `summary` of it by the provider, `absent`
    finish          `stop`, `length` (cut off at max_tokens), or what else the teacher said
    model           who answered, as the teacher names itself: it may be more exact than the name that was asked for
    usage           tokens; None where the teacher does not say
    top_logprobs    a position of the answer: (token, log-probability) of the likeliest; empty if not asked for
    prompt_logprobs a position of the prompt: (token number, log-probability) of the likeliest before it was read, most
                    probable first; empty for the first position, which nothing comes before, and if not asked for
    """

    text: str
    reasoning: str = ""
    reasoning_kind: Literal["raw", "summary", "absent"] = "absent"
    finish: str = "stop"
    model: str = ""
    usage: Usage | None = None
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...] = ()
    prompt_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()


class Author(Protocol):
    """A teacher that writes. Asked the same again, it gives the answer that it gave before, and is not paid twice."""

    def ask(self, requests: Sequence[Request]) -> Sequence[Completion | None]:
        """The answers in order, read when indexed or iterated; None where there is none: refused, or given up."""
        ...
