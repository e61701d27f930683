"""The exit codes of all commands."""

from __future__ import annotations

DONE = 0  # done, valid, the same
ANSWER_IS_NO = 1  # `validate` has errors, `diff` has differences
FAILED = 2  # usage, a recipe, a refusal, a missing file, no space, a bug
INTERRUPTED = 130
