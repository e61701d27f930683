"""A few inputs of `tests.fuzz`, in a process that may take one gigabyte; 100,000 are run by hand."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT


def test_readers_refuse_and_never_crash_hang_or_swell() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" inputs, ") == 3
