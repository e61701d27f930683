"""Time and peak memory of `moesurgery drop-experts` on a GGUF against `cp` of the same output bytes, in one run.

    python benchmarks/drop_gguf.py [--gb 4] [--rounds 5] [--sparse-gb 100]

Makes a GGUF of Qwen3-30B-A3B's widths with 64 experts in each layer, Q4_K blocks of random bytes, leaves out every
fourth expert, and copies what came of it with `cp`; the commands run in turn, each as a process of its own. `cp` does
not wait for the disk, moesurgery does (fsync before rename): compare it with `cp and sync`, and `--no-fsync` with `cp`.
Then a sparse GGUF of `--sparse-gb` is counted, of which only the header is read.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from timing import compare, timed

HIDDEN, WIDTH, EXPERTS, VOCABULARY = 2048, 768, 64, 32000
ALIGNMENT = 32
EVERY = 4  # of so many experts one is left out


def tensors_of(layers: int) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield (name, shape, whether it is quantised) of every tensor."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN), True
    for i in range(layers):
        for name, rows in (("q", 4096), ("k", 512), ("v", 512)):
            yield f"blk.{i}.attn_{name}.weight", (rows, HIDDEN), True
        yield f"blk.{i}.attn_output.weight", (HIDDEN, 4096), True
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", (HIDDEN,), False
        yield f"blk.{i}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), False
        for name in ("gate", "up"):
            yield f"blk.{i}.ffn_{name}_exps.weight", (EXPERTS, WIDTH, HIDDEN), True
        yield f"blk.{i}.ffn_down_exps.weight", (EXPERTS, HIDDEN, WIDTH), True
    yield "output_norm.weight", (HIDDEN,), False


def make_gguf(path: Path, gigabytes: float, *, sparse: bool = False) -> int:
    """Write a GGUF of about `gigabytes` GB, or only its header and a hole behind it; return its layers."""
    layer = sum(size_of(shape, quantised) for name, shape, quantised in tensors_of(1) if name.startswith("blk."))
    layers = max(1, round(gigabytes * 1e9 / layer))
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_block_count(layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(32)
    writer.add_head_count_kv(4)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(8)
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    sizes = []
    for name, shape, quantised in tensors_of(layers):
        kind = GGMLQuantizationType.Q4_K if quantised else GGMLQuantizationType.F32
        size = size_of(shape, quantised)
        stored = (*shape[:-1], shape[-1] // 256 * 144) if quantised else shape
        writer.add_tensor_info(name, stored, np.uint8 if quantised else np.float32, size, raw_dtype=kind)
        sizes.append(-(-size // ALIGNMENT) * ALIGNMENT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        at = -(-file.seek(0, os.SEEK_END) // ALIGNMENT) * ALIGNMENT
        file.truncate(at + sum(sizes))
        if not sparse:
            generator = random.Random(0)
            file.seek(at)
            for size in sizes:
                for start in range(0, size, 1 << 24):
                    file.write(generator.randbytes(min(1 << 24, size - start)))
    return layers


def size_of(shape: tuple[int, ...], quantised: bool) -> int:
    count = 1
    for size in shape:
        count *= size
    return count // 256 * 144 if quantised else 4 * count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparse-gb", type=float, default=100.0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    tool = [str(Path(sys.executable).parent / "moesurgery")]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        model, pruned, out = work / "model.gguf", work / "pruned", work / "out"
        layers = make_gguf(model, options.gb)
        gone = ",".join(map(str, range(0, EXPERTS, EVERY)))
        drop = [*tool, "drop-experts", str(model), "--experts", gone, "-q", "-o"]
        timed([*drop, str(pruned)])
        before, after = model.stat().st_size, (pruned / model.name).stat().st_size
        load = f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{before / 1e9:.2f} GB in {layers} layers to {after / 1e9:.2f} GB; {load}")
        jobs = {
            "cp": ["cp", "-r", str(pruned), str(out)],
            "cp and sync": ["sh", "-c", f"cp -r {pruned} {out} && sync {out}/*"],
            "drop-experts": [*drop, str(out)],
            "the same, --no-fsync": [*drop, str(out), "--no-fsync"],
        }
        compare(jobs, out, options.rounds)
        layers = make_gguf(model, options.sparse_gb, sparse=True)
        for job, command in {"--help": [*tool, "--help"], "count-params": [*tool, "count-params", str(model)]}.items():
            runs = [timed(command) for _ in range(5)]
            wall, cpu = (statistics.median(run[i] for run in runs) for i in (0, 1))
            print(f"{job}: {wall:.2f} s, {cpu:.2f} s of CPU")
        print(f"counted: {model.stat().st_size / 1e9:.1f} GB in {layers} layers")


if __name__ == "__main__":
    main()
