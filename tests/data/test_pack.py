"""The packer: every learned token is a target once, after its predecessor, and nothing crosses a segment."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.data import Encoded, PackedRows, PackedStats, plan_rows, write_rows
from potstill.data.pack import WINDOW_PIECES, RowWriter
from potstill.errors import DataError
from potstill.types import IGNORE, Batch

PAD = 999_999


@st.composite
def corpora(draw: st.DrawFn) -> list[Encoded]:
    """Documents of all lengths. No two tokens are equal, so that each can be found again."""
    documents, token = [], 0
    for index, length in enumerate(draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))):
        learn = [False] * min(length, 1) + draw(
            st.lists(st.booleans(), min_size=max(length - 1, 0), max_size=length - 1 if length else 0)
        )
        documents.append(Encoded(f"doc-{index}", list(range(token, token + length)), learn))
        token += length
    return documents


def pack(
    documents: list[Encoded], length: int, seed: int = 0, window: int = WINDOW_PIECES
) -> tuple[PackedStats, Batch]:
    with TemporaryDirectory() as name:
        stats = write_rows(documents, Path(name), sequence_length=length, pad_id=PAD, seed=seed, window=window)
        rows = PackedRows(Path(name))
        assert rows.stats == stats
        return stats, rows.batch(range(len(rows)))


def pairs_learned(documents: list[Encoded]) -> Counter[tuple[str, int, int]]:
    return Counter(
        (document.id, document.ids[index - 1], document.ids[index])
        for document in documents
        for index in range(1, len(document.ids))
        if document.learn[index]
    )


@settings(deadline=None)
@given(corpora(), st.integers(1, 24), st.integers(0, 3))
def test_each_learned_token_is_a_target_once_after_its_predecessor_and_for_its_document(documents, length, seed):
    wanted = pairs_learned(documents)
    if not wanted:
        with pytest.raises(DataError, match="nothing is to be learned"):
            pack(documents, length, seed)
        return
    stats, batch = pack(documents, length, seed)
    found = Counter(
        (
            batch.examples[row][batch.segments_BT[row, at] - 1],
            int(batch.ids_BT[row, at]),
            int(batch.targets_BT[row, at]),
        )
        for row, at in batch.supervised_BT.nonzero().tolist()
    )
    assert found == wanted
    assert (stats.supervised, stats.documents) == (wanted.total(), len(documents))
    assert stats.tokens == int((batch.segments_BT > 0).sum())
    assert (stats.rows, stats.segments) == (len(batch), sum(map(len, batch.examples)))


@settings(deadline=None)
@given(corpora(), st.integers(1, 24))
def test_segments_are_runs_of_one_document_and_padding_comes_last(documents, length):
    if not pairs_learned(documents):
        return
    _, batch = pack(documents, length)
    token_of = {token: document.id for document in documents for token in document.ids}
    for ids, targets, segments, positions, names in zip(
        batch.ids_BT, batch.targets_BT, batch.segments_BT, batch.positions_BT, batch.examples, strict=True
    ):
        sizes = [int((segments == segment).sum()) for segment in range(1, len(names) + 1)]
        padding = length - sum(sizes)
        assert segments.tolist() == [s for s, size in enumerate(sizes, 1) for _ in range(size)] + [0] * padding
        assert positions.tolist()[: length - padding] == [index for size in sizes for index in range(size)]
        for run, name in zip(ids[: length - padding].split(sizes), names, strict=True):
            assert run.tolist() == list(range(int(run[0]), int(run[0]) + len(run)))
            assert {token_of[token] for token in run.tolist()} == {name}
        assert set(ids[length - padding :].tolist()) <= {PAD}
        assert set(targets[length - padding :].tolist()) <= {IGNORE}


@settings(deadline=None)
@given(corpora(), st.integers(4, 24), st.data())
def test_unlearning_one_token_changes_that_target_alone(documents, length, data):
    learned = [(d, i) for d, document in enumerate(documents) for i, on in enumerate(document.learn) if on]
    if len(learned) < 2:
        return
    number, index = data.draw(st.sampled_from(learned))
    token = documents[number].ids[index]
    changed = list(documents)
    learn = [on and at != index for at, on in enumerate(documents[number].learn)]
    changed[number] = Encoded(documents[number].id, documents[number].ids, learn)
    _, before = pack(documents, length)
    _, after = pack(changed, length)
    assert set(before.targets_N.tolist()) - set(after.targets_N.tolist()) == {token}
    assert set(after.targets_N.tolist()) <= set(before.targets_N.tolist())


def test_another_token_changes_its_target_and_the_input_after_it_and_nothing_else():
    documents = [Encoded("a", list(range(10)), [False] + [True] * 9), Encoded("b", [20, 21, 22], [False, True, True])]
    _, before = pack(documents, 16)
    documents[0].ids[4] = 777
    _, after = pack(documents, 16)
    assert after.targets_BT[before.targets_BT != after.targets_BT].tolist() == [777]
    assert after.ids_BT[before.ids_BT != after.ids_BT].tolist() == [777]
    target, where = (before.targets_BT != after.targets_BT).nonzero(), (before.ids_BT != after.ids_BT).nonzero()
    assert (where - target).tolist() == [[0, 1]]
    assert torch.equal(before.segments_BT, after.segments_BT)


def test_a_long_document_is_cut_so_that_each_piece_starts_at_the_last_target_of_the_one_before():
    stats, batch = pack([Encoded("long", list(range(9)), [False] + [True] * 8)], 4)
    assert sorted(batch.ids_BT.tolist()) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(batch.targets_BT.tolist()) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert (stats.fill, stats.dropped_pieces) == (1.0, 0)


def test_a_piece_ends_at_its_last_target_and_without_one_is_dropped_and_counted():
    learn = [index in (2, 3) for index in range(12)]
    stats, batch = pack([Encoded("talk", list(range(12)), learn)], 5)
    assert batch.ids_BT.tolist() == [[0, 1, 2, PAD, PAD]]
    assert batch.targets_BT.tolist() == [[IGNORE, 2, 3, IGNORE, IGNORE]]
    assert (stats.dropped_pieces, stats.segments, stats.tokens, stats.supervised) == (2, 1, 3, 2)


def test_successive_encodings_of_one_id_are_one_document():
    stats, batch = pack([Encoded("a", [1, 2], [False, True]), Encoded("a", [3, 4], [False, True])], 2)
    assert stats.documents == 1
    assert batch.examples == (("a", "a"),)


@settings(deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_the_plan_overfills_no_row_and_leaves_no_two_that_would_fit_into_one(lengths):
    row_of_piece = plan_rows(np.array(lengths), 32)
    loads = sorted(np.bincount(row_of_piece, weights=lengths).tolist())
    assert loads[0] > 0
    assert loads[-1] <= 32
    assert len(loads) == 1 or loads[0] + loads[1] > 32


def test_the_plan_takes_the_tightest_fit():
    # 6 and 5 open rows with room 4 and 5; the 4 goes where it fits exactly, then 3 and 2 fill the other.
    assert plan_rows(np.array([5, 6, 2, 4, 3]), 10).tolist() == [1, 0, 1, 0, 1]


def test_a_hundred_thousand_documents_are_planned_quickly_and_densely():
    lengths = np.random.default_rng(0).integers(1, 2049, 100_000)
    start = perf_counter()
    row_of_piece = plan_rows(lengths, 2048)
    assert perf_counter() - start < 5
    assert lengths.sum() / (2048 * (row_of_piece.max() + 1)) > 0.99


def test_rows_are_the_same_for_a_seed_and_mixed_by_it(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 65, 800).tolist()
    documents = [Encoded(f"{i}", [i] * length, [False] + [True] * (length - 1)) for i, length in enumerate(lengths)]
    (_, first), (_, again), (_, other) = pack(documents, 64), pack(documents, 64), pack(documents, 64, seed=1)
    assert first.key == again.key
    assert first.examples == again.examples
    assert first.key != other.key
    assert Counter(map(tuple, first.ids_BT.tolist())) == Counter(map(tuple, other.ids_BT.tolist()))
    # Number of segments a row: that of the first half is that of all, within what chance allows.
    counts = torch.tensor([len(names) for names in first.examples], dtype=torch.float64)
    half = counts[: len(counts) // 2]
    assert abs(half.mean() - counts.mean()) < 4 * counts.std() / len(half) ** 0.5


def mixed_corpus(count: int, seed: int) -> list[Encoded]:
    """Documents of 0 to 149 tokens, some of them with nothing to learn."""
    draw = np.random.default_rng(seed)
    documents = []
    for index in range(count):
        length = int(draw.integers(0, 150))
        learn = [False] * min(1, length) + (draw.random(max(0, length - 1)) < 0.7).tolist()
        learn = learn if index % 7 else [False] * length
        documents.append(Encoded(f"d-{index}", draw.integers(0, 999, length).tolist(), learn, f"f{index % 3}"))
    return documents


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("count", "seed", "digest"), [(50, 0, "930b5b6f57257447"), (700, 3, "bc7169d24d81c7fa")], ids=["small", "larger"]
)
def test_a_corpus_within_a_window_is_packed_into_the_same_bytes_by_every_version(tmp_path, count, seed, digest):
    write_rows(mixed_corpus(count, seed), tmp_path, sequence_length=64, pad_id=1, seed=seed)
    whole = hashlib.sha256()
    for name, content in sorted(bytes_of(tmp_path).items()):
        whole.update(name.encode() + hashlib.sha256(content).digest())
    assert whole.hexdigest().startswith(digest)


@settings(deadline=None)
@given(corpora(), st.integers(1, 24), st.integers(1, 9))
def test_windows_change_where_pieces_lie_and_not_what_is_learned(documents, length, window):
    if not pairs_learned(documents):
        return
    whole, batch = pack(documents, length)
    parted, other = pack(documents, length, window=window)
    assert replace(parted, rows=whole.rows) == whole
    assert parted.rows >= whole.rows

    def pairs(rows: Batch) -> list[list[int]]:
        return sorted(torch.stack([rows.ids_BT, rows.targets_BT], -1)[rows.supervised_BT].tolist())

    assert pairs(other) == pairs(batch)


def test_a_window_is_a_packing_of_its_own_pieces_after_that_of_the_window_before(tmp_path):
    documents = mixed_corpus(60, 1)
    count = write_rows(documents, tmp_path / "whole", sequence_length=200, pad_id=0).segments  # one piece a document
    first = [document for document in documents if any(document.learn)][: count // 2]
    write_rows(first, tmp_path / "first", sequence_length=200, pad_id=0)
    write_rows(documents, tmp_path / "both", sequence_length=200, pad_id=0, window=count // 2)
    alone, both = PackedRows(tmp_path / "first"), PackedRows(tmp_path / "both")
    beginning = both.batch(range(len(alone)))
    assert beginning.key == alone.batch(range(len(alone))).key
    names = [name for row in both.batch(range(len(both))).examples for name in row]
    assert names[: count // 2] == [name for row in alone.batch(range(len(alone))).examples for name in row]
    assert len(names) == len(set(names)) == count


def test_a_window_larger_than_the_corpus_changes_nothing(tmp_path):
    documents = mixed_corpus(40, 2)
    pieces = write_rows(documents, tmp_path / "a", sequence_length=64, pad_id=0).segments
    for name, window in (("b", pieces), ("c", pieces + 1)):
        write_rows(documents, tmp_path / name, sequence_length=64, pad_id=0, window=window)
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / "a")


def test_a_writer_that_is_left_without_finishing_leaves_a_folder_that_does_not_open(tmp_path):
    write_rows(mixed_corpus(9, 0), tmp_path, sequence_length=64, pad_id=0)
    with RowWriter(tmp_path, sequence_length=64, pad_id=0, window=2) as writer:
        for document in mixed_corpus(9, 0):
            writer.add(document)
        assert writer.tokens > 0
    with pytest.raises(DataError, match=r"rows\.json is missing"):
        PackedRows(tmp_path)
    assert not (tmp_path / "spool.bin").exists()


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    documents = [Encoded(f"é-{i}", list(range(i, i + 9)), [False] + [True] * 8) for i in range(40)]
    write_rows(documents, tmp_path, sequence_length=16, pad_id=0)
    return tmp_path


def test_a_batch_is_the_rows_asked_for_in_their_order(packed):
    rows = PackedRows(packed)
    batch, whole = rows.batch([3, 0, 3]), rows.batch(range(len(rows)))
    assert batch.ids_BT.dtype == batch.targets_BT.dtype == batch.segments_BT.dtype == torch.int64
    assert torch.equal(batch.ids_BT, whole.ids_BT[[3, 0, 3]])
    assert batch.examples == tuple(whole.examples[row] for row in (3, 0, 3))
    assert sorted(name for names in whole.examples for name in names) == sorted(f"é-{i}" for i in range(40))
    assert (rows.sequence_length, rows.num_tokens, rows.num_supervised) == (16, 320, 320)
    with pytest.raises(IndexError):
        rows.batch([len(rows)])


def test_nothing_but_the_rows_is_left_in_the_folder(packed):
    assert {path.suffix for path in packed.iterdir()} == {".npy", ".jsonl", ".json"}


FILES = ["ids.npy", "targets.npy", "segments.npy", "row_starts.npy", "segment_documents.npy", "documents.jsonl"]


@pytest.mark.parametrize("name", [*FILES, "example_starts.npy", "rows.json"])
@pytest.mark.parametrize("harm", ["missing", "empty", "short", "garbage"])
def test_a_damaged_file_is_named_with_the_stage_to_run_again(packed, name, harm):
    path = packed / name
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "short": whole[:-5], "garbage": b"\x00" * 7}.get(harm, b""))
    if harm == "missing":
        path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing, cut short .*Run the stage prepare again"):
        PackedRows(packed)


def test_files_of_two_packings_do_not_open_together(packed, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_rows([Encoded("a", [1, 2, 3], [False, True, True])], other, sequence_length=16, pad_id=0)
    (packed / "ids.npy").write_bytes((other / "ids.npy").read_bytes())
    with pytest.raises(DataError, match=r"ids\.npy .*shape \(1, 16\) instead of"):
        PackedRows(packed)


def test_a_packing_that_was_interrupted_does_not_open(packed):
    def stop() -> object:
        yield Encoded("a", [1, 2], [False, True])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(stop(), packed, sequence_length=16, pad_id=0)
    with pytest.raises(DataError, match=r"rows\.json"):
        PackedRows(packed)
    assert not (packed / "spool.bin").exists()


def test_no_documents_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"the 0 documents of validation\. .*data\.splits"):
        write_rows([], tmp_path / "validation", sequence_length=16, pad_id=0)


def test_ids_survive_any_text(tmp_path):
    names = ["line\nbreak", '"', "\ud800", "é"]
    write_rows((Encoded(name, [1, 2], [False, True]) for name in names), tmp_path, sequence_length=8, pad_id=0)
    assert list(PackedRows(tmp_path).batch([0]).examples[0]) == names
    assert json.loads((tmp_path / "rows.json").read_text())["documents"] == 4


def test_every_segment_knows_the_source_of_its_document(tmp_path):
    documents = [Encoded(f"d{i}", [i] * 4, [False, True, True, True], f"file-{i % 3}.jsonl") for i in range(20)]
    write_rows(documents, tmp_path, sequence_length=8, pad_id=0)
    rows = PackedRows(tmp_path)
    batch = rows.batch(range(len(rows)))
    told = {
        name: source
        for pair in zip(batch.examples, batch.sources, strict=True)
        for name, source in zip(*pair, strict=True)
    }
    assert told == {document.id: document.source for document in documents}
    assert batch.rows(1, 3).sources == batch.sources[1:3]
    assert rows.sources() == {"file-0.jsonl", "file-1.jsonl", "file-2.jsonl"}


FRAME = (PAD + 1, PAD + 2)


@given(corpora(), st.integers(3, 24), st.integers(0, 3))
def test_framed_pieces_lose_no_token_and_nothing_is_shifted(documents, length, seed):
    whole = [replace(document, learn=[True] * len(document.ids)) for document in documents]
    tokens = {token: document.id for document in whole for token in document.ids}
    if not tokens:
        return
    with TemporaryDirectory() as name:
        write_rows(whole, Path(name), sequence_length=length, pad_id=PAD, seed=seed, frame=FRAME)
        rows = PackedRows(Path(name))
        batch = rows.batch(range(len(rows)))
    assert sorted(batch.targets_N.tolist()) == sorted(tokens)
    assert torch.equal(batch.targets_N, batch.ids_BT[batch.supervised_BT])
    for row, names in enumerate(batch.examples):
        for segment, document in enumerate(names, start=1):
            here = batch.segments_BT[row] == segment
            first, *body, last = batch.ids_BT[row][here].tolist()
            assert (first, last) == FRAME
            assert body == list(range(body[0], body[0] + len(body)))
            assert {tokens[token] for token in body} == {document}
            assert len(body) <= length - 2
    assert (batch.ids_BT[batch.segments_BT == 0] == PAD).all()


def test_a_framed_piece_keeps_its_end_where_nothing_is_learned(tmp_path):
    document = Encoded("1", [5, 6, 7], [True, False, False])
    stats = write_rows([document], tmp_path, sequence_length=8, pad_id=0, frame=(1, 2))
    batch = PackedRows(tmp_path).batch([0])
    assert batch.ids_BT.tolist() == [[1, 5, 6, 7, 2, 0, 0, 0]]
    assert batch.targets_BT.tolist() == [[IGNORE, 5, *[IGNORE] * 6]]
    assert (stats.tokens, stats.supervised) == (5, 1)


def conversation(name: str, length: int, last: int) -> Encoded:
    """So many tokens, of which the one numbered `last` is the last that is learned."""
    learn = [0 < position <= last and position % 2 == last % 2 for position in range(length)]
    return Encoded(name, list(range(length)), learn, conversation=True)


@settings(deadline=None)
@given(corpora(), st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(2, 24))
def test_conversations_are_kept_whole_or_not_at_all_and_text_is_as_it_was(documents, lengths, room):
    talks = [conversation(f"talk-{number}", length, length - 1) for number, length in enumerate(lengths)]
    fitting = [talk for talk in talks if len(talk.ids) - 1 <= room]
    if not any(any(document.learn) for document in (*documents, *fitting)):
        return
    with TemporaryDirectory() as name:
        stats = write_rows(
            [*documents, *talks], Path(name), sequence_length=room, pad_id=PAD, overlong="drop"
        )  # fmt: skip
        batch = PackedRows(Path(name)).batch(range(stats.rows))
    plain, whole = pack([*documents, *talks], room)[0], pairs_learned([*documents, *fitting])
    assert (stats.conversations, stats.overlong) == (len(talks), len(talks) - len(fitting))
    assert stats.overlong_share == stats.overlong / len(talks)
    assert (plain.conversations, plain.overlong) == (len(talks), 0)
    assert int(batch.supervised_BT.sum()) == stats.supervised == whole.total()
    segments = Counter(name for row in batch.examples for name in row)
    assert {name: count for name, count in segments.items() if name.startswith("talk")} == {
        talk.id: 1 for talk in fitting
    }


def test_a_conversation_is_as_long_as_what_is_learned_of_it(tmp_path):
    fits, beyond = conversation("a", 30, 8), conversation("b", 30, 9)
    stats = write_rows([fits, beyond], tmp_path, sequence_length=8, pad_id=PAD, overlong="drop")
    assert (stats.overlong, stats.conversations, stats.segments) == (1, 2, 1)


def test_conversations_of_which_none_fits_are_an_error_that_names_the_length(tmp_path):
    with pytest.raises(DataError, match=r"^data\.sequence_length: none of the 1 conversations .* fits into 8 tokens"):
        write_rows([conversation("a", 30, 29)], tmp_path, sequence_length=8, pad_id=PAD, overlong="drop")


def test_rows_that_hold_no_conversation_are_told_of_as_ever(packed):
    assert not {"conversations", "overlong"} & set(json.loads((packed / "rows.json").read_text()))
    assert PackedRows(packed).stats.overlong == 0
