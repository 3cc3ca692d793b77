"""What is asked: the recipe's schema, and the way from YAML to a checked recipe and back.

Importing this room is cheap. Refuses: importing torch or transformers, and judging whether models or files exist.
"""

from __future__ import annotations

from potstill.recipes.load import (
    dump_recipe,
    fingerprint,
    load_recipe,
    recipe_schema,
    shipped_recipe,
    shipped_recipes,
)
from potstill.recipes.schema import Recipe

__all__ = [
    "Recipe",
    "dump_recipe",
    "fingerprint",
    "load_recipe",
    "recipe_schema",
    "shipped_recipe",
    "shipped_recipes",
]
