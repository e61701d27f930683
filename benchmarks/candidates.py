"""What `drop-experts --by auto --text` reads from storage, and how long it takes: the table of docs/performance.md.

    python benchmarks/candidates.py FOLDER [--dense 0 6] [--rounds 3] [--cached] [--device cpu] [--against OTHER…]

Writes a random GLM-4-MoE per entry of `--dense`, as many of whose first layers have no experts, into FOLDER, a shard
per layer; one that is there is used again. Then does what the command does before it writes, once per round in a
process of its own, by the package here and by those in the folders OTHER, in turn. Prints medians of seconds, of the
bytes that came from storage (read_bytes of /proc/self/io: Linux) and of the largest resident set.

A model larger than memory is simulated: whenever another shard is read, the one before is dropped from the page cache,
so that it holds one layer. With `--cached` nothing is dropped, and an uncounted round comes first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, WIDTH, DENSE_WIDTH, EXPERTS, LAYERS, VOCABULARY = 1024, 512, 4096, 48, 12, 1024
WINDOW, WINDOWS = 128, 8  # of which a quarter is held out
COMMAND = """
import os, sys
from moesurgery import CalibrationOptions, calibrate
from moesurgery.checkpoint.file_reader import FileReader
fill, last = FileReader.fill, [None]
def filling(self, view, source, file, start):
    path = self.path(source, file)
    if last[0] not in (None, path):
        descriptor = os.open(last[0], os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    last[0] = path
    fill(self, view, source, file, start)
cache, device, model, text, out, keep, window, tokens = sys.argv[1:]
if cache == "dropped":
    FileReader.fill = filling
options = CalibrationOptions(text=[text], window=int(window), tokens=int(tokens), device=device)
print(calibrate(model, "drop-experts", {"keep": int(keep)}, options, out, force=True).heldout, file=sys.stderr)
for file, name in (("io", "read_bytes"), ("status", "VmHWM")):
    print(name, next(line for line in open(f"/proc/self/{file}") if line.startswith(name)).split()[1], file=sys.stderr)
"""


def config(dense: int) -> dict[str, object]:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE_WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "first_k_dense_replace": dense,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": WINDOW,
        "attention_bias": False,
        "dtype": "bfloat16",
    }


def shards(dense: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the shapes of the tensors of each shard: what is outside of layers, then layer after layer."""
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN))
    yield {**ends, "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        base = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{base}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")
        }
        for name, rows in (("q", HIDDEN), ("k", HIDDEN // 4), ("v", HIDDEN // 4), ("o", HIDDEN)):
            shapes[f"{base}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        ffns = {"mlp.": DENSE_WIDTH}
        if layer >= dense:
            ffns = {f"mlp.experts.{e}.": WIDTH for e in range(EXPERTS)} | {"mlp.shared_experts.": WIDTH}
            shapes[f"{base}mlp.gate.weight"] = (EXPERTS, HIDDEN)
            shapes[f"{base}mlp.gate.e_score_correction_bias"] = (EXPERTS,)
        for ffn, width in ffns.items():
            shapes |= {f"{base}{ffn}{n}_proj.weight": (width, HIDDEN) for n in ("gate", "up")}
            shapes[f"{base}{ffn}down_proj.weight"] = (HIDDEN, width)
        yield shapes


def write(folder: Path, dense: int) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, shapes in enumerate(shards(dense), 1):
        tensors = {
            name: torch.ones(shape)
            if "norm" in name
            else torch.randn(shape, generator=generator) * (0.05 if len(shape) > 1 else 0.0)
            for name, shape in shapes.items()
        }
        file = f"model-{number:05}-of-{LAYERS + 1:05}.safetensors"
        kinds = {n: torch.float32 if "bias" in n else torch.bfloat16 for n in tensors}
        save_file({n: t.to(kinds[n]) for n, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": sum(f.stat().st_size for f in folder.iterdir())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(dense)))


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(
    package: Path, model: Path, text: Path, out: Path, cached: bool, device: str
) -> tuple[float, float, float]:
    """Return seconds, GB from storage and peak MB of the command, with its statistics collected anew."""
    if not cached:
        drop_from_cache(model)
    given = ["cached" if cached else "dropped", device, model, text, out, EXPERTS * 3 // 4, WINDOW, WINDOW * WINDOWS]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
        cwd=package,  # from where `-c` imports
    )
    seconds = time.monotonic() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    found = {line.split()[0]: int(line.split()[1]) for line in done.stderr.splitlines()[-2:]}
    for file in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return seconds, found["read_bytes"] / 1e9, found["VmHWM"] / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dense", type=int, nargs="+", default=[0, 6])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--against", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    given.folder = given.folder.resolve()
    given.folder.mkdir(parents=True, exist_ok=True)
    text = given.folder / "tokens.jsonl"
    ids = torch.randint(1, VOCABULARY, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(1))
    text.write_text("".join(json.dumps(row.tolist()) + "\n" for row in ids))
    packages = [*(other.resolve() for other in given.against), Path(__file__).resolve().parents[1]]
    print("| first layers without experts | package | GB | s | GB from storage | peak MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for dense in given.dense:
        model = given.folder / f"model-{dense}"
        if not model.exists():
            write(model, dense)
        size = sum(file.stat().st_size for file in model.iterdir()) / 1e9
        found: dict[Path, list[tuple[float, float, float]]] = {package: [] for package in packages}
        for number in range(given.rounds + given.cached):
            for package, values in found.items():
                figures = measured(package, model, text, given.folder / "out", given.cached, given.device)
                if number >= given.cached:
                    values.append(figures)
        for package, values in found.items():
            seconds, read, peak = (statistics.median(each) for each in zip(*values, strict=True))
            spread = f"{min(v[0] for v in values):.0f} to {max(v[0] for v in values):.0f}"
            print(
                f"| {dense} | {package} | {size:.2f} | {seconds:.0f} ({spread}) | {read:.2f} | {peak:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
