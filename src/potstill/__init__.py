"""potstill distils a large language model into a small one that its user owns, and proves what it kept.

This package's root stays light on purpose: importing it imports no model library.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
