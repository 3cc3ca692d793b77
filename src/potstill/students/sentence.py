"""What sentence-transformers reads beside a model's weights, so that one folder loads there and with `AutoModel`.

Refuses to import sentence-transformers, or to write anything but the files of its published layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from potstill.errors import ModelError

__all__ = ["save_sentence_encoder"]

_MODES = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "root": "mean_sqrt_len_tokens"}
"""All that its pooling knows."""


def save_sentence_encoder(folder: Path, *, pooling: Literal["cls", "mean"], normalise: bool, length: int) -> None:
    """Beside a saved encoder in `folder`: how its states become one vector. `length` is in tokens, specials included.

    Writes modules.json, sentence_bert_config.json, 1_Pooling/config.json and, where vectors are scaled to length 1, the
    empty folder 2_Normalize. Reimers and Gurevych (2019), arXiv:1908.10084. Raises ModelError where no model is there.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: needs a saved encoder. Save the student there first.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    places = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if normalise else {})
    for place in places:
        (folder / place).mkdir(exist_ok=True)
    modules = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (place, kind) in enumerate(places.items())
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    modes = {f"pooling_mode_{name}": mode == pooling for mode, name in _MODES.items()}
    width = config.get("hidden_size") or config["dim"]  # DistilBERT calls it so
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
