"""`--scheduler`: a Dask cluster of real processes, killed in the middle, gives the bytes of one process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesurgery.scheduler import Scheduler
from moesurgery.stats.statistics_file import load_stats
from tests.conftest import ROOT, Result
from tests.killing import contents

pytest.importorskip("distributed", reason="pip install moesurgery[dask]")

Cli = Callable[..., Result]
EDIT = ["--top-k", "3", "--scale", "1.5", "--max-shard-size", "400KB"]


class Cluster:
    """A scheduler and workers as processes of their own, without anything that restarts them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = (folder / "log").open("ab")
        self.file = folder / "scheduler.json"
        self._begin(0)

    def _begin(self, port: int) -> None:
        self.scheduler = self.start(
            "scheduler", "--port", str(port), "--scheduler-file", str(self.file), "--no-dashboard"
        )
        while not (self.file.exists() and self.file.read_text().rstrip().endswith("}")):
            assert self.scheduler.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.05)
        self.address = json.loads(self.file.read_text())["address"]
        self.workers = [self.worker(), self.worker()]

    def start(self, kind: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=self.log,
        )

    def worker(self) -> subprocess.Popen[bytes]:
        return self.start("worker", self.address, "--nthreads", "1", "--no-nanny", "--no-dashboard")

    def restart(self) -> None:
        """Kill all, and start them again at the same address."""
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()
        self.file.unlink()
        self._begin(int(self.address.rpartition(":")[2]))

    def kill_worker(self) -> None:
        victim = self.workers.pop(0)
        victim.send_signal(signal.SIGKILL)
        victim.wait()

    def close(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


def kill(cluster: Cluster, partial: Path, shards: int, stop: threading.Event) -> None:
    """Kill a worker as soon as so many shards are written, and start another in its place."""
    while len(list(partial.glob("*.safetensors"))) < shards and not stop.is_set():
        time.sleep(0.001)
    cluster.kill_worker()
    cluster.workers.append(cluster.worker())


def test_workers_are_killed_while_they_write(cli: Cli, demo: Path, tmp_path: Path, cluster: Cluster) -> None:
    assert cli("rescale", demo, *EDIT, "-o", tmp_path / "expected").code == 0
    draw = random.Random(0)
    for trial in range(int(os.environ.get("KILLS", "2"))):
        output = tmp_path / f"out{trial}"
        done_before = draw.randrange(0, 30)

        stop = threading.Event()
        killer = threading.Thread(target=kill, args=(cluster, tmp_path / f"out{trial}.partial", done_before, stop))
        killer.start()
        result = cli("rescale", demo, *EDIT, "-o", output, "--scheduler", cluster.address)
        stop.set()
        killer.join()
        assert result.code == 0, result.err
        assert contents(output) == contents(tmp_path / "expected")


def test_the_scheduler_comes_back(cli: Cli, demo: Path, tmp_path: Path, cluster: Cluster) -> None:
    """All of the cluster is killed and started again at its address: what was lost is sent again."""
    assert cli("rescale", demo, *EDIT, "-o", tmp_path / "expected").code == 0
    stop = threading.Event()

    def restart() -> None:
        while len(list((tmp_path / "out.partial").glob("*.safetensors"))) < 5 and not stop.is_set():
            time.sleep(0.001)
        cluster.restart()

    killer = threading.Thread(target=restart)
    killer.start()
    result = cli("rescale", demo, *EDIT, "-o", tmp_path / "out", "--scheduler", cluster.address)
    stop.set()
    killer.join()
    assert result.code == 0, result.err
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_scheduler_that_stays_away(cli: Cli, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says so; the same command without it ends the work with the shards that are there."""
    monkeypatch.setattr("moesurgery.scheduler._CONNECT", 0.5)
    assert cli("rescale", demo, *EDIT, "-o", tmp_path / "expected").code == 0
    submitted = results = 0

    class Lost(ThreadPoolExecutor):
        """Its connection ends with the fourth task."""

        def submit(self, function: Any, /, *arguments: Any, **more: Any) -> Any:
            nonlocal submitted
            submitted += 1
            if submitted <= 3:
                return super().submit(function, *arguments, **more)
            lost: Any = Future()
            lost.cancel()
            lost.set_running_or_notify_cancel()
            return lost

    executor = Scheduler.executor

    def once(self: Scheduler) -> Any:
        nonlocal results
        results += 1
        return Lost(1) if results == 1 else executor(self)

    monkeypatch.setattr(Scheduler, "executor", once)
    lost = cli("rescale", demo, *EDIT, "-o", tmp_path / "out", "--scheduler", "tcp://127.0.0.1:9")
    assert lost.code == 2
    assert "no scheduler answers at tcp://127.0.0.1:9" in lost.err
    kept = {file.name: file.stat().st_ino for file in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(kept) == 3
    assert cli("rescale", demo, *EDIT, "-o", tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert all((tmp_path / "out" / name).stat().st_ino == number for name, number in kept.items())


def test_workers_of_this_machine(cli: Cli, demo: Path, tmp_path: Path) -> None:
    assert cli("rescale", demo, *EDIT, "-o", tmp_path / "expected").code == 0
    result = cli("rescale", demo, *EDIT, "-o", tmp_path / "out", "--scheduler", "local:1")
    assert result.code == 0, result.err
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_collect_on_workers(
    cli: Cli, demo: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits whoever runs the parts, and the sums of one process but for the rounding of each batch."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "examples/demo/heldout-code.txt").read_text()[:30_000])
    arguments = ["collect", demo, "--text", text, "--window", "32", "--tokens", "3072", "--top-k", "3", "-q"]
    assert cli(*arguments, "-o", tmp_path / "one").code == 0
    killer = threading.Timer(1, cluster.kill_worker)
    killer.start()
    result = cli(*arguments, "-o", tmp_path / "two", "--scheduler", cluster.address)
    killer.join()
    assert result.code == 0, result.err
    monkeypatch.setattr(Scheduler, "executor", lambda self: ThreadPoolExecutor(1))
    assert cli(*arguments, "-o", tmp_path / "thread", "--scheduler", "local:1").code == 0
    files = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two", "thread")}
    one, two = load_stats(files["one"]), load_stats(files["two"])
    assert files["two"].read_bytes() == files["thread"].read_bytes()
    assert two.about == one.about
    for where, block in one.blocks.items():
        for name, values in block.sums.items():
            scale = float(np.abs(values).max())  # float32 sums of products that may cancel
            assert two.blocks[where].sums[name] == pytest.approx(values, rel=1e-5, abs=1e-6 * scale), (where, name)


@pytest.mark.parametrize(
    ("address", "said"), [("cluster", "is no address"), ("local:0", "is no address"), ("tcp://", "is no address")]
)
def test_wrong_addresses(cli: Cli, demo: Path, tmp_path: Path, address: str, said: str) -> None:
    result = cli("rescale", demo, *EDIT, "-o", tmp_path / "out", "--scheduler", address)
    assert result.code == 2
    assert said in result.err
