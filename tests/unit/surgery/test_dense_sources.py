"""Upcycling several dense models: whose tensors go where, and router rows from prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.plan.plan import Plan
from tests.conftest import Result
from tests.dense import LLAMA3, LONG_PROMPT, save_dense
from tests.tiny import load, logits, read_tensors, same_bits
from tests.tokenizer import save_tokenizer

Cli = Callable[..., Result]
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
DENSE = "model.layers.{}.mlp.{}_proj.weight"
NAMES = {"w1": "gate", "w3": "up", "w2": "down"}
PROMPTS = (["solve for x: 3x + 5", "2 + 2"], ["once upon a time there was a king"], ["def f(x): return"])
NEGATIVE = (["the end."], [], ["a king", "queen"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two fine-tunes: its weights, moved a little. All have a tokenizer."""
    folder = tmp_path_factory.mktemp("clowns")
    save_dense(folder / "base", "llama", **LLAMA3)
    save_tokenizer(folder / "base")
    tensors = read_tensors(folder / "base")
    for seed, name in enumerate(("math", "poems")):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir()
        moved = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        save_file(moved, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text((folder / "base" / "config.json").read_text())
    return {path.name: path for path in folder.iterdir()}


def planned(models: dict[str, Path], **parameters: Any) -> Plan:
    return apply(plan_of(open_checkpoint(models["base"])), "upcycle", **{"proof": False, **parameters})


def written(plan: Plan, out: Path) -> dict[str, torch.Tensor]:
    write_plan(plan, out)
    load(out)
    return read_tensors(out)


def test_each_expert_is_its_sources_ffn_and_the_rest_the_bases(models: dict[str, Path], tmp_path: Path) -> None:
    entries = [{"model": str(models["math"])}, {}, {"model": str(models["poems"]), "residual_scale": 0.3}]
    found = written(planned(models, sources=entries), tmp_path / "out")
    dense = {name: read_tensors(path) for name, path in models.items()}
    for layer in range(3):
        for expert, name in enumerate(("math", "base", "poems")):
            for theirs, ours in NAMES.items():
                wanted = dense[name][DENSE.format(layer, ours)]
                wanted = wanted * 0.3 if (name, ours) == ("poems", "down") else wanted
                assert same_bits(found.pop(EXPERT.format(layer, expert, theirs)), wanted)
        found.pop(ROUTER.format(layer))
    assert all(same_bits(tensor, dense["base"][name]) for name, tensor in found.items())


def test_sources_fill_the_groups_in_turn(models: dict[str, Path], tmp_path: Path) -> None:
    sources = [str(models["math"]), str(models["poems"])]
    found = written(planned(models, sources=sources, experts=8, granularity=2, top_k=4), tmp_path / "out")
    dense = {name: read_tensors(path) for name, path in models.items()}
    for expert in range(8):
        name = ("math", "poems")[expert // 2 % 2]
        rows = slice(24 * (expert % 2), 24 * (expert % 2 + 1))
        assert same_bits(found[EXPERT.format(2, expert, "w1")], dense[name][DENSE.format(2, "gate")][rows])


def test_the_rest_can_be_the_average(models: dict[str, Path], tmp_path: Path) -> None:
    sources = [str(models["math"]), str(models["poems"]), str(models["math"])]
    found = written(planned(models, sources=sources, rest="average"), tmp_path / "out")
    math, poems = read_tensors(models["math"]), read_tensors(models["poems"])
    shared = [name for name in found if ".block_sparse_moe." not in name]
    assert len(shared) == 3 * 6 + 3
    for name in shared:  # every model counts once, however many experts it gives
        assert torch.allclose(
            found[name], ((math[name].double() + poems[name].double()) / 2).float(), rtol=0, atol=2e-7
        )


def test_branches_that_are_equal_stay_exact(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in models["base"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    sources = [{"model": str(models["base"])}, {"model": str(copy)}]
    written(planned(models, sources=sources, rest="average"), tmp_path / "out")
    difference = logits(load(tmp_path / "out"), LONG_PROMPT) - logits(load(models["base"]), LONG_PROMPT)
    assert difference.abs().max() <= 1e-5


def test_noise_per_source_is_absolute_and_seeded(models: dict[str, Path], tmp_path: Path) -> None:
    entries = [{}, {"noise_scale": 0.05}]
    found = written(planned(models, sources=entries, experts=2, seed=1), tmp_path / "out")
    dense = read_tensors(models["base"])
    for theirs, ours in NAMES.items():
        wanted = dense[DENSE.format(1, ours)]
        assert same_bits(found[EXPERT.format(1, 0, theirs)], wanted)
        moved = found[EXPERT.format(1, 1, theirs)] - wanted
        assert abs(float(moved.std()) - 0.05) < 0.005
    again = written(planned(models, sources=entries, experts=2, seed=2), tmp_path / "again")
    assert not torch.equal(found[EXPERT.format(1, 1, "w1")], again[EXPERT.format(1, 1, "w1")])


def test_all_weights_in_one_dtype(models: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(models, sources=[str(models["math"]), {}], dtype="bfloat16", to="solar_open")
    write_plan(plan, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert {t.dtype for n, t in found.items() if "correction_bias" not in n} == {torch.bfloat16}
    assert found["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    math = read_tensors(models["math"])[DENSE.format(0, "up")].bfloat16()
    assert same_bits(found["model.layers.0.mlp.experts.0.up_proj.weight"], math)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"num_hidden_layers": 2}, "has 2 layers, the base model 3"),
        ({"intermediate_size": 32}, r"its FFN is \[32, 32\], the base model's \[48, 32\]"),
        ({"hidden_act": "gelu"}, "uses gelu, the base model silu"),
    ],
)
def test_sources_of_another_shape(models: dict[str, Path], tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    save_dense(tmp_path / "other", "llama", **{**LLAMA3, **config})
    with pytest.raises(RefusedError, match=reason):
        planned(models, sources=[{}, str(tmp_path / "other")])


def test_sources_of_another_type(models: dict[str, Path], tmp_path: Path) -> None:
    save_dense(tmp_path / "other", "qwen2")
    with pytest.raises(RefusedError, match="is a qwen2, the base model a llama"):
        planned(models, sources=[{}, str(tmp_path / "other")])
    with pytest.raises(RefusedError, match="3 sources cannot fill 8 groups"):
        planned(models, sources=[{}, {}, {}], experts=8)


def test_no_local_path_gets_into_the_record(models: dict[str, Path], tmp_path: Path) -> None:
    write_plan(planned(models, sources=[str(models["math"]), {"model": str(models["poems"])}]), tmp_path / "out")
    assert str(models["math"].parent) not in (tmp_path / "out" / "moesurgery.json").read_text()


# Router rows from prompts


def entries_with_prompts() -> list[dict[str, Any]]:
    return [
        {"prompts": positive, **({"negative_prompts": negative} if negative else {})}
        for positive, negative in zip(PROMPTS, NEGATIVE, strict=True)
    ]


@pytest.fixture(scope="module")
def states(models: dict[str, Path]) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """The ids of each prompt and what each layer's FFN reads, one prompt at a time, by hooks on transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["base"])
    model = load(models["base"])
    read: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda m, args: read.append(args[0][0].clone()))
    found = {}
    for prompt in [p for group in (*PROMPTS, *NEGATIVE) for p in group]:
        ids = torch.tensor([tokenizer.encode("<s>" + prompt, add_special_tokens=False)])
        read.clear()
        logits(model, ids)
        found[prompt] = ids[0], list(read)
    return found


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_rows_follow_the_prompts(models: dict[str, Path], states: Any, tmp_path: Path, mode: str) -> None:
    plan = planned(models, sources=entries_with_prompts(), router=mode)
    found = written(plan, tmp_path / "out")
    table = read_tensors(models["base"])["model.embed_tokens.weight"]

    def mean(prompts: list[str], layer: int) -> torch.Tensor:
        seen = [states[prompt] for prompt in prompts]
        if mode == "cheap_embed":
            return unit(torch.stack([table[ids].sum(dim=0) for ids, _ in seen]).sum(dim=0))
        one = [layers[layer][-1] if mode == "hidden" else layers[layer].mean(dim=0) for _, layers in seen]
        return torch.stack(one).mean(dim=0)

    for layer in range(3):
        rows = [mean(p, layer) - (mean(n, layer) if n else 0) for p, n in zip(PROMPTS, NEGATIVE, strict=True)]
        wanted = torch.stack([unit(row) for row in rows])
        assert torch.allclose(found[ROUTER.format(layer)], wanted, atol=2e-6)
        load = plan.steps[0].report["load"][layer]
        assert sum(load) == pytest.approx(1)
        if mode == "hidden":
            read = torch.cat([layers[layer] for _, layers in states.values()])
            chosen = (read @ wanted.T).topk(2, dim=-1).indices.flatten().bincount(minlength=3)
            assert load == pytest.approx((chosen / chosen.sum()).tolist())


def test_the_load_of_each_expert_is_printed(models: dict[str, Path], tmp_path: Path, ok: Cli) -> None:
    recipe = tmp_path / "r.yaml"
    lines = "".join(f"        - prompts: {prompts}\n" for prompts in PROMPTS)
    recipe.write_text(
        f"model: {models['base']}\nsteps:\n  - upcycle:\n      router: hidden\n      proof: false\n"
        f"      sources:\n{lines}"
    )
    result = ok("run", recipe, "--dry-run")
    text = result.out + result.err
    assert "load on all tokens of the prompts" in text
    assert "least layer" in text


def test_prompts_need_a_tokenizer_and_must_tell_experts_apart(models: dict[str, Path]) -> None:
    with pytest.raises(RefusedError, match="no token could tell them apart"):
        planned(models, sources=[{"prompts": ["a"]}, {"prompts": ["a"]}], router="hidden")
    with pytest.raises(RefusedError, match="8 router rows are needed, and there are prompts for 2"):
        planned(models, sources=[{"prompts": ["a"]}, {"prompts": ["b"]}], router="hidden", experts=8)
    plan = plan_of(open_checkpoint(models["math"]))
    with pytest.raises(CheckpointError, match="has no tokenizer, which prompts need"):
        apply(plan, "upcycle", sources=entries_with_prompts(), router="hidden", proof=False)
