"""Dropping experts: the model computes what the original computes with those router logits at minus infinity."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.nodes import Copy
from moesurgery.fitting.collector import collect
from moesurgery.forward.engine import Engine
from moesurgery.forward.tokens import Tokens
from moesurgery.stats.criteria import scores
from moesurgery.stats.statistics_file import Stats
from tests.conftest import Result
from tests.families import ROWS, TINY
from tests.quantise import make_fp8, make_mxfp4, mxfp4_value, rewrite
from tests.tiny import PROMPT, load, logits, read_config, read_tensors, same_bits
from tests.unit.write.test_write import digest

Cli = Callable[..., Result]
DROPPED = [0, 3, 4, 7]  # two of each group where there are groups
ROUTER = re.compile(r"\.(gate|router|router\.\w+|gate\.\w+|router_mlp\.out_proj)\.weight$")
SELECTION_BIAS = re.compile(r"(correction_bias|expert_bias|router_bias|balancing_biases)$")
LAYER = re.compile(r"(?:layers|blocks?)\.(\d+)\.")
# The code of NLLB-MoE in transformers 5.23 takes the mask of the best expert for its number.
NO_REFERENCE = {"nllb-moe", "deepseek_v4"}  # experts by token of the latter: test_hash_layers.py


def dropped(model: Path, out: Path, **parameters: Any) -> Path:
    write_plan(apply(plan_of(open_checkpoint(model)), "drop-experts", **parameters), out)
    return out


@contextmanager
def masked(model: torch.nn.Module, experts: Mapping[int, list[int]]) -> Iterator[None]:
    """Route as if the logits of some experts were minus infinity; `experts` are those of each layer.

    Where a bias is added to the scores only to select, minus infinity goes there as well: a score of zero could
    still win by its bias.
    """
    routers: dict[int, list[int]] = {}
    for name, parameter in model.named_parameters():
        layer = LAYER.search(name)
        if layer and ROUTER.search(name) and 8 <= parameter.shape[0] <= 12:  # others may follow
            routers[parameter.data_ptr()] = experts.get(int(layer[1]), [])
    assert routers
    biases = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if SELECTION_BIAS.search(n)}
    saved = {name: tensor.detach().clone() for name, tensor in biases.items()}
    linear = torch.nn.functional.linear

    def masking(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        found = linear(value, weight, bias)
        if weight.data_ptr() in routers:
            found = found.clone()
            found[..., routers[weight.data_ptr()]] = -torch.inf
        return found

    with torch.no_grad():
        for name, tensor in biases.items():
            layer = LAYER.search(name)
            if layer is not None and 8 <= tensor.shape[-1] <= 12:  # else of a vision tower
                tensor[..., experts.get(int(layer[1]), [])] = -torch.inf
    torch.nn.functional.linear = masking
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        with torch.no_grad():
            for name, tensor in biases.items():
                tensor.copy_(saved[name])


def masked_logits(path: Path, experts: Mapping[int, list[int]]) -> torch.Tensor:
    model = load(path)
    with masked(model, experts):
        return logits(model)


# What the model then computes


@pytest.mark.parametrize(("model_type", "fused"), [*((t, False) for t in ROWS), *((t, True) for t in TINY)])
def test_dropping_is_masking(models: Any, tmp_path: Path, model_type: str, fused: bool) -> None:
    """For every family of the table: it drops right, or it refuses by name."""
    path = models(model_type, fused=fused)
    plan = plan_of(open_checkpoint(path))
    if reason := plan.anatomy.family.refuses.get("drop-experts"):
        with pytest.raises(RefusedError, match=re.escape(reason)):
            apply(plan, "drop-experts", experts=DROPPED)
        return
    reduced = apply(plan, "drop-experts", experts=DROPPED)
    weights = {name: expr for name, expr in reduced.tensors.items() if not name.endswith("tid2eid")}
    assert all(isinstance(piece, Copy) for expr in weights.values() for piece in expr.pieces())
    assert reduced.anatomy.experts == 4
    write_plan(reduced, tmp_path / "out")
    found = logits(load(tmp_path / "out"))
    if model_type in NO_REFERENCE:
        return
    expected = masked_logits(path, dict.fromkeys(range(9), DROPPED))
    assert (found - expected).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))
    assert (found - logits(load(path))).abs().max() > 1e-3  # else the test could not fail


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("deepseek_v3", {"norm_topk_prob": False}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v2", {"topk_method": "greedy"}),
    ],
)
def test_raw_and_renormalised_with_and_without_groups(
    models: Any, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    path = models(model_type, **changes)
    found = logits(load(dropped(path, tmp_path / "out", experts=DROPPED)))
    assert (found - masked_logits(path, dict.fromkeys(range(9), DROPPED))).abs().max() < 2e-6


@pytest.mark.parametrize("fused", [False, True])
def test_another_expert_in_each_layer(models: Any, tmp_path: Path, fused: bool) -> None:
    path = models("mixtral", fused=fused)
    choice = {0: [0, 7], 1: [3, 4]}
    found = logits(load(dropped(path, tmp_path / "out", experts=choice)))
    assert (found - masked_logits(path, choice)).abs().max() < 2e-6
    keep = {0: [1, 2, 3, 4, 5, 6], "model.layers.1": [0, 1, 2, 5, 6, 7]}
    assert digest_of_tensors(dropped(path, tmp_path / "kept", keep=keep)) == digest_of_tensors(tmp_path / "out")


def digest_of_tensors(path: Path) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in read_tensors(path).items()
    }


def test_keep_takes_how_many_or_which(models: Any, tmp_path: Path, ok: Cli, cli: Cli) -> None:
    path = models("mixtral")
    random = ["--by", "random", "--seed", 3]
    ok("drop-experts", path, "--count", 2, *random, "-o", tmp_path / "count")
    printed = ok("drop-experts", path, "--keep", 6, *random, "--print-recipe").out
    assert "keep: 6" in printed
    (tmp_path / "r.yaml").write_text(printed)
    ok("run", tmp_path / "r.yaml", "-o", tmp_path / "number")
    assert digest_of_tensors(tmp_path / "number") == digest_of_tensors(tmp_path / "count")
    assert "fewer than 9" in cli("drop-experts", path, "--keep", 9, "-o", tmp_path / "out").err
    result = cli("drop-experts", path, "--keep", "[6]", "-o", tmp_path / "out")
    assert result.code == 2
    assert "1 expert" in result.err


@pytest.mark.parametrize("parameters", [{"experts": []}, {"count": 0}, {"keep": list(range(8))}])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_dropping_none_is_byte_identical(
    models: Any, tmp_path: Path, model_type: str, parameters: dict[str, Any]
) -> None:
    path = models(model_type)
    out = dropped(path, tmp_path / "out", **parameters)
    for file in (*path.glob("*.safetensors"), path / "config.json"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_experts_that_are_never_chosen_are_not_missed(models: Any, tmp_path: Path) -> None:
    tensors = read_tensors(models("deepseek_v3"))
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[[1, 6]] = -100.0
    rewrite(models("deepseek_v3"), tmp_path / "model", tensors, {})
    found = logits(load(dropped(tmp_path / "model", tmp_path / "out", experts=[1, 6])))
    assert (found - logits(load(tmp_path / "model"))).abs().max() < 2e-6


def test_leaving_out_each_index_in_turn(demo: Path, tmp_path: Path, ok: Cli) -> None:
    """The classic chart on the trained demo model: the loss of each checkpoint is that of the masked model."""
    text = demo.parent / "heldout-code.txt"
    model = load(demo)
    start = read_config(demo)["bos_token_id"]
    ids = [start, *Tokenizer.from_file(str(demo / "tokenizer.json")).encode(text.read_text()).ids]
    windows = torch.tensor(ids[: 4 * 128]).view(4, 128)
    nats = []
    for index in range(8):
        out = dropped(demo, tmp_path / str(index), experts=[index])
        found = ok("perplexity", out, text, "--window", 128, "--limit", 4, "--json").json["domains"][0]["nats"]
        with masked(model, {layer: [index] for layer in range(6)}):
            expected = cross_entropy(logits(model, windows)[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()
        assert found == pytest.approx(expected, abs=1e-5)
        nats.append(found)
    assert max(nats) > min(nats) + 0.05


# What follows the experts


def with_prediction_layer(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """Write a DeepSeek-V3 whose last layer stands again behind the stack, as its prediction (MTP) layer does."""
    tensors = read_tensors(source)
    extra = {n.replace("layers.1.", "layers.2."): t + 1 for n, t in tensors.items() if ".layers.1." in n}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(32, 64)
    extra |= {f"model.layers.2.{norm}.weight": torch.rand(32) + 0.5 for norm in ("enorm", "hnorm")}
    rewrite(source, target, {**tensors, **extra}, {"num_nextn_predict_layers": 1})
    return {**tensors, **extra}


def test_prediction_layers_follow(models: Any, tmp_path: Path) -> None:
    before = with_prediction_layer(models("deepseek_v3"), tmp_path / "mtp")
    after = read_tensors(dropped(tmp_path / "mtp", tmp_path / "out", keep=[0, 2, 4, 7]))
    kept = [0, 2, 4, 7]
    for layer in (1, 2):
        mlp = f"model.layers.{layer}.mlp"
        for new, old in enumerate(kept):
            name = f"{mlp}.experts.{{}}.down_proj.weight"
            assert same_bits(after[name.format(new)], before[name.format(old)])
        assert f"{mlp}.experts.4.down_proj.weight" not in after
        for name in (f"{mlp}.gate.weight", f"{mlp}.gate.e_score_correction_bias"):
            assert same_bits(after[name], before[name][kept])
    assert same_bits(after["model.layers.2.eh_proj.weight"], before["model.layers.2.eh_proj.weight"])


def test_a_map_must_name_the_prediction_layer_too(models: Any, tmp_path: Path) -> None:
    with_prediction_layer(models("deepseek_v3"), tmp_path / "mtp")
    plan = plan_of(open_checkpoint(tmp_path / "mtp"))
    with pytest.raises(RefusedError, match=r"8 in model.layers.2") as caught:
        apply(plan, "drop-experts", experts={1: [0, 4]})
    assert "prediction layers too" in str(caught.value.hint)
    reduced = apply(plan, "drop-experts", experts={1: [0, 4], 2: [3, 7]})
    assert [block.experts for block in reduced.anatomy.blocks] == [6, 6]


def test_quantised_experts_take_their_scales_along(models: Any, tmp_path: Path) -> None:
    make_fp8(models("deepseek_v3"), tmp_path / "fp8")
    before = read_tensors(tmp_path / "fp8")
    after = read_tensors(dropped(tmp_path / "fp8", tmp_path / "out", experts=[0, 5]))
    kept = [1, 2, 3, 4, 6, 7]
    names = [n for n in after if ".experts." in n]
    assert len(names) == 6 * 3 * 2
    for name in names:
        old = re.sub(r"experts\.(\d+)", lambda m: f"experts.{kept[int(m[1])]}", name)
        assert same_bits(after[name], before[old])
    assert open_checkpoint(tmp_path / "out").config["quantization_config"]["quant_method"] == "fp8"


def test_mxfp4_blocks_scales_and_biases_lose_the_same_rows(models: Any, tmp_path: Path) -> None:
    make_mxfp4(models("gpt_oss"), tmp_path / "mxfp4")
    before = read_tensors(tmp_path / "mxfp4")
    after = read_tensors(dropped(tmp_path / "mxfp4", tmp_path / "out", experts=[3]))
    kept = [0, 1, 2, 4, 5, 6, 7]
    name = "model.layers.0.mlp.experts.down_proj"
    values = [mxfp4_value(t[f"{name}_blocks"], t[f"{name}_scales"]) for t in (after, before)]
    assert torch.equal(values[0], values[1][kept])
    assert same_bits(after[f"{name}_bias"], before[f"{name}_bias"][kept])
    assert same_bits(after["model.layers.0.mlp.router.bias"], before["model.layers.0.mlp.router.bias"][kept])


def test_blocks_of_rows_are_experts_too() -> None:
    """The layout of DBRX: [E*I, H], an expert being I consecutive rows."""
    from moesurgery.checkpoint.file_reader import FileReader
    from moesurgery.expr.random import Normal
    from moesurgery.families.anatomy import BlockTensor, MoeBlock
    from moesurgery.families.family import Projection
    from moesurgery.families.quantised import TensorName
    from moesurgery.moe.expert_axis import along_experts

    expr = Normal(1.0, 3, "F32", (4 * 6, 5))
    part = Projection("ffn.experts.mlp.w1", "gate", rows=True)
    member = BlockTensor("w1", "gate", TensorName("w1", ""), part, None, None, 0)
    found = along_experts(MoeBlock("", 0, "blocks", experts=4), member, expr, [0, 3])
    whole, reader = expr.evaluate(0, expr.numel, FileReader()).view(4, 6, 5), FileReader()
    assert found.shape == (12, 5)
    assert torch.equal(found.evaluate(0, found.numel, reader).view(2, 6, 5), whole[[0, 3]])


def test_every_alias_and_every_list_in_the_config(models: Any, tmp_path: Path) -> None:
    path = models("mixtral")
    ignored = [f"model.layers.0.block_sparse_moe.experts.{e}.w1" for e in (2, 3, 4)]
    extra = {"num_experts": [8, 8], "quantization_config": {"quant_method": "x", "ignore": [*ignored, "lm_head"]}}
    rewrite(path, tmp_path / "model", read_tensors(path), extra)
    config = read_config(dropped(tmp_path / "model", tmp_path / "out", experts=[3]))
    assert config["num_local_experts"] == 7
    assert config["num_experts"] == [7, 7]
    assert config["quantization_config"]["ignore"] == [ignored[0], ignored[1], "lm_head"]


# Choosing without data


def test_router_norm_drops_the_shortest_rows(models: Any) -> None:
    path = models("mixtral")
    report = apply(plan_of(open_checkpoint(path)), "drop-experts", count=3).steps[0].report
    tensors = read_tensors(path)
    for entry in report["layers"]:
        rows = tensors[f"{entry['layer']}.block_sparse_moe.gate.weight"]
        norms = (rows - rows.mean(0)).norm(dim=1)
        assert entry["dropped"] == sorted(norms.argsort()[:3].tolist())
        assert entry["scores"] == pytest.approx(norms.tolist(), rel=1e-5)


def test_router_norm_takes_as_many_from_each_group(models: Any) -> None:
    path = models("deepseek_v3")
    report = apply(plan_of(open_checkpoint(path)), "drop-experts", count=4).steps[0].report
    norms = read_tensors(path)["model.layers.1.mlp.gate.weight"].norm(dim=1)
    expected = [*norms[:4].argsort()[:2].tolist(), *(4 + norms[4:].argsort()[:2]).tolist()]
    assert report["layers"][0]["dropped"] == sorted(expected)


def test_random_is_the_seeds_choice(models: Any) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))

    def choice(seed: int) -> list[list[int]]:
        report = apply(plan, "drop-experts", count=3, by="random", seed=seed).steps[0].report
        return [entry["dropped"] for entry in report["layers"]]

    assert choice(1) == choice(1)
    assert len({str(choice(seed)) for seed in range(8)}) > 4
    assert choice(1)[0] != choice(1)[1] or choice(2)[0] != choice(2)[1]


# Refusals


@pytest.mark.parametrize(
    ("model_type", "parameters", "message", "hint"),
    [
        ("mixtral", {"experts": [8]}, "no expert 8", "0 to 7"),
        ("mixtral", {"experts": [1, 1]}, "named twice", None),
        (
            "mixtral",
            {"experts": {0: [1]}},
            "7 experts are left in model.layers.0, 8 in model.layers.1",
            "in every MoE layer",
        ),
        ("mixtral", {"experts": {2: [1]}}, "no MoE layer 2", "0, 1"),
        ("mixtral", {"experts": [0, 1, 2, 3, 4, 5, 6]}, "1 experts would be left.*routed to 2", "rescale: {top_k: 1}"),
        ("mixtral", {"count": 9}, "-1 experts", None),
        ("phimoe", {"experts": [0, 1, 2, 3, 4, 5, 6]}, "routed to 2", "always uses top-2"),
        ("deepseek_v3", {"experts": [0, 1]}, "2 groups of 4.*2, 4", "in each group"),
        ("deepseek_v3", {"experts": [0]}, "7 experts do not divide", "multiple of 2"),
        ("deepseek_v3", {"count": 6}, "one per group", "at least 4"),
        ("deepseek_v2", {"count": 6}, "reaches 1", "rescale: {top_k: 1}"),
        ("deepseek_v3", {"experts": {0: [1, 6]}}, "no MoE layer 0", "MoE layers are 1"),
    ],
)
def test_refusals(models: Any, model_type: str, parameters: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        apply(plan_of(open_checkpoint(models(model_type))), "drop-experts", **parameters)
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize("parameters", [{}, {"experts": [1], "count": 1}, {"experts": [1], "keep": [1]}])
def test_one_choice_and_only_one(models: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="one of experts, keep, count and plan_file"):
        apply(plan_of(open_checkpoint(models("mixtral"))), "drop-experts", **parameters)


def test_a_dense_model(models: Any) -> None:
    with pytest.raises(RefusedError, match="dense model"):
        apply(plan_of(open_checkpoint(models("llama", intermediate_size=48))), "drop-experts", experts=[0])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.block_sparse_moe.experts.3.w1.mystery", (4,)),
        ("model.layers.0.block_sparse_moe.experts.3.adapter.weight", (4, 4)),
        ("model.layers.0.block_sparse_moe.gate.temperature", (8,)),
    ],
)
def test_what_is_not_understood_beside_the_experts_is_refused(
    models: Any, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    path = models("mixtral")
    rewrite(path, tmp_path / "model", {**read_tensors(path), name: torch.zeros(shape)}, {})
    with pytest.raises(RefusedError, match=re.escape(name)):
        apply(plan_of(open_checkpoint(tmp_path / "model")), "drop-experts", experts=[0])


# The command


def test_lowering_top_k_in_the_same_recipe(demo: Path, ok: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "steps:\n  - rescale: {top_k: 1}\n  - drop-experts: {keep: {0: [3], 1: [1], 2: [0], 3: [7], 4: [2], 5: [5]}}\n"
    )
    ok("run", recipe, "--model", demo, "-o", tmp_path / "out")
    assert read_config(tmp_path / "out")["num_local_experts"] == 1
    assert bool(logits(load(tmp_path / "out")).isfinite().all())


def test_the_command_and_its_printed_recipe(demo: Path, ok: Cli, tmp_path: Path) -> None:
    arguments = ["--experts", "{0: [3], 1: [1], 2: [0], 3: [7], 4: [2], 5: [5]}"]
    out = ok("drop-experts", demo, *arguments, "-o", tmp_path / "a").out
    assert "1 of 8 experts dropped in each of 6 layers" in out
    (tmp_path / "r.yaml").write_text(ok("drop-experts", demo, *arguments, "--print-recipe").out)
    ok("run", tmp_path / "r.yaml", "-o", tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    record = json.loads((tmp_path / "a" / "moesurgery.json").read_text())
    assert record["steps"][0]["report"]["experts"] == 7


# By statistics


def collected(model: Path) -> Stats:
    return collect(Engine(plan_of(open_checkpoint(model))), Tokens(PROMPT))


@pytest.mark.parametrize("by", ["frequency", "soft-frequency", "ean", "reap", "reap-sum", "gram", None])
def test_the_lowest_by_statistics_go(models: Any, tmp_path: Path, by: str | None) -> None:
    model = models("deepseek_v3")
    stats = collected(model)
    file = str(stats.save(tmp_path / "s"))
    chosen = {} if by is None else {"by": by}
    step = apply(
        plan_of(open_checkpoint(model)), "drop-experts", count=4, stats=file, protect_super=False, **chosen
    ).steps[0]
    assert step.report["statistics"]["tokens"] == PROMPT.numel()
    for layer in step.report["layers"]:
        found = scores(stats.blocks[layer["layer"]], by or "reap-sum")
        for group in (range(4), range(4, 8)):
            assert set(layer["dropped"]) & set(group) == set(sorted(group, key=lambda e: found[e])[:2])
    assert any("agree on" in note for note in step.notes)


def test_super_experts_are_protected(models: Any, tmp_path: Path) -> None:
    model = models("mixtral")
    stats = collected(model)
    block = stats.blocks["model.layers.0"]
    rarest = int(scores(block, "frequency").argmin())
    block.sums["peak"][:, rarest] = 1e4
    file = str(stats.save(tmp_path / "s"))
    plan = plan_of(open_checkpoint(model))
    guarded = apply(plan, "drop-experts", count=1, by="frequency", stats=file).steps[0]
    assert rarest not in guarded.report["layers"][0]["dropped"]
    assert any(f"model.layers.0: {rarest}" in note for note in guarded.notes)
    free = apply(plan, "drop-experts", count=1, by="frequency", stats=file, protect_super=False).steps[0]
    assert free.report["layers"][0]["dropped"] == [rarest]


def test_criteria_that_need_statistics(models: Any, tmp_path: Path) -> None:
    plan = plan_of(open_checkpoint(models("mixtral")))
    with pytest.raises(RecipeError, match="--by reap needs statistics"):
        apply(plan, "drop-experts", count=1, by="reap")
    other = str(collected(models("qwen2_moe")).save(tmp_path / "s"))  # the same layers and counts
    with pytest.raises(RefusedError, match="another model: this is a mixtral, they were collected on a qwen2_moe"):
        apply(plan, "drop-experts", count=1, by="reap", stats=other)


def test_text_is_enough(demo: Path, tmp_path: Path, ok: Cli) -> None:
    """Statistics, what it costs, and the checkpoint, in one command; and it costs what was said."""
    text = demo.parent / "calibration-code.txt"
    held_out = demo.parent / "heldout-code.txt"
    options = ["--text", text, "--tokens", 2048, "--window", 128, "--heldout", held_out, "--limit", 4]
    document = ok("drop-experts", demo, "--count", 2, "--by", "recon", *options, "-o", tmp_path / "out", "--json").json
    nats = document["heldout"]["nats"]
    assert nats.keys() == {"original", "drop-experts"}
    measured = ok("perplexity", tmp_path / "out", held_out, "--window", 128, "--limit", 4, "--json").json
    assert measured["domains"][0]["nats"] == pytest.approx(nats["drop-experts"], abs=1e-5)
    shown = ok("drop-experts", demo, "--count", 3, "--stats", tmp_path / "out.stats.safetensors", "--dry-run").out
    assert "collapse" in shown
    assert "agree on" in shown
