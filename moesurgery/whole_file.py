"""A file that is there whole or not at all, in place of whatever had its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesurgery.errors import OutputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a new empty file beside `path`, which takes its place at once when the block ends.

    A link that has this name is replaced, and not written through. What an interrupted run has left is replaced too.
    Raises OutputError where nothing can be written there.
    """
    new = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", "choose another place with -o") from None
    try:
        yield new
        os.replace(new, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", "choose another place with -o") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
