"""Tied blocks: one set of weights for several positions, on disk and in memory, and the same function."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import CheckpointError, RefusedError
from tests.conftest import Result
from tests.quantise import make_fp8, rewrite
from tests.tiny import PROMPT, load, logits, read_config, read_tensors, same_bits
from tests.unit.write.test_write import digest

Cli = Callable[..., Result]
Models = Callable[..., Path]

# model type, what makes it four layers deep, and which block each position runs
FAMILIES: list[tuple[str, dict[str, Any], list[int]]] = [
    ("llama", {"num_hidden_layers": 4, "intermediate_size": 48}, [0, 0, 2, 2]),
    ("qwen3", {"num_hidden_layers": 4, "intermediate_size": 48, "head_dim": 8}, [0, 1, 0, 3]),
    ("mixtral", {"num_hidden_layers": 4}, [0, 1, 1, 0]),
    ("qwen3_moe", {"num_hidden_layers": 4}, [0, 1, 1, 1]),
    ("deepseek_v3", {"num_hidden_layers": 4, "first_k_dense_replace": 2}, [0, 0, 2, 2]),
    ("gpt_oss", {"num_hidden_layers": 4}, [0, 1, 0, 1]),
    (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 48,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        [0, 1, 0, 1],
    ),
]
BLOCK = re.compile(r"(.*\blayers\.)(\d+)\.(.+)")
each_family = pytest.mark.parametrize(("model_type", "changes", "blocks"), FAMILIES, ids=[f[0] for f in FAMILIES])


def tied(model: Path, out: Path, **parameters: Any) -> Path:
    write_plan(apply(plan_of(open_checkpoint(model)), "tie-blocks", distances="none", **parameters), out)
    return out


def by_hand(tensors: dict[str, torch.Tensor], sources: list[list[int]], apart: str | None) -> dict[str, torch.Tensor]:
    """Return the tensors with each block's replaced by the mean of those of `sources`, all but those found `apart`."""
    found = {}
    for name, tensor in tensors.items():
        block = BLOCK.fullmatch(name)
        if block is None or (apart and re.search(apart, block[3])):
            found[name] = tensor
            continue
        others = [tensors[f"{block[1]}{source}.{block[3]}"] for source in sources[int(block[2])]]
        found[name] = others[0] if len(others) == 1 else torch.stack(others).float().mean(0).to(tensor.dtype)
    return found


def shared(model: torch.nn.Module, blocks: list[int], apart: str | None = "norm") -> int:
    """Assert that each parameter and buffer of a block is that of its source, in memory; return how many are."""
    entries = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    count = 0
    for name, tensor in entries.items():
        block = BLOCK.fullmatch(name)
        if block is None or blocks[int(block[2])] == int(block[2]):
            continue
        other = entries[f"{block[1]}{blocks[int(block[2])]}.{block[3]}"]
        expected = not (apart and re.search(apart, block[3]))
        assert (tensor.data_ptr() == other.data_ptr()) == expected, name
        count += expected
    return count


# The function


@each_family
def test_stored_once_and_written_out_compute_the_same(
    models: Models, tmp_path: Path, model_type: str, changes: dict[str, Any], blocks: list[int]
) -> None:
    path = models(model_type, **changes)
    out = tied(path, tmp_path / "tied", blocks=blocks)
    stock = tied(path, tmp_path / "stock", blocks=blocks, materialize=True)
    written, expected = read_tensors(stock), by_hand(read_tensors(path), [[b] for b in blocks], "norm")
    assert written.keys() == expected.keys()
    assert all(same_bits(written[name], expected[name]) for name in expected)
    assert read_config(stock) == read_config(path)
    stored = read_tensors(out)
    assert stored.keys() < written.keys()
    assert not [n for n in stored if (b := BLOCK.fullmatch(n)) and blocks[int(b[2])] != int(b[2]) and "norm" not in n]

    model, reference = load(out), load(stock)
    assert type(model).__name__ == f"Tied{type(reference).__name__}"
    assert torch.equal(logits(model), logits(reference))
    assert (logits(model) - logits(load(path))).abs().max() > 1e-3  # else the test could not fail
    assert shared(model, blocks) >= 6
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(PROMPT, use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, plain)
    assert torch.equal(cached, reference.generate(PROMPT, use_cache=True, **greedy))


@each_family
def test_ties_outlive_a_cast_and_a_round_trip(
    models: Models, tmp_path: Path, model_type: str, changes: dict[str, Any], blocks: list[int]
) -> None:
    """In bf16 and in shards, all tensors shared but the norms; then `.to`, save_pretrained and a reload."""
    path = models(model_type, dtype="bfloat16", **changes)
    out = tied(path, tmp_path / "tied", blocks=blocks, norms="shared")
    assert len(list(out.glob("*.safetensors"))) > 1
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    stock = tied(path, tmp_path / "stock", blocks=blocks, norms="shared", materialize=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(stock, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(reference))
    before = shared(model, blocks, apart=None)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        assert shared(model, blocks, apart=None) == before
    model.save_pretrained(tmp_path / "again", max_shard_size="60KB")
    saved, stored = read_tensors(tmp_path / "again"), read_tensors(out)
    assert saved.keys() == stored.keys()
    assert all(same_bits(saved[name], stored[name]) for name in stored)
    assert (tmp_path / "again" / "modeling_tied.py").read_bytes() == (out / "modeling_tied.py").read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert shared(again, blocks, apart=None) == before
    assert torch.equal(logits(again), logits(reference))


def test_other_loaders(models: Models, tmp_path: Path) -> None:
    """Without moesurgery: the code beside the weights loads them; a stock loader fails, and says so."""
    cases = {}
    for model_type, changes, blocks in FAMILIES:
        out = tied(models(model_type, **changes), tmp_path / model_type, blocks=blocks)
        torch.save(logits(load(out)), tmp_path / f"{model_type}.pt")
        cases[model_type] = read_config(out)["architectures"][0].removeprefix("Tied")
    script = f"""
import sys, torch, transformers
from pathlib import Path
prompt = torch.tensor({PROMPT.tolist()})
for name, stock in {cases!r}.items():
    path = Path({str(tmp_path)!r}) / name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, torch.load(path.with_suffix(".pt"))), name
    for load in (transformers.AutoModelForCausalLM, getattr(transformers, stock)):
        try:
            load.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            print(name, load.__name__, type(error).__name__, str(error)[:1000].replace(chr(10), " "))
        else:
            raise SystemExit(f"{{load.__name__}} loaded {{name}}")
model.save_pretrained(path / "again")
again = transformers.AutoModelForCausalLM.from_pretrained(
    path / "again", trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
)
layers = again.model.layers
assert layers[0].self_attn.q_proj.weight.data_ptr() == layers[2].self_attn.q_proj.weight.data_ptr()
with torch.no_grad():
    assert torch.equal(again(prompt).logits, torch.load(path.with_suffix(".pt")))
assert "moesurgery" not in sys.modules
import moesurgery
moesurgery.register_tied_models()
model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
assert type(model).__module__ == "moesurgery.tied.modeling_tied"
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 2 * len(FAMILIES), done.stdout
    assert all(re.search("custom code|num_hidden_layers", line) for line in done.stdout.splitlines()), done.stdout


# Maps and weights


@pytest.mark.parametrize(
    ("scheme", "depth", "size", "expected"),
    [
        ("immediate", 6, 2, [0, 0, 2, 2, 4, 4]),
        ("immediate", 5, 3, [0, 0, 0, 3, 3]),
        ("cycle", 6, 2, [0, 1, 2, 0, 1, 2]),
        ("cycle", 5, 2, [0, 1, 2, 0, 1]),
        ("all", 4, 2, [0, 0, 0, 0]),
        ("middle-cycle", 6, 2, [0, 1, 2, 1, 2, 5]),
        ("middle-cycle", 5, 3, [0, 1, 1, 1, 4]),
        ("repeat", 3, 2, [0, 0, 2, 2, 4, 4]),
        ("repeat", 2, 3, [0, 0, 0, 3, 3, 3]),
        ("immediate", 3, 1, [0, 1, 2]),
    ],
)
def test_schemes(models: Models, scheme: str, depth: int, size: int, expected: list[int]) -> None:
    plan = plan_of(open_checkpoint(models("llama", num_hidden_layers=depth, intermediate_size=48)))
    tied_plan = apply(plan, "tie-blocks", scheme=scheme, group_size=size, distances="none")
    assert tied_plan.steps[0].report["layer_tie_map"] == expected
    assert tied_plan.config.get("layer_tie_map", list(range(depth))) == expected


@pytest.mark.parametrize(
    ("parameters", "sources"),
    [
        ({"init": "first"}, [[0], [1], [0], [1], [0]]),
        ({"init": "last"}, [[4], [3], [4], [3], [4]]),
        ({"init": "average"}, [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3], [0, 2, 4]]),
        ({"init": "stepwise"}, [[0], [4], [0], [4], [0]]),
        ({"init": "average", "norms": "shared"}, [[0, 2, 4], [1, 3], [0, 2, 4], [1, 3], [0, 2, 4]]),
        ({"blocks": [3, 1, 1, 3, 4]}, [[3], [1], [1], [3], [4]]),
        ({"blocks": [3, 1, 1, 3, 4], "init": "average"}, [[0, 3], [1, 2], [1, 2], [0, 3], [4]]),
    ],
)
def test_whose_weights(models: Models, tmp_path: Path, parameters: dict[str, Any], sources: list[list[int]]) -> None:
    path = models("llama", num_hidden_layers=5, intermediate_size=48, dtype="bfloat16")
    chosen = parameters if "blocks" in parameters else {"scheme": "cycle", "group_size": 3, **parameters}
    written = read_tensors(tied(path, tmp_path / "stock", materialize=True, **chosen))
    expected = by_hand(read_tensors(path), sources, None if parameters.get("norms") == "shared" else "norm")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        if parameters.get("init") == "average":  # up to the last bit: a mean may be summed in any order
            torch.testing.assert_close(written[name], tensor, rtol=2**-7, atol=1e-6)
        else:
            assert same_bits(written[name], tensor)


def test_stepwise_is_evenly_spaced(models: Models) -> None:
    plan = plan_of(open_checkpoint(models("llama", num_hidden_layers=9, intermediate_size=48)))
    report = apply(plan, "tie-blocks", scheme="cycle", group_size=3, init="stepwise").steps[0].report
    assert report["blocks"] == {"0": [0], "1": [4], "2": [8]}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_repeating_runs_every_block_twice(models: Models, tmp_path: Path, model_type: str) -> None:
    """Depth up-scaling, stored once: the stock model with each of its layers called twice computes the same."""
    path = models(model_type, num_hidden_layers=3, **({"intermediate_size": 48} if model_type == "llama" else {}))
    out = tied(path, tmp_path / "tied", scheme="repeat")
    reference = load(path)
    reference.model.layers = torch.nn.ModuleList([layer for layer in reference.model.layers for _ in range(2)])
    reference.config.num_hidden_layers = 6
    reference.config.use_cache = False
    assert torch.equal(logits(load(out)), logits(reference))
    small, large = (sum(t.numel() for t in read_tensors(p).values()) for p in (path, out))
    assert large - small == 3 * 2 * 32  # two more norms for each new position, no more


def test_a_longer_stack_of_any_order(models: Models, tmp_path: Path) -> None:
    """SOLAR's way: 0-2 and then 1-3 again; what config.json says of each layer follows."""
    path = models("gpt_oss", num_hidden_layers=4)
    out = tied(path, tmp_path / "tied", blocks=[0, 1, 2, 1, 2, 3])
    config, kinds = read_config(out), read_config(path)["layer_types"]
    assert config["layer_tie_map"] == [0, 1, 2, 1, 2, 5]
    assert config["layer_types"] == [kinds[b] for b in (0, 1, 2, 1, 2, 3)]
    stock = tied(path, tmp_path / "stock", blocks=[0, 1, 2, 1, 2, 3], materialize=True)
    assert read_config(stock)["num_hidden_layers"] == 6
    assert torch.equal(logits(load(out)), logits(load(stock)))
    before, after = read_tensors(path), read_tensors(stock)
    for position, block in enumerate((0, 1, 2, 1, 2, 3)):
        names = [n for n in before if n.startswith(f"model.layers.{block}.")]
        assert names
        for name in names:
            assert same_bits(after[name.replace(f"layers.{block}.", f"layers.{position}.")], before[name])


@pytest.mark.parametrize(("model_type", "changes", "blocks"), [FAMILIES[0], FAMILIES[4]], ids=["llama", "deepseek_v3"])
def test_writing_out_a_tied_model(
    models: Models, tmp_path: Path, model_type: str, changes: dict[str, Any], blocks: list[int]
) -> None:
    path = models(model_type, **changes)
    tied(path, tmp_path / "tied", blocks=blocks)
    tied(path, tmp_path / "stock", blocks=blocks, materialize=True)
    out = tied(tmp_path / "tied", tmp_path / "out", materialize=True)
    assert read_config(out) == read_config(path)
    assert not (out / "modeling_tied.py").exists()
    written, expected = read_tensors(out), read_tensors(tmp_path / "stock")
    assert written.keys() == expected.keys()
    assert all(same_bits(written[name], expected[name]) for name in expected)


def test_prediction_layers_stay_behind_the_stack(models: Models, tmp_path: Path) -> None:
    path = models("deepseek_v3", num_hidden_layers=3)
    tensors = read_tensors(path)
    extra = {n.replace("layers.2.", "layers.3."): t + 1 for n, t in tensors.items() if ".layers.2." in n}
    extra["model.layers.3.eh_proj.weight"] = torch.randn(32, 64)
    rewrite(path, tmp_path / "mtp", {**tensors, **extra}, {"num_nextn_predict_layers": 1})
    out = tied(tmp_path / "mtp", tmp_path / "tied", blocks=[0, 1, 2, 1, 2])
    stored = read_tensors(out)
    moved = {n.replace("layers.3.", "layers.5."): t for n, t in extra.items()}
    assert {n for n in stored if ".layers.5." in n} == set(moved)
    assert all(same_bits(stored[name], tensor) for name, tensor in moved.items())
    assert read_config(out)["num_nextn_predict_layers"] == 1
    assert bool(logits(load(out)).isfinite().all())
    none = tied(tmp_path / "mtp", tmp_path / "none", blocks=[0, 1, 1], prediction_layers="drop")
    assert not [n for n in read_tensors(none) if ".layers.3." in n]
    assert read_config(none)["num_nextn_predict_layers"] == 0
    load(none)


# Distances


def distances_by_hand(path: Path, blocks: list[int], inside: str) -> dict[str, float]:
    tensors = read_tensors(path)
    found = {}
    for position, block in enumerate(blocks):
        if block != position:
            own, other = (
                torch.cat([t.double().flatten() for n, t in tensors.items() if re.search(rf"layers\.{i}\.{inside}", n)])
                for i in (position, block)
            )
            found[str(position)] = float((own - other).norm() / own.norm())
    return found


@pytest.mark.parametrize("how", ["exact", "sampled"])
def test_distances(models: Models, how: str) -> None:
    path = models("mixtral", num_hidden_layers=4)
    plan = plan_of(open_checkpoint(path))
    found = apply(plan, "tie-blocks", blocks=[0, 1, 1, 0], distances=how, norms="shared").steps[0].report["distances"]
    tolerance = 1e-6 if how == "exact" else 0.1
    kinds = {
        "block_sparse_moe.experts.#.w1": r"block_sparse_moe\.experts\.\d+\.w1",
        "self_attn.q_proj": r"self_attn\.q_proj",
        "input_layernorm": "input_layernorm",
    }
    assert kinds.keys() < found.keys()
    for kind, inside in kinds.items():
        assert found[kind] == pytest.approx(distances_by_hand(path, [0, 1, 1, 0], inside), rel=tolerance)


# Refusals


@pytest.mark.parametrize(
    ("model_type", "changes", "parameters", "message"),
    [
        ("qwen3_moe", {}, {"scheme": "immediate"}, "block 1 cannot run with the weights of block 0.*differs"),
        ("gpt_oss", {}, {"scheme": "all"}, "block 1 cannot run.*layer_types"),
        ("llama", {"intermediate_size": 48}, {"blocks": [0, 2]}, "no block 2"),
        ("llama", {"intermediate_size": 48}, {"blocks": [0, 1, 0], "init": "last"}, "as long as the model is deep"),
        (
            "deepseek_v3",
            {"num_hidden_layers": 4},
            {"blocks": [1, 0, 1]},
            "first_k_dense_replace is 1, and cannot say of layer",
        ),
    ],
)
def test_refusals(
    models: Models, model_type: str, changes: dict[str, Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        apply(plan_of(open_checkpoint(models(model_type, **changes))), "tie-blocks", **parameters)


def test_attention_that_code_decides_by_number(models: Models, tmp_path: Path) -> None:
    """Gemma 2 alternates without a word in config.json: repeated, its layers would be of another kind."""
    path = models("gemma2", num_hidden_layers=4, intermediate_size=48, head_dim=8)
    plan = apply(plan_of(open_checkpoint(path)), "tie-blocks", scheme="repeat")
    assert plan.config["layer_types"] == [kind for kind in read_config(path)["layer_types"] for _ in range(2)]
    rewrite(path, tmp_path / "silent", read_tensors(path), {"layer_types": None})
    with pytest.raises(RefusedError, match="the code of gemma2 then goes by number"):
        apply(plan_of(open_checkpoint(tmp_path / "silent")), "tie-blocks", scheme="repeat")


def test_tables_by_the_number_of_a_layer_stand_still(ok: Cli, cli: Cli, models: Models, tmp_path: Path) -> None:
    """Inkling 2 keeps queries for each layer outside its layers: those that more layers lack, loaders make up."""
    path = models("inkling2")
    table = "attention residuals go by blocks of layers"
    with pytest.raises(RefusedError, match=table):
        apply(plan_of(open_checkpoint(path)), "tie-blocks", scheme="repeat", materialize=True)
    recipe = tmp_path / "r.yaml"
    part = "- sources: [{{model: {}, layer_range: [{}, {}]}}]\n"
    text = "merge_method: passthrough\nslices:\n"
    recipe.write_text(text + part.format(path, 0, 2) + part.format(path, 1, 2))
    refused = cli("merge", recipe, "-o", tmp_path / "out")
    assert refused.code == 2
    assert table in " ".join(refused.err.split())
    assert not (tmp_path / "out").exists()
    recipe.write_text(text + part.format(path, 0, 2))  # all layers where they were
    ok("merge", recipe, "-o", tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(path).keys()


def test_quantised_blocks_are_written_out_or_refused(models: Models, tmp_path: Path) -> None:
    make_fp8(models("deepseek_v3", num_hidden_layers=4), tmp_path / "fp8")
    plan = plan_of(open_checkpoint(tmp_path / "fp8"))
    with pytest.raises(RefusedError, match="quantised"):
        apply(plan, "tie-blocks", blocks=[0, 1, 1, 3])
    with pytest.raises(RefusedError, match="average has no exact form"):
        apply(plan, "tie-blocks", blocks=[0, 1, 1, 3], init="average", materialize=True)
    write_plan(apply(plan, "tie-blocks", blocks=[0, 1, 1, 3], materialize=True), tmp_path / "out")
    before, after = read_tensors(tmp_path / "fp8"), read_tensors(tmp_path / "out")
    expected = by_hand(before, [[0], [1], [1], [3]], "norm")
    assert after.keys() == expected.keys()
    assert all(same_bits(after[name], expected[name]) for name in expected)


def test_tied_twice_is_refused(models: Models, tmp_path: Path) -> None:
    out = tied(models("llama", intermediate_size=48), tmp_path / "tied")
    plan = plan_of(open_checkpoint(out))
    for parameters in ({}, {"materialize": True, "blocks": [0, 1]}, {"materialize": True, "relax": 2}):
        with pytest.raises(RefusedError, match="tied already") as caught:
            apply(plan, "tie-blocks", **parameters)
        assert "materialize" in str(caught.value.hint)


@pytest.mark.parametrize("broken", ["x", [], [0, 5], [0, 0, 1], [1, 1]])
def test_a_broken_map_is_an_error(models: Models, tmp_path: Path, broken: Any) -> None:
    out = tied(models("llama", intermediate_size=48, num_hidden_layers=3), tmp_path / "tied")
    rewrite(out, tmp_path / "broken", read_tensors(out), {"layer_tie_map": broken})
    with pytest.raises(CheckpointError, match="layer_tie_map"):
        apply(plan_of(open_checkpoint(tmp_path / "broken")), "tie-blocks", materialize=True)
    with pytest.raises(ValueError, match="layer_tie_map"):
        load(tmp_path / "broken")


# What else knows of ties


def test_counts(models: Models, tmp_path: Path, ok: Cli) -> None:
    path = models("llama", num_hidden_layers=4, intermediate_size=48)
    out, stock = (
        tied(path, tmp_path / name, scheme="all", norms="shared", materialize=written)
        for name, written in (("tied", False), ("stock", True))
    )
    whole, few, many = (ok("count-params", p, "--json", "--context", 64).json for p in (path, out, stock))
    model = load(out)
    assert few["total_params"] == sum(p.numel() for p in model.parameters())  # each tensor once
    assert few["executed_params"] == many["active_params"]["all"] == whole["total_params"]
    assert (few["num_layers"], few["num_blocks"]) == (4, 1)
    assert few["roofline"]["kv_bytes_per_token"] == many["roofline"]["kv_bytes_per_token"]
    assert few["roofline"]["flops_per_token_weights"] == many["roofline"]["flops_per_token_weights"]
    assert few["roofline"]["density"] > 1 > many["roofline"]["density"]
    assert "4 positions run 1 stored block" in ok("count-params", out).out


def test_other_operations_see_a_tied_model(models: Models, tmp_path: Path, ok: Cli) -> None:
    """Experts are dropped from stored blocks, once for all positions that run them."""
    path = models("mixtral", num_hidden_layers=4)
    tied(path, tmp_path / "tied", scheme="cycle")
    ok("drop-experts", tmp_path / "tied", "--experts", "1,6", "-o", tmp_path / "a")
    ok("drop-experts", path, "--experts", "1,6", "-o", tmp_path / "dropped")
    tied(tmp_path / "dropped", tmp_path / "b", scheme="cycle")
    assert torch.equal(logits(load(tmp_path / "a")), logits(load(tmp_path / "b")))
    assert ok("validate", tmp_path / "a", "--level", "config").code == 0
    with pytest.raises(RefusedError, match="the blocks are tied") as caught:
        apply(plan_of(open_checkpoint(tmp_path / "a")), "to-dense", expert=0)
    assert "materialize" in str(caught.value.hint)


def test_the_command(models: Models, tmp_path: Path, ok: Cli) -> None:
    path = models("mixtral", num_hidden_layers=4)
    done = ok("tie-blocks", path, "--group-size", 2, "--init", "average", "-o", tmp_path / "a")
    assert "4 positions run 2 blocks (4 before)" in done.out
    assert "layer_tie_map: 0, 0, 2, 2" in done.out
    assert "self_attn.q_proj" in done.out
    recipe = tmp_path / "r.yaml"
    recipe.write_text(ok("tie-blocks", path, "--group-size", 2, "--init", "average", "--print-recipe").out)
    ok("run", recipe, "-o", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "moesurgery.json").read_text())["steps"][0]["report"]["blocks"]["2"] == [2, 3]
    ok("tie-blocks", path, "-o", tmp_path / "a", "--force")
