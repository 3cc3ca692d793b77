"""What `potstill signals` does with a store by its place alone: verify it, describe it, export it as Parquet.

Refuses to export into half a file: it is there when all of it is.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import StoreError
from potstill.pipeline.recall import cache_folder
from potstill.signals import Encoding, Records, SignalSpec, Store, encoding_of, reopen_store
from potstill.types import Head, Logits, SparseLogits, States

if TYPE_CHECKING:
    import pyarrow as arrow  # type: ignore[import-untyped]

__all__ = ["Verified", "describe_store", "export_store", "verify_store"]

GROUP_VALUES = 1 << 22
"""Numbers of a row group, so that an export needs little memory however large the store."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found: a line for every damage and one for the whole; and whether there was none."""

    lines: tuple[str, ...]
    whole: bool


def verify_store(place: str | Path) -> Verified:
    """Compares every byte of a store with its checksums, and sets aside what of its shards is damaged.

    Raises StoreError where there is no store, or it cannot be read; MissingExtra.
    """
    store = reopen_store(place, cache_folder())
    damages = store.verify()
    if not damages:
        before = f"; set aside before: {_aside(store)}" if _aside(store) else ""
        return Verified((f"{_size(store)}: every byte in use is as it was written{before}.",), True)
    lines = list(map(str, damages))
    try:
        if store.quarantine(damages):
            lines.append(f"Set aside: {_aside(store)}. Run the recipe again: what is missing is captured anew.")
    except StoreError as error:
        lines.append(f"Nothing could be set aside: {error}")
    return Verified(tuple(lines), False)


def describe_store(place: str | Path) -> Iterator[str]:
    """Lines: whose words they are, how many, how large. Raises StoreError where there is no store, MissingExtra."""
    store = reopen_store(place, cache_folder())
    stamp = store.stamp
    rows = {
        "place": store.place,
        **stamp.words,
        "spec": json.dumps(dict(stamp.spec_json), ensure_ascii=False),
        "teacher fingerprint": stamp.teacher,
        "tokenizer fingerprint": stamp.tokenizer,
        "template fingerprint": stamp.template,
        "spec fingerprint": stamp.spec,
        "pieces": f"{store.num_pieces:,}",
        "records": f"{store.num_records:,}",
        "bytes": f"{store.num_bytes:,}",
        "bytes per token": f"{store.num_bytes / store.num_records:.2f}" if store.num_records else "none",
        "shards": f"{store.num_shards:,}",
        "set aside": _aside(store) or "nothing",
    }
    return (f"{name:<23}{value}" for name, value in rows.items())


def export_store(place: str | Path, path: Path) -> str:
    """Writes all that a store holds as one Parquet file, and returns a line that says what it holds.

    Columns: piece (hex), position (of the record within its piece); then temperature, ids list<int32>, logprobs
    list<float> in nats and tail (log-mass of all others, null where the listed ones stand for all), a row for every
    position at every temperature; or for `hidden` states list<float>, for `dense` logits list<float>.

    Raises StoreError, MissingExtra, and RecipeError where another version wrote the spec.
    """
    from pyarrow import parquet

    store = reopen_store(place, cache_folder())
    if path.suffix != ".parquet" or not path.parent.is_dir():
        raise StoreError(
            f"signals export: {str(path)!r} cannot be written: needs a name that ends in .parquet, in a folder that is "
            "there."
        )
    spec = SignalSpec.from_json(store.stamp.spec_json)
    rows = 0
    with _writing(path) as part, parquet.ParquetWriter(part, _schema(spec)) as writer:
        for table in _row_groups(store, spec):
            writer.write_table(table)
            rows += table.num_rows
    return f"{path}: {rows:,} rows of {store.num_pieces:,} pieces."


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its name if all goes well, and is gone if not."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield part
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        raise StoreError(
            f"signals export: {path} cannot be written ({(error.strerror or str(error)).splitlines()[0]}). Free some "
            "space, or choose another file."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _schema(spec: SignalSpec) -> arrow.Schema:
    import pyarrow as arrow

    floats = arrow.list_(arrow.float32())
    said: Mapping[str, arrow.DataType] = {
        "temperature": arrow.float64(),
        "ids": arrow.list_(arrow.int32()),
        "logprobs": floats,
        "tail": arrow.float32(),
    }
    if not spec.lists:
        said = {"states": floats} if spec.kind == "hidden" else {"logits": floats}
    return arrow.schema({"piece": arrow.string(), "position": arrow.int32(), **said})


def _row_groups(store: Store, spec: SignalSpec) -> Iterator[arrow.Table]:
    """Tables of some pieces each, in the order in which these lie in the store."""
    encoding = encoding_of(spec, _bodiless_head(spec))
    most = max(1, GROUP_VALUES // (spec.k * len(spec.temperatures) or spec.width or spec.vocabulary))
    for keys, records in _readings(store, most):
        pieces = [key.hex() for key in keys]
        for start in range(0, len(records.records_NS), most):
            yield _table(spec, encoding, (pieces, records), range(start, min(start + most, len(records.records_NS))))


def _bodiless_head(spec: SignalSpec) -> Head:
    """States are exported without logits: a head of no tokens serves, and the teacher's need not be there."""
    return Head(torch.empty(0, spec.width))


def _readings(store: Store, most: int) -> Iterator[tuple[list[bytes], Records]]:
    """Pieces with at least `most` records together."""
    keys: list[bytes] = []
    parts: list[Records] = []
    held = 0
    for key in store:
        keys.append(key)
        parts.append(store.read([key]))
        held += len(parts[-1].records_NS)
        if held >= most:
            yield keys, _joined(parts)
            keys, parts, held = [], [], 0
    if held:
        yield keys, _joined(parts)


def _joined(parts: list[Records]) -> Records:
    records_NS = np.concatenate([part.records_NS for part in parts])
    notes = tuple(note for part in parts for note in part.notes)
    return Records(records_NS, np.concatenate([part.counts for part in parts]), notes)


def _table(spec: SignalSpec, encoding: Encoding, said: tuple[list[str], Records], rows: range) -> arrow.Table:
    """The records `rows` as a table, at one temperature after another."""
    import pyarrow as arrow

    pieces, records = said
    owners = np.repeat(np.arange(len(pieces)), records.counts)[rows.start : rows.stop]
    firsts = np.cumsum(records.counts) - records.counts
    positions = np.arange(rows.start, rows.stop) - firsts[owners]
    records_nS = records.records_NS[rows.start : rows.stop]
    schema, tables = _schema(spec), []
    for temperature in spec.temperatures:
        columns = {
            "piece": arrow.array(np.array(pieces, object)[owners], arrow.string()),
            "position": arrow.array(positions.astype(np.int32)),
            "temperature": arrow.array(np.full(len(rows), temperature)),
            **_said(encoding.unpack(records_nS, temperature)),
        }
        tables.append(arrow.table({name: columns[name] for name in schema.names}, schema=schema))
    return arrow.concat_tables(tables).combine_chunks()


def _said(said: SparseLogits | Logits | States) -> dict[str, Any]:
    """Columns of what the teacher said, one entry a position."""
    import pyarrow as arrow

    if isinstance(said, States):
        return {"states": _lists(said.rows_ND.float())}
    if isinstance(said, Logits):
        return {"logits": _lists(said.logits_NV)}
    listed = torch.isfinite(said.logprobs_NK).numpy()
    tail = (
        arrow.nulls(len(listed), arrow.float32()) if said.tail_N is None else arrow.array(said.tail_N.float().numpy())
    )
    return {
        "ids": _lists(said.ids_NK.int(), listed),
        "logprobs": _lists(said.logprobs_NK.float(), listed),
        "tail": tail,
    }


def _lists(values_NK: Tensor, listed_NK: NDArray[np.bool_] | None = None) -> arrow.ListArray:
    """A list a row, of the entries that are listed."""
    import pyarrow as arrow

    values = values_NK.numpy()
    listed_NK = np.ones(values.shape, np.bool_) if listed_NK is None else listed_NK
    stops = np.cumsum(listed_NK.sum(-1), dtype=np.int32)
    return arrow.ListArray.from_arrays(np.concatenate([np.zeros(1, np.int32), stops]), values[listed_NK])


def _size(store: Store) -> str:
    return f"{store.place}: {store.num_pieces:,} pieces, {store.num_records:,} records, {store.num_bytes:,} bytes"


def _aside(store: Store) -> str:
    """What is in quarantine, in words; nothing where nothing is."""
    aside = store.quarantined
    parts = []
    if aside.blocks:
        parts.append(f"blocks: {aside.blocks:,} (pieces in them: {aside.pieces:,})")
    if aside.shards:
        parts.append(f"whole shards: {aside.shards:,}")
    return ", ".join(parts)
