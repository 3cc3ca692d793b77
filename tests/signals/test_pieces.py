"""A piece is known by its tokens, by where they are supervised, and by the salt: by nothing else around it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.signals import pieces_of
from potstill.signals.pieces import KEY_BYTES
from potstill.types import IGNORE, Batch

LENGTH = 24


@dataclass(frozen=True)
class Document:
    ids: tuple[int, ...]
    targets: tuple[int, ...]
    source: str = ""


@st.composite
def documents(draw: st.DrawFn) -> list[Document]:
    found = []
    for _ in range(draw(st.integers(1, 7))):
        length = draw(st.integers(1, 12))
        ids = draw(st.lists(st.integers(0, 5), min_size=length, max_size=length))
        learned = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        source = draw(st.sampled_from(["code", "talk"]))
        found.append(Document(tuple(ids), tuple(7 if one else IGNORE for one in learned), source))
    return found


def pack(found: list[Document], length: int = LENGTH, fill: int = 0) -> Batch:
    """Documents one after another, in rows of this length that end in padding."""
    rows: list[list[Document]] = [[]]
    for document in found:
        if sum(len(one.ids) for one in rows[-1]) + len(document.ids) > length:
            rows.append([])
        rows[-1].append(document)
    ids = torch.full((len(rows), length), fill)
    targets, segments = torch.full((len(rows), length), IGNORE), torch.zeros((len(rows), length), dtype=torch.int64)
    for row, packed in enumerate(rows):
        start = 0
        for number, document in enumerate(packed, start=1):
            stop = start + len(document.ids)
            ids[row, start:stop], targets[row, start:stop] = torch.tensor([document.ids, document.targets])
            segments[row, start:stop], start = number, stop
    sources = tuple(tuple(document.source for document in packed) for packed in rows)
    return Batch(ids, targets, segments, sources=sources)


def keys(batch: Batch, salt=None) -> list[bytes]:
    return [piece.key for piece in pieces_of(batch, salt)]


def key(document: Document, salt=None) -> bytes:
    (found,) = keys(pack([document]), salt)
    return found


@given(documents(), st.randoms(use_true_random=False), st.integers(12, 40), st.integers(0, 5))
def test_packing_order_padding_and_neighbours_play_no_part(found, random, length, fill):
    alone = [key(document) for document in found]
    assert keys(pack(found)) == alone
    assert {len(one) for one in alone} == {KEY_BYTES}
    shuffled = random.sample(found, len(found))
    assert sorted(keys(pack(shuffled, length, fill))) == sorted(alone)


@given(documents())
def test_every_position_is_in_its_piece_and_padding_in_none(found):
    batch = pack(found)
    covered = torch.zeros_like(batch.segments_BT)
    for piece in pieces_of(batch):
        covered[piece.row, piece.start : piece.stop] += 1
        assert len(set(batch.segments_BT[piece.row, piece.start : piece.stop].tolist())) == 1
    assert torch.equal(covered, (batch.segments_BT > 0).long())


@given(documents())
def test_pieces_come_in_the_order_of_supervised_positions(found):
    batch = pack(found)
    numbered = torch.arange(batch.ids_BT.numel()).view_as(batch.ids_BT)
    by_piece = [
        numbered[one.row, one.start : one.stop][batch.supervised_BT[one.row, one.start : one.stop]]
        for one in pieces_of(batch)
    ]
    assert torch.equal(torch.cat(by_piece), numbered[batch.supervised_BT])


@given(documents(), st.data())
def test_another_token_or_another_mask_is_another_piece(found, data):
    document = found[0]
    place = data.draw(st.integers(0, len(document.ids) - 1))
    ids, targets = list(document.ids), list(document.targets)
    ids[place] += 1
    targets[place] = 7 if targets[place] == IGNORE else IGNORE
    same = key(document)
    changed = {key(replace(document, ids=tuple(ids))), key(replace(document, targets=tuple(targets)))}
    assert len(changed) == 2
    assert same not in changed


@given(documents())
def test_what_is_to_be_predicted_is_no_part_of_what_the_teacher_reads(found):
    """Only where something is learned counts: the target itself is the next token, or a piece's last one."""
    document = found[0]
    other = tuple(9 if target != IGNORE else IGNORE for target in document.targets)
    assert key(document) == key(replace(document, targets=other))


def test_the_source_counts_by_its_salt_alone():
    talk, code = Document((1, 2), (2, IGNORE), "talk"), Document((1, 2), (2, IGNORE), "code")
    assert key(talk) == key(code)
    assert key(talk, str.encode) != key(code, str.encode)
    assert key(talk, lambda _: b"same") == key(code, lambda _: b"same")
    assert key(talk, lambda _: b"same") != key(talk)
    assert [piece.source for piece in pieces_of(pack([talk, code]))] == ["talk", "code"]


def test_a_salt_needs_to_know_the_sources():
    batch = pack([Document((1, 2), (2, IGNORE))])
    with pytest.raises(ValueError, match="the batch has 1 rows and the sources of 0: needs them all"):
        pieces_of(replace(batch, sources=()), str.encode)
    assert len(pieces_of(replace(batch, sources=()))) == 1


def test_keys_are_what_they_always_were():
    """Stores live for years: another way to make keys would have every teacher read everything again."""
    document = Document((1, 2, 70000), (2, IGNORE, 3))
    assert key(document).hex() == "11a7031f4b30e6e85e318095b0bc8bce"


def test_padding_alone_has_no_pieces():
    blank = torch.zeros((2, 4), dtype=torch.int64)
    assert pieces_of(Batch(blank, torch.full_like(blank, IGNORE), blank)) == []
