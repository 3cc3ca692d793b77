"""The nouns of the house and the protocols between its rooms.

Imports torch and the standard library only, and holds no algorithm beyond what a noun knows about itself.
"""

from potstill.types.batch import IGNORE, Batch, Example
from potstill.types.logits import Head, Logits, Mixture, SparseLogits, States, TeacherLogits
from potstill.types.protocols import Engine, LessonSource, Loss, Measurement, Reader, Sampling
from potstill.types.request import Author, Completion, Request, Usage
from potstill.types.signal import AttentionVectors, Lesson, LossSum, Offer, Role, Signal, StudentView, Wants

__all__ = [
    "IGNORE",
    "AttentionVectors",
    "Author",
    "Batch",
    "Completion",
    "Engine",
    "Example",
    "Head",
    "Lesson",
    "LessonSource",
    "Logits",
    "Loss",
    "LossSum",
    "Measurement",
    "Mixture",
    "Offer",
    "Reader",
    "Request",
    "Role",
    "Sampling",
    "Signal",
    "SparseLogits",
    "States",
    "StudentView",
    "TeacherLogits",
    "Usage",
    "Wants",
]
