"""A GGUF file made into a plain model folder, once, so that it loads anywhere with `from_pretrained`.

Refuses: to leave anything of the file's quantization in the folder; the weights are ordinary bf16 afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.errors import ModelError

__all__ = ["convert_gguf"]

PLAIN_SPLITS = frozenset({"default", "gpt-2", "gpt2"})
"""Names of `tokenizer.ggml.pre` that mean GPT-2's own splitting rule."""

DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
"""Names that mean: every digit stands alone, and then GPT-2's rule."""

logger = logging.getLogger(__name__)


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the model of `gguf_file` to `folder` as bf16 safetensors with tokenizer, chat template, generation config.

    Weights are unpacked in float32 and rounded to bf16 once. Needs memory for the model in float32.

    Raises:
        ModelError: the file is missing, no GGUF file, cut short, or of an architecture that transformers cannot read.
    """
    if not gguf_file.is_file():
        raise ModelError(f"{gguf_file} does not exist. Give the path of a .gguf file.")
    with _progress_bars_off():
        try:
            tokenizer = _read_tokenizer(gguf_file)
            model = _read_model(gguf_file)
        except (ValueError, TypeError, LookupError, RuntimeError, NotImplementedError, OSError) as error:
            raise ModelError(
                f"{gguf_file} cannot be read as a GGUF model: {_reason(error)}. "
                f"Download it again if it may be damaged, or use the model's original folder."
            ) from error
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read_tokenizer(gguf_file: Path) -> Any:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    field = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    split = "default" if field is None else str(field.contents())
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    plain = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    if plain and split in DIGIT_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif plain and split not in PLAIN_SPLITS:
        logger.warning(
            "%s splits text by the rule `%s`, which is unknown here; GPT-2's is used, so some token ids around digits "
            "and white space may differ from the original model's. Use the original folder if that matters.",
            gguf_file,
            split,
        )
    return tokenizer


def _read_model(gguf_file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    # float32 first: in bf16 each block's scale would be rounded before it is multiplied, an error for the whole block.
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).to(torch.bfloat16)
    for leftover in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(leftover, None)
    _restore_decimals(model.config)
    special = {name: getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**special)
    return model


def _restore_decimals(config: Any) -> None:
    """1e-05, not 9.999999747378752e-06: GGUF holds float32, whose shortest decimal is what the author wrote."""
    import numpy as np

    for name, value in vars(config).items():
        if isinstance(value, float) and float(np.float32(value)) == value:
            setattr(config, name, float(str(np.float32(value))))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@contextmanager
def _progress_bars_off() -> Iterator[None]:
    """Their lines would cut through the caller's own progress display."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
