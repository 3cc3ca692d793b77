"""Texts with labels, or without: how they are named, and kept in a prepare folder.

Refuses to read a file of texts that is damaged: half of the texts would look like all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from potstill.data.clean import mend
from potstill.data.split import Split
from potstill.errors import DataError

__all__ = ["LabelledText", "content_key", "read_texts", "write_texts"]

Text = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or the words of one, and what is known of it.

    text        as it is, or its words where each has a label
    pair        a second text, of which the label tells how it stands to the first
    label       a class; several labels, or none: a tuple; one for every word ("" for a word that has none): a tuple as
                long as the words; None where nobody labelled it
    split       what the source says; None where it says nothing
    slice       by which the evaluation is told apart
    origin      key of the text that this one is a noisy copy of: what a teacher says of that holds for this
    """

    id: str
    text: Text
    pair: str | None = None
    label: str | tuple[str, ...] | None = None
    split: Split | None = None
    slice: str = ""
    source: str = ""
    provenance: str = "human"
    origin: bytes | None = None

    @property
    def key(self) -> bytes:
        """16 bytes that name text and pair by their content: equal ones have equal keys, whatever their labels."""
        return content_key(self.text, self.pair)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that stand here, by name."""
        if self.label is None:
            return ()
        return (self.label,) if isinstance(self.label, str) else tuple(filter(None, self.label))


_DEFAULTS = {field.name: field.default for field in fields(LabelledText)}


def content_key(text: Text, pair: str | None = None) -> bytes:
    """The 16 bytes that name a text by its content, as a row would give it: NULs and lone surrogates are mended."""
    words = list(text) if isinstance(text, tuple) else text
    canonical = json.dumps([mend(words), mend(pair)], separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


def write_texts(path: Path, texts: Iterable[LabelledText]) -> int:
    """Write texts as JSON lines, which `read_texts` gives back exactly, and say how many. Raises OSError."""
    count = 0
    with path.open("w", encoding="ascii") as lines:
        for text in texts:
            lines.write(_line(text) + "\n")
            count += 1
    return count


def read_texts(path: Path) -> list[LabelledText]:
    """The texts that `write_texts` wrote. Raises DataError where the file is missing or damaged."""
    try:
        with path.open(encoding="ascii") as lines:
            return [_revive(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is missing or damaged ({error}). Run the stage prepare again.") from None


def _line(text: LabelledText) -> str:
    cells = {name: cell for name, cell in asdict(text).items() if cell != _DEFAULTS[name]}
    if text.origin is not None:
        cells["origin"] = text.origin.hex()
    return json.dumps(cells)


def _revive(cells: dict[str, Any]) -> LabelledText:
    for name in ("text", "label"):
        if isinstance(cells.get(name), list):
            cells[name] = tuple(cells[name])
    if "origin" in cells:
        cells["origin"] = bytes.fromhex(cells["origin"])
    return LabelledText(**cells)
