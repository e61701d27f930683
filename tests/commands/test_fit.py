"""`fit`: budgets are kept, recipes give the same bytes, and what cannot be is said with what to type next."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgery import apply, open_checkpoint, plan_of
from tests.conftest import DEMO, Result
from tests.gguf_make import write_gguf
from tests.headers import header_checkpoint
from tests.quantise import make_form
from tests.tiny import read_config, read_tensors

Cli = Callable[..., Result]
TEXT = ["--text", DEMO.parent / "calibration-code.txt", "--window", 32, "--tokens", 512]
QUICK = [*TEXT, "--measured", 2, "--repaired", 1, "--by", "gram"]
LIMIT = 12_000_000


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_the_budget_is_kept_and_the_recipe_gives_the_same_bytes(demo: Path, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    out, picture = tmp_path / "out", tmp_path / "front.svg"
    command = ["fit", demo, "--memory", "12MB", "--context", 128, "--keep", "form", *QUICK, "--repaired", 3, "-o", out]
    dry = ok(*command, "--dry-run", "--json").json
    assert not out.exists()
    assert dry["bytes_written"] <= LIMIT
    told = ok(*command, "--picture", picture, "--plan", tmp_path / "plan.json")
    assert "is used again" in " ".join(told.err.split())  # the search of the dry run
    assert "(taken)" in told.out
    assert "10 % more memory" in told.out
    written = weights(out)
    record = json.loads((tmp_path / "out.fit.json").read_text())
    taken = next(c for c in dry["fit"]["candidates"] if c["shape"] == record["taken"])
    assert sum(map(len, written.values())) <= LIMIT - taken["kv_bytes"]
    assert sum(map(len, written.values())) <= taken["weight_bytes"]
    assert record["taken"] in picture.read_text()
    dropping, slimming = (
        next(n for n in record["repaired"] if re.fullmatch(p, n)) for p in (r"e\d-w256-k2", r"e8-w\d+-k2")
    )
    assert taken_of(record) == record["taken"]
    assert record["repaired"][record["taken"]] <= min(record["repaired"][dropping], record["repaired"][slimming])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(ok(*command, "--print-recipe").out)
    ok("run", recipe, "-o", tmp_path / "again")
    assert weights(tmp_path / "again") == written
    assert ok("validate", out, "--level", "forward").code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["text"][0]["file"] == "calibration-code.txt"
    shape = read_config(out)
    for entry in plan["layers"].values():
        assert len(entry.get("keep", range(8))) == shape["num_local_experts"]
        assert {len(own) for own in entry.get("neurons", {}).values()} <= {shape["intermediate_size"]}
        assert {"keep", "neurons"} & entry.keys()
    original = plan_of(open_checkpoint(demo))
    for operation in (choice for choice in ("slim-experts", "drop-experts") if f"- {choice}:" in recipe.read_text()):
        original = apply(original, operation, plan_file=str(tmp_path / "plan.json"))
    assert {name: (t.dtype, t.shape) for name, t in original.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in open_checkpoint(out).tensors.items()
    }
    command[command.index("12MB")] = "11MB"
    other = cli(*command, "--dry-run")
    assert other.code == 2
    assert "record of another search: it differs in shapes" in " ".join(other.err.split())


def taken_of(record: dict[str, Any]) -> str:
    """The shape with the least increase over all text, of those that were measured on more of it, where any were."""
    first, more = record["repaired"], record["further"]
    weights = record["heldout"]["tokens"], record["further_tokens"]
    return min(more or first, key=lambda name: weights[0] * first[name] + weights[1] * more.get(name, 0))


def test_shapes_that_cannot_be_told_apart_are_measured_on_more_text(demo: Path, tmp_path: Path, ok: Cli) -> None:
    """On windows that had no part in the search, with the losses that `perplexity` has there."""
    text = tmp_path / "text.txt"
    words = (DEMO.parent / "calibration-code.txt").read_text()
    text.write_text(words[: len(words) // 8])
    command = ["fit", demo, "--memory", "12MB", "--context", 128, "--only", "experts,width", "--window", 32]
    command += [
        "--by",
        "gram",
        "--measured",
        3,
        "--repaired",
        2,
        "--refit",
        "none",
        "--text",
        text,
        "-o",
        tmp_path / "o",
    ]
    shown = ok(*command, "--tokens", 512, "--dry-run").out
    record = json.loads((tmp_path / "o.fit.json").read_text())
    assert len(record["further"]) > 1
    assert f"measured on {record['further_tokens']:,} tokens more" in shown
    assert record["further_tokens"] == 512 // 32 * 31
    whole = ok(*command, "--tokens", 10**6, "--dry-run", "--force", "--json").json
    assert whole["fit"]["further"] == {"tokens": 0, "increases": {}}  # no text is left


def on_tokens(tmp_path: Path) -> list[object]:
    """Options of a quick search on a text of token ids, as tiny models have no tokenizer."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"input_ids": [i * i % 57 + 3 for i in range(2048)]}))
    return ["--text", text, *QUICK[2:]]


def size_of(model: Path) -> int:
    return sum(map(len, weights(model).values()))


def test_a_quantised_form_with_fewer_experts(models: Callable[..., Path], tmp_path: Path, ok: Cli) -> None:
    """What fits only in 4 bits and smaller still: repaired, then rounded, and within the limit."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model, out, recipe = models("mixtral", dtype="bfloat16", **sizes), tmp_path / "out", tmp_path / "recipe.yaml"
    common = ["fit", model, "--context", 1, *on_tokens(tmp_path), "--refit", "expert", "--forms", "int4", "--memory"]
    limit = int(0.42 * size_of(model))
    command = [*common, limit, "--only", "experts,form", "-o", out]
    ok(*command)
    record = json.loads((tmp_path / "out.fit.json").read_text())
    assert re.fullmatch(r"e[2-7]-w64-k2-int4", record["taken"])
    assert record["prices"][3] > 0
    assert record["repaired"][record["taken"]] != record["measured"][record["taken"]]
    assert size_of(out) <= limit
    assert read_config(out)["quantization_config"]["quant_method"] == "compressed-tensors"
    recipe.write_text(ok(*command, "--print-recipe").out)
    ok("run", recipe, "-o", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(out)
    whole = [*common, int(0.7 * size_of(model)), "--only", "form,width", "-o", tmp_path / "whole"]
    assert ok(*whole, "--dry-run", "--json").json["fit"]["candidates"][0]["shape"] == "e8-w64-k2-int4"
    assert not (tmp_path / "whole.refit").exists()  # nothing but rounding is missing
    assert "whole.stats.safetensors" in ok(*whole, "--print-recipe").out  # by which scales are chosen


def test_merging_is_tried_where_dropping_alone_costs_least(
    models: Callable[..., Path], tmp_path: Path, ok: Cli
) -> None:
    model, out = models("mixtral"), tmp_path / "out"
    command = ["fit", model, "--memory", int(0.7 * size_of(model)), "--context", 1, "--only", "experts,merging"]
    command += [*on_tokens(tmp_path), "--measured", 1, "--refit", "expert", "-o", out]
    ok(*command, "--repaired", 2)
    record = json.loads((tmp_path / "out.fit.json").read_text())
    assert sorted(record["repaired"]) == ["e4-w48-k2", "e4-w48-k2-merged"]
    assert record["taken"] == taken_of(record)
    assert bool(list(tmp_path.glob("out.merged-*"))) == record["taken"].endswith("merged")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(ok(*command, "--repaired", 2, "--print-recipe").out)
    ok("run", recipe, "-o", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(out)


def test_tied_blocks_where_asked(models: Callable[..., Path], tmp_path: Path, ok: Cli) -> None:
    model, out = models("mixtral", num_hidden_layers=4), tmp_path / "out"
    limit = int(0.4 * size_of(model))
    command = ["fit", model, "--memory", limit, "--context", 1, *on_tokens(tmp_path), "-o", out]
    shapes = ok(*command[:6], "--only", "experts,tie", "--dry-run", "--json").json["shapes"]
    assert {shape["tied"] for shape in shapes} == {True}  # half of the blocks, and fewer experts
    told = ok(*command, "--only", "experts,tie").out
    record = json.loads((tmp_path / "out.fit.json").read_text())
    assert record["taken"] == shapes[0]["shape"]
    assert record["taken"].endswith("-tied")
    assert record["taken"] in told
    assert record["repaired"][record["taken"]] == record["measured"][record["taken"]]
    assert size_of(out) <= min(limit, shapes[0]["weight_bytes"])
    assert read_config(out)["layer_tie_map"] == [0, 0, 2, 2]
    assert not any(shape["tied"] for shape in ok(*command[:6], "--dry-run", "--json").json["shapes"])


@pytest.mark.parametrize("form", ["fp8-block", "int4"])
def test_a_quantised_model_stays_in_its_form(models: Callable[..., Path], tmp_path: Path, ok: Cli, form: str) -> None:
    make_form(models("qwen3_moe", moe_intermediate_size=64), tmp_path / "model", form)
    limit, out = int(0.8 * size_of(tmp_path / "model")), tmp_path / "out"
    command = ["fit", tmp_path / "model", "--memory", limit, "--context", 1, "--keep", "top-k"]
    ok(*command, *on_tokens(tmp_path), "-o", out)
    assert size_of(out) <= limit
    before, after = read_tensors(tmp_path / "model"), read_tensors(out)
    assert {n.rpartition(".")[2] for n in before} == {n.rpartition(".")[2] for n in after}
    assert {t.dtype for t in before.values()} == {t.dtype for t in after.values()}
    settings = [read_config(folder)["quantization_config"] for folder in (tmp_path / "model", out)]
    assert settings[0] == settings[1]
    assert ok("validate", out, "--level", "values").code == 0


@pytest.fixture(scope="module")
def terabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The headers of a Mixtral of 1 TB."""
    hidden, width, layers = 8192, 28672, 90
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": width,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
    }
    shapes = {"model.embed_tokens.weight": [32000, hidden], "lm_head.weight": [32000, hidden]}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(layers):
        where = f"model.layers.{layer}"
        shapes |= {f"{where}.self_attn.{p}_proj.weight": [hidden, hidden] for p in "qo"}
        shapes |= {f"{where}.self_attn.{p}_proj.weight": [hidden // 8, hidden] for p in "kv"}
        shapes |= {f"{where}.{n}_layernorm.weight": [hidden] for n in ("input", "post_attention")}
        shapes[f"{where}.block_sparse_moe.gate.weight"] = [8, hidden]
        for name in [f"{where}.block_sparse_moe.experts.{e}.{w}.weight" for e in range(8) for w in ("w1", "w2", "w3")]:
            shapes[name] = [hidden, width] if ".w2." in name else [width, hidden]
    folder = tmp_path_factory.mktemp("terabyte") / "model"
    header_checkpoint(folder, config, shapes, sparse=False)
    return folder


def test_headers_alone_show_what_fits(terabyte: Path, ok: Cli) -> None:
    """By bytes, active parameters and speed, of a model of which nothing else is there."""
    command = ["fit", terabyte, "--memory", "300GB", "--context", "8k", "--accelerator", "h100", "--dry-run"]
    found = ok(*command, "--json").json
    whole = found["original"]
    assert whole["memory"] > 1e12
    assert {entry["form"] for entry in found["shapes"]} == {"as stored", "fp8", "int4"}
    for entry in found["shapes"]:
        assert entry["memory"] <= 300e9
        assert entry["active"] <= whole["active"]
        assert entry["tokens_per_second"] >= whole["tokens_per_second"]
    assert {entry["experts"] for entry in found["shapes"]} >= {8}
    assert "which of them costs least" in ok(*command).out
    fast = ok(*command, "--speed", 1.5 * whole["tokens_per_second"], "--json").json
    assert all(e["tokens_per_second"] > 1.5 * whole["tokens_per_second"] for e in fast["shapes"])
    assert ok(*command, "--active", "50B", "--json").json["shapes"][0]["active"] <= 50e9
    only = ok(*command, "--only", "experts", "--json").json
    assert {(e["width"], e["top_k"]) for e in only["shapes"]} == {(28672, 2)}
    kept = ok(*command, "--keep", "experts,top-k", "--json").json
    assert {(e["experts"], e["top_k"]) for e in kept["shapes"]} == {(8, 2)}


def test_engines_leave_out_what_they_take_badly(terabyte: Path, ok: Cli, cli: Cli) -> None:
    command = ["fit", terabyte, "--memory", "300GB", "--dry-run"]
    shapes = {e: ok(*command, "--engine", e, "--json").json["shapes"] for e in ("vllm", "llama.cpp", "transformers")}
    assert {s["experts"] for s in shapes["vllm"]} == {8}  # expert parallelism over eight ranks, as before
    assert {s["form"] for s in shapes["vllm"]} == {"as stored", "fp8", "int4"}
    assert {s["width"] % 256 for s in shapes["llama.cpp"]} == {0}  # k-quants
    assert {s["form"] for s in shapes["llama.cpp"]} == {"as stored"}
    assert len({s["experts"] for s in shapes["transformers"]}) > 1
    blocks = ok(*command, "--engine", "vllm", "--forms", "fp8-block", "--only", "width,form", "--json").json["shapes"]
    assert {s["width"] % 1024 for s in blocks if s["form"] == "fp8-block"} == {0}  # over eight ranks in blocks of 128
    unread = cli(*command, "--engine", "mlx", "--forms", "bfloat16,int4")
    assert unread.code == 2
    assert "mlx does not read int4" in unread.err
    unknown = cli(*command, "--engine", "steam")
    assert unknown.code == 2
    assert "known: " in unknown.err


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
