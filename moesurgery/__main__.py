"""`python -m moesurgery`, for where the script is not on the path."""

from __future__ import annotations

from moesurgery.cli import run

run()
