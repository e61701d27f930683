"""Record what mergekit-moe 0.1.5 makes of the recipes below: run it with mergekit's Python, from the project's root.

    .work/mk/bin/python -m tests.golden.moe      # an environment of its own: pip install mergekit==0.1.5

Writes tests/golden/moe.json: for each recipe the SHA-256 of each tensor's bytes, under the names of the Hub. No part
of mergekit is kept, only hashes of what it computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).parent
GOLDEN = HERE / "moe.json"
HIDDEN, WIDTH, HEADS, KV, VOCABULARY, LAYERS = 32, 48, 4, 2, 64, 2

# Models by letter: kind and seed. A and B, say, are a model and its fine-tune.
MODELS = {
    "A": ("llama", 1),
    "B": ("llama", 2),
    "M": ("mistral", 3),
    "N": ("mistral", 4),
    "Q": ("qwen3", 5),
    "R": ("qwen3", 6),
}


def _recipe(base: str, mode: str, dtype: str, *experts: str, **more: Any) -> str:
    entries = "".join(f"\n  - {entry}" for entry in experts)
    rest = "".join(f"\n{key}: {value}" for key, value in more.items())
    return f"base_model: {base}\ngate_mode: {mode}\ndtype: {dtype}{rest}\nexperts:{entries}\n"


def _prompted(base: str, mode: str, dtype: str, other: str, **more: Any) -> str:
    return _recipe(
        base,
        mode,
        dtype,
        f'{{source_model: {base}, positive_prompts: ["math solve integral", "2 + 2 = 4"]}}',
        f"{{source_model: {other}, positive_prompts: [poem story once upon a time],"
        ' negative_prompts: [math, "the sum of all"]}',
        f'{{source_model: {base}, positive_prompts: ["def f(x):"]}}',
        **more,
    )


A, B = "source_model: A", "source_model: B"
SCALED = (f"{{{A}, residual_scale: 0.3}}", f"{{{B}, residual_scale: 0.7}}")
RECIPES: dict[str, str] = {
    "random": _recipe("A", "random", "bfloat16", *[A] * 8, experts_per_token=2),
    "scales": _recipe("A", "random", "bfloat16", *SCALED, f"{{{B}}}", f"{{{A}, residual_scale: 1.7}}"),
    "float16": _recipe("A", "random", "float16", *SCALED),
    "float32": _recipe("B", "random", "float32", *SCALED),
    "cheap-embed": _prompted("A", "cheap_embed", "bfloat16", "B"),
    "cheap-embed-float32": _prompted("A", "cheap_embed", "float32", "B"),
    "mistral": _prompted("M", "cheap_embed", "bfloat16", "N", experts_per_token=1),
    "hidden": _prompted("M", "hidden", "bfloat16", "N"),
    "hidden-avg": _prompted("A", "hidden_avg", "float32", "B"),
    "uniform": _prompted("A", "uniform_random", "bfloat16", "B"),
    "qwen3": _prompted("Q", "cheap_embed", "bfloat16", "R", architecture="qwen3"),
    "shared": _recipe("A", "random", "bfloat16", A, B, architecture="qwen", shared_experts=f"[{{{A}}}]"),
}


def placed(recipe: str, places: dict[str, Path]) -> str:
    """Return a recipe with folders in place of letters."""
    return re.sub(r"\b([ABMNQR])\b", lambda m: str(places[m[1]]), recipe)


def write_models(folder: Path) -> dict[str, Path]:
    """Write all models, from numpy's random numbers: the same bytes whatever computes them."""
    return {letter: _write(kind, seed, folder / letter) for letter, (kind, seed) in MODELS.items()}


def _write(kind: str, seed: int, path: Path) -> Path:
    path.mkdir(parents=True)
    random = np.random.Generator(np.random.PCG64(seed))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    head = HIDDEN // HEADS
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        rows = {"q": HIDDEN, "k": KV * head, "v": KV * head, "o": HIDDEN}
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (count, HIDDEN) for p, count in rows.items()}
        if kind == "qwen3":
            shapes |= {f"{at}.self_attn.{p}_norm.weight": (head,) for p in "qk"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (WIDTH, HIDDEN) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, WIDTH)
        shapes |= {f"{at}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    tensors = {
        name: torch.from_numpy(random.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32)).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    name = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}[kind]
    config: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": head,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **({"sliding_window": 16} if kind == "mistral" else {}),
    }
    (path / "config.json").write_text(json.dumps(config))
    from tests.tokenizer import save_tokenizer

    save_tokenizer(path)
    return path


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
        for name, t in sorted(tensors.items())
    }


def of_the_hub(tensors: dict[str, torch.Tensor], kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a mixture's tensors by expert and under the names of the Hub, from those in transformers' memory."""
    mixtral = kind != "qwen3"
    names = {"gate": "w1", "up": "w3", "down": "w2"} if mixtral else {p: f"{p}_proj" for p in ("gate", "up", "down")}
    for name, tensor in tensors.items():
        at, _, leaf = name.rpartition(".mlp.")
        block = f"{at}.block_sparse_moe" if mixtral else f"{at}.mlp"
        if leaf.startswith("experts.gate_up_proj"):
            for e, expert in enumerate(tensor):
                yield f"{block}.experts.{e}.{names['gate']}.weight", expert[:WIDTH]
                yield f"{block}.experts.{e}.{names['up']}.weight", expert[WIDTH:]
        elif leaf == "experts.down_proj":
            for e, expert in enumerate(tensor):
                yield f"{block}.experts.{e}.{names['down']}.weight", expert
        elif leaf == "gate.weight":
            yield f"{block}.gate.weight", tensor
        else:
            yield name, tensor


def main() -> None:
    command = Path(sys.executable).parent / "mergekit-moe"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        places = write_models(Path(folder, "models"))
        for name, recipe in RECIPES.items():
            file, out = Path(folder, f"{name}.yml"), Path(folder, "out", name)
            file.write_text(placed(recipe, places))
            subprocess.run([command, file, out, "--quiet", "--random-seed", "0"], check=True)
            tensors = {k: v for part in out.glob("*.safetensors") for k, v in load_file(part).items()}
            if name != "shared":  # mergekit writes that one with the names of the Hub
                tensors = dict(of_the_hub(tensors, "qwen3" if name == "qwen3" else "mixtral"))
            found[name] = digests(tensors)
            print(name, len(tensors), file=sys.stderr)
    GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
