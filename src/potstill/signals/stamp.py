"""Whose words a store keeps: fingerprints of teacher, tokenizer and spec, in a manifest that guards itself.

Refuses a manifest with one byte that is not as it was written, and a store of another teacher, tokenizer or spec.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from potstill.errors import StoreError

__all__ = ["Manifest", "Stamp", "check_manifest", "parse_manifest", "sealed", "unsealed"]

VERSION = 1

_CHECKSUM = "checksum"


@dataclass(frozen=True, slots=True)
class Stamp:
    """Who spoke, in which tokens, and what is kept of it.

    teacher, tokenizer, spec   fingerprints, which must agree for a store to be used
    template                   fingerprint of the chat template; recorded only: it is in the tokens that make the keys
    spec_json                  the spec itself, as JSON values
    words                      for people: the teacher's name, and what else helps to know the store again
    """

    teacher: str
    tokenizer: str
    spec: str
    template: str = ""
    spec_json: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of store.json: the stamp, and the bytes of a record."""

    stamp: Stamp
    stride: int

    @property
    def mark(self) -> bytes:
        """What every shard of the store bears, 16 bytes: a shard that strayed here from another store is known."""
        parts = (self.stamp.teacher, self.stamp.tokenizer, self.stamp.spec, str(self.stride))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()

    def render(self) -> bytes:
        """The bytes of store.json."""
        stamp = self.stamp
        fingerprints = {name: getattr(stamp, name) for name in ("teacher", "tokenizer", "spec", "template")}
        content = {"format": VERSION, "stride": self.stride, "fingerprints": fingerprints}
        return sealed({**content, "spec": dict(stamp.spec_json), "words": dict(stamp.words)})


def sealed(content: Mapping[str, Any]) -> bytes:
    """Indented JSON with its own checksum. Raises ValueError for NaN and TypeError for what is not JSON."""
    return _render({**content, _CHECKSUM: _checksum(content)})


def unsealed(raw: bytes) -> dict[str, Any] | None:
    """What `sealed` wrote, None where a single byte differs."""
    try:
        content = json.loads(raw)
        checksum = content.pop(_CHECKSUM)
        same = checksum == _checksum(content) and raw == _render({**content, _CHECKSUM: checksum})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if same else None


def parse_manifest(raw: bytes, place: str) -> Manifest:
    """Raises StoreError for a manifest that is damaged or of another version."""
    content = unsealed(raw)
    if content is None:
        raise StoreError(
            f"signals.store: {place}/store.json is damaged. Delete that file and run the same command again: the "
            "shards bear the mark of their teacher, and are used where it is this one."
        )
    if content.get("format") != VERSION:
        raise StoreError(
            f"signals.store: {place} is of format {content.get('format')}, this potstill reads {VERSION}. Install the "
            "potstill that wrote it, or choose another place."
        )
    return Manifest(
        Stamp(**content["fingerprints"], spec_json=content["spec"], words=content["words"]), content["stride"]
    )


def check_manifest(found: Manifest, wanted: Manifest, place: str) -> None:
    """Raises StoreError unless a store with the manifest `found` may be used for `wanted`: names both fingerprints."""
    for what in ("teacher", "tokenizer", "spec"):
        theirs, ours = getattr(found.stamp, what), getattr(wanted.stamp, what)
        if theirs != ours:
            words = ", ".join(f"{name} {value}" for name, value in found.stamp.words.items())
            raise StoreError(
                f"signals.store: {place} was filled with another {what}: its fingerprint is {theirs}, that of this "
                f"recipe is {ours}{f' (the store says: {words})' if words else ''}. Choose another place, or the "
                f"{what} that filled it."
            )
    if found.stride != wanted.stride:
        raise StoreError(
            f"signals.store: {place} has records of {found.stride} bytes, this potstill writes {wanted.stride} for the "
            "same spec. Choose another place, or install the potstill that filled it."
        )


def _render(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(_render(content), digest_size=16).hexdigest()
