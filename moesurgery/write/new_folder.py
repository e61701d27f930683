"""A folder of a few files, such as an adapter or a patch: there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moesurgery.errors import OutputError
from moesurgery.write.claim import claim
from moesurgery.write.publish import publish, recover


@contextmanager
def new_folder(output: Path, kind: str) -> Iterator[dict[str, bytes | Iterable[bytes]]]:
    """Claim `output`, which must not exist, and publish it with the files that are put into what is yielded.

    Nothing stays where the block raises. `kind` names the job in the claimed folder. Raises OutputError where the
    folder is there, or cannot be written.
    """
    output = Path(os.path.abspath(output))
    recover(output)
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output} exists", "choose another folder with -o")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from None
    work = claim(output.with_name(output.name + ".partial"), kind, force=False)
    try:
        files: dict[str, bytes | Iterable[bytes]] = {}
        yield files
        try:
            work.keep(set())
            for name, content in files.items():
                work.write(name, [content] if isinstance(content, bytes) else content, durable=True)
            publish(work, output, force=False, durable=True)
        except OSError as error:
            raise OutputError(f"{output} cannot be written: {error.strerror}") from None
    except BaseException:
        work.discard()  # nothing of it can be resumed
        raise
    finally:
        work.release()
