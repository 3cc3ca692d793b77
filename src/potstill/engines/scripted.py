"""A teacher that says what it was told to: for tests of users, as httpx's MockTransport is.

Refuses to invent: a question that the script does not know has no answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from potstill.types.request import Completion, Request

__all__ = ["ScriptedAuthor"]

Script = Mapping[str, str | Sequence[str]] | Callable[[Request], str | Completion | None]


class ScriptedAuthor:
    """An `Author` without a model. `asked` holds what it was asked, in order."""

    def __init__(self, answers: Script) -> None:
        """`answers`: a function of the request, or {prompt or last message: answer}.

        Of several answers to one question, request number `sample` gets that of its number, and after the last the
        first again. None, and a question that is not there, is no answer.
        """
        self.asked: list[Request] = []
        self._answers = answers
        self._given: dict[str, Completion | None] = {}

    def ask(self, requests: Sequence[Request]) -> Sequence[Completion | None]:
        """The answers in order; asked the same again, the function is not called again."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion | None:
        self.asked.append(request)
        name = repr(request)
        if name not in self._given:
            said = self._answers(request) if callable(self._answers) else self._look_up(self._answers, request)
            self._given[name] = Completion(said, model="scripted") if isinstance(said, str) else said
        return self._given[name]

    def _look_up(self, answers: Mapping[str, str | Sequence[str]], request: Request) -> str | None:
        said = answers.get(_question(request))
        if said is None or isinstance(said, str):
            return said
        return said[request.sample % len(said)] if said else None


def _question(request: Request) -> str:
    if request.messages is None:
        return request.prompt or ""
    content = request.messages[-1].get("content") if request.messages else ""
    return content if isinstance(content, str) else json.dumps(content)
