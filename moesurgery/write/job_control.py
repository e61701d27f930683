"""How a running job is seen and stopped, apart from what writes, so that the console loads nothing of that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

ByteProgress = Callable[[int], None]  # is told how many more bytes were handled


@dataclass
class JobControl:
    """How a running task is seen and stopped from outside; not used across processes."""

    progress: ByteProgress = field(default=lambda count: None)
    stop: threading.Event = field(default_factory=threading.Event)
    expect: ByteProgress = field(default=lambda count: None)  # is told how many bytes there will be in all
