"""Writers killed, out of disk space, or unable to read, in the middle of any step: nothing wrong ever passes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("recipe", ["rescale-top3", "merge-experts"])
def test_no_interruption_leaves_anything_wrong(recipe: str, models: Callable[..., Path], tmp_path: Path) -> None:
    """Three random steps of each kind; `python -m tests.killing` without a number takes every one."""
    command = [sys.executable, "-m", "tests.killing", f"recipes/{recipe}.yaml", models("mixtral"), tmp_path, "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tried {'killed': 3, 'full': 3, 'unreadable': 3}" in done.stdout
