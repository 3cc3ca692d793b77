"""Which split a document belongs to: a keyed hash of its content decides.

Equal documents share a split whatever their ids or order, and adding documents moves none of the others. Refuses shares
that leave nothing to train on.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from potstill.errors import DataError
from potstill.types import Example

__all__ = ["Split", "split_of"]

Split = Literal["train", "validation", "test"]


def split_of(example: Example, *, seed: int, validation: float, test: float) -> Split:
    """The split of a document, given the shares of documents held out for validation and test.

    A document's place in [0, 1) is its hash; test takes the lower end and validation the upper one, so that changing
    one share never moves a document from one held-out split to the other.

    Raises:
        DataError: the shares are negative or leave nothing to train on.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise DataError(
            f"data.splits: validation {validation} and test {test} must be at least 0 and add up to less than 1. "
            "Lower one of them."
        )
    place = _place(example, seed)
    if place < test:
        return "test"
    return "validation" if place >= 1 - validation else "train"


def _place(example: Example, seed: int) -> float:
    """A number in [0, 1) that depends on the content and the seed only."""
    content = example.text if example.messages is None else list(map(dict, example.messages))
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(canonical.encode(), digest_size=8, key=seed.to_bytes(16, "big"))
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53  # 53 bits: exact in a float, never 1.0
