"""The errors that a user can cause or meet: what happened, where, and what to type next.

Nothing here prints. `moesurgery.cli.main` turns a `SurgeryError` into two lines on stderr and exit code 2;
any other exception is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class SurgeryError(Exception):
    """Base of all expected failures: `message` says what and where, `hint` what to type next."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[SurgeryError], tuple[str, str | None]]:
        # Shard tasks may run in other processes; the default pickling would lose the hint.
        return type(self), (self.message, self.hint)


class CheckpointError(SurgeryError):
    """An input is missing, truncated, or not what its own headers say."""


class RefusedError(SurgeryError):
    """The edit has no meaning, or no exact meaning, for this model."""


class RecipeError(SurgeryError):
    """A recipe or an option is wrong: unknown key, wrong type, value out of range."""


class OutputError(SurgeryError):
    """The output cannot be written: it exists, the disk is full, the path is an input."""


@contextmanager
def at_line(origin: str, line: int, words: Callable[[str], str] | None = None) -> Iterator[None]:
    """Say in what is raised within where in a recipe it comes from; line 0 is a command line, and is not said.

    `words` puts texts that speak of a command's options into those of the recipe.
    """
    try:
        yield
    except SurgeryError as error:
        if words is not None:
            error.message = words(error.message)
            error.hint = None if error.hint is None else words(error.hint)
        if line:
            error.message = f"{origin}:{line}: {error.message}"
        raise
