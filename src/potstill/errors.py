"""What can go wrong, and its name. Every message names the recipe key, what was got, what is needed, what to do.

    PotstillError
    ├── RecipeError (ValueError)            the recipe cannot be read or asks for the impossible
    ├── DataError (ValueError)              the user's rows cannot be used
    ├── ModelError (ValueError)             a model or tokenizer cannot be loaded or does not fit
    │   └── VocabularyMismatch              teacher and student do not number the same tokens alike
    ├── SampleError (OSError)               a sample could not be fetched, or is not what its hash says
    ├── RunError (RuntimeError)             the run folder is locked, unwritable, full or damaged
    │   └── CheckpointError                 no checkpoint of this run is whole
    ├── StoreError (RuntimeError)           a store of signals is damaged, of another teacher, or cannot be reached
    ├── TeacherError (RuntimeError)         the teacher's endpoint cannot be used, or refuses
    ├── BudgetError (RuntimeError)          the budget is too small for what is asked
    ├── NonFiniteError (ArithmeticError)    a loss or gradient is not a number
    ├── MissingExtra (ImportError)          an optional package is needed; names the extra
    └── Interrupted (RuntimeError)          asked to stop; state is saved and the same command continues

Refuses: anything but exceptions. Nothing here imports from the project.
"""

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DataError",
    "Interrupted",
    "MissingExtra",
    "ModelError",
    "NonFiniteError",
    "PotstillError",
    "RecipeError",
    "RunError",
    "SampleError",
    "StoreError",
    "TeacherError",
    "VocabularyMismatch",
]


class PotstillError(Exception):
    """Root of all errors that potstill raises on purpose."""


class RecipeError(PotstillError, ValueError):
    """The recipe cannot be read, or asks for something impossible."""


class DataError(PotstillError, ValueError):
    """The data is missing, empty or unusable."""


class ModelError(PotstillError, ValueError):
    """A model or tokenizer cannot be loaded, or does not fit the recipe."""


class VocabularyMismatch(ModelError):
    """Teacher and student do not give the same number to the same token."""


class SampleError(PotstillError, OSError):
    """A sample could not be fetched, or its bytes are not those that were pinned."""


class RunError(PotstillError, RuntimeError):
    """The run folder is locked by another process, unwritable, full or damaged."""


class CheckpointError(RunError):
    """No checkpoint of this run can be read back whole."""


class StoreError(PotstillError, RuntimeError):
    """A store of signals is damaged, is of another teacher, or cannot be reached."""


class TeacherError(PotstillError, RuntimeError):
    """The teacher's endpoint cannot be reached or used, refuses the key or the model, or fails too often."""


class BudgetError(PotstillError, RuntimeError):
    """The budget does not suffice for a single request, or the price that it needs is not known."""


class NonFiniteError(PotstillError, ArithmeticError):
    """A loss or a gradient became NaN or infinite."""


class MissingExtra(PotstillError, ImportError):
    """An optional package is needed; the message names the extra to install."""


class Interrupted(PotstillError, RuntimeError):
    """The run was asked to stop. Its state is saved; the same command continues."""
