"""Teachers that write, on this machine: any engine that generates, with the same ledger as one behind an API.

What was drawn stays drawn: the ledger answers the second time. Refuses what an engine cannot do: stop sequences,
choices, schemas and log-probabilities.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from potstill.engines.answers import Answers
from potstill.engines.asking import BUSY_S, KNOWN, Stopping
from potstill.engines.completions import BadAnswer, Reading, read_completion
from potstill.engines.ledger import Asked, Budget, Ledger, Outcome, State, request_key
from potstill.engines.prices import FREE
from potstill.engines.tally import Tally, TallyCounter
from potstill.errors import Interrupted, ModelError
from potstill.types import Completion, Engine, Request, Sampling, Usage

__all__ = ["LocalAuthor"]

_TOGETHER = 16
"""Requests that are generated at once. Always the same ones, whatever is missing: a draw depends on its neighbours."""


class LocalAuthor:
    """An engine as an `Author`. `tally` says what the last `ask` came to; nothing costs anything."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        ledger: Ledger,
        *,
        name: str,
        run: str,
        stopping: Stopping | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`tokenizer` has the chat template; `name` tells these weights from others, and is who answers."""
        self.tally = Tally()
        self._engine, self._tokenizer, self._ledger = engine, tokenizer, ledger
        self._name, self._run = name, run
        self._stopping, self._advance = stopping, advance

    def ask(self, requests: Sequence[Request]) -> Sequence[Completion | None]:
        """The answers in order, read from the ledger when indexed.

        Sampled answers are seeded by what is asked. Raises ModelError for a request that an engine cannot do or a
        tokenizer without chat template, StoreError, Interrupted.
        """
        count, seen = TallyCounter(len(requests)), set[bytes]()
        try:
            for together in _alike(requests):
                self._refuse_if_stopped()
                self._answer([self._asked(request) for request in together], together, (count, seen))
                self._advance(len(together))
        except Interrupted:
            count.stopped_by = "interrupt"
            raise
        finally:
            self.tally = count.tally()
        return Answers(requests, self._find, _parse).as_sequence()

    def key_of(self, request: Request) -> bytes:
        """The ledger's key of this request and its sample."""
        return self._asked(request).key

    def note_use(self, requests: Iterable[Request], run_folder: str | Path, stage: str) -> None:
        """Keep in the ledger that this stage of this run reads the answers, so that forgetting one can name it."""
        self._ledger.record_use(map(self.key_of, requests), run_folder, stage)

    def _refuse_if_stopped(self) -> None:
        if self._stopping is not None and self._stopping.asked():
            raise Interrupted("stopped; what was answered is kept, and the same command continues.")

    def _answer(
        self, asked: Sequence[Asked], requests: Sequence[Request], so_far: tuple[TallyCounter, set[bytes]]
    ) -> None:
        count, seen = so_far
        for one in asked:
            self._ledger.note_user(one)
        fresh = {one.key: number for number, one in enumerate(asked) if one.key not in seen}
        count.repeated += len(asked) - len(fresh)
        seen.update(fresh)
        states = self._ledger.states(list(fresh))
        missing = [number for key, number in fresh.items() if states.get(key) not in KNOWN]
        for key in fresh.keys() & states.keys():
            if states[key] in KNOWN:
                self._count(key, requests[fresh[key]], (count, "answered_before"))
        if missing:
            texts = self._generate(asked, requests[0])
            for number in missing:
                self._keep(asked[number], requests[number], texts[number])
                self._count(asked[number].key, requests[number], (count, "answered"))

    def _generate(self, asked: Sequence[Asked], like: Request) -> list[str]:
        prompts = [json.loads(one.body)["prompt"] for one in asked]
        sampling = Sampling(like.max_tokens, like.temperature, like.top_p)
        with torch.random.fork_rng():
            torch.manual_seed(int.from_bytes(asked[0].key[:8], "big") >> 1)
            return self._engine.generate(prompts, sampling)

    def _keep(self, asked: Asked, request: Request, text: str) -> None:
        tokens_in, tokens_out = (self._tokens(words) for words in (json.loads(asked.body)["prompt"], text))
        usage = Usage(tokens_in, min(tokens_out, request.max_tokens))
        raw = _as_answer(self._name, text, usage, is_cut=tokens_out >= request.max_tokens)
        reason = _problem_of(raw, request)
        state: State = "quarantined" if reason else "answered"
        while (claim := self._ledger.claim(asked, FREE.spend(usage), Budget()).result()).verdict == "busy":
            self._refuse_if_stopped()  # another process writes the same answer, and has it in a moment
            time.sleep(BUSY_S)
        if claim.verdict == "send":
            outcome = Outcome(state, FREE.spend(usage), reason, raw=raw, served=self._name, usage=usage)
            self._ledger.settle(claim.attempt, outcome).result()

    def _count(self, key: bytes, request: Request, where: tuple[TallyCounter, str]) -> None:
        count, name = where
        record = self._ledger.read(key)
        try:
            answer = None if record is None or record.raw is None else _parse(record.raw, request)
        except BadAnswer as error:
            count.quarantined[error.reason] += 1
            return
        if answer is not None:
            setattr(count, name, getattr(count, name) + 1)
            count.served[answer.model] += 1

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _asked(self, request: Request) -> Asked:
        body = json.dumps(
            {
                "prompt": self._prompt(request),
                "max_tokens": request.max_tokens,
                "temperature": request.temperature,
                "top_p": request.top_p,
            }
        )
        key = request_key(self._name, "local", body, request.sample)
        return Asked(key, body, self._name, "local", self._run, user=request.user, sample=request.sample)

    def _prompt(self, request: Request) -> str:
        if request.stop or request.choices or request.schema is not None or request.top_logprobs:
            raise ModelError(
                "teacher.kind=local writes freely: it takes no stop sequences, choices, schema or log-probabilities. "
                "Remove them, or serve the model and use teacher.kind=openai."
            )
        if request.prompt is not None:
            return request.prompt
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"teacher.model: {self._name} has no chat template, and messages need one. Use an instruct model."
            )
        chat = [dict(message) for message in request.messages or ()]
        text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(self._own_beginning())

    def _own_beginning(self) -> str:
        """The begin token, where the tokenizer puts one before every text: a template that writes it too makes two."""
        begin = self._tokenizer.bos_token
        ids = self._tokenizer("")["input_ids"]
        return begin if begin and ids[:1] == [self._tokenizer.bos_token_id] else ""

    def _find(self, request: Request) -> bytes | None:
        record = self._ledger.read(self._asked(request).key)
        return None if record is None else record.raw


def _alike(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Neighbours that are sampled alike, so many together as are generated at once."""

    def sampling(number: int) -> tuple[int, int, float, float]:
        request = requests[number]
        return number // _TOGETHER, request.max_tokens, request.temperature, request.top_p

    for _, numbers in groupby(range(len(requests)), sampling):
        yield [requests[number] for number in numbers]


def _parse(raw: bytes, request: Request) -> Completion:
    return read_completion(raw, request, Reading(None))


def _problem_of(raw: bytes, request: Request) -> str:
    try:
        _parse(raw, request)
    except BadAnswer as error:
        return error.reason
    return ""


def _as_answer(model: str, text: str, usage: Usage, *, is_cut: bool) -> bytes:
    """In the form of an endpoint's answer, so that one reader reads all."""
    counts = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
    choice = {"message": {"content": text}, "finish_reason": "length" if is_cut else "stop"}
    return json.dumps({"model": model, "choices": [choice], "usage": counts}, ensure_ascii=False).encode()
