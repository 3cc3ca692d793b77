"""What a student hears from a store is what the teacher said, in the order of the batch, however it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.errors import StoreError
from potstill.losses import HeadTerm, distillation_loss
from potstill.signals import SignalSpec, Stamp, Store, StoredReader, draw_uniforms, encoding_of, open_store, pieces_of
from potstill.types import IGNORE, Batch, Head, LossSum, Signal, States, TeacherLogits, Wants

V, D, LENGTH = 23, 6, 16
FINAL = Wants(final=True)
DOCUMENTS = [
    [3, 1, 4, 1, 5],
    [9, 2, 6, 5, 3, 5, 8],
    [9],
    [7, 9, 3, 2, 3, 8, 4, 6, 2, 6],
    [4, 3],
    [3, 8, 3, 2, 7, 9, 5, 0, 2, 8, 8],
]
HEAD = Head(torch.randn(V, D, generator=torch.Generator().manual_seed(1)))
SPECS = {
    "sampled": SignalSpec("sampled", V, k=5, temperatures=(1.0, 2.0)),
    "topk": SignalSpec("topk", V, k=5, temperatures=(1.0, 2.0)),
    "topk_renormalised": SignalSpec("topk_renormalised", V, k=5),
    "dense": SignalSpec("dense", V),
    "hidden": SignalSpec("hidden", V, width=D, dtype="fp32"),
}


def pack(documents: Sequence[Sequence[int]]) -> Batch:
    """Documents one after another in rows of 16; every token predicts the next one."""
    rows: list[list[Sequence[int]]] = [[]]
    for document in documents:
        if sum(map(len, rows[-1])) + len(document) > LENGTH:
            rows.append([])
        rows[-1].append(document)
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    targets, segments = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for row, packed in enumerate(rows):
        start = 0
        for segment, document in enumerate(packed, start=1):
            stop = start + len(document)
            ids[row, start:stop], segments[row, start:stop] = torch.tensor(document), segment
            targets[row, start : stop - 1] = ids[row, start + 1 : stop]
            start = stop
    return Batch(ids, targets, segments)


def teach(batch: Batch, dtype: torch.dtype = torch.float32) -> States:
    """A teacher whose states depend on token and position in the document."""
    table = torch.randn(V * LENGTH, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows_BT = batch.ids_BT * LENGTH + batch.positions_BT
    return States(table[rows_BT[batch.supervised_BT]], Head(HEAD.weight_VD.to(dtype)))


def keep(folder: Path, spec: SignalSpec, batch: Batch, *, taught_BT: Tensor | None = None) -> Store:
    """A store of what the teacher says about the pieces of a batch, with a note where it does not speak everywhere."""
    dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float32
    encoding, said = encoding_of(spec), teach(batch, dtype)
    # All at once: the product of fewer rows may differ in its last bit.
    said_NX = said.rows_ND if spec.kind == "hidden" else (said.rows_ND @ said.head.weight_VD.T).float()
    store = open_store(folder, Stamp("T" * 32, "K" * 32, spec.fingerprint), encoding.stride)
    numbers = torch.full_like(batch.ids_BT, -1)
    numbers[batch.supervised_BT] = torch.arange(len(said_NX))
    with store.writer() as writer:
        for piece in pieces_of(batch):
            cut = (piece.row, slice(piece.start, piece.stop))
            mine = numbers[cut][batch.supervised_BT[cut]]
            heard = torch.ones(len(mine), dtype=torch.bool)
            if taught_BT is not None:
                heard = taught_BT[cut][batch.supervised_BT[cut]]
            uniforms = draw_uniforms(piece.key, len(mine), encoding.randoms)[heard]
            records = encoding.pack(encoding.select(said_NX[mine][heard], uniforms))
            writer.append(piece.key, records, b"" if taught_BT is None else np.packbits(heard.numpy()).tobytes())
    return store


def parts_of(said: TeacherLogits) -> list[Tensor]:
    names = ("rows_ND", "logits_NV", "ids_NK", "logprobs_NK", "tail_N")
    return [part for name in names if (part := getattr(said, name, None)) is not None]


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), slice(1, 4)], ids=["same", "reversed", "some"])
@pytest.mark.parametrize("kind", SPECS)
def test_what_was_stored_is_read_in_the_order_of_any_batch(tmp_path, kind, order):
    spec = SPECS[kind]
    store = keep(tmp_path / "a", spec, pack(DOCUMENTS))
    other = pack(DOCUMENTS[order])
    encoding = encoding_of(spec, HEAD)
    found = StoredReader(store, encoding).read(other, FINAL).logits
    alone = keep(tmp_path / "b", spec, other)
    expected = encoding.unpack(alone.read([piece.key for piece in pieces_of(other)]).records_NS)
    for ours, theirs in zip(parts_of(found), parts_of(expected), strict=True):
        assert len(ours) == int(other.supervised_BT.sum())
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_a_list_is_read_at_the_temperature_that_was_asked_for(tmp_path, kind):
    batch = pack(DOCUMENTS)
    store, encoding = keep(tmp_path / "a", SPECS[kind], batch), encoding_of(SPECS[kind])
    for temperature in (1.0, 2.0):
        said = StoredReader(store, encoding, temperature=temperature).read(batch, FINAL).logits
        assert said.temperature == temperature
    expected = (teach(batch).rows_ND @ HEAD.weight_VD.T / 2).softmax(-1)
    if kind == "topk":  # within what the few bits of a probability hold
        listed = said.logprobs_NK.exp()
        assert torch.allclose(listed, expected.gather(1, said.ids_NK), rtol=0.06)
        assert torch.allclose(listed.sum(1) + said.tail_N.exp(), torch.ones(len(listed)), atol=0.02)


def test_a_piece_that_is_not_there_names_the_store(tmp_path):
    store = keep(tmp_path / "a", SPECS["topk"], pack(DOCUMENTS[:3]))
    reader, batch = StoredReader(store, encoding_of(SPECS["topk"])), pack(DOCUMENTS[:4])
    absent = pieces_of(batch)[-1].key.hex()
    for ask in (lambda: reader.read(batch, FINAL), lambda: reader.mark(batch)):
        with pytest.raises(StoreError) as caught:
            ask()
        assert str(caught.value).startswith(f"signals.store: {tmp_path / 'a'} lacks 1 of 4 pieces of a batch")
        assert absent in str(caught.value)
        assert "Run the same command again" in str(caught.value)


def test_the_salt_of_a_piece_is_part_of_its_name(tmp_path):
    batch = pack(DOCUMENTS)
    store = keep(tmp_path / "a", SPECS["topk"], batch)
    salted = Batch(
        batch.ids_BT,
        batch.targets_BT,
        batch.segments_BT,
        sources=tuple(("code",) * int(row.max()) for row in batch.segments_BT),
    )
    with pytest.raises(StoreError, match="lacks 6 of 6 pieces"):
        StoredReader(store, encoding_of(SPECS["topk"]), salt=str.encode).read(salted, FINAL)


def test_only_next_token_distributions_are_kept(tmp_path):
    reader = StoredReader(keep(tmp_path / "a", SPECS["topk"], pack(DOCUMENTS)), encoding_of(SPECS["topk"]))
    with pytest.raises(ValueError, match=r"layers \(1,\) are not in a store of signals"):
        reader.read(pack(DOCUMENTS), Wants(final=True, layers=(1,)))
    assert reader.read(pack(DOCUMENTS), Wants()) == Signal()


# Where the teacher speaks


@pytest.mark.parametrize("kind", ["topk", "hidden"])
def test_the_marks_are_those_positions_that_were_stored(tmp_path, kind):
    batch = pack(DOCUMENTS)
    taught_BT = batch.supervised_BT & (batch.ids_BT % 2 == 0)
    store = keep(tmp_path / "a", SPECS[kind], batch, taught_BT=taught_BT)
    reader = StoredReader(store, encoding_of(SPECS[kind], HEAD))
    assert torch.equal(reader.mark(batch).taught_BT, taught_BT)
    other = pack(DOCUMENTS[::-1])
    marked = reader.mark(other)
    assert torch.equal(marked.taught_BT, other.supervised_BT & (other.ids_BT % 2 == 0))
    said = reader.read(marked, FINAL).logits
    assert len(parts_of(said)[0]) == int(marked.taught_BT.sum())
    if kind == "hidden":
        assert torch.equal(said.rows_ND, teach(other).rows_ND[marked.taught_N])


def test_a_batch_whose_positions_are_all_stored_is_not_marked(tmp_path):
    batch = pack(DOCUMENTS)
    assert StoredReader(keep(tmp_path / "a", SPECS["topk"], batch), encoding_of(SPECS["topk"])).mark(batch) is batch


def test_a_text_in_which_nothing_is_learned_is_read_as_nothing(tmp_path):
    batch = pack([[9], [5]])
    for name, taught in (("all", None), ("some", batch.supervised_BT)):
        store = keep(tmp_path / name, SPECS["topk"], batch, taught_BT=taught)
        reader = StoredReader(store, encoding_of(SPECS["topk"]))
        assert len(reader.read(reader.mark(batch), FINAL).logits.ids_NK) == 0


# Offline is online


def learned(batch: Batch, said: TeacherLogits, dtype: torch.dtype) -> tuple[LossSum, list[Tensor]]:
    """The loss of a student that hears this, and its gradients for states and head."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(int(batch.supervised_BT.sum()), 4, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, 4, generator=generator).to(dtype).requires_grad_()
    terms = [HeadTerm("forward_kl", temperature=2.0), HeadTerm("reverse_kl", 0.3), HeadTerm("cross_entropy", 0.5)]
    found = distillation_loss(States(rows, Head(weight)), batch.targets_N, terms, teacher=said)
    return found, list(torch.autograd.grad(found.total, [rows, weight]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hidden_states_from_a_store_teach_bit_for_bit_what_the_teacher_teaches(tmp_path, dtype):
    batch, torch_dtype = pack(DOCUMENTS), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    spec, online = SignalSpec("hidden", V, width=D, dtype=dtype), teach(batch, torch_dtype)
    stored = StoredReader(keep(tmp_path / "a", spec, batch), encoding_of(spec, online.head)).read(batch, FINAL).logits
    assert stored.rows_ND.dtype == torch_dtype
    same_lessons(batch, stored, online, torch_dtype)


def test_all_logits_from_a_store_teach_bit_for_bit_the_same(tmp_path):
    """Against a teacher whose head is the identity: its logits are its states, whoever multiplies."""
    batch, spec = pack(DOCUMENTS), SPECS["dense"]
    stored = StoredReader(keep(tmp_path / "a", spec, batch), encoding_of(spec)).read(batch, FINAL).logits
    said = teach(batch)
    online = States(said.rows_ND @ said.head.weight_VD.T, Head(torch.eye(V)))
    same_lessons(batch, stored, online, torch.float32)


def same_lessons(batch: Batch, stored: TeacherLogits, online: TeacherLogits, dtype: torch.dtype) -> None:
    (ours, our_gradients), (theirs, their_gradients) = (learned(batch, said, dtype) for said in (stored, online))
    assert torch.equal(ours.total, theirs.total)
    assert ours.terms.keys() == theirs.terms.keys()
    for name in ours.terms:
        assert torch.equal(ours.terms[name], theirs.terms[name]), name
    for one, other in zip(our_gradients, their_gradients, strict=True):
        assert one.any()
        assert torch.equal(one, other)
