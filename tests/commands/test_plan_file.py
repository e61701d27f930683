"""Plans as files: the same experts on every stored form, the shapes that others publish, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.errors import CheckpointError, RecipeError, RefusedError
from moesurgery.stats.plan_file import plan_file_schema
from tests.commands.test_drop_experts import with_prediction_layer
from tests.conftest import Result
from tests.quantise import make_fp8, rewrite
from tests.tiny import read_tensors, same_bits

Cli = Callable[..., Result]
EXPERT = re.compile(r"(.*layers\.(\d+)\..*experts\.)(\d+)(\..*)")


def kept_experts(plan_path: Path) -> dict[str, list[int]]:
    return {where: entry["keep"] for where, entry in json.loads(plan_path.read_text())["layers"].items()}


def edited(model: Path, operation: str = "drop-experts", **parameters: Any) -> Any:
    return apply(plan_of(open_checkpoint(model)), operation, **parameters)


def written(path: Path, value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def same_plan(one: Any, other: Any) -> bool:
    """Whether two plans make the same tensors and config, whatever their steps say."""
    return bool(repr(one.tensors) == repr(other.tensors) and one.config == other.config)


# One plan on several forms


def test_a_plan_of_the_bf16_copy_keeps_the_same_experts_of_the_fp8_copy(models: Any, ok: Cli, tmp_path: Path) -> None:
    """Every kept expert's bytes are those of the FP8 source, at the place where the bf16 output has the same expert."""
    model = models("qwen3_moe", dtype="bfloat16", hidden_size=32, moe_intermediate_size=16)
    make_fp8(model, tmp_path / "fp8")
    ok(
        "drop-experts",
        model,
        "--keep",
        5,
        "--by",
        "router-norm",
        "--plan",
        tmp_path / "plan.json",
        "-o",
        tmp_path / "a",
    )
    told = ok("drop-experts", tmp_path / "fp8", "--plan", tmp_path / "plan.json", "-o", tmp_path / "b")
    assert "warning" not in told.err
    kept = kept_experts(tmp_path / "plan.json")
    plain, out, source = read_tensors(model), read_tensors(tmp_path / "b"), read_tensors(tmp_path / "fp8")
    reduced = read_tensors(tmp_path / "a")
    seen = 0
    for name, tensor in out.items():
        matched = EXPERT.fullmatch(name)
        if matched is None:
            continue
        before, layer, new, after = matched.groups()
        old = f"{before}{kept[f'model.layers.{layer}'][int(new)]}{after}"
        assert same_bits(tensor, source[old])
        if old in plain:
            assert same_bits(reduced[name], plain[old])
        seen += 1
    assert seen == 2 * 5 * 3 * 2  # layers, experts, projections, with their scales
    assert any(len(set(experts) - set(range(5))) for experts in kept.values())  # else nothing was renumbered


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_plan_is_for_both_layouts(models: Any, ok: Cli, tmp_path: Path, model_type: str) -> None:
    plan = tmp_path / "plan.json"
    ok("drop-experts", models(model_type), "--keep", 4, "--by", "random", "--plan", plan, "--plan-only")
    fused = models(model_type, fused=True)
    by_plan, by_number = edited(fused, plan_file=str(plan)), edited(fused, keep=kept_experts(plan))
    assert same_plan(by_plan, by_number)


def test_a_merge_is_carried_out_as_it_was_chosen(models: Any, ok: Cli, tmp_path: Path) -> None:
    """Groups in their order and the shares of their members, which on another copy would come out otherwise."""
    model, plan = models("mixtral"), tmp_path / "plan.json"
    ok("merge-experts", model, "--to", 4, "--weights", "router-norm", "--plan", plan, "-o", tmp_path / "a")
    ok("merge-experts", model, "--plan", plan, "-o", tmp_path / "b")
    first, second = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(same_bits(tensor, second[name]) for name, tensor in first.items())
    with pytest.raises(RefusedError, match="no keep"):
        edited(model, plan_file=str(plan))


def test_routers_of_another_model_are_told(models: Any, ok: Cli, tmp_path: Path) -> None:
    model, plan = models("mixtral"), tmp_path / "plan.json"
    ok("drop-experts", model, "--keep", 6, "--plan", plan, "--plan-only")
    tensors = {n: t + 1 if n.endswith("gate.weight") else t for n, t in read_tensors(model).items()}
    rewrite(model, tmp_path / "other", tensors, {})
    told = ok("drop-experts", tmp_path / "other", "--plan", plan, "--dry-run")
    assert "the routers are not those of ./mixtral" in told.err
    copy = {n: t.to(torch.float64).to(torch.float32) for n, t in read_tensors(model).items()}
    rewrite(model, tmp_path / "copy", copy, {})
    assert "routers" not in ok("drop-experts", tmp_path / "copy", "--plan", plan, "--dry-run").err


def test_neurons_of_the_bf16_copy_are_those_of_the_fp8_copy(models: Any, ok: Cli, tmp_path: Path) -> None:
    """Rows of gate and up and columns of down are bytes of the FP8 source, for the same neurons as of the bf16 copy."""
    model, plan = models("qwen3_moe", dtype="bfloat16", moe_intermediate_size=32), tmp_path / "plan.json"
    ok("convert", model, "--quantize", "fp8", "-o", tmp_path / "fp8")
    ok("slim-experts", model, "--width", 16, "--plan", plan, "-o", tmp_path / "a")
    told = ok("slim-experts", tmp_path / "fp8", "--plan", plan, "-o", tmp_path / "b")
    assert "warning" not in told.err
    document = json.loads(plan.read_text())
    jsonschema.validate(document, plan_file_schema())
    source, plain = read_tensors(tmp_path / "fp8"), read_tensors(model)
    out, reduced = read_tensors(tmp_path / "b"), read_tensors(tmp_path / "a")
    for where, entry in document["layers"].items():
        assert len({tuple(own) for own in entry["neurons"].values()}) > 1
        for expert, own in entry["neurons"].items():
            for role in ("gate", "up", "down"):
                name = f"{where}.mlp.experts.{expert}.{role}_proj.weight"
                taken = (lambda t, own=own: t[:, own]) if role == "down" else (lambda t, own=own: t[own])
                assert same_bits(out[name], taken(source[name].view(torch.uint8)).view(torch.float8_e4m3fn))
                assert same_bits(reduced[name], taken(plain[name]))


def test_neurons_with_text_and_of_shared_experts(models: Any, ok: Cli, cli: Cli, tmp_path: Path) -> None:
    """What `--text` chose is carried out again, as it is or solved on text; drop-experts leaves it alone."""
    model, plan, text = models("deepseek_v3"), tmp_path / "plan.json", tmp_path / "text.jsonl"
    text.write_text(json.dumps({"input_ids": [i * i % 60 + 3 for i in range(2048)]}))
    on_text = ("--text", text, "--window", 64, "--tokens", 512, "--no-heldout")
    ok("slim-experts", model, "--width", 16, *on_text, "--plan", plan, "-o", tmp_path / "a")
    document = json.loads(plan.read_text())
    assert document["criterion"]["by"] == "obs"
    assert document["text"][0]["file"] == "text.jsonl"
    assert all(where.endswith("shared_experts") for where in document["ffns"])
    ok("slim-experts", model, "--plan", plan, *on_text, "-o", tmp_path / "solved")
    ok("slim-experts", model, "--plan", plan, "-o", tmp_path / "b")
    first, solved, second = (read_tensors(tmp_path / name) for name in ("a", "solved", "b"))
    assert all(same_bits(tensor, solved[name]) for name, tensor in first.items())
    differ = {name for name, tensor in first.items() if not same_bits(tensor, second[name])}
    assert differ
    assert all(name.endswith("down_proj.weight") for name in differ)
    wrong = cli("drop-experts", model, "--plan", plan, "--dry-run")
    assert wrong.code == 2
    assert "moesurgery slim-experts --plan" in wrong.err


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"model.layers.0": {"experts": 8, "keep": [0, 1]}}, "says nothing of neurons"),
        ({"model.layers.0": {"experts": 8, "neurons": {"0": [1]}}}, "does not name the neurons of each of the 8"),
        ({"model.layers.0": {"experts": 8, "neurons": {e: [1, 0] for e in range(8)}}}, "once, in ascending order"),
        (
            {"model.layers.0": {"experts": 8, "neurons": {e: [0, 48] for e in range(8)}}},
            "keeps neuron 48, there are 48",
        ),
        ({"model.layers.0": {"experts": 8, "neurons": {e: [0, 1] for e in range(8)}}}, "nothing of model.layers.1"),
    ],
)
def test_neurons_that_cannot_be(models: Any, tmp_path: Path, layers: Any, message: str) -> None:
    document = {"format": "moesurgery plan 1", "operation": "x", "model": {}, "layers": layers}
    with pytest.raises(RefusedError, match=message):
        edited(models("mixtral"), "slim-experts", plan_file=written(tmp_path / "p.json", document))
    with pytest.raises(RecipeError, match="width and plan_file are given"):
        edited(models("mixtral"), "slim-experts", width=8, plan_file=str(tmp_path / "p.json"))


def test_neurons_that_go_together_in_another_form(models: Any, ok: Cli, tmp_path: Path) -> None:
    model, plan = models("qwen3_moe", moe_intermediate_size=64, hidden_size=64), tmp_path / "plan.json"
    ok("slim-experts", model, "--width", 32, "--plan", plan, "--plan-only")
    quantised = apply(plan_of(open_checkpoint(model)), "convert", quantize="int4")
    with pytest.raises(RefusedError, match="does not keep whole blocks of 32 neurons") as refused:
        apply(quantised, "slim-experts", plan_file=str(plan))
    assert "make the plan on this copy" in str(refused.value.hint)


# Writing and reading by one option


def test_what_is_written(models: Any, ok: Cli, tmp_path: Path) -> None:
    model, plan = models("mixtral"), tmp_path / "plan.json"
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"input_ids": [i % 60 + 3 for i in range(4096)]}))
    told = ok(
        *("drop-experts", model, "--keep", 6, "--by", "reap", "--text", text, "--window", 64, "--tokens", 1024),
        *("--plan", plan, "--plan-only", "-o", tmp_path / "out"),
    )
    assert "wrote the plan" in told.err
    document = json.loads(plan.read_text())
    jsonschema.Draft7Validator.check_schema(plan_file_schema())
    jsonschema.validate(document, plan_file_schema())
    assert document["criterion"] | {"keep": 6, "by": "reap"} == document["criterion"]
    (about,) = document["text"]
    assert about == {"file": "text.jsonl", "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    assert str(tmp_path) not in plan.read_text()
    for entry in document["layers"].values():
        best = sorted(range(8), key=lambda e: -entry["scores"][e])[:6]
        assert entry["keep"] == sorted(best)


def test_alone_it_is_read_and_beside_a_choice_written(models: Any, ok: Cli, cli: Cli, tmp_path: Path) -> None:
    model, plan = models("mixtral"), tmp_path / "plan.json"
    missing = cli("drop-experts", model, "--plan", plan, "--dry-run")
    assert missing.code == 2
    assert "cannot be read as a plan" in missing.err
    assert "--keep 25%" in missing.err
    assert not plan.exists()
    choice = ("drop-experts", model, "--keep", 6, "--plan", plan)
    assert "would write the plan" in ok(*choice, "--dry-run").err
    assert not plan.exists()
    ok(*choice, "--plan-only")
    before = plan.read_bytes()
    assert "is there already" in ok(*choice, "--plan-only").err
    other = cli("drop-experts", model, "--keep", 5, "--plan", plan, "--plan-only")
    assert other.code == 2
    assert "holds something else" in other.err
    assert plan.read_bytes() == before
    ok("drop-experts", model, "--keep", 5, "--plan", plan, "--plan-only", "--force")
    assert plan.read_bytes() != before
    nothing = cli("drop-experts", model, "--plan", plan, "--plan-only")
    assert nothing.code == 2
    assert "--plan-only writes a plan" in nothing.err


def test_a_recipe_reads_a_plan_and_never_writes_one(models: Any, ok: Cli, cli: Cli, tmp_path: Path) -> None:
    model, plan, recipe = models("mixtral"), tmp_path / "plan.json", tmp_path / "recipe.yaml"
    ok("drop-experts", model, "--keep", 6, "--plan", plan, "--plan-only")
    printed = ok("drop-experts", model, "--plan", plan, "--print-recipe").out
    assert "plan_file" in printed
    recipe.write_text(printed)
    ok("run", recipe, "-o", tmp_path / "out")
    ok("drop-experts", model, "--keep", 6, "-o", tmp_path / "by-count")
    first, second = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "by-count")
    assert all(same_bits(tensor, second[name]) for name, tensor in first.items())
    recipe.write_text(f"model: {model}\nsteps:\n  - drop-experts: {{keep: 6, plan_file: {plan}}}\n")
    both = cli("run", recipe, "--dry-run")
    assert both.code == 2
    assert "keep and plan_file are given" in both.err
    recipe.write_text(f"model: {model}\nsteps:\n  - drop-experts: {{keep: 5}}\n")
    ok("drop-experts", recipe, "--plan", tmp_path / "of-recipe.json", "--plan-only")
    assert all(len(experts) == 5 for experts in kept_experts(tmp_path / "of-recipe.json").values())


# The shapes that others publish


@pytest.mark.parametrize(
    "document",
    [
        {"keep": {"0": [0, 2, 3, 5], "1": [1, 2, 4, 7]}},
        {"kept_experts": {"model.layers.0": [5, 3, 2, 0], "model.layers.1.block_sparse_moe.experts": [1, 2, 4, 7]}},
        {"model": "some/model", "retained_experts": {"layer_0": [0, 2, 3, 5], "layers.1": [1, 2, 4, 7]}},
        {"keep": [[0, 2, 3, 5], [1, 2, 4, 7]]},
        {"drop": {"0": [1, 4, 6, 7], "1": [0, 3, 5, 6]}},
        {"dropped": [[1, 4, 6, 7], [0, 3, 5, 6]]},
        {"version": 1, "pruned_experts": [[0, 1], [0, 4], [0, 6], [0, 7], [1, 0], [1, 3], [1, 5], [1, 6]]},
        {"layers": {"0": {"keep": [0, 2, 3, 5]}, "1": {"drop": [0, 3, 5, 6]}}},
        {"0": {"kept": [0, 2, 3, 5], "score": 1.5}, "1": {"kept": [1, 2, 4, 7]}},
    ],
)
def test_plain_shapes(models: Any, tmp_path: Path, document: Any) -> None:
    model = models("mixtral")
    by_plan = edited(model, plan_file=written(tmp_path / "p.json", document))
    assert same_plan(by_plan, edited(model, keep={0: [0, 2, 3, 5], 1: [1, 2, 4, 7]}))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"0": [0, 1], "1": [0, 1]}, 'kept or dropped; say which in the file: {"keep": {"0"'),
        ([[0, 1], [0, 1]], "kept or dropped"),
        ({"keep": {"0": [0]}, "drop": {"1": [0]}}, "keep and drop: leave one"),
        ({"keep": {"0": [0.5]}}, "expected a list of expert numbers"),
        ({"keep": {"0": [-1]}}, "expected a list of expert numbers"),
        ({"keep": 3}, "expected a list of experts for each layer"),
        ({"scores": {"0": 1}}, "scores is none of keep"),
        ({}, "says nothing of any layer"),
        ("nonsense", "no JSON object"),
        ({"format": "moesurgery plan 9"}, "expected 'moesurgery plan 1'"),
        ({"format": "moesurgery plan 1"}, "operation is missing"),
        ({"format": "moesurgery plan 1", "operation": "x", "model": {}}, "layers is missing"),
        (
            {"format": "moesurgery plan 1", "operation": "x", "model": {}, "layers": {"a": 3}},
            "layers.a: it is not a JSON",
        ),
    ],
)
def test_what_is_no_plan(models: Any, tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        edited(models("mixtral"), plan_file=written(tmp_path / "p.json", json.dumps(document)))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"keep": {"0": [0, 1, 2, 3], "7": [0, 1, 2, 3]}}, "'7', which is no MoE layer"),
        ({"keep": {"0": [0, 1, 2, 3]}}, "says nothing of model.layers.1"),
        ({"keep": {"0": [0, 1], "model.layers.0": [0, 1]}}, "speaks of model.layers.0 twice"),
        ({"keep": {"0": [0, 1, 2, 8], "1": [0, 1, 2, 3]}}, "expert 8 of model.layers.0, whose experts are 0 to 7"),
        ({"keep": {"0": [0, 1, 1], "1": [0, 1, 2]}}, "an expert of model.layers.0 twice"),
        ({"keep": {"0": [0, 1, 2], "1": [0, 1]}}, "3 experts are left in model.layers.0, 2 in model.layers.1"),
        ({"keep": {"0": [0], "1": [1]}}, "each token is routed to 2"),
        ({"keep": [[0, 1], [0, 1], [0, 1]]}, "lists 3 layers, the model has 2"),
    ],
)
def test_a_plan_that_does_not_fit(models: Any, tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        edited(models("mixtral"), plan_file=written(tmp_path / "p.json", document))
    assert message in caught.value.message


def test_a_plan_of_another_type(models: Any, ok: Cli, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    ok("drop-experts", models("mixtral"), "--keep", 6, "--plan", plan, "--plan-only")
    with pytest.raises(RefusedError, match="a plan for a mixtral, this is a olmoe"):
        edited(models("olmoe"), plan_file=str(plan))
    document = json.loads(plan.read_text())
    document["layers"]["model.layers.0"]["experts"] = 16
    with pytest.raises(RefusedError, match="for 16 experts in"):
        edited(models("mixtral"), plan_file=written(plan, document))


def test_groups_must_hold_every_expert(models: Any, ok: Cli, tmp_path: Path) -> None:
    model, plan = models("mixtral"), tmp_path / "plan.json"
    ok("merge-experts", model, "--to", 4, "--plan", plan, "--plan-only")
    document = json.loads(plan.read_text())
    entry = document["layers"]["model.layers.1"]
    entry["groups"], entry["shares"] = entry["groups"][:-1], entry["shares"][:-1]
    with pytest.raises(RefusedError, match="of the 8 experts of"):
        edited(model, "merge-experts", plan_file=written(plan, document))


def test_what_a_plan_leaves_to_the_criterion_is_refused_beside_it(models: Any, tmp_path: Path) -> None:
    plan = written(tmp_path / "p.json", {"keep": [[0, 1, 2, 3], [0, 1, 2, 3]]})
    with pytest.raises(RecipeError, match="protect is for a choice by a criterion"):
        edited(models("mixtral"), plan_file=plan, protect="some.safetensors")


# For programs that prune while loading


def test_keep_lists(models: Any, ok: Cli, cli: Cli, tmp_path: Path) -> None:
    """vLLM's pairs, vllm-ascend's ranking of which it cuts a share, and kept experts by layer, from one plan."""
    plan = tmp_path / "plan.json"
    ok("drop-experts", models("mixtral"), "--keep", 6, "--by", "router-norm", "--plan", plan, "--plan-only")
    kept = kept_experts(plan)
    profile = ok("keep-list", plan, "--for", "vllm").json
    assert {(layer, e) for layer in range(2) for e in range(8) if e not in kept[f"model.layers.{layer}"]} == {
        tuple(pair) for pair in profile["pruned_experts"]
    }
    assert profile["version"] == 1
    told = ok("keep-list", plan, "--for", "vllm-ascend", "-o", tmp_path / "experts.jsonl")
    assert '"expert_prune_ratio": 0.25' in told.err
    for layer, line in enumerate((tmp_path / "experts.jsonl").read_text().splitlines()):
        ((number, ranked),) = json.loads(line).items()
        assert number == str(layer)
        assert sorted(ranked) == list(range(8))
        assert sorted(ranked[: int(8 * 0.75)]) == kept[f"model.layers.{layer}"]
    assert ok("keep-list", plan).json == {where.rsplit(".")[-1]: experts for where, experts in kept.items()}
    by_profile = edited(models("mixtral"), plan_file=written(tmp_path / "vllm.json", profile))
    assert same_plan(by_profile, edited(models("mixtral"), plan_file=str(plan)))


def test_keep_lists_that_cannot_be(models: Any, ok: Cli, cli: Cli, tmp_path: Path) -> None:
    plain = written(tmp_path / "p.json", {"keep": [[0], [1]]})
    assert "does not say how many experts" in cli("keep-list", plain).err
    ok("merge-experts", models("mixtral"), "--to", 4, "--plan", tmp_path / "m.json", "--plan-only")
    assert "a keep list is for plans of drop-experts" in cli("keep-list", tmp_path / "m.json").err
    ok("drop-experts", models("mixtral"), "--experts", 3, "--plan", tmp_path / "n.json", "--plan-only")
    assert "no score for each expert" in cli("keep-list", tmp_path / "n.json", "--for", "vllm-ascend").err
    assert "did you mean 'vllm'" in cli("keep-list", tmp_path / "n.json", "--for", "vlm").err


def test_prediction_layers_that_a_plan_leaves_out(models: Any, tmp_path: Path) -> None:
    """They keep as many experts as the others, by their router rows, and that is said."""
    with_prediction_layer(models("deepseek_v3"), tmp_path / "mtp")
    plan = edited(tmp_path / "mtp", plan_file=written(tmp_path / "p.json", {"keep": {"1": [0, 3, 4, 7]}}))
    assert {block.experts for block in plan.anatomy.blocks} == {4}
    assert "not in the plan" in plan.steps[-1].notes[0]
