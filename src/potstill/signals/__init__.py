"""What the teacher said, in a form that a student can use. Refuses to match what does not mean the same."""

from potstill.signals.vocab import shared_vocabulary

__all__ = ["shared_vocabulary"]
