"""NaN and infinity: estimates leave them out and say so, decisions refuse them, and no JSON holds them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.checkpoint.strict_json import constants, not_finite, write_json
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.merge.compute.method import methods
from moesurgery.stats.criteria import scores
from moesurgery.stats.statistics_file import BlockStats, Stats, empty_sums, load_stats
from tests.conftest import Result
from tests.tiny import read_tensors

Cli = Callable[..., Result]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """numpy says nothing on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def edited(model: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """Copy a model in one shard, with changed tensors and config."""
    tensors = read_tensors(model)
    change(tensors)
    shutil.copytree(model, out)
    for file in (*out.glob("*.safetensors"), *out.glob("*.index.json")):
        file.unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    held = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(held))
    return out


def embedding(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    (name,) = (n for n in tensors if n.endswith("embed_tokens.weight"))
    return tensors[name]


def rows_of(tensors: dict[str, torch.Tensor], rows: list[int], value: float) -> None:
    embedding(tensors)[rows, 3] = value


def zero_rows(tensors: dict[str, torch.Tensor], rows: list[int]) -> None:
    embedding(tensors)[rows] = 0


def fill(tensors: dict[str, torch.Tensor], value: float) -> None:
    embedding(tensors).fill_(value)


def report(plan: Any) -> dict[str, float]:
    return {entry["layer"]: entry["factor"] for entry in plan.steps[-1].report["layers"]}


def strict(text: str) -> Any:
    """Parse as every parser but Python's does."""

    def refuse(literal: str) -> Any:
        raise AssertionError(f"{literal} is no JSON")

    return json.loads(text, parse_constant=refuse)


# Estimates from the router


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e25])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_embedding_rows_that_are_not_finite_are_left_out_and_counted(
    models: Any, tmp_path: Path, model_type: str, value: float
) -> None:
    model = models(model_type)
    bad = edited(model, tmp_path / "bad", lambda t: rows_of(t, [5, 9], value))
    # Padding is left out already: rows of zeros are what the estimate is without.
    without = edited(model, tmp_path / "without", lambda t: zero_rows(t, [5, 9]))
    found = apply(plan_of(open_checkpoint(bad)), "rescale", top_k=3)
    assert report(found) == report(apply(plan_of(open_checkpoint(without)), "rescale", top_k=3))
    count = embedding(read_tensors(model)).shape[0]
    (note,) = (n for n in found.steps[-1].notes if "sampled embedding rows" in n)
    assert note.startswith(f"2 of {count} sampled embedding rows hold NaN, infinity or numbers too large")
    assert "validate --level values" in note
    clean = apply(plan_of(open_checkpoint(model)), "rescale", top_k=3)
    assert not any("sampled embedding rows" in n for n in clean.steps[-1].notes)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("value", [0.0, NAN, INF])
def test_an_embedding_without_one_usable_row_gives_no_estimate(
    models: Any, tmp_path: Path, cli: Cli, model_type: str, value: float
) -> None:
    bad = edited(models(model_type), tmp_path / "bad", lambda t: fill(t, value))
    result = cli("rescale", bad, "--top-k", 3, "-o", tmp_path / "out")
    assert result.code == 2
    assert "the router estimate cannot be made: all" in result.err
    assert "rows that were sampled of the embedding are zero or not finite" in result.err
    assert "choose --scale norm, --scale none or a number" in result.err
    assert not (tmp_path / "out").exists()
    # Another rule needs no estimate, and says that this one is not there.
    plan = apply(plan_of(open_checkpoint(bad)), "rescale", top_k=3, scale="norm")
    assert plan.steps[-1].report["alternatives"]["router"] is None


def test_a_file_of_holes_gives_no_factor(tmp_path: Path, cli: Cli, models: Any) -> None:
    model = Path(shutil.copytree(models("mixtral"), tmp_path / "holes"))
    for shard in model.glob("*.safetensors"):
        size = shard.stat().st_size
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        with open(shard, "r+b") as file:
            file.truncate(header)
            file.truncate(size)
    result = cli("rescale", model, "--top-k", 3, "-o", tmp_path / "out")
    assert result.code == 2
    assert "zero or not finite" in result.err


@pytest.mark.parametrize("tensor", ["block_sparse_moe.gate.weight", "post_attention_layernorm.weight"])
def test_a_router_or_norm_that_is_not_finite_decides_nothing(
    models: Any, tmp_path: Path, cli: Cli, tensor: str
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"model.layers.1.{tensor}"].view(-1)[2:4] = NAN

    bad = edited(models("mixtral"), tmp_path / "bad", spoil)
    result = cli("rescale", bad, "--top-k", 3, "-o", tmp_path / "out")
    assert result.code == 2
    assert f"model.layers.1.{tensor} holds 2 numbers that are not finite" in result.err
    assert cli("rescale", bad, "--top-k", 3, "--scale", 1.25, "-o", tmp_path / "out").code == 0


def test_a_selection_bias_that_is_not_finite_decides_nothing(models: Any, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                tensors[name][1] = INF

    plan = plan_of(open_checkpoint(edited(models("deepseek_v3"), tmp_path / "bad", spoil)))
    with pytest.raises(RefusedError, match=r"e_score_correction_bias holds 1 numbers that are not finite"):
        apply(plan, "rescale", top_k=3)


def test_scores_that_overflow_give_no_factor(models: Any, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"].fill_(3e38)

    plan = plan_of(open_checkpoint(edited(models("mixtral"), tmp_path / "bad", spoil)))
    with pytest.raises(RefusedError, match="mean squared weights of its router come to") as caught:
        apply(plan, "rescale", top_k=3)
    assert "--scale norm" in str(caught.value.hint)


# Factors


@pytest.mark.parametrize("routed_scale_key", [0.0, -2.5, INF, 1e308])
def test_a_config_number_that_comes_out_wrong_is_refused(
    models: Any, tmp_path: Path, cli: Cli, routed_scale_key: float
) -> None:
    model = edited(models("deepseek_v3"), tmp_path / "m", lambda t: None, routed_scaling_factor=routed_scale_key)
    result = cli("rescale", model, "--top-k", 3, "--scale", 1e10, "-o", tmp_path / "out")
    assert result.code == 2
    assert "rescale: routed_scaling_factor" in result.err
    assert "not a finite and positive number" in result.err
    assert "put a positive routed_scaling_factor into config.json first, or use --where weights" in result.err


@pytest.mark.parametrize("factor", [NAN, INF, -0.5, 0.0])
@pytest.mark.parametrize("where", [0, 5])
def test_a_factor_of_a_repair_is_finite_and_positive(models: Any, tmp_path: Path, factor: float, where: int) -> None:
    model = models("mixtral")
    blocks = plan_of(open_checkpoint(model)).anatomy.blocks
    factors = [1.5] * blocks[0].experts
    factors[where] = factor
    errors = {"error_before": 1.0, "error_after": 1.0}
    layers = [
        {"layer": b.where, "factors": factors, "file": None, "tokens": [9] * b.experts, "skipped": [], **errors}
        for b in blocks
    ]
    repair = tmp_path / "repair"
    repair.mkdir()
    document = {"format": "moesurgery refit 1", "kind": "scalar", "tokens": 9, "layers": layers}
    (repair / "refit.json").write_text(json.dumps(document))
    with pytest.raises(
        RefusedError, match=rf"{blocks[0].where}, expert {where}: the factor on the output is"
    ) as caught:
        apply(plan_of(open_checkpoint(model)), "refit", repair=str(repair))
    assert "not a finite and positive number" in caught.value.message
    assert "validate --level values" in str(caught.value.hint)


def statistics(model: Path, **other: float) -> Stats:
    """Statistics of a model's blocks: ones, but for single values."""
    anatomy = plan_of(open_checkpoint(model)).anatomy
    blocks = {}
    for block in anatomy.blocks:
        sums = {name: np.ones_like(v.numpy()) for name, v in empty_sums(block.experts, 4, [3]).items()}
        blocks[block.where] = BlockStats(block.where, sums)
    last = blocks[anatomy.blocks[-1].where]
    for name, value in other.items():
        last.sums[name].reshape(-1)[0] = value
    about = {"top_k": 2, "other_top_k": [3], "model_type": "mixtral", "blocks": list(blocks), "tokens": 9}
    return Stats(blocks, about)


@pytest.mark.parametrize("name", ["gram", "norm", "count", "output"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_statistics_that_are_not_finite_are_neither_written_nor_read(
    models: Any, tmp_path: Path, cli: Cli, name: str, value: float
) -> None:
    model = models("mixtral")
    bad = statistics(model, **{name: value})
    where = list(bad.blocks)[-1]
    with pytest.raises(RefusedError, match=f"s.safetensors: {name} of {where} holds numbers that are not finite"):
        bad.save(tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()
    bad.check_finite = lambda source: None  # type: ignore[method-assign] - as an earlier version wrote them
    bad.save(tmp_path / "old.safetensors")
    with pytest.raises(RefusedError, match=f"{name} of {where} holds numbers that are not finite") as caught:
        load_stats(tmp_path / "old.safetensors")
    assert "validate --level values" in str(caught.value.hint)
    for command in (("drop-experts", "--count", 2), ("rescale", "--top-k", 3, "--scale", "measured")):
        result = cli(command[0], model, *command[1:], "--stats", tmp_path / "old.safetensors", "-o", tmp_path / "out")
        assert result.code == 2
        assert "not finite" in result.err


def test_a_measured_factor_that_is_not_positive_is_refused(models: Any, tmp_path: Path, cli: Cli) -> None:
    model = models("mixtral")
    good = statistics(model)
    for block in good.blocks.values():
        block.sums["gram@3"] = np.stack([np.eye(block.experts)] * 2)
        block.sums["cross@3"][:, 2] = -5.0
    good.save(tmp_path / "s.safetensors")
    arguments = ("--top-k", 3, "--scale", "measured-expert", "--stats", tmp_path / "s.safetensors")
    result = cli("rescale", model, *arguments, "-o", tmp_path / "out")
    assert result.code == 2
    assert "expert 2: the factor on the output is -4.9" in result.err


# Choices of experts


@pytest.mark.parametrize(
    "command",
    [
        ("drop-experts", "--count", 2, "--by", "router-norm"),
        ("merge-experts", "--to", 4),
        ("merge-experts", "--groups", "[[0, 1]]", "--weights", "router-norm"),
    ],
)
def test_router_rows_that_are_not_finite_rank_nothing(
    models: Any, tmp_path: Path, cli: Cli, command: tuple[Any, ...]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"][4, 1] = NAN

    bad = edited(models("mixtral"), tmp_path / "bad", spoil)
    result = cli(command[0], bad, *command[1:], "-o", tmp_path / "out")
    assert result.code == 2
    assert "model.layers.1.block_sparse_moe.gate.weight holds 1 numbers that are not finite" in result.err
    assert "validate --level values" in result.err


def test_finite_statistics_rank_as_before(models: Any) -> None:
    block = next(iter(statistics(models("mixtral")).blocks.values()))
    assert scores(block, "reap-sum").tolist() == [2.0] * block.experts


# Numbers in recipes and adapters


@pytest.mark.parametrize(
    ("name", "values", "where"),
    [
        ("merge-experts", {"groups": [[0, 1]], "weights": [1.0, NAN, 1.0]}, "weights.1 is nan"),
        ("rescale", {"top_k": 3, "scale": INF}, "scale is inf"),
        ("upcycle", {"experts": 4, "sources": [{"residual_scale": -INF}]}, "sources"),
    ],
)
def test_numbers_of_a_recipe_are_finite_at_any_depth(
    models: Any, name: str, values: dict[str, Any], where: str
) -> None:
    with pytest.raises(RecipeError, match="expected a finite number") as caught:
        apply(plan_of(open_checkpoint(models("mixtral"))), name, **values)
    assert where in caught.value.message


# Merges


def dense(folder: Path, seed: int, bad: float | None = None) -> Path:
    """A small Llama with one value in place of another."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    shapes |= {f"model.layers.0.self_attn.{q}_proj.weight": (8, 8) for q in "qkvo"}
    shapes |= {f"model.layers.0.mlp.{q}_proj.weight": (12, 8) for q in ("gate", "up")}
    shapes |= {"model.layers.0.mlp.down_proj.weight": (8, 12), "lm_head.weight": (16, 8)}
    shapes |= {f"model.layers.0.{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if bad is not None:
        tensors[UP][3, 4] = bad
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 12}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False, "dtype": "float32"}))
    return folder


UP = "model.layers.0.mlp.up_proj.weight"
TWO = ("nearswap", "arcee_fusion")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("method", sorted(set(methods()) - {"passthrough"}))
def test_one_value_never_spoils_the_tensor_of_a_merge(tmp_path: Path, cli: Cli, method: str, bad: float) -> None:
    base, a, b = dense(tmp_path / "base", 0), dense(tmp_path / "a", 1), dense(tmp_path / "b", 2, bad)
    models = [base, b] if method == "slerp" else [b] if method in TWO else [a, b]
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(m)} for m in models], "dtype": "float32"}
    for name, parameter in methods()[method].parameters.items():
        if parameter.required:
            recipe.setdefault("parameters", {})[name] = 0.5
    if methods()[method].base or method == "slerp":
        recipe["base_model"] = str(base)
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    result = cli("merge", tmp_path / "r.yml", "-o", tmp_path / "out", "-q")
    if result.code == 0:
        odd = {n: (~t.isfinite()).nonzero().tolist() for n, t in load_file(tmp_path / "out/model.safetensors").items()}
        assert {n: at for n, at in odd.items() if at} in ({}, {UP: [[3, 4]]})
    else:
        assert result.code == 2
        assert f"{UP}: a tensor to be merged holds NaN" in result.err
        assert "hint:  `moesurgery validate" in result.err


@pytest.mark.parametrize("value", [".nan", ".inf", '"nan"'])
def test_parameters_of_a_merge_are_finite(tmp_path: Path, cli: Cli, value: str) -> None:
    a, b = dense(tmp_path / "a", 1), dense(tmp_path / "b", 2)
    text = f"merge_method: linear\nmodels:\n- {{model: {a}, parameters: {{weight: 1}}}}\n"
    (tmp_path / "r.yml").write_text(f"{text}- model: {b}\n  parameters:\n    weight: [0, {value}]\n")
    result = cli("merge", tmp_path / "r.yml", "-o", tmp_path / "out")
    assert result.code == 2
    assert "r.yml:5:" in result.err or "r.yml:6:" in result.err
    assert "finite number" in result.err


def test_weights_that_overflow_are_refused_and_the_tensor_is_named(tmp_path: Path, cli: Cli) -> None:
    a, b = dense(tmp_path / "a", 1), dense(tmp_path / "b", 2)
    recipe = {"merge_method": "linear", "parameters": {"normalize": False}, "dtype": "float32"}
    recipe["models"] = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((a, 1e39), (b, -1e39))]
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    result = cli("merge", tmp_path / "r.yml", "-o", tmp_path / "out")
    assert result.code == 2
    assert "weight holds NaN, and nothing that it is made of does" in result.err or "cannot: beyond" in result.err
    assert "model." in result.err or "lm_head" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [NAN, INF, "sixteen", None, True])
def test_the_factor_of_an_adapter_is_a_finite_number(tmp_path: Path, cli: Cli, alpha: Any) -> None:
    model, adapter = dense(tmp_path / "m", 1), tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A": torch.ones(2, 8), "lora_B": torch.ones(12, 2)}
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    save_file({f"{prefix}.{n}.weight": t for n, t in factors.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    (tmp_path / "r.yml").write_text(f"merge_method: passthrough\nmodels:\n- model: {model}+{adapter}\n")
    result = cli("merge", tmp_path / "r.yml", "-o", tmp_path / "out")
    assert result.code == 2
    assert "adapter/adapter_config.json: lora_alpha is" in result.err
    assert "expected a finite number" in result.err


def test_no_adapter_is_made_of_a_difference_that_is_not_finite(tmp_path: Path, cli: Cli, models: Any) -> None:
    model = models("mixtral")
    name = "model.layers.0.self_attn.o_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = NAN

    bad = edited(model, tmp_path / "bad", spoil)
    result = cli("extract-lora", model, bad, "--rank", 2, "-o", tmp_path / "out")
    assert result.code == 2
    assert f"{name}: the two models differ by NaN or infinity" in result.err
    assert not (tmp_path / "out").exists()


# Distances


def test_distances_are_over_what_is_finite_and_say_how_much_is_not(models: Any, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, :3] = torch.tensor([NAN, INF, -INF])

    model = models("mixtral")
    plan = plan_of(open_checkpoint(edited(model, tmp_path / "bad", spoil)))
    tied = apply(plan, "tie-blocks", materialize=True, distances="exact")
    mine, other = (read_tensors(model)[f"model.layers.{i}.self_attn.o_proj.weight"].double() for i in (1, 0))
    keep = torch.ones_like(mine, dtype=torch.bool)
    keep[0, :3] = False
    expected = float((mine - other)[keep].norm() / mine[keep].norm())
    assert tied.steps[-1].report["distances"]["self_attn.o_proj"]["1"] == pytest.approx(expected, rel=1e-6)
    assert any(
        n.startswith("the distances are without 3 values that are NaN or infinite") for n in tied.steps[-1].notes
    )
    assert not list(not_finite(dict(tied.steps[-1].report)))


# JSON


def test_json_is_json_whatever_the_numbers() -> None:
    value = {"a": [1.5, INF, -INF, NAN], "text": 'NaN, "Infinity" and \\', "ü": {"NaN": 1}}
    text = write_json(value)
    assert strict(text) == {**value, "a": [1.5, INF, -INF, None]}
    assert list(constants(text)) == []
    assert list(constants(json.dumps(value, indent=1))) == [(4, "Infinity"), (5, "-Infinity"), (6, "NaN")]
    assert [path for path, _ in not_finite(value)] == ["a.1", "a.2", "a.3"]


def test_infinity_of_a_config_stays_and_becomes_json(models: Any, tmp_path: Path, ok: Cli) -> None:
    model = edited(models("deepseek_v3"), tmp_path / "m", lambda t: None, time_step_limit=[0.0, INF])
    ok("rescale", model, "--top-k", 3, "--scale", 1.25, "-o", tmp_path / "out")
    for file in (tmp_path / "out").glob("*.json"):
        strict(file.read_text())
    assert json.loads((tmp_path / "out/config.json").read_text())["time_step_limit"] == [0.0, INF]
    assert "C16" in ok("validate", model, "--level", "config").out
    assert "C16" not in ok("validate", tmp_path / "out", "--level", "config").out


def test_a_config_with_nan_is_not_edited(models: Any, tmp_path: Path, cli: Cli) -> None:
    model = edited(models("mixtral"), tmp_path / "m", lambda t: None, rope={"theta": NAN})
    result = cli("rescale", model, "--top-k", 3, "--scale", 1.25, "-o", tmp_path / "out")
    assert result.code == 2
    assert "rescale: rope.theta in config.json would be nan, which is no number of JSON" in result.err
    assert "give rope.theta a number in config.json" in result.err
    assert cli("validate", model, "--level", "config").code == 1


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_validate_finds_what_is_no_json(models: Any, tmp_path: Path, cli: Cli, literal: str, file: str) -> None:
    model = Path(shutil.copytree(models("mixtral"), tmp_path / "m"))
    held = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps({**held, "note": "Infinity"}, indent=2)[:-2] + f',\n  "odd": {literal}\n}}')
    found = [f for f in cli("validate", model, "--level", "config", "--json").json["findings"] if f["code"] == "C16"]
    line = (model / file).read_text().splitlines().index(f'  "odd": {literal}') + 1
    assert [(f["file"], f["severity"]) for f in found] == [(file, "error" if literal == "NaN" else "warning")]
    assert f"line {line} holds {literal}, which is no JSON" in found[0]["message"]
    assert ("put a number there" if literal == "NaN" else "write 1e999") in found[0]["hint"]


def test_reports_on_the_terminal_are_json(models: Any, tmp_path: Path, cli: Cli) -> None:
    model = edited(models("deepseek_v3"), tmp_path / "a", lambda t: None, odd=INF)
    other = edited(models("deepseek_v3"), tmp_path / "b", lambda t: rows_of(t, [1], NAN), odd=NAN)
    for arguments in (("diff", model, other), ("inspect", other), ("validate", other), ("count-params", other)):
        strict(cli(*arguments, "--json").out)
    assert strict(write_json(INF)) == INF


def test_what_is_not_finite_in_a_source_is_copied_as_it_is(models: Any, tmp_path: Path) -> None:
    """It is for `validate` to say; no edit changes it."""
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[:3] = torch.tensor([NAN, INF, -INF])

    bad = edited(models("mixtral"), tmp_path / "bad", spoil)
    write_plan(apply(plan_of(open_checkpoint(bad)), "rescale", top_k=3, scale=1.5), tmp_path / "out")
    found = read_tensors(tmp_path / "out")[name].view(-1)
    assert found[0].isnan()
    assert found[1:3].tolist() == [INF, -INF]
    assert torch.equal(found[3:], read_tensors(bad)[name].view(-1)[3:] * 1.5)
