"""The hallway: turns a recipe into parts and walks the stages. Refuses: mathematics of its own."""

__all__ = []
