"""C16: NaN and Infinity in JSON files. Python writes and reads them, and no other parser does."""

from __future__ import annotations

from moesurgery.checkpoint.scan import MAX_CONFIG_BYTES
from moesurgery.checkpoint.strict_json import constants
from moesurgery.validate.check import Outcome, check, finding
from moesurgery.validate.context import Context


@check("C16")
def json_constants(subject: Context) -> Outcome:
    """The JSON files beside the weights hold no number that JSON does not have."""
    for file, size in subject.files.items():
        if not file.endswith(".json") or size > MAX_CONFIG_BYTES:
            continue
        literals = list(constants(subject.source.read(file, 0, size).decode("utf-8", "replace")))
        if not literals:
            continue
        line, literal = literals[0]
        lines = f"line {line}" + (f" (and {len(literals) - 1} more)" if len(literals) > 1 else "")
        # An infinite limit is what some real configs mean, and Python reads it; NaN means nothing.
        worse = any(literal == "NaN" for _, literal in literals)
        yield finding(
            "C16",
            f"{lines} holds {literal}, which is no JSON: parsers other than Python's refuse the file",
            file,
            hint="put a number there" if worse else "write 1e999, which is JSON, and which readers take as infinite",
            severity="error" if worse else "warning",
        )
