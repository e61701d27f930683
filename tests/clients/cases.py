"""The checkpoints that the clients read: tiny models as they are published, and what each operation makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.decoders.pairs import pairs_from
from moesurgery.families.rope_keys import spelled_both_ways
from moesurgery.merge.merge_recipe import parse_merge_recipe

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 512
TOKENS = 48
# Sizes that every client's kernels take: heads of 32, a hidden size of 128.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3-scaled": ("llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-ungrouped": ("qwen3", {"head_dim": 32, "num_key_value_heads": 4}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "phi3": ("phi3", {}),
    "granite": ("granite", GRANITE),
    "youtu": ("youtu", LATENT),
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "num_experts": 4, "head_dim": 32, "norm_topk_prob": True}),
    "deepseek-v3": (
        "deepseek_v3",
        {**EXPERTS, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0}
        | {"n_group": 1, "topk_group": 1},
    ),
}
OPERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rescale": ("rescale", {"top_k": 3}),
    "drop-experts": ("drop-experts", {"experts": [3]}),
    "merge-experts": ("merge-experts", {"to": 2}),
    "tie-blocks": ("tie-blocks", {"blocks": [0, 0], "materialize": True}),
    "bf16": ("convert", {"dtype": "bf16"}),
    "fused": ("convert", {"layout": "fused"}),
    "to-dense": ("to-dense", {"expert": 0}),
}


@dataclass(frozen=True)
class Case:
    """One checkpoint. `origin` is the input that it was made from, itself for an input."""

    name: str
    path: Path
    origin: str
    operation: str


def cases(folder: Path) -> Iterator[Case]:
    """Write all checkpoints under `folder`, those anew that are there, and yield them."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, (model_type, changes) in {**DENSE, **MIXTURES}.items():
        path = folder / name
        save(path, model_type, changes)
        yield Case(name, path, name, "")
        if name in DENSE:
            for pair in pairs_from(model_type):
                values = {"experts": 4, "to": pair.target_type, "proof": False}
                yield edited(folder, name, f"upcycle-{pair.target_type}", "upcycle", values)
            continue
        for label, (operation, values) in OPERATIONS.items():
            yield edited(folder, name, label, operation, values)
        yield merged(folder, name)


def edited(folder: Path, origin: str, label: str, operation: str, values: dict[str, Any]) -> Case:
    out = folder / f"{origin}--{label}"
    write_plan(apply(plan_of(open_checkpoint(folder / origin)), operation, **values), out)
    return Case(out.name, out, origin, label)


def merged(folder: Path, origin: str) -> Case:
    out = folder / f"{origin}--merge"
    models = [folder / origin, folder / f"{origin}--rescale"]
    text = "merge_method: linear\ndtype: float32\nmodels:\n" + "".join(
        f"- model: {model}\n  parameters: {{weight: 0.5}}\n" for model in models
    )
    write_plan(parse_merge_recipe(text, "case").plan(), out)
    return Case(out.name, out, origin, "merge")


def save(path: Path, model_type: str, changes: dict[str, Any]) -> None:
    """Save a tiny random model as models are published: one tensor per expert, RoPE in both spellings."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.copy_((0 if "bias" in name else 1) + 0.2 * torch.randn(parameter.shape))
            elif "embed" not in name:
                parameter.mul_(4)  # initial weights are so small that a wrong expert would hardly show
    model.save_pretrained(path, save_original_format=True)
    file = path / "config.json"
    stated = json.loads(file.read_text())
    stated.update(spelled_both_ways(stated))
    if model_type == "qwen3_moe":
        stated["num_experts"] = stated.pop("num_local_experts")
    if model_type == "deepseek_v3":
        stated |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    file.write_text(json.dumps(stated, indent=2))
    tokenizer().save_pretrained(path)
    file = path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))  # older transformers


def tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of our own text, with the special tokens that GLM's converter asks for."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ("<|endoftext|>", "<|user|>", "<|observation|>", "[gMASK]", "<unk>", "<s>", "</s>", "<|startoftext|>")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


def prompt() -> list[int]:
    """Return tokens of our own text, beyond the original context of the scaled RoPE."""
    ids: list[int] = tokenizer()((ROOT / "docs" / "design.md").read_text())["input_ids"]
    return ids[:TOKENS]
