"""`python -m potstill` is `potstill`. Refuses to be anything else."""

from __future__ import annotations

from potstill.cli import main

__all__ = []

if __name__ == "__main__":
    main()
