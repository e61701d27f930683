"""The forms that other programs read: `convert --for`, `validate --for`, and what an upcycle says of each of them.

What the programs themselves compute is in tests/clients (`make clients`).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.decoders.lookup import DENSE_TYPES
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.tensors import Full
from moesurgery.families.client_types import LLAMA_CPP_TYPES
from moesurgery.families.clients import CLIENTS, Wants
from moesurgery.families.table import FAMILIES
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import Result
from tests.dense import LATENT, LLAMA3, LONG_PROMPT, NARROW, TIED, save_dense
from tests.tiny import load, logits, read_config, read_tensors, same_bits, save_tiny

Cli = Callable[..., Result]
GLM_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", "[gMASK]")


def upcycled(dense: Path, out: Path, **parameters: Any) -> Path:
    write_plan(apply(plan_of(open_checkpoint(dense)), "upcycle", experts=4, proof=False, **parameters), out)
    return out


def converted(model: Path, out: Path, client: str) -> Path:
    write_plan(apply(plan_of(open_checkpoint(model)), "convert", client=client), out)
    return out


def codes_for(model: Path, client: str) -> set[str]:
    report = validate_checkpoint(model, level="config", client=client)
    return {finding.code for finding in report.findings if finding.code.startswith("K") and finding.severity == "error"}


def edit_config(model: Path, *without: str, **changes: Any) -> None:
    config = {key: value for key, value in {**read_config(model), **changes}.items() if key not in without}
    (model / "config.json").write_text(json.dumps(config))


def add_tokenizer(model: Path, *added: str) -> None:
    tokens = [{"content": token, "id": i} for i, token in enumerate(added)]
    vocabulary = {f"t{i}": i for i in range(64)}
    text = {"added_tokens": tokens, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}}
    (model / "tokenizer.json").write_text(json.dumps(text))


def test_the_types_of_the_table_are_types_that_we_know() -> None:
    known = {t for family in FAMILIES for t in family.model_types} | {a.model_type for a in DENSE_TYPES}
    known |= {"gemma2", "gemma3_text"}
    for client in CLIENTS.values():
        assert (client.types or set()) <= known, client.name
        assert client.heads <= (client.types or known)
        for key in client.keys:
            assert key.types & (client.types or known)
        for fault in client.faults:
            assert fault.types & (client.types or known)


# Upcycles: the form that all read, and what is said of those that compute something else

SAID: list[tuple[str, dict[str, Any], str, dict[str, str]]] = [
    # dense type, config, --to, what is said of which client
    ("llama", {}, "mixtral", {}),
    ("llama", LLAMA3, "mixtral", {"mlx": "scaled RoPE"}),
    ("llama", LLAMA3, "granitemoe", {"llama.cpp": "Llama 3's"}),
    ("mistral", {"sliding_window": None}, "mixtral", {}),
    ("mistral", {"sliding_window": 8}, "mixtral", {"mlx": "sliding window", "llama.cpp": "sliding window"}),
    ("qwen2", {}, "qwen2_moe", {"mlx": "never renormalises", "llama.cpp": "never renormalises"}),
    ("qwen2", {}, "glm4_moe", {}),
    ("qwen3", {"head_dim": 8}, "qwen3_moe", {}),
    ("qwen3", {"head_dim": 8}, "dots1", {"sglang": "no code", "llama.cpp": "as many key and value heads as heads"}),
    ("qwen3", {"head_dim": 8, "num_key_value_heads": 4}, "dots1", {"sglang": "no code"}),
    ("phi3", {}, "mixtral", {}),
    ("granite", {}, "granitemoe", {}),
    ("granite", {}, "granitemoeshared", {"mlx": "no code"}),
    ("granite", {}, "granitemoehybrid", {"llama.cpp": "Mamba"}),
    ("youtu", LATENT, "deepseek_v3", {}),
    ("youtu", LATENT, "glm4_moe_lite", {"transformers4": "no code"}),
    (
        "llama",
        {},
        "llama4_text",
        {"llama.cpp": "attn_temperature_tuning", "mlx": "no code", "vllm": "one expert per token"},
    ),
    ("gemma", NARROW, "mixtral", dict.fromkeys(("vllm", "sglang", "llama.cpp", "mlx"), "SiLU")),
]


@pytest.mark.parametrize(
    ("source", "changes", "target", "said"), SAID, ids=[f"{s}-{t}-{i}" for i, (s, _, t, _) in enumerate(SAID)]
)
def test_an_upcycle_names_the_clients_in_which_it_is_not_exact(
    tmp_path: Path, source: str, changes: dict[str, Any], target: str, said: dict[str, str]
) -> None:
    save_dense(tmp_path / "dense", source, **changes)
    plan = apply(plan_of(open_checkpoint(tmp_path / "dense")), "upcycle", experts=4, to=target, proof=False)
    found = plan.steps[-1].report["clients"]
    assert found.keys() == said.keys()
    for client, words in said.items():
        assert words in "; ".join(found[client])
        assert any(note.startswith(f"not exact in {client}: ") for note in plan.steps[-1].notes)
    write_plan(plan, tmp_path / "out")
    for client in CLIENTS:  # all others read the file as it is
        assert codes_for(tmp_path / "out", client) == ({"K01"} if client in said else set()), client


@pytest.mark.parametrize(
    ("source", "changes", "target", "said"), SAID, ids=[f"{s}-{t}-{i}" for i, (s, _, t, _) in enumerate(SAID)]
)
def test_it_is_said_before_anything_is_written(
    ok: Cli, tmp_path: Path, source: str, changes: dict[str, Any], target: str, said: dict[str, str]
) -> None:
    save_dense(tmp_path / "dense", source, **changes)
    options = ("--experts", 4, "--to", target, "--no-proof", "--dry-run", "-o", tmp_path / "out")
    lines = [line for line in ok("upcycle", tmp_path / "dense", *options).out.splitlines() if "not exact in" in line]
    assert len(lines) == len(said)
    for client, words in said.items():
        assert any(f"not exact in {client}: " in line and words in line for line in lines), lines
    assert not (tmp_path / "out").exists()


def test_a_type_that_no_mixture_computes_is_refused_before_anything_is_written(cli: Cli, tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "gemma2", head_dim=8)
    refused = cli("upcycle", tmp_path / "dense", "--experts", 4, "-o", tmp_path / "out")
    assert refused.code == 2
    assert "gemma2" in refused.err
    assert "hint:" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_client_chooses_the_type(ok: Cli, cli: Cli, tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "qwen2")
    options = ("upcycle", tmp_path / "dense", "--experts", 4, "--no-proof")
    for client, target in (("vllm", "qwen2_moe"), ("mlx", "glm4_moe"), ("transformers4", "qwen2_moe")):
        ok(*options, "--for", client, "-o", tmp_path / client)
        assert read_config(tmp_path / client)["model_type"] == target
    refused = cli(*options, "--for", "mlx", "--to", "qwen2_moe", "-o", tmp_path / "no")
    assert refused.code == 2
    assert "mlx: it never renormalises the gates of this type" in refused.err
    assert "--to glm4_moe" in refused.err
    assert not (tmp_path / "no").exists()
    assert "sgl" in cli(*options, "--for", "sgl").err


def test_a_type_of_which_the_converter_asks_for_other_tokens(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "qwen2")
    add_tokenizer(tmp_path / "dense", *GLM_TOKENS[:2])
    plan = plan_of(open_checkpoint(tmp_path / "dense"))
    made = apply(plan, "upcycle", experts=4, to="glm4_moe", proof=False)
    asked = "its converter asks the tokenizer for <|observation|>, [gMASK]"
    assert made.steps[-1].report["clients"] == {"llama.cpp": [asked]}
    with pytest.raises(RefusedError, match="would lose something") as caught:
        apply(plan, "upcycle", experts=4, client="llama.cpp", proof=False)
    assert asked in caught.value.message
    add_tokenizer(tmp_path / "dense", *GLM_TOKENS)
    plan = plan_of(open_checkpoint(tmp_path / "dense"))
    assert apply(plan, "upcycle", experts=4, client="llama.cpp", proof=False).config["model_type"] == "glm4_moe"


def test_a_type_of_which_the_converter_asks_for_another_tokenizer(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "llama")
    add_tokenizer(tmp_path / "dense")
    made = apply(plan_of(open_checkpoint(tmp_path / "dense")), "upcycle", experts=4, to="ernie4_5_moe", proof=False)
    assert made.steps[-1].report["clients"] == {"llama.cpp": ["its converter asks for tokenizer.model"]}
    (tmp_path / "dense" / "tokenizer.model").write_bytes(b"\n")
    made = apply(plan_of(open_checkpoint(tmp_path / "dense")), "upcycle", experts=4, to="ernie4_5_moe", proof=False)
    assert made.steps[-1].report["clients"] == {}


@pytest.mark.parametrize("rope", ["both", "older", "newer"])
@pytest.mark.parametrize("rules", [{}, LLAMA3], ids=["plain", "scaled"])
def test_upcycles_have_rope_in_both_spellings(tmp_path: Path, rope: str, rules: dict[str, Any]) -> None:
    save_dense(tmp_path / "dense", "llama", **rules)
    stated = read_config(tmp_path / "dense")["rope_parameters"]
    scaling = {k: v for k, v in stated.items() if k != "rope_theta"} if rules else None
    older = {"rope_theta": stated["rope_theta"], "rope_scaling": scaling}
    if rope != "newer":
        edit_config(tmp_path / "dense", *(["rope_parameters"] if rope == "older" else []), **older)
    config = read_config(upcycled(tmp_path / "dense", tmp_path / "out", to="mixtral"))
    assert {key: config[key] for key in older} == older
    assert config["rope_parameters"] == stated
    expected = logits(load(tmp_path / "dense"), LONG_PROMPT)
    assert (logits(load(tmp_path / "out"), LONG_PROMPT) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_tied_heads_are_written_where_a_client_has_none(tmp_path: Path, target: str) -> None:
    save_dense(tmp_path / "dense", "llama", **TIED)
    tensors = read_tensors(upcycled(tmp_path / "dense", tmp_path / "out", to=target))
    assert same_bits(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    expected = logits(load(tmp_path / "dense"), LONG_PROMPT)
    assert (logits(load(tmp_path / "out"), LONG_PROMPT) - expected).abs().max() <= 1e-5


def test_heads_stay_tied_where_every_client_reads_them(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "granite", **TIED)
    tensors = read_tensors(upcycled(tmp_path / "dense", tmp_path / "out", to="granitemoe"))
    assert "lm_head.weight" not in tensors
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is True


def test_no_gate_of_a_shared_expert_is_zero(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "qwen2")
    for share in (0, 0.25):
        tensors = read_tensors(upcycled(tmp_path / "dense", tmp_path / f"{share}", shared_expert=share, seed=1))
        gates = [tensor for name, tensor in tensors.items() if name.endswith("shared_expert_gate.weight")]
        assert gates
        assert all((gate != 0).all() for gate in gates)
        # Exactly 1/2 for any hidden state that is not enormous.
        assert all(torch.sigmoid(gate.float() @ (1e4 * torch.ones(32))).item() == 0.5 for gate in gates)


def test_deepseek_says_how_it_scores(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "youtu", **LATENT)
    config = read_config(upcycled(tmp_path / "dense", tmp_path / "out", to="deepseek_v3"))
    assert (config["scoring_func"], config["topk_method"]) == ("sigmoid", "noaux_tc")


# convert --for mends what validate --for finds


def break_rope(model: Path) -> None:
    edit_config(model, "rope_theta", "rope_scaling")


def break_nothing_else(model: Path) -> None:
    edit_config(model, rope_theta=read_config(model)["rope_parameters"]["rope_theta"])


def break_counts(model: Path) -> None:
    edit_config(model, "num_experts", num_local_experts=8)
    break_nothing_else(model)


def break_scores(model: Path) -> None:
    edit_config(model, "scoring_func", "topk_method")


MENDED: list[tuple[str, dict[str, Any], str, Callable[[Path], None], str, str]] = [
    ("mixtral", {}, "mlx", break_rope, "K03", "rope_theta"),
    ("mixtral", {}, "transformers4", break_rope, "K03", "rope_theta"),
    ("qwen3_moe", {}, "transformers4", break_counts, "K04", "num_experts"),
    ("deepseek_v3", {}, "vllm", break_scores, "K04", "scoring_func, topk_method"),
    ("deepseek_v3", {}, "llama.cpp", break_scores, "K04", "needs scoring_func"),
    ("qwen2_moe", {"norm_topk_prob": False, **TIED}, "mlx", lambda model: None, "K05", "lm_head.weight"),
    ("olmoe", TIED, "llama.cpp", lambda model: None, "K05", "lm_head.weight"),
    ("dots1", {**TIED, "num_key_value_heads": 4}, "llama.cpp", lambda model: None, "K05", "lm_head.weight"),
    ("glm4_moe", TIED, "vllm", lambda model: None, "K05", "lm_head.weight"),
]


@pytest.mark.parametrize(
    ("model_type", "changes", "client", "damage", "code", "words"),
    MENDED,
    ids=[f"{m[0]}-{m[2]}-{m[4]}" for m in MENDED],
)
def test_what_a_client_misses_is_found_and_mended(
    ok: Cli,
    cli: Cli,
    tmp_path: Path,
    model_type: str,
    changes: dict[str, Any],
    client: str,
    damage: Callable[[Path], None],
    code: str,
    words: str,
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    save_tiny(model_type, model, **changes)
    damage(model)
    before = validate_checkpoint(model, level="config", client=client)
    mine = [finding for finding in before.findings if finding.code == code]
    assert len(mine) == 1
    assert words in mine[0].message
    assert f"convert --for {client}" in (mine[0].hint or "")
    assert cli("validate", model, "--level", "config", "--for", client).code == 1
    assert f"for {client}: " in ok("convert", model, "--for", client, "-o", out).out
    assert ok("validate", out, "--level", "config", "--for", client).code == 0
    assert (logits(load(out)) - logits(load(model))).abs().max() <= 1e-6


@pytest.mark.parametrize("client", CLIENTS)
def test_layouts(tmp_path: Path, client: str) -> None:
    save_tiny("mixtral", tmp_path / "fused", fused=True)
    unread = client != "transformers5"
    assert ("K02" in codes_for(tmp_path / "fused", client)) == unread
    out = converted(tmp_path / "fused", tmp_path / "out", client)
    (kind,) = {block.layout.kind for block in plan_of(open_checkpoint(out)).anatomy.blocks if block.layout}
    assert kind == ("per-expert" if unread else "fused")
    assert codes_for(out, client) == set()
    assert (logits(load(out)) - logits(load(tmp_path / "fused"))).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("model_type", "readers"), [("qwen3_moe", {"transformers5", "vllm", "llama.cpp"}), ("mixtral", {"transformers5"})]
)
def test_who_reads_the_fused_layout_is_said(tmp_path: Path, model_type: str, readers: set[str]) -> None:
    save_tiny(model_type, tmp_path / "model")
    plan = apply(plan_of(open_checkpoint(tmp_path / "model")), "convert", layout="fused")
    (note,) = plan.steps[-1].notes
    assert {name for name in CLIENTS if f"{name}," in note or f"{name} do" in note} == CLIENTS.keys() - readers
    back = apply(plan, "convert", layout="per-expert")
    assert back.steps[-1].notes == ()


def test_a_layout_that_the_client_does_not_read_is_refused(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    with pytest.raises(RefusedError, match="mlx does not read experts that are fused") as caught:
        apply(plan_of(open_checkpoint(tmp_path / "model")), "convert", layout="fused", client="mlx")
    assert caught.value.hint == "leave --layout out"


def test_gates_of_zeros(tmp_path: Path) -> None:
    save_tiny("qwen2_moe", tmp_path / "model", norm_topk_prob=False)
    plan = plan_of(open_checkpoint(tmp_path / "model"))
    gates = [name for name in plan.tensors if name.endswith("shared_expert_gate.weight")]
    zeros = {n: Full(0.0, e.dtype, e.shape) if n in gates else e for n, e in plan.tensors.items()}
    write_plan(replace(plan, tensors=zeros), tmp_path / "zero")
    assert "K06" in codes_for(tmp_path / "zero", "llama.cpp")
    assert "K06" not in codes_for(tmp_path / "zero", "vllm")
    out = converted(tmp_path / "zero", tmp_path / "out", "llama.cpp")
    assert codes_for(out, "llama.cpp") == set()
    assert (logits(load(out)) - logits(load(tmp_path / "zero"))).abs().max() == 0


def test_what_no_form_mends_is_refused(cli: Cli, tmp_path: Path) -> None:
    save_tiny("qwen2_moe", tmp_path / "model", norm_topk_prob=True)
    assert codes_for(tmp_path / "model", "mlx") == {"K01"}
    refused = cli("convert", tmp_path / "model", "--for", "mlx", "-o", tmp_path / "out")
    assert refused.code == 2
    assert "mlx (mlx-lm 0.32) does not run this model as it is: it never renormalises the gates" in refused.err
    assert "it is for transformers4, transformers5, vllm, sglang" in refused.err
    assert not (tmp_path / "out").exists()


def test_a_client_that_nobody_knows(cli: Cli, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model")
    assert "--for mxl: unknown" in cli("validate", tmp_path / "model", "--for", "mxl").err
    assert "did you mean 'mlx'?" in cli("validate", tmp_path / "model", "--for", "mxl").err
    with pytest.raises(RecipeError, match="there is no client 'mxl'"):
        validate_checkpoint(tmp_path / "model", client="mxl")
    assert cli("convert", tmp_path / "model", "--for", "mxl").code == 2


def test_to_dense_says_who_runs_it_and_writes_both_spellings(ok: Cli, cli: Cli, tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "youtu", **LATENT)
    upcycled(tmp_path / "dense", tmp_path / "moe", to="deepseek_v3")
    out = ok("to-dense", tmp_path / "moe", "--expert", 0, "-o", tmp_path / "back").out
    assert "not for mlx: it has no code for youtu" in out
    assert "not for transformers4: it has no code for youtu" in out
    refused = cli("to-dense", tmp_path / "moe", "--expert", 0, "--for", "mlx", "-o", tmp_path / "no")
    assert refused.code == 2
    assert "mlx: it has no code for youtu" in refused.err
    save_tiny("mixtral", tmp_path / "mixtral")
    ok("to-dense", tmp_path / "mixtral", "--expert", 0, "--for", "mlx", "-o", tmp_path / "mistral")
    config = read_config(tmp_path / "mistral")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert codes_for(tmp_path / "mistral", "mlx") == set()


def test_every_wish_is_met_by_the_form_for_all(tmp_path: Path) -> None:
    """`Wants` a config that has what all clients want is empty."""
    save_dense(tmp_path / "dense", "llama")
    for target in ("mixtral", "solar_open", "ernie4_5_moe", "llama4_text"):
        config = read_config(upcycled(tmp_path / "dense", tmp_path / target, to=target))
        assert Wants(config).keys == {}, target
    assert "mixtral" in LLAMA_CPP_TYPES


# Adapters and tied models say for whom they are


def test_an_adapter_says_for_whom_it_is(ok: Cli, tmp_path: Path) -> None:
    for name, model_type in (("moe", "mixtral"), ("dense", "llama")):
        base, tuned = tmp_path / f"{name}-base", tmp_path / f"{name}-tuned"
        (save_tiny if name == "moe" else lambda t, p: save_dense(p, t))(model_type, base)
        tensors = {n: t + 0.01 if "layers" in n and t.dim() == 2 else t for n, t in read_tensors(base).items()}
        shutil.copytree(base, tuned)
        for file in tuned.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / f"{name}-adapter"
        said = ok("extract-lora", base, tuned, "--rank", 2, "-o", out)
        assert "the adapter is for transformers 5 with PEFT" in said.out + said.err
        assert ("which llama.cpp's converter and others refuse" in said.out + said.err) == (name == "moe")
        again = ok("extract-lora", base, tuned, "--rank", 2, "-o", tmp_path / f"{name}-2", "--json").json
        assert "MODEL+ADAPTER" in again["readers"] or name == "dense"


def test_an_adapter_of_experts_serves_all_once_it_is_merged(ok: Cli, tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "base")
    tied, recipe = tmp_path / "tied", tmp_path / "r.yaml"
    report = ok("tie-blocks", tmp_path / "base", "--blocks", "0,0", "--relax", 4, "-o", tied, "--materialize")
    assert "which llama.cpp's converter and others refuse" in report.out
    recipe.write_text(f"models: [{{model: {tied}+{tied / 'adapter'}}}]\nmerge_method: passthrough\n")
    ok("merge", recipe, "-o", tmp_path / "merged")
    edit_config(tmp_path / "merged", rope_theta=read_config(tmp_path / "merged")["rope_parameters"]["rope_theta"])
    for client in ("transformers4", "llama.cpp", "mlx", "vllm"):
        assert codes_for(tmp_path / "merged", client) == set()


def test_tied_models_say_what_they_need(ok: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("mixtral", tmp_path / "base")
    out = ok("tie-blocks", tmp_path / "base", "--blocks", "0,0", "-o", tmp_path / "tied").out
    assert "loads in transformers 5 with trust_remote_code=True" in out
    assert "transformers 4 and other programs refuse it" in out
    assert codes_for(tmp_path / "tied", "transformers4") == {"K01"}
    code = (tmp_path / "tied" / "modeling_tied.py").read_text()
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)  # as in transformers 4
    with pytest.raises(ImportError, match=r"tied blocks need transformers 5 or newer, and this is .*--materialize"):
        exec(compile(code, "modeling_tied.py", "exec"), {"__name__": "modeling_tied"})
