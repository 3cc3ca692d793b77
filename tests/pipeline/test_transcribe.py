"""What is stored of a text depends on the text and the teacher: not on what was read beside it, when, or by whom."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from potstill.engines import LocalEngine, load_model, load_tokenizer
from potstill.errors import StoreError
from potstill.losses import blocks
from potstill.pipeline import transcribe
from potstill.pipeline.transcribe import Captured, Transcript, capture_rows, texts_to_read
from potstill.recipes.signals import AllPositions, HighestEntropyPositions, RandomPositions
from potstill.signals import SignalSpec, Stamp, Store, encoding_of, open_store, pieces_of
from potstill.types import IGNORE, Batch, Head, Logits, Mixture, Signal, States, Wants

V = 40
ALL = AllPositions(kind="all")
HALF = RandomPositions(kind="random", share=0.5)
UNSURE = HighestEntropyPositions(kind="highest_entropy", share=0.3)
SPECS = {
    "sampled": SignalSpec("sampled", V, k=4, temperatures=(1.0, 2.0)),
    "topk": SignalSpec("topk", V, k=4),
    "dense": SignalSpec("dense", V),
    "hidden": SignalSpec("hidden", V, width=V, dtype="fp32"),
}


class Table:
    """A teacher whose words depend on the last token alone, by a table: exactly the same in every batch."""

    def __init__(self, vocabulary: int = V) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits_VV = 3 * torch.randn(vocabulary, vocabulary, generator=generator)
        self.batches: list[Batch] = []

    def read(self, batch: Batch, wants: Wants) -> Signal:
        assert wants == Wants(final=True)
        self.batches.append(batch)
        return Signal(States(self.logits_VV[batch.ids_BT[batch.supervised_BT]], Head(torch.eye(len(self.logits_VV)))))

    @property
    def texts(self) -> list[int]:
        """How many texts were read in each batch."""
        return [len(batch) for batch in self.batches]


class Packed:
    """Rows of documents, each row a list of token lists; every position predicts the next, but the last."""

    def __init__(self, rows: Sequence[Sequence[Sequence[int]]], silent: frozenset[int] = frozenset()) -> None:
        self.rows, self.silent = rows, silent
        self.length = max(sum(map(len, row)) for row in rows)

    def batch(self, numbers: Sequence[int]) -> Batch:
        shape = (len(numbers), self.length)
        ids, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
        segments = torch.zeros_like(ids)
        for place, number in enumerate(numbers):
            start = 0
            for segment, tokens in enumerate(self.rows[number], start=1):
                stop = start + len(tokens)
                ids[place, start:stop], segments[place, start:stop] = torch.tensor(tokens), segment
                learned = [IGNORE if token in self.silent else token for token in tokens[1:]]
                targets[place, start : stop - 1] = torch.tensor(learned, dtype=torch.int64)
                start = stop
        sources = tuple(tuple("file" for _ in self.rows[number]) for number in numbers)
        return Batch(ids, targets, segments, sources=sources)


def make_documents(count: int = 30, longest: int = 12) -> list[list[int]]:
    return [torch.randint(0, V, (int(torch.randint(1, longest, ())),)).tolist() for _ in range(count)]


def packed(documents: list[list[int]], a_row: int = 3) -> Packed:
    return Packed([documents[start : start + a_row] for start in range(0, len(documents), a_row)])


def make_store(folder: Path, spec: SignalSpec) -> Store:
    return open_store(folder, Stamp("T" * 32, "K" * 32, spec.fingerprint), encoding_of(spec).stride)


def transcribed(
    folder: Path, spec: SignalSpec, rows: Packed, *, positions=ALL, batch_tokens: int = 4096, teacher=None, **also
) -> tuple[dict[bytes, tuple[bytes, bytes]], Captured]:
    """All that is in the store after a capture, by key: records and note."""
    store = make_store(folder, spec)
    transcript = Transcript(teacher or Table(), encoding_of(spec), V, positions, batch_tokens)
    done = capture_rows(transcript, rows, range(len(rows.rows)), store=store, **also)
    return content(store), done


def content(store: Store) -> dict[bytes, tuple[bytes, bytes]]:
    found = {}
    for key in store:
        records = store.read([key])
        found[key] = (records.records_NS.tobytes(), records.notes[0])
    return found


@pytest.mark.parametrize("positions", [ALL, HALF, UNSURE], ids=lambda rule: rule.kind)
@pytest.mark.parametrize("kind", ["sampled", "topk", "dense"])
def test_batches_packing_and_order_change_no_bit(tmp_path, kind, positions):
    documents = make_documents()
    expected, _ = transcribed(tmp_path / "a", SPECS[kind], packed(documents), positions=positions)
    for name, batch_tokens, order, a_row in (("b", 1, 1, 3), ("c", 16, -1, 2), ("d", 30, 1, 7)):
        rows = packed(documents[::order], a_row)
        found, _ = transcribed(tmp_path / name, SPECS[kind], rows, positions=positions, batch_tokens=batch_tokens)
        assert found == expected


def test_windows_change_no_bit_and_texts_are_read_once(tmp_path, monkeypatch):
    documents = make_documents()
    rows = packed(documents + documents[::-1])
    expected, done = transcribed(tmp_path / "a", SPECS["sampled"], rows)
    monkeypatch.setattr(transcribe, "WINDOW_ROWS", 2)
    teacher = Table()
    found, again = transcribed(tmp_path / "b", SPECS["sampled"], rows, teacher=teacher)
    assert found == expected
    distinct = {tuple(document) for document in documents}
    assert sum(teacher.texts) == len(distinct) == done.pieces == again.pieces
    assert (done.positions, done.tokens) == (again.positions, again.tokens)
    assert done.tokens == sum(map(len, distinct))


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_blocks_of_logits_change_no_bit(tmp_path, kind, monkeypatch):
    """One buffer serves all blocks: what is kept of one must not be a view into it."""
    rows = packed(make_documents())
    expected, _ = transcribed(tmp_path / "a", SPECS[kind], rows)
    monkeypatch.setattr(blocks, "READ_BYTES", {"cpu": 3 * 4 * V})
    found, _ = transcribed(tmp_path / "b", SPECS[kind], rows)
    assert found == expected


def test_hidden_states_are_stored_bit_for_bit(tmp_path):
    rows, teacher = packed(make_documents()), Table()
    store = make_store(tmp_path / "a", SPECS["hidden"])
    capture_rows(Transcript(teacher, encoding_of(SPECS["hidden"]), V, ALL), rows, range(10), store=store)
    batch = rows.batch(range(10))
    said = teacher.read(batch, Wants(final=True)).logits
    head = Head(torch.eye(V))
    records = store.read([piece.key for piece in pieces_of(batch)]).records_NS
    assert torch.equal(encoding_of(SPECS["hidden"], head).unpack(records).rows_ND, said.rows_ND)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=25), st.integers(1, 60))
def test_a_batch_holds_texts_of_like_length_and_no_more_tokens_than_asked(lengths, batch_tokens):
    texts = [transcribe.Text(bytes(16), torch.zeros(n), torch.zeros(n), "") for n in lengths]
    found = list(transcribe._batches(texts, batch_tokens))
    assert [len(text) for batch in found for text in batch] == sorted(lengths, reverse=True)
    for batch in found:
        assert len(batch) == 1 or len(batch) * len(batch[0]) <= batch_tokens
    for one in found[:-1]:  # and no batch ends before it must
        assert (len(one) + 1) * len(one[0]) > batch_tokens


def test_what_the_teacher_reads_is_padded_on_the_right_and_unmasked(tmp_path):
    teacher = Table()
    transcribed(tmp_path / "a", SPECS["topk"], packed(make_documents()), teacher=teacher, batch_tokens=64)
    for batch in teacher.batches:
        assert (batch.segments_BT == 1).all()
        assert len(batch.sources) == len(batch)
        assert (batch.targets_BT[:, -1] == IGNORE).all()


# A real model


@pytest.fixture(scope="module")
def llama(tiny_llama) -> LocalEngine:
    model = load_model(str(tiny_llama), "fp32", torch.device("cpu"), "teacher.model")
    return LocalEngine(model, load_tokenizer(str(tiny_llama), "teacher.model"))


def decoded(folder: Path, spec: SignalSpec, rows: Packed, head: Head | None = None) -> Tensor:
    """Probabilities [N, V] of all supervised positions, in the order of the batch."""
    batch = rows.batch(range(len(rows.rows)))
    records = make_store(folder, spec).read([piece.key for piece in pieces_of(batch)]).records_NS
    said = encoding_of(spec, head).unpack(records)
    if isinstance(said, Logits):
        return said.logits_NV.softmax(-1)
    dense = torch.zeros(len(records), spec.vocabulary)
    return dense.scatter_add(1, said.ids_NK, said.logprobs_NK.exp())


@pytest.mark.parametrize("spec", [SignalSpec("dense", 300), SignalSpec("topk", 300, k=16)], ids=lambda spec: spec.kind)
def test_a_model_is_stored_alike_whatever_it_reads_at_once(tmp_path, llama, spec):
    rows = packed(make_documents())
    found = []
    for name, batch_tokens in (("alone", 1), ("few", 16), ("many", 4096)):
        transcript = Transcript(llama, encoding_of(spec), 300, ALL, batch_tokens)
        capture_rows(transcript, rows, range(10), store=make_store(tmp_path / name, spec))
        found.append(decoded(tmp_path / name, spec, rows))
    for other in found[1:]:
        assert_close(other, found[0], atol=3e-5 if spec.kind == "dense" else 2e-3, rtol=1e-3)


def test_what_is_stored_of_a_model_is_what_it_says_of_packed_rows(tmp_path, llama):
    """Read in rows of several documents, as training does, or text by text: the same distributions."""
    rows, spec = packed(make_documents()), SignalSpec("dense", 300)
    capture_rows(
        Transcript(llama, encoding_of(spec), 300, ALL), rows, range(10), store=make_store(tmp_path / "a", spec)
    )
    said = llama.read(rows.batch(range(10)), Wants(final=True)).logits.sliced(300)
    online = (said.rows_ND @ said.head.weight_VD.T).softmax(-1)
    assert_close(decoded(tmp_path / "a", spec, rows), online, atol=1e-5, rtol=1e-4)


# Positions


@pytest.mark.parametrize("positions", [HALF, UNSURE], ids=lambda rule: rule.kind)
def test_of_every_text_its_share_is_stored_rounded_up(tmp_path, positions):
    documents = make_documents()
    rows = packed(documents)
    found, done = transcribed(tmp_path / "a", SPECS["dense"], rows, positions=positions)
    batch = rows.batch(range(len(rows.rows)))
    for piece in pieces_of(batch):
        count = int(batch.supervised_BT[piece.row, piece.start : piece.stop].sum())
        records, note = found[piece.key]
        expected = math.ceil(positions.share * count)
        assert len(records) == expected * 4 * V
        assert sum(byte.bit_count() for byte in note) == expected
    assert done.positions == sum(len(records) for records, _ in found.values()) // (4 * V)


def test_the_highest_entropies_are_those_of_the_whole_distribution(tmp_path):
    rows, teacher = packed(make_documents()), Table()
    found, _ = transcribed(tmp_path / "a", SPECS["topk"], rows, positions=UNSURE, teacher=teacher)
    log_p = teacher.logits_VV.double().log_softmax(-1)
    entropy_V = -(log_p.exp() * log_p).sum(-1)
    batch = rows.batch(range(len(rows.rows)))
    for piece in pieces_of(batch):
        entropies = entropy_V[batch.ids_BT[piece.row, piece.start : piece.stop - 1]]
        note = found[piece.key][1]
        kept = [bool(note[place // 8] >> (7 - place % 8) & 1) for place in range(len(entropies))]
        chosen, left = entropies[torch.tensor(kept, dtype=torch.bool)], entropies[~torch.tensor(kept, dtype=torch.bool)]
        if len(chosen) and len(left):
            assert chosen.min() >= left.max() - 1e-6


def test_random_positions_are_spread_and_are_others_in_other_texts(tmp_path):
    """Of 400 texts of 10 positions with half of them stored, each place is stored about 200 times."""
    documents = [[number % V, number // V, *range(9)] for number in range(400)]
    found, _ = transcribed(tmp_path / "a", SPECS["topk"], packed(documents, 20), positions=HALF)
    bits = torch.tensor(
        [[note[place // 8] >> (7 - place % 8) & 1 for place in range(10)] for _, note in found.values()]
    )
    assert (bits.sum(1) == 5).all()
    assert ((bits.sum(0) - 200).abs() < 5 * math.sqrt(400 / 4)).all()


@pytest.mark.parametrize("kind", ["sampled", "topk", "dense", "hidden"])
@pytest.mark.parametrize("positions", [ALL, HALF, UNSURE], ids=lambda rule: rule.kind)
def test_texts_in_which_nothing_is_learned_are_stored_as_such(tmp_path, kind, positions):
    """A document of one token, and a prompt that was cut off before its answer: alone in a batch, and beside others."""
    rows = Packed([[[1], [2, 3, 3]], [[4, 5, 6]]], silent=frozenset({3}))
    for name, batch_tokens in (("alone", 1), ("together", 4096)):
        found, done = transcribed(tmp_path / name, SPECS[kind], rows, positions=positions, batch_tokens=batch_tokens)
        assert done.pieces == len(found) == 3
        assert sorted(len(records) > 0 for records, _ in found.values()) == [False, False, True]


# Sharing and stopping


@settings(max_examples=10, deadline=None)
@given(parts=st.integers(1, 5))
def test_parts_are_a_partition(tmp_path_factory, parts):
    rows = packed(make_documents())
    store = make_store(tmp_path_factory.mktemp("parts") / "s", SPECS["topk"])
    (whole,) = texts_to_read(rows, range(10), store)
    shares = [next(iter(texts_to_read(rows, range(10), store, part=(i, parts)))) for i in range(parts)]
    assert sorted(text.key for share in shares for text in share) == sorted(text.key for text in whole)


def test_parts_together_fill_the_store(tmp_path):
    rows = packed(make_documents())
    expected, whole = transcribed(tmp_path / "a", SPECS["sampled"], rows)
    dones = [transcribed(tmp_path / "b", SPECS["sampled"], rows, part=(i, 3))[1] for i in range(3)]
    assert sum(done.pieces for done in dones) == whole.pieces
    found, nothing = transcribed(tmp_path / "b", SPECS["sampled"], rows)
    assert found == expected
    assert (nothing.pieces, nothing.positions, nothing.tokens) == (0, 0, 0)


def test_only_what_is_missing_is_read(tmp_path):
    documents = make_documents()
    transcribed(tmp_path / "a", SPECS["sampled"], packed(documents[:20]))
    teacher = Table()
    _, done = transcribed(tmp_path / "a", SPECS["sampled"], packed(documents), teacher=teacher)
    known = {tuple(document) for document in documents[:20]}
    assert sum(teacher.texts) == done.pieces == len({tuple(one) for one in documents[20:]} - known)


def test_asked_to_stop_it_stores_what_was_read_and_no_more(tmp_path):
    rows, teacher = packed(make_documents()), Table()
    found, done = transcribed(
        tmp_path / "a",
        SPECS["sampled"],
        rows,
        teacher=teacher,
        batch_tokens=1,
        stopping=lambda: len(teacher.batches) >= 7,
    )
    assert len(found) == done.pieces == 7
    whole, _ = transcribed(tmp_path / "a", SPECS["sampled"], rows, batch_tokens=1)
    assert whole == transcribed(tmp_path / "b", SPECS["sampled"], rows)[0]


def test_a_teacher_that_fails_leaves_what_it_said_before(tmp_path):
    class Failing(Table):
        def read(self, batch: Batch, wants: Wants) -> Signal:
            if len(self.batches) == 6:
                raise RuntimeError("out of memory")
            return super().read(batch, wants)

    rows = packed(make_documents())
    with pytest.raises(RuntimeError, match="out of memory"):
        transcribed(tmp_path / "a", SPECS["sampled"], rows, teacher=Failing(), batch_tokens=1)
    kept = content(make_store(tmp_path / "a", SPECS["sampled"]))
    whole, _ = transcribed(tmp_path / "b", SPECS["sampled"], rows)
    assert 0 < len(kept) <= 6
    assert kept.items() <= whole.items()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPool")] == []


def test_a_store_that_refuses_is_told_and_not_hidden(tmp_path, monkeypatch):
    def full(*_, **__):
        raise StoreError("signals.store: is full")

    monkeypatch.setattr(transcribe.Writer, "append", full)
    with pytest.raises(StoreError, match="is full"):
        transcribed(tmp_path / "a", SPECS["topk"], packed(make_documents()))


def test_the_meter_counts_tokens_without_padding(tmp_path):
    steps: list[int] = []
    meter = type("Meter", (), {"advance": lambda self, tokens: steps.append(tokens)})()
    _, done = transcribed(tmp_path / "a", SPECS["topk"], packed(make_documents()), meter=meter, batch_tokens=20)
    assert sum(steps) == done.tokens
    assert len(steps) > 1


# Who cannot be taken down


class Speaking(Table):
    def __init__(self, said) -> None:
        super().__init__()
        self.said = said

    def read(self, batch: Batch, wants: Wants) -> Signal:
        states = super().read(batch, wants).logits
        return Signal(self.said(states))


def test_a_mixture_is_stored_as_the_mean_of_its_probabilities(tmp_path):
    def mixed(states: States) -> Mixture:
        other = States(-states.rows_ND, states.head)
        return Mixture((states, other), torch.tensor([0.25, 0.75]).expand(len(states.rows_ND), 2))

    rows, spec = packed(make_documents()), SPECS["dense"]
    transcribed(tmp_path / "a", spec, rows, teacher=Speaking(mixed))
    batch = rows.batch(range(10))
    logits_NV = Table().logits_VV[batch.ids_BT[batch.supervised_BT]]
    expected = 0.25 * logits_NV.softmax(-1) + 0.75 * (-logits_NV).softmax(-1)
    assert_close(decoded(tmp_path / "a", spec, rows), expected)
    with pytest.raises(ValueError, match=r"signals\.kind: hidden keeps the states of one model"):
        transcribed(tmp_path / "b", SPECS["hidden"], rows, teacher=Speaking(mixed))


@pytest.mark.parametrize("said", [lambda states: None, lambda states: Logits(states.rows_ND)])
def test_a_teacher_without_final_states_is_refused(tmp_path, said):
    with pytest.raises(ValueError, match="a capture needs its final hidden states and head"):
        transcribed(tmp_path / "a", SPECS["topk"], packed(make_documents()), teacher=Speaking(said))


def test_a_padded_head_is_cut_to_the_shared_tokens(tmp_path):
    rows = packed(make_documents())
    expected, _ = transcribed(tmp_path / "a", SPECS["dense"], rows)

    def padded(states: States) -> States:
        return States(states.rows_ND, Head(torch.cat([states.head.weight_VD, 9 * torch.ones(8, V)])))

    assert transcribed(tmp_path / "b", SPECS["dense"], rows, teacher=Speaking(padded))[0] == expected
