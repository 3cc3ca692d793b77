"""Words: from the user's files to examples, token ids with a learn mask, and packed rows.

The way through the room: `load_examples` -> `clean_examples` -> `split_of` -> `encode_examples` -> `write_rows` ->
`PackedRows`. Refuses to drop anything uncounted.
"""

from __future__ import annotations

from potstill.data.chat import Encoded, encode_example, encode_examples
from potstill.data.clean import Cleaning, Reason, clean_examples
from potstill.data.load import Format, Row, load_examples
from potstill.data.pack import PackedRows, PackedStats, plan_rows, write_rows
from potstill.data.split import Split, split_of

__all__ = [
    "Cleaning",
    "Encoded",
    "Format",
    "PackedRows",
    "PackedStats",
    "Reason",
    "Row",
    "Split",
    "clean_examples",
    "encode_example",
    "encode_examples",
    "load_examples",
    "plan_rows",
    "split_of",
    "write_rows",
]
