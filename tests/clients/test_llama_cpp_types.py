"""Types that llama-quantize makes, K and IQ ones with an imatrix of ours: pruned before or after, and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from moesurgery import open_checkpoint
from moesurgery.validate.difference import diff_checkpoints
from tests.clients import cases
from tests.clients.llama_cpp import INSTALLED, converted, log_probabilities, quantised
from tests.conftest import DEMO
from tests.tiny import load

pytestmark = INSTALLED
EXPERTS, GONE = 8, (1, 4, 6)
KEPT = [e for e in range(EXPERTS) if e not in GONE]
# The numbers of llama_ftype; the WEIGHTED are made with an imatrix.
PLAIN = {"Q4_0": 2, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q3_K": 11, "Q4_K": 14, "Q6_K": 18, "IQ4_NL": 25}
WEIGHTED = {"Q2_K": 10, "Q5_K": 16, "IQ4_XS": 30, "IQ3_S": 26, "IQ3_XXS": 23, "IQ2_XXS": 19, "IQ2_XS": 20}
WEIGHTED |= {"IQ2_S": 29, "IQ1_S": 24, "IQ1_M": 31}
TYPES = {**PLAIN, **WEIGHTED}
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write every type of a tiny Qwen3-MoE: TYPE.gguf pruned after it was quantised, by us, TYPE-before.gguf before."""
    from moesurgery.cli import main

    folder = tmp_path_factory.mktemp("types")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    routing = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 64, "norm_topk_prob": True}
    cases.save(folder / "model", "qwen3_moe", {**sizes, **routing})

    def run(*command: object) -> None:
        assert main([*map(str, command), "-q"]) == 0

    options = ("--tokens", 8192, "--window", 128, "-o", folder / "s", "--imatrix", folder / "i.gguf")
    run("collect", folder / "model", "--text", DEMO.parent / "calibration-code.txt", *options)
    run("drop-experts", folder / "model", "--experts", ",".join(map(str, GONE)), "-o", folder / "pruned")
    whole, pruned = (converted(folder / m, folder / f"{m}-f32", "f32") for m in ("model", "pruned"))
    means = _means(folder / "i.gguf")
    assert all(np.ndim(values) == 2 and len(values) == EXPERTS for n, values in means.items() if "_exps" in n)
    np.savez(folder / "whole.npz", **means)
    np.savez(folder / "kept.npz", **{n: values[KEPT] if "_exps" in n else values for n, values in means.items()})
    jobs = []
    for kind, number in TYPES.items():
        for source, to, values in ((whole, f"{kind}-whole", "whole"), (pruned, f"{kind}-before", "kept")):
            imatrix = folder / f"{values}.npz" if kind in WEIGHTED else None
            jobs.append((source, folder / f"{to}.gguf", number, imatrix))
    quantised(jobs)
    (folder / "runs").mkdir()
    for kind in TYPES:
        source, out = folder / f"{kind}-whole.gguf", folder / f"{kind}-after"
        run("drop-experts", source, "--experts", ",".join(map(str, GONE)), "-o", out, "--validate")
        (out / source.name).rename(folder / "runs" / f"{kind}.gguf")
    return folder


def _means(imatrix: Path) -> dict[str, np.ndarray]:
    """Return the means of squares as llama-quantize reads them, by the package gguf: 1 where nothing was counted."""
    stored = {tensor.name: np.array(tensor.data, np.float32) for tensor in GGUFReader(imatrix).tensors}
    means = {}
    for name, sums in stored.items():
        if name.endswith(".in_sum2"):
            counts = stored[f"{name.removesuffix('.in_sum2')}.counts"].reshape(-1, 1)
            mean = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1)
            means[name.removesuffix(".in_sum2")] = mean if len(counts) > 1 else mean[0]
    return means


@pytest.mark.parametrize("kind", TYPES)
def test_drop_then_quantise_is_quantise_then_drop(kind: str, made: Path) -> None:
    before, after = (open_checkpoint(made / name) for name in (f"{kind}-before.gguf", f"runs/{kind}.gguf"))
    assert {info.dtype for name, info in after.tensors.items() if "_exps" in name} == {kind}
    assert not diff_checkpoints(before, after).tensors


def test_llama_cpp_runs_them(made: Path) -> None:
    """Its log-probabilities are those of transformers with the values that the package gguf reads from the file.

    llama.cpp rounds what such products read to 8 bits, so they are compared by their correlation.
    """
    tokens = cases.prompt()
    found = log_probabilities(made / "runs", tokens)
    model = load(made / "pruned")
    for kind in TYPES:
        with torch.no_grad():
            _fill(model, made / "runs" / f"{kind}.gguf")
            rows = model(torch.tensor([tokens])).logits[0].log_softmax(-1).double().numpy()
            _fill(model, made / "runs" / f"{kind}.gguf", shift=1)
            other = model(torch.tensor([tokens])).logits[0].log_softmax(-1).double().numpy()
        alike, unlike = (np.corrcoef(of.ravel(), found[kind].ravel())[0, 1] for of in (rows, other))
        print(f"{kind}: correlation with transformers {alike:.4f}, with its experts in another order {unlike:.4f}")
        assert alike > 0.98 > unlike


def _fill(model: torch.nn.Module, path: Path, shift: int = 0) -> None:
    """Give a model of transformers the values of a GGUF, its experts moved by `shift` places."""
    weights = {t.name: dequantize(t.data, GGMLQuantizationType(t.tensor_type)) for t in GGUFReader(path).tensors}
    tensors = {name: torch.from_numpy(np.array(values, np.float32)) for name, values in weights.items()}
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "lm_head.weight": tensors["output.weight"]}
    state["model.norm.weight"] = tensors["output_norm.weight"]
    for i in range(2):
        to = f"model.layers.{i}."
        for ours, theirs in _NAMES.items():
            state[f"{to}{theirs}.weight"] = tensors[f"blk.{i}.{ours}.weight"]
        gate, up, down = (tensors[f"blk.{i}.ffn_{part}_exps.weight"].roll(shift, 0) for part in ("gate", "up", "down"))
        state[f"{to}mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        state[f"{to}mlp.experts.down_proj"] = down
    model.load_state_dict(state)
