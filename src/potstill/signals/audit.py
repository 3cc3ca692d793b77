"""Does a store still hold what was written? Every byte of every file, compared with its checksum.

Refuses to mend anything: it names what is damaged, and whose pieces are lost with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from potstill.signals.files import FILE, file_is_whole
from potstill.signals.places import Place, refusals
from potstill.signals.shard import Damage, Shard, check_blocks, open_shard
from potstill.signals.stamp import Manifest, unsealed

__all__ = ["CONDEMNED", "MANIFEST", "SHARD", "WHOLE", "audit", "condemned_in", "read_shard"]

MANIFEST = "store.json"
SHARD = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.shard")
CONDEMNED = re.compile(rf"({SHARD.pattern})\.(\d+|whole)\.json")

WHOLE = -1
"""Stands for all blocks of a shard."""

Condemned = frozenset[tuple[str, int]]
"""(shard, block) of all that is in quarantine."""


def audit(place: Place, manifest: Manifest, condemned: Condemned) -> Iterator[Damage]:
    """All damages of a store but those that are in quarantine already. Raises StoreError where it cannot be read."""
    if place.read(MANIFEST) != manifest.render():
        yield Damage(MANIFEST, "content", "its bytes are not those that were written: delete it and run the recipe")
    yield from _strangers(place)
    for name in sorted(filter(SHARD.fullmatch, place.list("shards"))):
        if (name, WHOLE) not in condemned:
            blocks = {block for shard, block in condemned if shard == name}
            yield from _audit_shard(place, manifest, name, blocks)
    for name in sorted(filter(FILE.fullmatch, place.list("files"))):
        if not file_is_whole(place, name):
            yield Damage(
                f"files/{name}", "content", "its bytes are not those of its hash: delete it and run the recipe"
            )
    for name in sorted(filter(CONDEMNED.fullmatch, place.list("quarantine"))):
        if unsealed(place.read(f"quarantine/{name}") or b"") is None:
            yield Damage(
                f"quarantine/{name}",
                "content",
                "its bytes are not those that were written: delete it, what it tells of is found again",
            )


def condemned_in(place: Place) -> Condemned:
    """What is in quarantine: the names of the files there say it all. Raises StoreError."""
    matches = filter(None, map(CONDEMNED.fullmatch, place.list("quarantine")))
    return frozenset((match[1], WHOLE if match[2] == "whole" else int(match[2])) for match in matches)


def read_shard(place: Place, manifest: Manifest, name: str, *, again: bool = False) -> Shard | Damage:
    """The shard, mapped and checked but for its data, or what is wrong with it. A damaged copy is fetched again.

    Raises StoreError where the system refuses to read it.
    """
    file = f"shards/{name}"
    path = place.fetch(file, again=again)
    with refusals(place.name):
        found = open_shard(path, file, stride=manifest.stride, mark=manifest.mark)
    if isinstance(found, Damage) and place.copied and not again:
        return read_shard(place, manifest, name, again=True)
    return found


def _audit_shard(place: Place, manifest: Manifest, name: str, condemned: set[int]) -> Iterator[Damage]:
    shard = read_shard(place, manifest, name, again=place.copied)
    if isinstance(shard, Damage):
        yield shard
    else:
        yield from check_blocks(shard, (block for block in range(len(shard.checks)) if block not in condemned))


def _strangers(place: Place) -> Iterator[Damage]:
    """Files that no potstill wrote there, in the folders of a store."""
    for folder, ours in (("shards", SHARD), ("files", FILE), ("quarantine", CONDEMNED)):
        for name in sorted(place.list(folder)):
            if not ours.fullmatch(name):
                yield Damage(f"{folder}/{name}", "foreign", "it is no part of the store, and not used: move it away")
