"""`fit`: budgets are kept, recipes give the same bytes, and what cannot be is said with what to type next."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DEMO, Result
from tests.gguf_make import write_gguf
from tests.headers import header_checkpoint

Cli = Callable[..., Result]
TEXT = ["--text", DEMO.parent / "calibration-code.txt", "--window", 32, "--tokens", 512]
QUICK = [*TEXT, "--measured", 2, "--repaired", 1, "--by", "gram"]
LIMIT = 12_000_000


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_the_budget_is_kept_and_the_recipe_gives_the_same_bytes(demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    out, picture = tmp_path / "out", tmp_path / "front.svg"
    command = ["fit", demo, "--memory", "12MB", "--context", 128, *QUICK, "-o", out]
    dry = ok(*command, "--dry-run", "--json").json
    assert not out.exists()
    assert dry["bytes_written"] <= LIMIT
    told = ok(*command, "--picture", picture)
    assert "is used again" in " ".join(told.err.split())  # the search of the dry run
    assert "(taken)" in told.out
    assert "10 % more memory" in told.out
    written = weights(out)
    record = json.loads((tmp_path / "out.fit.json").read_text())
    taken = next(c for c in dry["fit"]["candidates"] if c["shape"] == record["taken"])
    assert sum(map(len, written.values())) <= LIMIT - taken["kv_bytes"]
    assert sum(map(len, written.values())) <= taken["weight_bytes"]
    assert record["taken"] in picture.read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(ok(*command, "--print-recipe").out)
    ok("run", recipe, "-o", tmp_path / "again")
    assert weights(tmp_path / "again") == written
    assert ok("validate", out, "--level", "forward").code == 0
    other = cli("fit", demo, "--memory", "11MB", "--context", 128, *QUICK, "-o", out, "--dry-run")
    assert other.code == 2
    assert "record of another search: it differs in shapes" in " ".join(other.err.split())


def test_headers_alone_show_what_fits(tmp_path: Path, ok: Cli) -> None:
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 128,
    }
    block = "model.layers.0.block_sparse_moe"
    shapes = {"model.embed_tokens.weight": [128, 64], "lm_head.weight": [128, 64], "model.norm.weight": [64]}
    shapes |= {f"model.layers.0.self_attn.{p}_proj.weight": [64, 64] for p in "qkvo"}
    shapes |= {f"model.layers.0.{n}_layernorm.weight": [64] for n in ("input", "post_attention")}
    shapes |= {f"{block}.gate.weight": [8, 64]}
    for e in range(8):
        shapes |= {f"{block}.experts.{e}.{w}.weight": [128, 64] if w != "w2" else [64, 128] for w in ("w1", "w2", "w3")}
    header_checkpoint(tmp_path / "model", config, shapes, sparse=False)
    command = ["fit", tmp_path / "model", "--memory", "320kB", "--context", 64, "--accelerator", "h100", "--dry-run"]
    found = ok(*command, "--json").json
    assert found["shapes"]
    for entry in found["shapes"]:
        assert entry["memory"] <= 320_000
        assert entry["tokens_per_second"] >= found["original"]["tokens_per_second"]
    assert {entry["experts"] for entry in found["shapes"]} >= {8}
    assert "which of them costs least" in ok(*command).out
    fast = ok(*command, "--speed", 1.01 * found["original"]["tokens_per_second"], "--json").json
    assert all(e["tokens_per_second"] > found["original"]["tokens_per_second"] for e in fast["shapes"])
    only = ok(*command, "--only", "experts", "--json").json
    assert {(e["width"], e["top_k"]) for e in only["shapes"]} == {(128, 2)}
    kept = ok(*command, "--keep", "experts,top-k", "--json").json
    assert {(e["experts"], e["top_k"]) for e in kept["shapes"]} == {(8, 2)}


def test_a_narrower_form_alone_may_do(models: Callable[..., Path], ok: Cli) -> None:
    model = models("mixtral", dtype="float32")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found = ok("fit", model, "--memory", str(int(0.9 * size)), "--context", 1, "--dry-run", "--json").json
    whole = found["original"]
    assert any(
        e["form"] == "bfloat16" and (e["experts"], e["width"]) == (whole["experts"], whole["width"])
        for e in found["shapes"]
    )


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (["--memory", "1MB"], "no shape of this model fits: the smallest takes", "--memory"),
        (["--memory", "12MB"], "fit needs text to choose by", "--dry-run"),
        (["--memory", "much"], "--memory: 'much' is not a size", ""),
        (["--memory", "12MB", "--speed", "40tok/s"], "--speed needs to know of which machine", "--accelerator"),
        (["--memory", "12MB", "--accelerator", "abacus"], "unknown accelerator", "known:"),
        (["--memory", "12MB", "--only", "layers"], "'layers' is not known", "experts, width, top-k, form"),
        (["--memory", "12MB", "--only", "width", "--keep", "width"], "leave nothing to change", ""),
        (["--memory", "12MB", "--context", "long"], "--context is 'long'", "32k"),
        (["--memory", "12MB", "--by", "luck"], "--by is 'luck'", ""),
    ],
)
def test_what_cannot_be(demo: Path, tmp_path: Path, cli: Cli, words: list[str], said: str, hint: str) -> None:
    result = cli("fit", demo, "--context", 128, "-o", tmp_path / "out", *words)
    assert result.code == 2
    text = " ".join(result.err.split())
    assert said in text
    assert hint in text
    assert not (tmp_path / "out").exists()


def test_a_model_that_fits_is_left_alone(demo: Path, tmp_path: Path, ok: Cli) -> None:
    told = ok("fit", demo, "--memory", "1GB", *TEXT, "-o", tmp_path / "out")
    assert "it fits as it is" in told.out
    assert list(tmp_path.iterdir()) == []


def test_what_fits_of_a_gguf_is_made_by_drop_experts(tmp_path: Path, ok: Cli, cli: Cli) -> None:
    """Experts and top-k alone change; the bytes promised are those of the file, KV cache beside them."""
    model = write_gguf(tmp_path / "m.gguf", "Q4_K")
    command = ("fit", model, "--memory", "1.2MB", "--context", 64, "--dry-run")
    found = ok(*command, "--json").json["shapes"]
    assert {shape["width"] for shape in found} == {256}
    three = next(shape for shape in found if shape["experts"] == 3)
    assert three["kv_bytes"] == 64 * 2 * 2 * 256 * 2  # positions, layers, keys and values, their width, bytes
    ok("drop-experts", model, "--keep", "0,1,2", "-o", tmp_path / "out")
    size = (tmp_path / "out" / "m.gguf").stat().st_size
    assert size <= three["weight_bytes"] < size + 4096 * 2
    assert "rescale --top-k make them" in ok(*command).out
    refused = cli(*command, "--only", "width")
    assert "of a GGUF only experts and top-k" in refused.err
