"""Every pair: a dense model saved by transformers, upcycled, and loaded again computes the same logits.

Prompts are longer than every window and original context. What would lose something is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.decoders.lookup import DENSE_TYPES, MOE_TYPES
from moesurgery.decoders.pairs import NO_PAIR, PAIRS
from moesurgery.errors import CheckpointError, RefusedError
from tests.dense import (
    BIAS,
    CONVOLUTION,
    DEFAULT_ROPE,
    DELTA,
    LATENT,
    LLAMA3,
    LONG_PROMPT,
    LONGROPE,
    MULTIPLIERS,
    NARROW,
    ORIGINAL,
    SECOND_SLIDES,
    SINKS,
    SLIDING,
    TIED,
    WIDE,
    WINDOW,
    YARN,
    rope,
    save_dense,
)
from tests.tiny import load, logits, read_config

Changes = dict[str, Any]
LLAMA_TARGETS = (
    *("mixtral", "qwen2_moe", "solar_open", "glm4_moe", "granitemoe", "granitemoeshared"),
    *("ernie4_5_moe", "llama4_text"),
)
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
EXACT: list[tuple[str, Changes, tuple[str, ...]]] = [
    ("llama", LLAMA3, LLAMA_TARGETS),
    ("llama", {**YARN, **WIDE}, LLAMA_TARGETS),
    ("llama", {**TIED, **DEFAULT_ROPE, "hidden_act": "gelu"}, ("mixtral", "qwen2_moe", "granitemoe", "solar_open")),
    ("llama", BIAS, ("granitemoe", "granitemoeshared")),
    ("mistral", {"sliding_window": WINDOW}, ("mixtral",)),
    ("mistral", {"sliding_window": None, **YARN}, ("mixtral", "qwen2_moe", "solar_open", "glm4_moe", "granitemoe")),
    ("ministral", {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 3, **NARROW}, ("mixtral",)),
    (
        "ministral3",
        {**NARROW, **rope("yarn", factor=2.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.1)},
        ("mixtral", "qwen2_moe", "solar_open"),
    ),
    ("qwen2", {**LLAMA3, **TIED}, ("qwen2_moe", "glm4_moe")),
    ("qwen2", SECOND_SLIDES, ("qwen2_moe",)),
    ("qwen2", QWEN_WINDOWS, ("qwen2_moe",)),
    ("qwen3", {**YARN, **WIDE}, ("qwen3_moe", "dots1", "glm4_moe")),
    ("qwen3", {**BIAS, **NARROW}, ("qwen3_moe", "dots1")),
    ("qwen3", {**SECOND_SLIDES, **NARROW}, ("dots1",)),
    ("qwen3", {**SLIDING, **NARROW, "max_window_layers": 0}, ("qwen3_moe", "dots1")),
    ("qwen3_5_text", DELTA, ("qwen3_5_moe_text",)),
    ("granite", {**MULTIPLIERS, **LLAMA3, **BIAS}, ("granitemoe", "granitemoeshared", "granitemoehybrid")),
    ("granite_swa", SINKS, ("granitemoe_swa",)),
    ("olmo2", LLAMA3, ("flex_olmo",)),
    ("olmo3", {"layer_types": ["full_attention"] * 3}, ("flex_olmo",)),
    ("phi3", LONGROPE, ("mixtral", "solar_open")),
    ("phi3", {"sliding_window": WINDOW}, ("mixtral",)),
    ("phi3", rope("default", partial_rotary_factor=0.5), ("glm4_moe",)),
    ("phi3", {**rope("default", partial_rotary_factor=0.5), "sliding_window": 64}, ("glm4_moe",)),  # never filled
    ("gemma", NARROW, ("mixtral", "granitemoe")),
    ("gemma", {**WIDE, "tie_word_embeddings": False}, ("mixtral", "granitemoe")),
    ("glm", {**NARROW, **BIAS}, ("glm4_moe",)),
    ("glm", {**WIDE, "attention_bias": False}, ("glm4_moe",)),
    ("ernie4_5", NARROW, ("ernie4_5_moe", "mixtral")),
    ("helium", NARROW, ("ernie4_5_moe",)),
    ("hunyuan_v1_dense", NARROW, ("hunyuan_v1_moe",)),
    ("cohere", {}, ("cohere2_moe",)),
    ("cohere2", {"sliding_window": WINDOW, "layer_types": SECOND_SLIDES["layer_types"]}, ("cohere2_moe",)),
    ("seed_oss", {**NARROW, **BIAS}, ("qwen2_moe", "solar_open", "glm4_moe")),
    ("internlm3", NARROW, ("mixtral", "qwen2_moe", "solar_open")),
    ("iquestcoder", NARROW, ("mixtral", "qwen2_moe", "solar_open")),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, ("llama4_text",)),
    ("lfm2", CONVOLUTION, ("lfm2_moe",)),
    ("youtu", LATENT, ("deepseek_v3", "glm4_moe_lite")),
]
CASES = [(source, changes, target) for source, changes, targets in EXACT for target in targets]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Tiny dense models with their logits, each made once: `dense("llama", {...})`."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def get(model_type: str, changes: Changes) -> tuple[Path, torch.Tensor]:
        key = f"{model_type} {sorted(changes.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp("dense") / model_type
            save_dense(path, model_type, **changes)
            made[key] = (path, logits(load(path), LONG_PROMPT))
        return made[key]

    return get


@pytest.mark.parametrize(
    ("source", "changes", "target"), CASES, ids=[f"{s}-{i}-{t}" for i, (s, _, t) in enumerate(CASES)]
)
def test_the_mixture_computes_what_the_dense_model_does(
    dense: Any, tmp_path: Path, source: str, changes: Changes, target: str
) -> None:
    path, expected = dense(source, changes)
    plan = apply(plan_of(open_checkpoint(path)), "upcycle", experts=4, to=target, proof=False)
    write_plan(plan, tmp_path / "out")
    assert read_config(tmp_path / "out")["model_type"] == target
    found = logits(load(tmp_path / "out"), LONG_PROMPT)
    assert (found - expected).abs().max() <= 1e-5


LEFT_OVERS: list[tuple[str, Changes, str]] = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "mixtral"),  # beside rope_parameters: it counts
    ("llama", {"num_experts_per_tok": 7, "moe_norm_min": 5.0, "norm_topk_prob": False}, "ernie4_5_moe"),
    ("llama", {"sliding_window": 8, "use_qk_norm": True}, "glm4_moe"),
    ("mistral", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 64}, "granitemoe"),
]


@pytest.mark.parametrize(("source", "stale", "target"), LEFT_OVERS)
def test_keys_that_only_the_new_type_reads_change_nothing(
    tmp_path: Path, source: str, stale: Changes, target: str
) -> None:
    save_dense(tmp_path / "dense", source)
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **stale}))
    expected = logits(load(tmp_path / "dense"), LONG_PROMPT)
    plan = apply(plan_of(open_checkpoint(tmp_path / "dense")), "upcycle", experts=4, to=target, proof=False)
    write_plan(plan, tmp_path / "out")
    assert (logits(load(tmp_path / "out"), LONG_PROMPT) - expected).abs().max() <= 1e-5


def test_a_share_of_heads_that_the_type_does_not_rotate_is_refused(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "llama")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "partial_rotary_factor": 0.5}))
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor is 0\.5") as caught:
        apply(plan_of(open_checkpoint(tmp_path / "dense")), "upcycle", experts=4, to="glm4_moe", proof=False)
    assert "remove the key" in (caught.value.hint or "")


def test_every_pair_is_tested() -> None:
    assert {(p.source_type, p.target_type) for p in PAIRS} == {(s, t) for s, _, t in CASES}
    assert {p.source_type for p in PAIRS} | {"cwm"} == {a.model_type for a in DENSE_TYPES}
    assert {p.target_type for p in PAIRS} == {a.model_type for a in MOE_TYPES}


BEYOND = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, llama_4_scaling_beta=0.1)


def refusal(path: Path, **parameters: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        apply(plan_of(open_checkpoint(path)), "upcycle", experts=4, proof=False, **parameters)
    return caught.value


REFUSED: list[tuple[str, Changes, str | None, str, str]] = [
    # source, config, --to, what would be lost, the nearest type that keeps it
    ("llama", BIAS, "mixtral", "biases on q, k and v", "--to granitemoe"),
    ("llama", BIAS, "qwen2_moe", "a bias on attention's output projection", "--to granitemoe"),
    ("llama", {"mlp_bias": True}, "mixtral", "biases in the FFN", "no type keeps everything"),
    ("llama", {"mlp_bias": True}, None, "biases in the FFN", "no type keeps everything"),
    ("llama", {}, "deepseek_v3", "latent", "--to mixtral"),
    ("llama", {}, "glm4_moe_lite", "latent", "--to mixtral"),
    ("llama", {}, "phimoe", "no type that a dense model becomes", "known"),
    ("llama", {}, "qwen3_moe", "norms on q and k", "--to mixtral"),
    ("mistral", {"sliding_window": WINDOW}, "qwen2_moe", "a sliding window here", "--to mixtral"),
    ("mistral", {"sliding_window": WINDOW}, "solar_open", "a sliding window of 8", "--to mixtral"),
    ("mistral", {"sliding_window": WINDOW}, "glm4_moe", "a sliding window of 8", "--to mixtral"),
    ("mistral", {"sliding_window": WINDOW}, "granitemoe", "a sliding window of 8", "--to mixtral"),
    ("ministral", {**SECOND_SLIDES, **NARROW}, "mixtral", "some layers with a window", "no type keeps everything"),
    ("ministral3", {**NARROW, **BEYOND}, "mixtral", "scaling of queries beyond the original context", "no type keeps"),
    ("cwm", NARROW, None, "some of its layers have a window", "known"),
    ("qwen2", SECOND_SLIDES, "glm4_moe", "a sliding window of 8", "--to qwen2_moe"),
    ("qwen2", {}, "mixtral", "biases on q, k and v", "--to qwen2_moe"),
    ("qwen3", {**SECOND_SLIDES, **NARROW}, "qwen3_moe", "some layers with a window", "--to dots1"),
    ("qwen3", {**SECOND_SLIDES, **NARROW}, "glm4_moe", "a sliding window of 8", "--to dots1"),
    ("qwen3", NARROW, "mixtral", "norms on q and k", "--to qwen3_moe"),
    ("olmo3", {"sliding_window": WINDOW}, "flex_olmo", "a sliding window of 8", "no type keeps everything"),
    ("phi3", rope("default", partial_rotary_factor=0.5), "mixtral", "rotary position embedding", "--to glm4_moe"),
    ("phi3", {}, "phimoe", "no type that a dense model becomes", "known"),
    ("gemma", NARROW, "qwen2_moe", "", "--to mixtral"),
    ("granite", MULTIPLIERS, "mixtral", "the factor on", "--to granitemoe"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "mixtral", "NoPE", "--to llama4_text"),
    ("cohere2", {"sliding_window": WINDOW}, "mixtral", "the kind of norm", "--to cohere2_moe"),
    ("youtu", LATENT, "mixtral", "the kind of attention", "--to deepseek_v3"),
    ("seed_oss", {**NARROW, "attention_out_bias": True}, "solar_open", "a bias on attention's output", "no type keeps"),
    ("glm", {**NARROW, **BIAS}, "mixtral", "", "--to glm4_moe"),
]


@pytest.mark.parametrize(
    ("source", "changes", "to", "reason", "nearest"),
    REFUSED,
    ids=[f"{s}-{i}-{t}" for i, (s, _, t, *_) in enumerate(REFUSED)],
)
def test_what_would_lose_something_is_refused(
    dense: Any, source: str, changes: Changes, to: str | None, reason: str, nearest: str
) -> None:
    error = refusal(dense(source, changes)[0], to=to)
    assert reason in error.message
    assert nearest in (error.hint or "")


@pytest.mark.parametrize("model_type", NO_PAIR)
def test_types_without_a_pair_say_why(tmp_path: Path, model_type: str) -> None:
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    error = refusal(tmp_path)
    assert NO_PAIR[model_type] in error.message
    assert "known: llama" in (error.hint or "")
