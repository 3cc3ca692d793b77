"""Words: from the user's files to examples, token ids with a learn mask, and packed rows; or to labelled texts.

The way of language models through the room: `load_examples` -> `clean_examples` -> `split_of` -> `encode_examples` ->
`write_rows` -> `PackedRows`, and `mask_tokens` for masked ones. That of tasks over texts: `load_texts` ->
`partition_texts` -> `fit_labels` -> `write_texts` -> `TextRows`. Refuses to drop anything uncounted.
"""

from __future__ import annotations

from potstill.data.chat import Encoded, encode_example, encode_examples
from potstill.data.clean import Cleaning, Reason, clean_examples
from potstill.data.labels import LabelMap, count_labels, fit_labels
from potstill.data.layout import plan_rows
from potstill.data.load import Format, Row, load_examples
from potstill.data.masking import MaskRule, mask_tokens
from potstill.data.noise import add_slips
from potstill.data.pack import PackedRows, PackedStats, write_rows
from potstill.data.partition import Partition, RemovalReason, normal_form, partition_texts
from potstill.data.records import Record, read_parts, read_records
from potstill.data.rows import TextColumns, TextReason, load_texts
from potstill.data.split import Split, split_of
from potstill.data.texts import LabelledText, content_key, read_texts, write_texts
from potstill.data.tokens import Overlong, TextRows, bucketed_order

__all__ = [
    "Cleaning",
    "Encoded",
    "Format",
    "LabelMap",
    "LabelledText",
    "MaskRule",
    "Overlong",
    "PackedRows",
    "PackedStats",
    "Partition",
    "Reason",
    "Record",
    "RemovalReason",
    "Row",
    "Split",
    "TextColumns",
    "TextReason",
    "TextRows",
    "add_slips",
    "bucketed_order",
    "clean_examples",
    "content_key",
    "count_labels",
    "encode_example",
    "encode_examples",
    "fit_labels",
    "load_examples",
    "load_texts",
    "mask_tokens",
    "normal_form",
    "partition_texts",
    "plan_rows",
    "read_parts",
    "read_records",
    "read_texts",
    "split_of",
    "write_rows",
    "write_texts",
]
