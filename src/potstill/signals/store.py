"""Bytes under keys, for years: shards that many processes write and read at once, without a lock.

    PLACE/
        store.json             whose words these are, and the bytes of a record
        shards/NAME.shard      immutable; names are unique, so that writers never meet
        files/NAME.HASH        large files beside the records, such as a teacher's head
        quarantine/NAME.json   SHARD.BLOCK or SHARD.whole: what no reader uses any more

Refuses to give out bytes that are not those that were written. Knows bytes and keys, and nothing of what they mean.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.errors import StoreError
from potstill.signals.audit import MANIFEST, SHARD, WHOLE, audit, condemned_in, read_shard
from potstill.signals.files import find_file, keep_file
from potstill.signals.index import Index, columns_of, empty_index, grown
from potstill.signals.places import Place
from potstill.signals.remote import place_at
from potstill.signals.shard import Damage, Shard, block_span, check_blocks, still_whole
from potstill.signals.stamp import Manifest, Stamp, check_manifest, parse_manifest, sealed
from potstill.signals.writer import SECONDS, SHARD_BYTES, Writer

__all__ = [
    "Damage",
    "Quarantined",
    "Records",
    "Stamp",
    "Store",
    "Writer",
    "has_store",
    "open_store",
    "read_stamp",
    "reopen_store",
]

MAPPED = 256
"""Shards that are mapped at a time: each holds a file descriptor, of which a process may often have 1,024."""

NAMED = 8
"""Keys that an error names before it goes on with a number."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Records:
    """What was stored of some pieces, in the order in which they were asked for.

    records_NS uint8 [N, stride], piece after piece; counts int64 [E], the records of each; notes, one each.
    """

    records_NS: NDArray[np.uint8]
    counts: NDArray[np.int64]
    notes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """What is set aside: single blocks, whole shards, and the pieces that touch such blocks."""

    blocks: int
    shards: int
    pieces: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a reader knows of a store; replaced, never changed, so that threads may read while one refreshes.

    names of the shards by number; the index; what is in quarantine; shards that cannot be opened; pieces that lie in
    damaged blocks; bytes of all shards.
    """

    names: tuple[str, ...] = ()
    index: Index = field(default_factory=empty_index)
    condemned: frozenset[tuple[str, int]] = frozenset()
    unreadable: frozenset[str] = frozenset()
    lost_pieces: int = 0
    num_bytes: int = 0


def open_store(
    place: str | Path, stamp: Stamp, stride: int, *, create: bool = True, cache: Path | None = None
) -> Store:
    """The store at `place`, a folder or an address, for records of `stride` bytes that fit `stamp`.

    Where there is none it is made, unless `create` is false. `cache` is the folder for copies, for an address only.
    Raises StoreError where there is a store of another teacher, tokenizer or spec, where it is damaged or cannot be
    reached; MissingExtra where a package is absent; ValueError for a stride below 1.
    """
    if stride < 1:
        raise ValueError(f"a record has at least 1 byte; got stride {stride}")
    wanted, there = Manifest(stamp, stride), place_at(place, cache)
    raw = there.read(MANIFEST)
    if raw is None and create:
        there.create(MANIFEST, wanted.render())
        raw = there.read(MANIFEST)  # of two that made it at once, both see the winner's
    found = _parse(raw, there.name)
    check_manifest(found, wanted, there.name)
    return Store(there, found)


def reopen_store(place: str | Path, cache: Path | None = None) -> Store:
    """The store at `place`, whosever words it keeps. Raises StoreError where there is none, MissingExtra."""
    there = place_at(place, cache)
    return Store(there, _parse(there.read(MANIFEST), there.name))


def has_store(place: str | Path, cache: Path | None = None) -> bool:
    """Whether there is a store at `place`, whole or not. Raises StoreError where that cannot be known, MissingExtra."""
    return place_at(place, cache).read(MANIFEST) is not None


def read_stamp(place: str | Path, cache: Path | None = None) -> Stamp:
    """Whose words the store at `place` keeps. Raises StoreError where there is none, MissingExtra."""
    there = place_at(place, cache)
    return _parse(there.read(MANIFEST), there.name).stamp


class Store:
    """Pieces by key: each some records of one length, and a note. Several threads may read at once."""

    def __init__(self, place: Place, manifest: Manifest) -> None:
        """Looks at all shards. Use `open_store`. Raises StoreError where they cannot be read."""
        self._place, self._manifest = place, manifest
        self._lock = threading.RLock()
        self._mapped: dict[str, Shard | Damage] = {}
        self._checked: dict[str, NDArray[np.bool_]] = {}
        self._seen = _Seen()
        self.refresh()

    @property
    def place(self) -> str:
        """The folder or address, in the user's words."""
        return self._place.name

    @property
    def stamp(self) -> Stamp:
        """Whose words it keeps."""
        return self._manifest.stamp

    @property
    def stride(self) -> int:
        """Bytes of a record."""
        return self._manifest.stride

    @property
    def num_pieces(self) -> int:
        """Pieces that can be read, equal ones counted once."""
        return len(self._seen.index)

    @property
    def num_records(self) -> int:
        """Records of these."""
        return int(self._seen.index.counts.sum(dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards, also of what is in quarantine."""
        return self._seen.num_bytes

    @property
    def num_shards(self) -> int:
        """Shards that are used."""
        return len(self._seen.names) - len(self._lost_shards)

    @property
    def quarantined(self) -> Quarantined:
        """What readers do not use any more; what a lost shard held cannot be known, and is not counted as pieces."""
        blocks = sum(block != WHOLE for _, block in self._seen.condemned)
        return Quarantined(blocks, len(self._lost_shards), self._seen.lost_pieces)

    def __contains__(self, key: bytes) -> bool:
        return bool(self._seen.index.find([key])[1][0])

    def __iter__(self) -> Iterator[bytes]:
        """All keys, in the order in which their records lie."""
        return self._seen.index.in_stored_order()

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of these keys that are not there, each once, in order."""
        asked = list(dict.fromkeys(keys))
        _, found = self._seen.index.find(asked)
        return [key for key, there in zip(asked, found, strict=True) if not there]

    def read(self, keys: Sequence[bytes]) -> Records:
        """What was stored under these keys, in their order; every block is compared with its checksum at first touch.

        Raises StoreError for a key that is not there, and for a damaged shard or block after setting it aside.
        """
        seen = self._seen
        rows, found = seen.index.find(keys)
        if not found.all():
            absent = [key for key, there in zip(keys, found, strict=True) if not there]
            raise StoreError(
                f"signals.store: {self.place} has no piece {_named(absent)}. Run the same command again: what is "
                "missing is captured."
            )
        shards, pieces = seen.index.shards[rows], seen.index.pieces[rows]
        starts, counts = seen.index.starts[rows], seen.index.counts[rows].astype(np.int64)
        stops = np.cumsum(counts)
        records_NS = np.empty((int(counts.sum()), self.stride), np.uint8)
        notes = [b""] * len(rows)
        for number in np.unique(shards):
            places = np.flatnonzero(shards == number)
            shard = self._sound_shard(seen.names[number], starts[places], counts[places])
            columns = (places, pieces[places], starts[places], counts[places], stops[places])
            for place, piece, start, count, stop in zip(*(column.tolist() for column in columns), strict=True):
                records_NS[stop - count : stop] = shard.data[start : start + count]
                notes[place] = shard.note(piece)
        return Records(records_NS, counts, tuple(notes))

    def writer(self, *, shard_bytes: int = SHARD_BYTES, seconds: float = SECONDS) -> Writer:
        """A context in which pieces are appended; after it this reader sees them. One shard is up to `shard_bytes`."""
        return Writer(self._place, self._manifest, self.refresh, shard_bytes=shard_bytes, seconds=seconds)

    def refresh(self) -> None:
        """Sees what other writers committed, and what other readers set aside, since. Raises StoreError."""
        with self._lock:
            sizes = {name: size for name, size in self._place.list("shards").items() if SHARD.fullmatch(name)}
            condemned, seen = condemned_in(self._place), self._seen
            if condemned != seen.condemned or not sizes.keys() >= set(seen.names):
                self._mapped.clear()
                seen = _Seen(condemned=condemned)
            self._seen = self._extended(seen, sizes)

    def put_file(self, name: str, path: Path) -> None:
        """Keeps a copy of a file beside the records. Raises StoreError where another has that name, ValueError."""
        keep_file(self._place, name, path)

    def get_file(self, name: str) -> Path:
        """A path on this machine of what `put_file` kept. Raises StoreError where it is not there or not whole."""
        return find_file(self._place, name)

    def verify(self) -> list[Damage]:
        """Every damage of every file but those that are in quarantine. Reads all bytes. Raises StoreError."""
        known = {name for name in self._seen.names if (name, WHOLE) not in self._seen.condemned}
        gone = sorted(known - self._place.list("shards").keys())
        words = "it is not there any more"
        missing = [Damage(f"shards/{name}", "missing", words, pieces=self._pieces_of(name)) for name in gone]
        return [*missing, *audit(self._place, self._manifest, self._seen.condemned)]

    def quarantine(self, damages: Iterable[Damage]) -> int:
        """Sets aside, durably and for all readers, what is damaged of shards: its pieces count as missing from now on.

        Returns how many of the damages these are; all others are left to people. Raises StoreError where nothing can be
        written.
        """
        done = 0
        for damage in damages:
            folder, _, name = damage.file.partition("/")
            if folder == "shards" and damage.what in ("header", "index", "size", "block"):
                block = "whole" if damage.block is None else damage.block
                pieces = [key.hex() for key in damage.pieces]
                content = {"file": damage.file, "what": damage.what, "words": str(damage), "pieces": pieces}
                self._place.create(f"quarantine/{name}.{block}.json", sealed(content))
                done += 1
        self.refresh()
        return done

    @property
    def _lost_shards(self) -> frozenset[str]:
        seen = self._seen
        return seen.unreadable | {name for name, block in seen.condemned if block == WHOLE and name in seen.names}

    def _pieces_of(self, name: str) -> tuple[bytes, ...]:
        seen = self._seen
        index, number = seen.index, seen.names.index(name)
        rows = np.flatnonzero(index.shards == number)
        return tuple(index.keys[row : row + 1].tobytes() for row in rows)

    def _extended(self, seen: _Seen, sizes: dict[str, int]) -> _Seen:
        """`seen` and the shards that are new in `sizes`."""
        new = sorted(sizes.keys() - set(seen.names))
        unreadable, lost_pieces = set(seen.unreadable), seen.lost_pieces
        parts: list[Index] = []
        for number, name in enumerate(new, start=len(seen.names)):
            blocks = [block for shard, block in seen.condemned if shard == name]
            if WHOLE in blocks:
                continue
            shard = self._shard(name)
            if isinstance(shard, Damage):
                _log.warning("signals.store: %s: %s. It is not used; what it held counts as missing", self.place, shard)
                unreadable.add(name)
                continue
            parts.append(columns_of(shard, number, blocks))
            lost_pieces += len(shard.keys) - len(parts[-1])
        index = grown(seen.index, parts) if parts else seen.index
        names = (*seen.names, *new)
        return _Seen(names, index, seen.condemned, frozenset(unreadable), lost_pieces, sum(sizes.values()))

    def _shard(self, name: str, *, again: bool = False) -> Shard | Damage:
        """The shard, kept mapped until many others were asked for."""
        with self._lock:
            shard = None if again else self._mapped.pop(name, None)
            if shard is None:
                shard = read_shard(self._place, self._manifest, name, again=again)
            self._mapped[name] = shard
            while len(self._mapped) > MAPPED:
                del self._mapped[next(iter(self._mapped))]
            return shard

    def _sound_shard(self, name: str, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Shard:
        """The shard, after every block of these records has been compared. Raises StoreError."""
        shard, damages = self._examine(self._shard(name), starts, counts)
        if damages and self._place.copied:  # the copy may be damaged where the original is not
            self._checked.pop(name, None)
            shard, damages = self._examine(self._shard(name, again=True), starts, counts)
        if shard is None or damages:
            raise StoreError(self._set_aside(damages))
        return shard

    def _examine(
        self, shard: Shard | Damage, starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[Shard | None, list[Damage]]:
        if isinstance(shard, Damage):
            return None, [shard]
        changed = still_whole(shard)
        if changed:
            return None, [changed]
        name = shard.file.rpartition("/")[2]
        checked = self._checked.setdefault(name, np.zeros(len(shard.checks), np.bool_))
        spans = block_span(starts, starts + counts, self.stride)
        blocks = {
            block for first, last in zip(*map(np.ndarray.tolist, spans), strict=True) for block in range(first, last)
        }
        fresh = sorted(block for block in blocks if not checked[block])
        damages = check_blocks(shard, fresh)
        checked[fresh] = not damages
        return shard, damages

    def _set_aside(self, damages: Sequence[Damage]) -> str:
        """Quarantines, and says what happened and what to do."""
        try:
            self.quarantine(damages)
            done = "It is set aside: run the same command again, and these pieces are captured anew."
        except StoreError as error:
            done = f"It could not be set aside ({error}). Make the store writable and run the same command again."
        lost = [key for damage in damages for key in damage.pieces]
        what = "; ".join(map(str, damages))
        return f"signals.store: {self.place} is damaged: {what}{f' ({_named(lost)})' if lost else ''}. {done}"


def _parse(raw: bytes | None, place: str) -> Manifest:
    if raw is None:
        raise StoreError(
            f"signals.store: {place} holds no store of signals: it has no {MANIFEST}. Name the place that a recipe has "
            "as signals.store, or run a recipe that captures into it."
        )
    return parse_manifest(raw, place)


def _named(keys: Sequence[bytes]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(key.hex() for key in keys[:NAMED]) + more
