"""Peak memory of the streamed forward pass, on a synthetic Mixtral of 4 GB in bfloat16.

    python benchmarks/streaming_memory.py [FOLDER [WHAT…]]

Writes the model (random weights, a shard per layer), then runs each command that runs models in a process of its own:
`perplexity`, `collect`, the repairs and `probe`. Prints the largest resident set of each (VmHWM: Linux) beside the size
of a layer in float32 and of the hidden states. docs/measure.md has the figures. WHAT are some of the commands by name,
such as "--refit down"; a model that is in FOLDER already is used again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, WIDTH, LAYERS, EXPERTS, VOCABULARY = 1024, 3584, 24, 8, 4096
WINDOW, WINDOWS = 512, 2
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
}
COMMAND = """
import sys
from moesurgery.cli import main
code = main(sys.argv[1:])
"""
# A repair of two layers, one for `down`, which takes a minute per expert: with more of them only its time grows.
# Experts are fitted however few tokens they see.
REPAIR = """
import sys
from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.fitting.run_settings import RunSettings
model, text, window, kind, layers = sys.argv[1:]
plan, run, done = plan_of(open_checkpoint(model)), RunSettings(int(window)), []
class Enough(Exception): pass
def take(fitted):
    done.append(fitted.where)  # a command writes a block and lets it go
    if len(done) == int(layers):
        raise Enough
edited = apply(plan, "drop-experts", experts=[1, 6])
tokens = read_calibration(run, plan, [text], 1 << 20).windows
try:
    fit_layers(*run.pair(plan, edited, tokens), tokens, RepairOptions(kind, minimum=0), take)
except Enough:
    code = 0
"""
PEAK = """
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
sys.exit(code)
"""


def write(folder: Path) -> int:
    """Write the model, one layer in memory at a time; return its bytes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).to(torch.bfloat16)

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    places: dict[str, str] = {}
    total = 0
    for layer in range(-1, LAYERS):
        tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
        if layer >= 0:
            base = f"model.layers.{layer}."
            tensors = {
                f"{base}input_layernorm.weight": torch.ones(HIDDEN),
                f"{base}post_attention_layernorm.weight": torch.ones(HIDDEN),
                f"{base}block_sparse_moe.gate.weight": random(EXPERTS, HIDDEN),
            }
            for name, rows in (("q", HIDDEN), ("k", HIDDEN // 4), ("v", HIDDEN // 4), ("o", HIDDEN)):
                tensors[f"{base}self_attn.{name}_proj.weight"] = random(rows, HIDDEN)
            for expert in range(EXPERTS):
                for name, shape in (("w1", (WIDTH, HIDDEN)), ("w2", (HIDDEN, WIDTH)), ("w3", (WIDTH, HIDDEN))):
                    tensors[f"{base}block_sparse_moe.experts.{expert}.{name}.weight"] = random(*shape)
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        file = f"model-{layer + 2:05}-of-{LAYERS + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * 2 for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def peak(script: str, *arguments: object) -> int:
    done = subprocess.run(
        [sys.executable, "-c", script + PEAK, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stderr.rsplit("peak ", 1)[1])


def main() -> None:
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    model = place / "model"
    total = sum(f.stat().st_size for f in model.glob("*.safetensors")) if model.exists() else write(model)
    ids = torch.randint(1, VOCABULARY, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(1))
    text = place / "tokens.jsonl"
    text.write_text("".join(json.dumps(row.tolist()) + "\n" for row in ids))
    layer = 4 * (EXPERTS * 3 * HIDDEN * WIDTH + 2 * HIDDEN * HIDDEN * 5 // 4)
    hidden = 4 * WINDOW * WINDOWS * HIDDEN
    print(
        f"model {total / 1e9:.2f} GB; a layer in float32 {layer / 1e6:.0f} MB; hidden states {hidden / 1e6:.0f} MB",
        flush=True,
    )
    calibrated = ["--text", text, "--window", WINDOW, "--quiet", "--force", "-o", place / "out"]
    measured: dict[str, tuple[str, list[object]]] = {
        "perplexity": (COMMAND, ["perplexity", model, text, "--quiet"]),
        "collect": (COMMAND, ["collect", model, *calibrated]),
        "collect --top-k 3": (COMMAND, ["collect", model, *calibrated, "--top-k", 3]),
        # There are as many passes as layers, and a layer is read once for all its experts: few tokens will do.
        "probe": (COMMAND, ["probe", model, *calibrated, "--tokens", 32, "--window", 32, "--mode", "mask", "--no-png"]),
        **{
            f"--refit {kind}": (REPAIR, [model, text, WINDOW, kind, 1 if kind == "down" else 2])
            for kind in ("scalar", "expert", "down", "all")
        },
    }
    for name, (script, arguments) in measured.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        found = peak(script, *arguments)
        left = (found - layer - hidden) / 1e6
        print(f"{name}: peak {found / 1e6:.0f} MB, {left:.0f} MB beside one layer and the hidden states", flush=True)
    if len(sys.argv) < 2:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
