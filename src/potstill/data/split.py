"""Which split a document belongs to: a keyed hash of its content decides.

Equal documents share a split whatever their ids or order, and adding documents moves none of the others. Refuses shares
that leave nothing to train on.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Literal

from potstill.errors import DataError
from potstill.types import Example

__all__ = ["Split", "check_shares", "place_of", "split_named", "split_of"]

Split = Literal["train", "validation", "test"]

_WORD = re.compile(r"[^\W\d_]+")
_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "unsupervised", "unlabelled", "unlabeled"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(example: Example, *, seed: int, validation: float, test: float) -> Split:
    """The split of a document, given the shares of documents held out for validation and test.

    A document's place in [0, 1) is its hash; test takes the lower end and validation the upper one, so that changing
    one share never moves a document from one held-out split to the other.

    Raises:
        DataError: the shares are negative or leave nothing to train on.
    """
    check_shares(validation, test)
    place = place_of(example.text if example.messages is None else list(map(dict, example.messages)), seed)
    if place < test:
        return "test"
    return "validation" if place >= 1 - validation else "train"


def check_shares(validation: float, test: float) -> None:
    """Raises DataError where the shares held out are negative or leave nothing to train on."""
    if min(validation, test) < 0 or validation + test >= 1:
        raise DataError(
            f"data.splits: validation {validation} and test {test} must be at least 0 and add up to less than 1. "
            "Lower one of them."
        )


def split_named(name: str) -> Split | None:
    """The split that a name means by one of its words (`oos_val`, `test-00000-of-00001`); None for none or for two."""
    found = {_NAMES[word] for word in _WORD.findall(name.casefold()) if word in _NAMES}
    return found.pop() if len(found) == 1 else None


def place_of(content: object, seed: int) -> float:
    """A number in [0, 1) that depends on the content, a JSON value, and the seed only."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(canonical.encode(), digest_size=8, key=seed.to_bytes(16, "big"))
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53  # 53 bits: exact in a float, never 1.0
