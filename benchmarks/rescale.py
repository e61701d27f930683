"""Time and peak memory of `moesurgery rescale` against `cp` of the same bytes, in one run.

    python benchmarks/rescale.py [--gb 2] [--shards 4] [--rounds 3] [--mergekit PATH/TO/mergekit-yaml]

Makes a synthetic Mixtral-shaped bf16 checkpoint, then runs the commands in turn, each as a process of its own.
Reported are the medians of wall time, CPU time and peak resident memory, the ratio to `cp`, and the disk space that
the output takes (on XFS and btrfs, unchanged tensors share blocks with the source).
The source is in the page cache. `cp` does not wait for the disk, moesurgery does (fsync before rename): compare
its rows with `cp and sync`, and the `--no-fsync` row with `cp`. With --mergekit, its passthrough+scale recipe
runs on the same checkpoint. Start-up times of `--help` and `count-params` follow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthetic import write_checkpoint
from timing import compare, in_own_process, timed

MERGEKIT_RECIPE = """\
slices:
  - sources:
      - model: {model}
        layer_range: [0, {layers}]
        parameters:
          scale:
            - filter: mlp.experts.down_proj
              value: 1.2247448713915890
            - value: 1.0
merge_method: passthrough
dtype: bfloat16
"""


def make_checkpoint(folder: Path, gigabytes: float, shards: int) -> None:
    """Write a Mixtral-shaped checkpoint of about `gigabytes` GB of bf16 normals."""
    hidden, width, experts = 1024, 3584, 8
    layer_bytes = 2 * (experts * 3 * hidden * width + 4 * hidden * hidden)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": max(shards, round(gigabytes * 1e9 / layer_bytes)),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }

    def layer(at: str, normal: Callable[..., Any]) -> dict[str, Any]:
        tensors = {f"{at}block_sparse_moe.gate.weight": normal(experts, hidden)}
        for e in range(experts):
            tensors[f"{at}block_sparse_moe.experts.{e}.w1.weight"] = normal(width, hidden)
            tensors[f"{at}block_sparse_moe.experts.{e}.w2.weight"] = normal(hidden, width)
            tensors[f"{at}block_sparse_moe.experts.{e}.w3.weight"] = normal(width, hidden)
        return tensors

    write_checkpoint(folder, config, shards, layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mergekit", help="path of mergekit-yaml in an environment of its own")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    tool = [str(Path(sys.executable).parent / "moesurgery")]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        model = work / "model"
        in_own_process(make_checkpoint, model, options.gb, options.shards)
        size = sum(f.stat().st_size for f in model.iterdir())
        layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        load = f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"
        print(f"{size / 1e9:.2f} GB, {layers} layers, {options.shards} shards; {load}")
        out = work / "out"
        rescale = [*tool, "rescale", str(model), "--top-k", "3", "-q", "-o", str(out)]
        jobs = {
            "cp": ["cp", "-r", str(model), str(out)],
            "cp and sync": ["sh", "-c", f"cp -r {model} {out} && sync {out}/*"],
            "rescale, all down-projections": [*rescale, "--scale", "norm"],
            "the same, --no-fsync": [*rescale, "--scale", "norm", "--no-fsync"],
            "rescale, router estimate": rescale,
            "rescale, config only": [*rescale, "--scale", "none"],
            "rescale, config only, --link": [*rescale, "--scale", "none", "--link"],
        }
        if options.mergekit:
            recipe = work / "mergekit.yml"
            recipe.write_text(MERGEKIT_RECIPE.format(model=model, layers=layers))
            jobs["mergekit passthrough+scale"] = [options.mergekit, str(recipe), str(out), "--quiet"]
        compare(jobs, out, options.rounds)
        for job, command in {"--help": [*tool, "--help"], "count-params": [*tool, "count-params", str(model)]}.items():
            runs = [timed(command) for _ in range(5)]
            print(f"{'start-up: ' + job:32} {statistics.median(r[0] for r in runs):8.2f} {runs[0][2]:31.0f}")


if __name__ == "__main__":
    main()
