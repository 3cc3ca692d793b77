"""Learning: one loop over lessons from one source. Refuses to build models, losses or teachers: it is handed them."""

from potstill.training.checkpoint import CheckpointStore
from potstill.training.loop import Callbacks, Plan, Training, train
from potstill.training.schedule import learning_rate_factor
from potstill.training.sources import Rows, RowSource, first_rows, join_rows

__all__ = [
    "Callbacks",
    "CheckpointStore",
    "Plan",
    "RowSource",
    "Rows",
    "Training",
    "first_rows",
    "join_rows",
    "learning_rate_factor",
    "train",
]
