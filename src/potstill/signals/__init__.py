"""What the teacher said, in a form that a student can use. Refuses to match what does not mean the same."""

from potstill.signals.encodings import Encoding, draw_uniforms, encoding_of, select_listed
from potstill.signals.pieces import Piece, Salt, pieces_of
from potstill.signals.reader import StoredReader
from potstill.signals.remote import check_place, is_remote
from potstill.signals.sparse import entropy_of
from potstill.signals.spec import SignalSpec
from potstill.signals.store import (
    Damage,
    Records,
    Stamp,
    Store,
    Writer,
    has_store,
    open_store,
    read_stamp,
    reopen_store,
)
from potstill.signals.vocab import shared_vocabulary

__all__ = [
    "Damage",
    "Encoding",
    "Piece",
    "Records",
    "Salt",
    "SignalSpec",
    "Stamp",
    "Store",
    "StoredReader",
    "Writer",
    "check_place",
    "draw_uniforms",
    "encoding_of",
    "entropy_of",
    "has_store",
    "is_remote",
    "open_store",
    "pieces_of",
    "read_stamp",
    "reopen_store",
    "select_listed",
    "shared_vocabulary",
]
