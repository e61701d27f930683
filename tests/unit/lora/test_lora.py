"""LoRA adapters applied and extracted, held to PEFT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Result
from tests.quantise import rewrite
from tests.tiny import PROMPT, load, logits, read_tensors

Cli = Callable[..., Result]
ATTENTION = ["q_proj", "v_proj", "o_proj"]


def with_adapter(base: Path, target: Path, **settings: Any) -> torch.Tensor:
    """Save a random adapter made by PEFT, and return what PEFT computes with it."""
    model = load(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            elif "modules_to_save" in name:
                value.add_(0.05 * torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(target)
    with torch.no_grad():
        return wrapped.eval()(PROMPT).logits.float()


def merged(ok: Cli, base: Path, adapter: Path, folder: Path) -> torch.Tensor:
    recipe = folder / "r.yaml"
    recipe.write_text(f"models: [{{model: {base}+{adapter}}}]\nmerge_method: passthrough\n")
    ok("merge", recipe, "-o", folder / "out", "--force")
    return logits(load(folder / "out"))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("mixtral", {"target_modules": ATTENTION}),
    "rslora, patterns": (
        "mixtral",
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "experts": (
        "mixtral",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts alone": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}),
    "experts as [in, out]": (
        "gpt_oss",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "whole modules and embeddings": (
        "mixtral",
        {"target_modules": [*ATTENTION, "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "dense": ("llama", {"target_modules": [*ATTENTION, "gate_proj", "down_proj"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_applied_as_peft_does(case: str, models: Any, ok: Cli, tmp_path: Path) -> None:
    family, settings = CASES[case]
    for fused in (False, True) if family in ("mixtral", "qwen3_moe") else (False,):
        base = models(family, fused=fused)
        theirs = with_adapter(base, tmp_path / f"adapter{fused}", **settings)
        found = merged(ok, base, tmp_path / f"adapter{fused}", tmp_path)
        assert float((theirs - logits(load(base))).abs().max()) > 0.01
        torch.testing.assert_close(found, theirs, rtol=2e-3, atol=2e-3)


def by_version(base: Path, target: Path, version: str, parameters: list[str]) -> torch.Tensor:
    """Save an adapter on experts as an older PEFT did, and return what it computed.

    Up to 0.18 PEFT took every stack of experts for [E, in, out], as it does today where a module says that it is
    transposed; 0.19.0 did so where a module says that it is not.
    """
    model = load(base)
    modules = [m for m in model.modules() if hasattr(m, "is_transposed")]
    own = [m.is_transposed for m in modules]
    for module in modules:
        module.is_transposed = True if version.startswith("0.18") else not module.is_transposed
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=[], target_parameters=parameters)
    )
    for module, transposed in zip(modules, own, strict=True):
        module.is_transposed = transposed
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    wrapped.save_pretrained(target)
    settings = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**settings, "peft_version": version}))
    with torch.no_grad():
        return wrapped.eval()(PROMPT).logits.float()


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SQUARE = {
    "mixtral": {"intermediate_size": 16},  # gate and up together are square
    "mixtral down": {"intermediate_size": 32},
    "mixtral wide": {},
    "gpt_oss": {"intermediate_size": 16},
    "gpt_oss down": {"intermediate_size": 32},
    "gpt_oss wide": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", ["0.18.0", "0.18.1.dev0", "0.19.0"])
@pytest.mark.parametrize("case", SQUARE)
def test_experts_as_older_versions_laid_them_out(case: str, version: str, models: Any, ok: Cli, tmp_path: Path) -> None:
    family = case.split()[0]
    for fused in (False, True) if family == "mixtral" else (False,):
        base = models(family, fused=fused, **SQUARE[case])
        theirs = by_version(base, tmp_path / f"adapter{fused}", version, EXPERTS)
        found = merged(ok, base, tmp_path / f"adapter{fused}", tmp_path)
        assert float((theirs - logits(load(base))).abs().max()) > 0.01
        torch.testing.assert_close(found, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_square_experts_of_an_unknown_version_are_refused(models: Any, ok: Cli, cli: Cli, tmp_path: Path) -> None:
    """Where experts are not square, shapes tell; where they are, nothing else but the version does."""
    for case, refused in (("mixtral", True), ("mixtral wide", False)):
        base = models("mixtral", **SQUARE[case])
        theirs = by_version(base, tmp_path / case, "0.18.0", EXPERTS[:1])
        settings = json.loads((tmp_path / case / "adapter_config.json").read_text())
        del settings["peft_version"]
        (tmp_path / case / "adapter_config.json").write_text(json.dumps(settings))
        if not refused:
            torch.testing.assert_close(merged(ok, base, tmp_path / case, tmp_path), theirs, rtol=2e-3, atol=2e-3)
            continue
        (tmp_path / "r.yaml").write_text(f"models: [{{model: {base}+{tmp_path / case}}}]\nmerge_method: passthrough\n")
        result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "no")
        assert result.code == 2
        assert "does not say which PEFT saved it: up to 0.18" in " ".join(result.err.split())
        assert '"peft_version": "0.18.0"' in result.err
        assert not (tmp_path / "no").exists()


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_written_here_say_their_layout(models: Any, ok: Cli, tmp_path: Path) -> None:
    """Square experts too are read back by us and by PEFT as they were meant."""
    base = models("mixtral", **SQUARE["mixtral"])
    theirs = with_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=EXPERTS)
    merged(ok, base, tmp_path / "adapter", tmp_path)
    ok("extract-lora", base, tmp_path / "out", "--rank", 3, "-o", tmp_path / "extracted")
    assert json.loads((tmp_path / "extracted" / "adapter_config.json").read_text())["peft_version"] == "0.19.1"
    torch.testing.assert_close(merged(ok, base, tmp_path / "extracted", tmp_path), theirs, rtol=2e-3, atol=2e-3)
    again = peft.PeftModel.from_pretrained(load(base), tmp_path / "extracted")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(PROMPT).logits.float(), theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_single_experts_from_transformers_4(models: Any, ok: Cli, tmp_path: Path) -> None:
    """Their names are those of the Hub's layout; they fit a fused checkpoint too."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 32, generator=generator), torch.randn(48, 2, generator=generator)
    name = "model.layers.1.block_sparse_moe.experts.5.w3"
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    merged(ok, models("mixtral"), folder, tmp_path)
    hub = read_tensors(tmp_path / "out")
    expected = read_tensors(models("mixtral"))[f"{name}.weight"] + 2 * b @ a
    torch.testing.assert_close(hub[f"{name}.weight"], expected)
    merged(ok, models("mixtral", fused=True), folder, tmp_path)
    stacked = read_tensors(tmp_path / "out")["model.layers.1.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(stacked[5, 48:], expected)


@pytest.mark.filterwarnings("ignore")
def test_an_adapted_model_merges_as_if_it_had_been_written(models: Any, ok: Cli, tmp_path: Path) -> None:
    base = models("mixtral")
    with_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    merged(ok, base, tmp_path / "adapter", tmp_path)
    shutil.move(tmp_path / "out", tmp_path / "written")
    results = []
    for model in (f"{base}+{tmp_path / 'adapter'}", str(tmp_path / "written")):
        (tmp_path / "r.yaml").write_text(
            f"models: [{{model: {base}}}, {{model: {model}}}]\nmerge_method: slerp\nbase_model: {base}\n"
            "parameters: {t: 0.3}\n"
        )
        ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--force")
        results.append(read_tensors(tmp_path / "out"))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    record = json.loads((tmp_path / "out" / "moesurgery.json").read_text())
    assert record["inputs"]


@pytest.mark.filterwarnings("ignore")
def test_a_base_with_its_adapter_alone(models: Any, ok: Cli, tmp_path: Path) -> None:
    """The shape of the recipes that write "lorablated" models."""
    base = models("llama")
    with_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    merged(ok, base, tmp_path / "adapter", tmp_path)
    written = read_tensors(tmp_path / "out")
    model = f"{base}+{tmp_path / 'adapter'}"
    (tmp_path / "r.yaml").write_text(
        f"base_model: {model}\nmerge_method: task_arithmetic\nparameters: {{normalize: false}}\n"
        f"slices: [{{sources: [{{layer_range: [0, 2], model: {model}, parameters: {{weight: 1.0}}}}]}}]\n"
    )
    ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--force")
    found = read_tensors(tmp_path / "out")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], value) for name, value in written.items())


def test_what_does_not_fit_is_refused(models: Any, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"models: [{{model: {models('mixtral')}+{folder}}}]\nmerge_method: passthrough\n")
    assert "has no adapter_model.safetensors" in cli("merge", recipe, "-o", tmp_path / "out").err
    for module, width in (("model.layers.0.self_attn.q_prj", 32), ("model.layers.0.self_attn.q_proj", 31)):
        factors = {"A": torch.zeros(2, width), "B": torch.zeros(32, 2)}
        tensors = {f"base_model.model.{module}.lora_{k}.weight": v for k, v in factors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        result = cli("merge", recipe, "-o", tmp_path / "out")
        assert result.code == 2
        assert "r.yaml:1: " in result.err
        assert "fits no tensor" in result.err
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    assert "use_dora, which is not applied" in cli("merge", recipe, "-o", tmp_path / "out").err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal"])
def test_adapters_that_belong_to_a_changed_base(begun: str, models: Any, ok: Cli, cli: Cli, tmp_path: Path) -> None:
    """PEFT takes the first components out of the base before it trains some kinds, and again when it loads them."""
    base, adapter = models("llama"), tmp_path / "adapter"
    rank = {"r": 4} if begun == "orthogonal" else {}
    wrapped = peft.get_peft_model(
        load(base), peft.LoraConfig(**{"r": 3, **rank}, target_modules=["q_proj"], init_lora_weights=begun)
    )
    wrapped.save_pretrained(adapter)
    taken = load(base).model.layers[0].self_attn.q_proj.weight
    left = wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    if torch.equal(taken, left):
        merged(ok, base, adapter, tmp_path)
        return
    (tmp_path / "r.yaml").write_text(f"models: [{{model: {base}+{adapter}}}]\nmerge_method: passthrough\n")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert result.code == 2
    assert f"r.yaml:1: adapter has init_lora_weights '{begun}'" in result.err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "gpt_oss"])
def test_extracting_gives_back_what_was_applied(family: str, models: Any, ok: Cli, tmp_path: Path) -> None:
    """PEFT itself loads the adapter onto the base, and gets the function of the tuned model."""
    base = models(family)
    experts = [] if family == "llama" else ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with_adapter(base, tmp_path / "adapter", target_modules=ATTENTION, target_parameters=experts or None)
    tuned = merged(ok, base, tmp_path / "adapter", tmp_path)
    found = ok("extract-lora", base, tmp_path / "out", "--rank", 3, "-o", tmp_path / "extracted", "--json").json
    assert found["left"] == []
    assert min(found["shares"].values()) > 0.999
    again = peft.PeftModel.from_pretrained(load(base), tmp_path / "extracted").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(PROMPT).logits.float(), tuned, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(merged(ok, base, tmp_path / "extracted", tmp_path), tuned, rtol=5e-3, atol=5e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "phimoe", "granitemoe", "llama4_text", "nemotron_h"])
def test_every_matrix_of_the_layers_is_where_peft_looks_for_it(
    family: str, models: Any, ok: Cli, tmp_path: Path
) -> None:
    """Names, nesting and orientation are those in memory: dense layers, shared experts, routers, renamed modules."""
    base = models(family)
    generator = torch.Generator().manual_seed(4)
    held = read_tensors(base)
    matrices = {
        n
        for n, t in held.items()
        if t.dim() in (2, 3) and re.search(r"layers\.\d.*(proj|gate|router|linear|w[123])", n)
    }
    if family == "nemotron_h":  # PEFT cannot adapt what its code takes without calling the module, nor this router
        matrices = {n for n in matrices if not re.search(r"out_proj|gate\.weight|dt_proj", n)}
    rewrite(
        base,
        tmp_path / "tuned",
        {n: t + 0.05 * torch.randn(t.shape, generator=generator) if n in matrices else t for n, t in held.items()},
        {},
    )
    found = ok("extract-lora", base, tmp_path / "tuned", "--rank", 64, "-o", tmp_path / "adapter", "--json").json
    assert found["left"] == []
    tuned = logits(load(tmp_path / "tuned"))
    assert float((tuned - logits(load(base))).abs().max()) > 0.1
    adapted = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(PROMPT).logits.float(), tuned, rtol=2e-3, atol=2e-3)
    merged(ok, base, tmp_path / "adapter", tmp_path)
    for name, value in read_tensors(tmp_path / "out").items():
        torch.testing.assert_close(value, read_tensors(tmp_path / "tuned")[name], rtol=1e-4, atol=1e-4)


def test_models_that_do_not_differ_have_no_adapter(models: Any, cli: Cli, tmp_path: Path) -> None:
    result = cli("extract-lora", models("llama"), models("llama"), "--rank", 2, "-o", tmp_path / "adapter")
    assert result.code == 2
    assert "do not differ" in result.err
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_transformers_does_not_know(models: Any, ok: Cli, tmp_path: Path) -> None:
    """It is in memory what it is in its files: every expert is a module of its own."""
    base, tuned = (shutil.copytree(models("mixtral"), tmp_path / name) for name in ("base", "tuned"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    for path in (base, tuned):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "sibyl", "architectures": ["Sibyl"]}))
    for file in tuned.glob("*.safetensors"):
        held = load_file(file)
        if f"{name}.weight" in held:
            held[f"{name}.weight"] += torch.outer(torch.arange(32.0), torch.arange(48.0))
            save_file(held, file, metadata={"format": "pt"})
    found = ok("extract-lora", base, tuned, "--rank", 1, "-o", tmp_path / "adapter", "--json").json
    assert list(found["shares"]) == [f"{name}.weight"]
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert factors.keys() == {f"base_model.model.{name}.lora_{k}.weight" for k in "AB"}


def test_the_factors_are_the_best_of_their_rank(models: Any, ok: Cli, tmp_path: Path) -> None:
    base = models("llama")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    generator = torch.Generator().manual_seed(2)
    for file in tuned.glob("*.safetensors"):
        held = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    result = ok("extract-lora", base, tuned, "--rank", 4, "-o", tmp_path / "adapter")
    assert "are not in the adapter" in result.err
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = read_tensors(base), read_tensors(tuned)
    name = "model.layers.1.mlp.down_proj"
    change = after[f"{name}.weight"] - before[f"{name}.weight"]
    a, b = (factors[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
    assert a.shape == (4, change.shape[1])
    best = torch.linalg.svdvals(change)[4:].square().sum()
    torch.testing.assert_close((change - b @ a).square().sum(), best, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("first", "second"), [(64, 66), (66, 64)])
def test_added_tokens_are_left_out_as_embeddings_are(
    models: Any, ok: Cli, tmp_path: Path, first: int, second: int
) -> None:
    """No adapter holds embeddings; other rows in one model change nothing for the layers."""
    base, tuned = models("mixtral", vocab_size=first), models("mixtral", vocab_size=second)
    tensors = read_tensors(tuned)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = read_tensors(base)[name] + torch.ones(32, 1) @ torch.arange(32.0)[None] / 32
    layers = {n: t for n, t in read_tensors(base).items() if ".layers." in n and n != name}
    rewrite(tuned, tmp_path / "tuned", {**tensors, **layers}, {})
    result = ok("extract-lora", base, tmp_path / "tuned", "--rank", 2, "-o", tmp_path / "adapter")
    assert "model.embed_tokens.weight" in result.err
    assert "lm_head.weight" in result.err
    merged(ok, base, tmp_path / "adapter", tmp_path)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[name], tensors[name], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_models_of_other_shapes_have_no_adapter(models: Any, cli: Cli, tmp_path: Path) -> None:
    tensors = read_tensors(models("mixtral"))
    tensors["model.norm.weight"] = torch.ones(16)
    rewrite(models("mixtral"), tmp_path / "m", tensors, {"model_type": "unknown"})
    rewrite(models("mixtral"), tmp_path / "base", read_tensors(models("mixtral")), {"model_type": "unknown"})
    result = cli("extract-lora", tmp_path / "base", tmp_path / "m", "--rank", 2, "-o", tmp_path / "adapter")
    assert result.code == 2
    assert "model.norm.weight is F32 [32] in base, and is F32 [16] in m" in result.err
    assert "an adapter is between two models of the same shapes" in result.err
    assert "convert" not in result.err
