"""Hugging Face models in this process: any causal language model by hub id or folder.

Refuses a model without telling which recipe key asked for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from potstill.data.chat_template import UNFIT, open_template
from potstill.engines.causal import CausalReader, probe
from potstill.errors import DataError, ModelError
from potstill.types import Batch, Completion, Offer, Sampling, Signal, Wants

__all__ = [
    "DTYPES",
    "NO_ROOM",
    "LocalEngine",
    "find_folder",
    "load_config",
    "load_model",
    "load_part",
    "load_tokenizer",
    "pick_device",
]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

NO_ROOM = "no room"
"""How the answer to a prompt finished that fills the model's positions alone."""


def pick_device(device: str, key: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ModelError where the named device is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.zeros(1, device=picked).item()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{key}: {device} is not available here ({_first_line(error)}). Use auto or cpu.") from None
    return picked


def find_folder(model: str) -> Path | None:
    """Where a folder or hub id lies on this machine, the hub's cache included; None where it does not."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def load_config(model: str, key: str) -> Any:
    """The model's config. Raises ModelError naming the recipe key."""
    return load_part(AutoConfig.from_pretrained, model, key)


def load_tokenizer(model: str, key: str) -> Any:
    """The model's tokenizer. Raises ModelError naming the recipe key."""
    return load_part(AutoTokenizer.from_pretrained, model, key)


def load_model(model: str, dtype: str, device: torch.device, key: str, *, eager: bool = False) -> Any:
    """A causal language model with all its weights, probed (see `causal.probe`). Raises ModelError naming the key.

    `eager` is for attention maps (see `insides.needs_eager`).
    """
    options = {"attn_implementation": "eager"} if eager else {}
    loaded, notes = load_part(
        AutoModelForCausalLM.from_pretrained, model, key, dtype=DTYPES[dtype], output_loading_info=True, **options
    )
    missing = sorted(notes["missing_keys"])
    if missing:
        raise ModelError(
            f"{key}: {model} lacks weights of {type(loaded).__name__} ({len(missing)}; {missing[0]} is the first), "
            "which would be random numbers. Give a whole checkpoint of a causal language model."
        )
    loaded.to(device)
    probe(loaded, key)
    return loaded


class LocalEngine:
    """A model of this process as an `Engine`: reads with hidden states and head, generates with a batched KV cache."""

    offers = frozenset({Offer.TEXT, Offer.TOP_LOGPROBS, Offer.LOGITS, Offer.HIDDEN, Offer.ATTENTION, Offer.VECTORS})

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """`model` and `tokenizer` as `load_model` and `load_tokenizer` give them."""
        self.model, self.tokenizer = model, tokenizer
        named = 1 + max(tokenizer.get_vocab().values())  # its length is less where numbers are left out
        self._reader = CausalReader(model, min(named, model.get_output_embeddings().weight.shape[0]))

    @property
    def models(self) -> tuple[Any, ...]:
        """The model, as the only one."""
        return (self.model,)

    @property
    def vocabulary(self) -> int:
        """Rows of the head that stand for a token."""
        return self._reader.vocabulary

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the model says about `batch`; no gradient."""
        return self._reader.read(batch, wants)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """One completion a prompt, in order; 16 at a time, shorter ones padded on the left.

        `sampling` is all that counts: what the model's own generation config says of temperature or penalties does not.
        An empty prompt starts at the tokenizer's begin token (or end token, where texts begin with that). A prompt that
        leaves too little room for its completion keeps its end. Raises ModelError for an empty prompt without either.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        longest = self._positions()
        if longest is not None:
            encoded = [ids[-max(1, longest - sampling.max_new_tokens) :] for ids in encoded]
        with self._own_settings_aside():
            return [answer.text for answer in self._complete(encoded, sampling)]

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """As `generate`, each prompt whole, with how its answer finished: `stop`, `length`, or NO_ROOM and no text.

        A prompt that leaves less than `max_new_tokens` of the model's positions is answered in what room it leaves; of
        this, less than a sixteenth is not used, so that prompts of like length are answered together.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        limits = [self._room(len(ids), sampling.max_new_tokens) for ids in encoded]
        answers = [Completion("", finish=NO_ROOM)] * len(encoded)
        numbers = sorted((number for number, limit in enumerate(limits) if limit > 0), key=lambda one: -limits[one])
        with self._own_settings_aside():
            for limit, alike in groupby(numbers, lambda number: limits[number]):
                least = min(limit, sampling.min_new_tokens)
                asked, limited = list(alike), replace(sampling, max_new_tokens=limit, min_new_tokens=least)
                for number, said in zip(asked, self._complete([encoded[one] for one in asked], limited), strict=True):
                    answers[number] = said
        return answers

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        first = [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None]
        if not ids and not first:
            raise ModelError("generate: an empty prompt needs a begin token, the tokenizer has none. Give some words.")
        return ids or first[:1]

    def _positions(self) -> int | None:
        """So many tokens the model can read; None where there is no such number."""
        longest: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return longest

    def _room(self, tokens: int, wanted: int) -> int:
        """New tokens after so many: `wanted`, or what is left, of which the five leading bits count."""
        longest = self._positions()
        if longest is None or wanted <= longest - tokens:
            return wanted
        room = max(0, longest - tokens)
        step = 1 << max(0, room.bit_length() - 5)
        return room // step * step

    @contextmanager
    def _own_settings_aside(self) -> Iterator[None]:
        own = self.model.generation_config
        self.model.generation_config = self._special_tokens(own)
        try:
            yield
        finally:
            self.model.generation_config = own

    def _special_tokens(self, own: Any) -> GenerationConfig:
        """The model's token numbers, and what a chat's turn ends with, without its publisher's taste in sampling."""
        eos = self.tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        ends = {*([] if eos is None else eos if isinstance(eos, list) else [eos]), *self._turn_ends()}
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return GenerationConfig(bos_token_id=own.bos_token_id, eos_token_id=sorted(ends) or None, pad_token_id=pad or 0)

    def _turn_ends(self) -> list[int]:
        """The token that the chat template ends a turn with, where it does; a base model's own may be another."""
        if not self.tokenizer.chat_template:
            return []
        try:
            template = open_template(self.tokenizer)
        except (DataError, *UNFIT):  # no template for conversations: nothing was learned from any
            return []
        found = template.added.search(template.tail or "")
        return [self.tokenizer.convert_tokens_to_ids(found.group())] if found else []

    def _complete(self, encoded: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        starts = range(0, len(encoded), 16)
        return [said for start in starts for said in self._complete_batch(encoded[start : start + 16], sampling)]

    def _complete_batch(self, encoded: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        pad = self.model.generation_config.pad_token_id
        longest = max(len(ids) for ids in encoded)
        ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded], device=self.model.device)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            **(drawn if sampling.temperature > 0 else {"do_sample": False}),
        )
        return [self._completion(said) for said in output[:, longest:].tolist()]

    def _completion(self, said: list[int]) -> Completion:
        """The words before the first token that ends them; what follows that is padding."""
        ends = self.model.generation_config.eos_token_id or ()
        length = next((number for number, token in enumerate(said) if token in ends), None)
        text = str(self.tokenizer.decode(said[:length], skip_special_tokens=True))
        return Completion(text, finish="length" if length is None else "stop")


def load_part(loader: Any, model: str, key: str, **options: Any) -> Any:
    """What `loader`, a `from_pretrained`, makes of a folder or hub id. Raises ModelError naming the recipe key."""
    try:
        return loader(_locate(model), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(
            f"{key}: {model} cannot be loaded ({_first_line(error)}). Give a Hugging Face id, a folder with "
            "config.json, a .gguf file, or sample:NAME."
        ) from error


def _locate(model: str) -> str:
    """Where to load from: the folder, the hub's id, or the hub's cache when the hub cannot be reached."""
    if model and Path(model).is_dir():
        return model
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise FileNotFoundError(f"there is {'a file' if Path(model).is_file() else 'nothing'} where a folder is needed")
    if _hub_answers():
        return model
    try:
        return snapshot_download(model, local_files_only=True)
    except LocalEntryNotFoundError:
        raise FileNotFoundError("the Hugging Face hub cannot be reached, and its cache has no copy") from None


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub can be reached; asked once a process, since its client would retry every file for long."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=5):
            return True
    except OSError as error:
        # An answer that is an error is an answer; and the hub's client may trust certificates that Python does not.
        return isinstance(error, HTTPError) or isinstance(getattr(error, "reason", error), SSLError)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    more = lines[1] if lines[0].endswith(":") and len(lines) > 1 else ""
    return f"{lines[0]} {more}".strip().rstrip(".")[:300]
