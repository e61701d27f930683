"""How much of the speed of a throttled store `drop-experts` uses, reading from it and writing to local disk.

    python benchmarks/read_store.py [--gb 4] [--rate 1e8] [--schemes s3,http,hf] [--jobs 2]

Makes a synthetic Mixtral-shaped bf16 checkpoint, serves it on loopback from another process (`store_server.py`): all
connections share --rate bytes per second. Once as it is, and once with 20 ms before each answer and a quarter of the
rate for each connection. Each command is a process of its own, from its start to its end, disk included. Printed are
the bytes sent, requests, wall time, and the rate of the output's bytes by the server's: from start to end of the
process, and from its first request to the last byte, which is without its start and its wait for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import timing
from rescale import make_checkpoint
from timing import in_own_process, timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e8)
    parser.add_argument("--schemes", default="s3,http,hf")
    parser.add_argument("--edit", default="drop-experts --keep 75% --by router-norm", help="command and its options")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        in_own_process(make_checkpoint, work / "store" / "model", options.gb, options.shards)
        heads = f"{'GB':>6} {'requests':>8} {'wall s':>8} {'cpu s':>7} {'peak MB':>8} {'of the rate':>12}"
        print(f"{'':36} {heads} {'while it reads':>14}")
        for kind, more in {
            "": [],
            ", 20 ms, a quarter each": ["--latency", "0.02", "--connection-rate", str(options.rate / 4)],
        }.items():
            for scheme in options.schemes.split(","):
                line = measure(work, scheme, options.rate, more, options.edit.split())
                print(f"{scheme + kind:36} {line}", flush=True)


def measure(work: Path, scheme: str, rate: float, more: list[str], edit: list[str]) -> str:
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("store_server.py"), work / "store", "--rate", str(rate), *more],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        timing.ENVIRONMENT |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(work / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        model = {"s3": "s3://s3/model", "http": f"{endpoint}/model", "hf": "hf://acme/model"}[scheme]
        out = work / "out"
        tool = [sys.executable, "-m", "moesurgery"]
        wall, cpu, memory = timed([*tool, edit[0], model, *edit[1:], "-q", "-o", str(out)])
        counts = json.load(urllib.request.urlopen(f"{endpoint}/counts"))
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        os.sync()
    finally:
        server.kill()
        server.wait()
    figures = f"{counts['bytes'] / 1e9:6.2f} {counts['requests']:8d} {wall:8.1f} {cpu:7.1f} {memory:8.0f}"
    used = min(size, counts["bytes"]) / rate
    return f"{figures} {used / wall:12.2f} {used / counts['seconds']:12.2f}"


if __name__ == "__main__":
    main()
