"""Hugging Face models in this process: any causal language model by hub id or folder.

Refuses a model without telling which recipe key asked for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from potstill.engines.causal import CausalReader, probe
from potstill.errors import ModelError
from potstill.types import Batch, Offer, Sampling, Signal, Wants

__all__ = ["DTYPES", "LocalEngine", "load_config", "load_model", "load_tokenizer", "pick_device"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(device: str, key: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ModelError where the named device is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{key}: {device} is not available here ({_first_line(error)}). Use auto or cpu.") from None
    return picked


def load_config(model: str, key: str) -> Any:
    """The model's config. Raises ModelError naming the recipe key."""
    return _load(AutoConfig.from_pretrained, model, key)


def load_tokenizer(model: str, key: str) -> Any:
    """The model's tokenizer. Raises ModelError naming the recipe key."""
    return _load(AutoTokenizer.from_pretrained, model, key)


def load_model(model: str, dtype: str, device: torch.device, key: str) -> Any:
    """A causal language model, probed (see `causal.probe`). Raises ModelError naming the recipe key."""
    loaded = _load(AutoModelForCausalLM.from_pretrained, model, key, dtype=DTYPES[dtype])
    loaded.to(device)
    probe(loaded, key)
    return loaded


class LocalEngine:
    """A model of this process as an `Engine`: reads with hidden states and head, generates with a batched KV cache."""

    offers = frozenset({Offer.TEXT, Offer.TOP_LOGPROBS, Offer.LOGITS, Offer.HIDDEN})

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """`model` and `tokenizer` as `load_model` and `load_tokenizer` give them."""
        self.model, self.tokenizer = model, tokenizer
        self._reader = CausalReader(model, min(len(tokenizer), model.get_output_embeddings().weight.shape[0]))

    def read(self, batch: Batch, wants: Wants) -> Signal:
        """What the model says about `batch`; no gradient."""
        return self._reader.read(batch, wants)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """One completion a prompt, in order; 16 at a time, shorter ones padded on the left."""
        completions: list[str] = []
        for start in range(0, len(prompts), 16):
            completions += self._generate_batch(list(prompts[start : start + 16]), sampling)
        return completions

    def _generate_batch(self, prompts: list[str], sampling: Sampling) -> list[str]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        encoded = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(len(ids) for ids in encoded)
        ids = torch.tensor([[pad or 0] * (longest - len(ids)) + ids for ids in encoded], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded], device=self.model.device)
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad or 0,
            **(drawn if sampling.temperature > 0 else {"do_sample": False}),
        )
        texts = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [str(text) for text in texts]


def fingerprint_model(model: str) -> str:
    """Which model this is: for a folder a hash of its files' names, sizes and times, for a hub id the id itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        digest.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns};".encode())
    return digest.hexdigest()


def _load(loader: Any, model: str, key: str, **options: Any) -> Any:
    try:
        return loader(model, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{key}: {model} cannot be loaded ({_first_line(error)}). Give a Hugging Face id, a folder with config.json, "
            "a .gguf file, or sample:NAME."
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
