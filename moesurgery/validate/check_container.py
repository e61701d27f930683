"""S and I: the safetensors files and their index, as the strict readers of `checkpoint` see them."""

from __future__ import annotations

import errno
import os

from moesurgery.errors import CheckpointError
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.context import Context

_SCANNED = (
    *("P02", "P03", "P07", "C01"),
    *("S01", "S02", "S03", "S04", "S05", "S06", "S07", "S08", "S11"),
    *("G01", "G02", "G03", "G04", "G05", "G06", "G07", "G08", "G09", "G10", "G11", "G12"),
    *("I01", "I02", "I03", "I04", "I05", "I06"),
)


@check(*_SCANNED)
def scanned(subject: Context) -> Outcome:
    """What the strict readers of config, index and headers found."""
    yield from subject.scan.problems
    shards = {header.file for header in subject.scan.headers}
    others = [f for f in subject.files if f.endswith(".safetensors") and f not in shards]
    if others:
        shown = ", ".join(others[:3])
        yield NotChecked(("S01",), f"{len(others)} safetensors files that are no part of the checkpoint: {shown}")


@check("S10")
def no_holes(subject: Context) -> Outcome:
    """No shard has parts that were never written: what parallel downloads and copies leave when they are cut off."""
    for header in subject.scan.headers:
        try:
            path = subject.source.local(header.file)
        except CheckpointError:
            continue  # P03 says so
        if path is None:
            yield NotChecked(("S10",), "holes: the files are remote")
            return
        missing, first = _holes(str(path))
        if missing:
            yield finding(
                "S10",
                f"{missing:,} bytes were never written and read as zeros, from byte {first:,}",
                header.file,
                hint="copy or download the file again, unless it was made of zeros",
            )


def _holes(path: str) -> tuple[int, int]:
    """Return the bytes in holes of a file and where the first begins; (0, 0) where the filesystem does not say."""
    missing = first = at = 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while at < size:
                try:
                    data = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        return 0, 0
                    data = size  # nothing but a hole is left
                if data > at:
                    first = first if missing else at
                    missing += data - at
                at = os.lseek(file.fileno(), data, os.SEEK_HOLE) if data < size else size
    except OSError:
        return 0, 0  # S11 says so where it cannot be read at all
    return missing, first
