"""How fast a store is read back on one core: from the memory-mapped file through its checksums to log-probabilities.

Refuses to run on more than one core, and to read the same positions again within a pass.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from _table import Row, rounds_row

__all__ = ["decode_rows", "stay_on_one_core"]

BATCH_POSITIONS = 8 * 256
"""Positions that are asked for together: those of a training step."""


def stay_on_one_core() -> None:
    """Give up all cores but one, before any library counts them. Exits where the system has no such call."""
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("decoding is measured on one core, and this system cannot bind a process to one: use Linux")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def decode_rows(stores: Mapping[str, Path], folder: Path, positions: int, rounds: int) -> list[Row]:
    """Positions a second of a first pass, which compares all checksums, and of a second one in another order.

    Every round opens the store anew. Pieces come in random order, `BATCH_POSITIONS` at a time.
    """
    import torch

    torch.set_num_threads(1)
    if torch.get_num_threads() != 1 or len(os.sched_getaffinity(0)) != 1:
        raise SystemExit("decoding is measured on one core: this process has more")
    rows: list[Row] = []
    for name, source in stores.items():
        wide = folder / f"wide-{name}"
        counts = repeat_store(source, wide, positions)
        passes = [time_passes(wide, counts, random.Random(number)) for number in range(rounds + 1)][1:]
        first, again = zip(*passes, strict=True)
        rows.append(rounds_row(f"store.decode_{name}", again, "tokens/s"))
        rows.append(rounds_row(f"store.first_read_{name}", first, "tokens/s"))
    return [*rows, Row("store.decode_positions", float(sum(counts.values())), "positions")]


def repeat_store(source: Path, folder: Path, positions: int) -> dict[bytes, int]:
    """A store with `positions` or more records: those of `source`, as often as needed, each time under keys of its own.

    Returns the records of every key.
    """
    from potstill.signals import open_store, reopen_store

    narrow = reopen_store(source)
    counts: dict[bytes, int] = {}
    wide = open_store(folder, narrow.stamp, narrow.stride)
    with wide.writer() as writer:
        for copy in range(math.ceil(positions / narrow.num_records)):
            for key in narrow:
                records = narrow.read([key])
                other = hashlib.blake2b(key + copy.to_bytes(4, "little"), digest_size=16).digest()
                writer.append(other, records.records_NS, records.notes[0])
                counts[other] = len(records.records_NS)
    return counts


def time_passes(place: Path, counts: Mapping[bytes, int], chance: random.Random) -> tuple[float, float]:
    """Positions a second of two passes over a store that was just opened."""
    from potstill.signals import SignalSpec, encoding_of, reopen_store

    store = reopen_store(place)
    encoding = encoding_of(SignalSpec.from_json(store.stamp.spec_json))

    def rate() -> float:
        keys = chance.sample(list(counts), len(counts))
        batches = list(in_batches(keys, counts))
        read = 0
        began = time.perf_counter()
        for batch in batches:
            read += len(encoding.unpack(store.read(batch).records_NS).ids_NK)  # type: ignore[union-attr]
        seconds = time.perf_counter() - began
        if read != sum(counts.values()):
            raise SystemExit(f"read {read} positions of {sum(counts.values())}")
        return read / seconds

    return rate(), rate()


def in_batches(keys: Sequence[bytes], counts: Mapping[bytes, int]) -> Iterator[list[bytes]]:
    """Keys with at least `BATCH_POSITIONS` records together; the last ones may have fewer."""
    batch: list[bytes] = []
    held = 0
    for key in keys:
        batch.append(key)
        held += counts[key]
        if held >= BATCH_POSITIONS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
