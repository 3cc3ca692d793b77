"""What `potstill signals` says of a store is true, and what it exports is what the losses would read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from pyarrow import parquet

from potstill.errors import StoreError
from potstill.pipeline import stores
from potstill.pipeline.stores import describe_store, export_store, verify_store
from potstill.signals import SignalSpec, Stamp, draw_uniforms, encoding_of, open_store
from potstill.types import Head

V, D = 50, 6
SPECS = {
    "sampled": SignalSpec("sampled", V, k=8, temperatures=(1.0, 2.0)),
    "topk": SignalSpec("topk", V, k=8, temperatures=(2.0,)),
    "topk_renormalised": SignalSpec("topk_renormalised", V, k=8),
    "hidden": SignalSpec("hidden", V, width=D, dtype="bf16"),
    "dense": SignalSpec("dense", V),
}
COUNTS = [5, 0, 17, 1, 30]
KEYS = [bytes([number]) * 16 for number in range(len(COUNTS))]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))


def fill(place: Path, spec: SignalSpec) -> dict[bytes, np.ndarray]:
    """A store with some pieces that a random teacher spoke about, and their records."""
    encoding = encoding_of(spec)
    stamp = Stamp("T" * 32, "K" * 32, spec.fingerprint, "C" * 32, spec.to_json(), {"teacher": "a large model"})
    opened, records = open_store(place, stamp, encoding.stride), {}
    with opened.writer(shard_bytes=600) as writer:
        for key, count in zip(KEYS, COUNTS, strict=True):
            said = torch.randn(count, D).bfloat16() if spec.kind == "hidden" else 3 * torch.randn(count, V)
            if count:
                records[key] = encoding.pack(encoding.select(said, draw_uniforms(key, count, encoding.randoms)))
            else:
                records[key] = np.zeros((0, encoding.stride), np.uint8)
            writer.append(key, records[key])
    return records


def exported(place: Path, file: Path) -> pandas.DataFrame:
    export_store(place, file)
    return pandas.read_parquet(file)


def rows_of(table: pandas.DataFrame, key: bytes, **also: float) -> pandas.DataFrame:
    rows = table[table.piece == key.hex()]
    for column, value in also.items():
        rows = rows[rows[column] == value]
    assert rows.position.tolist() == list(range(COUNTS[KEYS.index(key)]))
    return rows


@pytest.mark.parametrize("small_groups", [False, True])
@pytest.mark.parametrize("kind", ["sampled", "topk", "topk_renormalised"])
def test_lists_are_exported_as_losses_read_them(tmp_path, monkeypatch, kind, small_groups):
    if small_groups:
        monkeypatch.setattr(stores, "GROUP_VALUES", 50)
    spec = SPECS[kind]
    records = fill(tmp_path / "s", spec)
    table = exported(tmp_path / "s", tmp_path / "out.parquet")
    assert len(table) == sum(COUNTS) * len(spec.temperatures)
    assert parquet.ParquetFile(tmp_path / "out.parquet").num_row_groups > 1 or not small_groups
    for key in KEYS:
        for temperature in spec.temperatures:
            rows = rows_of(table, key, temperature=temperature)
            said = encoding_of(spec).unpack(records[key], temperature)
            for number in range(len(rows)):
                listed = said.logprobs_NK[number].isfinite()
                assert rows.ids.iloc[number].tolist() == said.ids_NK[number][listed].tolist()
                assert rows.logprobs.iloc[number].tolist() == said.logprobs_NK[number][listed].tolist()
            tail = rows["tail"]
            assert tail.isna().all() if said.tail_N is None else tail.tolist() == said.tail_N.tolist()


def test_states_and_logits_are_exported_whole(tmp_path):
    for kind, column in (("hidden", "states"), ("dense", "logits")):
        records = fill(tmp_path / kind, SPECS[kind])
        table = exported(tmp_path / kind, tmp_path / f"{kind}.parquet")
        assert list(table.columns) == ["piece", "position", column]
        for key in KEYS:
            said = encoding_of(SPECS[kind], Head(torch.zeros(V, D))).unpack(records[key])
            expected = said.rows_ND.float() if kind == "hidden" else said.logits_NV
            got = [row.tolist() for row in rows_of(table, key)[column]]
            assert got == expected.tolist()


def test_the_types_are_those_that_are_promised(tmp_path):
    fill(tmp_path / "s", SPECS["topk"])
    export_store(tmp_path / "s", tmp_path / "out.parquet")
    schema = parquet.read_schema(tmp_path / "out.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "piece": "string",
        "position": "int32",
        "temperature": "double",
        "ids": "list<element: int32>",
        "logprobs": "list<element: float>",
        "tail": "float",
    }


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    fill(tmp_path / "s", SPECS["sampled"])
    (tmp_path / "out.parquet").write_text("before")
    for shard in (tmp_path / "s" / "shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:-1] + b"\xa5")
    with pytest.raises(StoreError, match="is damaged"):
        export_store(tmp_path / "s", tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_text() == "before"
    assert [path.name for path in tmp_path.glob(".*")] == []
    with pytest.raises(StoreError, match=r"signals export: .*cannot be written"):
        export_store(tmp_path / "s", tmp_path / "nowhere" / "out.parquet")


def test_an_empty_store_is_exported_as_an_empty_table(tmp_path):
    spec = SPECS["sampled"]
    open_store(tmp_path / "s", Stamp("T", "K", spec.fingerprint, "", spec.to_json()), encoding_of(spec).stride)
    assert len(exported(tmp_path / "s", tmp_path / "out.parquet")) == 0
    assert any("none" in line for line in describe_store(tmp_path / "s"))


def test_a_whole_store_is_called_whole(tmp_path):
    fill(tmp_path / "s", SPECS["sampled"])
    verified = verify_store(tmp_path / "s")
    assert verified.whole
    assert verified.lines == (
        f"{tmp_path / 's'}: 5 pieces, 53 records, {size(tmp_path / 's'):,} bytes: "
        "every byte in use is as it was written.",
    )


def size(place: Path) -> int:
    return sum(path.stat().st_size for path in (place / "shards").iterdir())


def test_damage_is_named_set_aside_and_then_told(tmp_path):
    fill(tmp_path / "s", SPECS["sampled"])
    shards = sorted((tmp_path / "s" / "shards").iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"\xa5")
    os.truncate(shards[1], 10)
    verified = verify_store(tmp_path / "s")
    assert not verified.whole
    assert [shard.name in line for shard, line in zip(shards, verified.lines, strict=False)] == [True, True]
    assert "Run the recipe again" in verified.lines[-1]
    again = verify_store(tmp_path / "s")
    assert again.whole
    assert "blocks: 1 (pieces in them: " in again.lines[0]
    assert any(line.startswith("set aside") and "whole shards: 1" in line for line in describe_store(tmp_path / "s"))


def test_a_store_is_described_in_words(tmp_path):
    fill(tmp_path / "s", SPECS["sampled"])
    text = "\n".join(describe_store(tmp_path / "s"))
    for word in ("a large model", "T" * 32, '"kind": "sampled"', "53", f"{size(tmp_path / 's') / 53:.2f}"):
        assert word in text


@pytest.mark.parametrize("command", [verify_store, describe_store, lambda place: export_store(place, Path("x"))])
def test_what_is_no_store_is_said(tmp_path, command):
    with pytest.raises(StoreError, match=r"^signals\.store: .*holds no store of signals"):
        command(tmp_path / "nowhere")
