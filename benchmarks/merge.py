"""Time and peak memory of `moesurgery merge` against mergekit and `cp`, each a process of its own, in one run.

    python benchmarks/merge.py [--gb 1.5] [--rounds 1] [--mergekit PATH/TO/mergekit-yaml] [--methods slerp…] [--many]

Makes two synthetic Mixtral-shaped bf16 checkpoints, the second being the first plus noise, and merges them by linear,
slerp, ties and dare_ties, with the recipes of mergekit's own documentation. `--many` adds two checkpoints with the
tensor count of Qwen3-30B-A3B (18,867 tensors of a kilobyte). Reported: wall time, CPU time, peak resident memory, the
ratios of these to mergekit's, and for linear the time of `cp` of the bytes that are read and written. Nobody waits for
the disk (`--no-fsync`); files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from rescale import make_checkpoint
from timing import in_own_process, timed

HEAD = "models: [{{model: {a}}}, {{model: {b}}}]\n"
METHODS = {
    "linear": HEAD + "merge_method: linear\nparameters: {{weight: 0.5}}\ndtype: bfloat16\n",
    "slerp": HEAD + "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.5}}\ndtype: bfloat16\n",
    "ties": HEAD + "merge_method: ties\nbase_model: {a}\nparameters: {{weight: 0.5, density: 0.5}}\ndtype: bfloat16\n",
    "dare_ties": HEAD
    + "merge_method: dare_ties\nbase_model: {a}\nparameters: {{weight: 0.5, density: 0.5}}\ndtype: bfloat16\n",
}


def add_noise(source: Path, target: Path) -> None:
    """Write a copy with noise of a fifth of the weights' size."""
    import torch
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    block = torch.randn(3_000_017, generator=torch.Generator().manual_seed(1)).mul_(0.004).bfloat16()
    for file in sorted(source.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
            continue
        held = load_file(file)
        for value in held.values():
            noise = block if value.numel() <= len(block) else block.repeat(-(-value.numel() // len(block)))
            value.add_(noise[: value.numel()].view(value.shape))
        save_file(held, target / file.name, metadata={"format": "pt"})


def make_many(folder: Path, layers: int = 48, experts: int = 128, hidden: int = 16) -> None:
    """Write a Qwen3-MoE-shaped checkpoint of many tensors and few bytes."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"model.embed_tokens.weight": normal(64, hidden), "lm_head.weight": normal(64, hidden)}
    tensors["model.norm.weight"] = normal(hidden)
    for i in range(layers):
        at = f"model.layers.{i}."
        for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            tensors[f"{at}self_attn.{name}.weight"] = normal(rows, hidden)
        tensors[f"{at}self_attn.o_proj.weight"] = normal(hidden, 16)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"{at}{norm}.weight"] = normal(4)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{norm}.weight"] = normal(hidden)
        tensors[f"{at}mlp.gate.weight"] = normal(experts, hidden)
        for e in range(experts):
            for name in ("gate_proj", "up_proj"):
                tensors[f"{at}mlp.experts.{e}.{name}.weight"] = normal(32, hidden)
            tensors[f"{at}mlp.experts.{e}.down_proj.weight"] = normal(hidden, 32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--mergekit", help="path of mergekit-yaml in an environment of its own")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--many", action="store_true", help="the case of 18,867 tensors too")
    parser.add_argument("--models", nargs=2, type=Path, help="two checkpoints to merge instead of synthetic ones")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    tool = str(Path(sys.executable).parent / "moesurgery")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        a, b = options.models or (work / "a", work / "b")
        if not options.models:
            in_own_process(make_checkpoint, a, options.gb, 4)
            in_own_process(add_noise, a, b)
        if options.many:
            in_own_process(make_many, work / "many-a")
            in_own_process(add_noise, work / "many-a", work / "many-b")
        size = sum(f.stat().st_size for f in a.iterdir())
        print(
            f"two of {size / 1e9:.2f} GB; {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        print(f"{'':26} {'wall s':>8} {'cpu s':>8} {'peak MB':>8} {'x faster':>9} {'cpu x':>7} {'memory x':>9}")
        cases = {method: (METHODS[method], a, b) for method in options.methods}
        if options.many:
            cases["18,867 tensors, linear"] = (METHODS["linear"], work / "many-a", work / "many-b")
        for case, (text, first, second) in cases.items():
            recipe, out = work / "recipe.yaml", work / "out"
            recipe.write_text(text.format(a=first, b=second))
            jobs = {"moesurgery": [tool, "merge", str(recipe), "-o", str(out), "--no-fsync", "-q"]}
            if options.mergekit:
                jobs["mergekit"] = [options.mergekit, str(recipe), str(out), "--quiet"]
            if case == "linear":  # as many bytes as a merge reads and writes
                copy = f"mkdir {out} && cp -r {first} {out}/1 && cat {second}/* > /dev/null"
                jobs["cp of the same bytes"] = ["sh", "-c", copy]
            results: dict[str, list[tuple[float, float, float]]] = {job: [] for job in jobs}
            for _ in range(options.rounds):
                for job, command in jobs.items():
                    os.sync()
                    results[job].append(timed(command))
                    shutil.rmtree(out)
            found = {j: [statistics.median(run[i] for run in runs) for i in range(3)] for j, runs in results.items()}
            for job, (wall, cpu, memory) in found.items():
                line = f"{case + ', ' + job:26} {wall:8.1f} {cpu:8.1f} {memory:8.0f}"
                if job == "moesurgery" and "mergekit" in found:
                    other = found["mergekit"]
                    line += f" {other[0] / wall:9.1f} {other[1] / cpu:7.1f} {other[2] / memory:9.1f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
