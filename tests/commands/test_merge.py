"""Merging: what recipes mean, what is refused, layouts and families. The methods: tests/unit/merge/test_golden.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import ROOT, Result
from tests.golden.models import tensors, write
from tests.quantise import rewrite
from tests.tiny import TINY, load, logits, read_config, read_tensors, same_bits

Cli = Callable[..., Result]
Q = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three Llamas of four layers, of float32."""
    folder = tmp_path_factory.mktemp("llamas")
    return [write("llama", i, folder / f"llama{i}", 4) for i in range(3)]


@pytest.fixture(scope="module")
def mixtrals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixtrals")
    return [write("mixtral", i, folder / f"mixtral{i}") for i in range(3)]


@pytest.fixture
def merge(ok: Cli, tmp_path: Path) -> Callable[..., dict[str, torch.Tensor]]:
    """Merge by a recipe's text and return the tensors; the output is tmp_path/out."""

    def run(text: str, *options: object) -> dict[str, torch.Tensor]:
        (tmp_path / "r.yaml").write_text(text)
        ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--force", *options)
        return read_tensors(tmp_path / "out")

    return run


Merge = Callable[..., dict[str, torch.Tensor]]


def factor(found: torch.Tensor, of: torch.Tensor) -> float:
    """Return what one tensor is of another, which must be the same everywhere."""
    ratio = (found.double() * of.double()).sum() / (of.double() ** 2).sum()
    torch.testing.assert_close(found, (ratio * of.double()).float(), rtol=1e-5, atol=1e-6)
    return round(float(ratio), 4)


# What parameters mean. The numbers are what mergekit 0.1.5 gives for the same recipes.


SCALES: dict[str, tuple[str, dict[str, float]]] = {
    "gradient": ("[0.0, 1.0]", {Q.format(0): 0, Q.format(1): 0.3333, Q.format(2): 0.6667, Q.format(3): 1}),
    "gradient of three": ("[1, 3, 2]", {Q.format(0): 1, Q.format(1): 2.3333, Q.format(2): 2.6667, Q.format(3): 2}),
    "outside of layers": ("[1, 3, 2]", {"model.embed_tokens.weight": 1, "model.norm.weight": 1, "lm_head.weight": 1}),
    "by filter": (
        "[{filter: mlp, value: [0, 3]}, {filter: self_attn, value: 7}, {value: 5}]",
        {"model.layers.2.mlp.up_proj.weight": 2, Q.format(2): 7, "model.layers.2.input_layernorm.weight": 5},
    ),
    "the first match": (
        "[{filter: q_proj, value: 2}, {filter: self_attn, value: 3}]",
        {Q.format(0): 2, "model.layers.0.self_attn.k_proj.weight": 3, "lm_head.weight": 1},
    ),
    "everything": ('[{filter: "*", value: 2}]', {Q.format(0): 2, "lm_head.weight": 2}),
    "one layer": ('[{filter: "layers.1.", value: 2}, {value: 1}]', {Q.format(0): 1, Q.format(1): 2}),
    "one choice": ("{filter: mlp, value: 3}", {Q.format(0): 1, "model.layers.0.mlp.up_proj.weight": 3}),
}


@pytest.mark.parametrize("case", SCALES)
def test_values_gradients_and_filters(case: str, llamas: list[Path], merge: Merge) -> None:
    text, wanted = SCALES[case]
    source = read_tensors(llamas[0])
    found = merge(f"models:\n  - model: {llamas[0]}\n    parameters:\n      scale: {text}\nmerge_method: passthrough\n")
    assert {name: factor(found[name], source[name]) for name in wanted} == wanted


def test_precedence_of_source_slice_and_recipe(llamas: list[Path], merge: Merge) -> None:
    source = read_tensors(llamas[0])
    found = merge(f"""\
slices:
  - sources:
      - model: {llamas[0]}
        layer_range: [0, 2]
        parameters: {{scale: [{{filter: q_proj, value: 2}}]}}
    parameters: {{scale: [{{filter: k_proj, value: 3}}]}}
  - sources: [{{model: {llamas[0]}, layer_range: [1, 4]}}]
    parameters: {{scale: [4, 8]}}
parameters: {{scale: 5}}
merge_method: passthrough
""")
    wanted = {
        (0, 0, "q"): 2,
        (0, 0, "k"): 3,
        (1, 1, "v"): 5,
        (2, 1, "q"): 4,
        (3, 2, "k"): 6,
        (4, 3, "o"): 8,
    }
    for (layer, origin, letter), value in wanted.items():
        name = f"model.layers.{{}}.self_attn.{letter}_proj.weight"
        assert factor(found[name.format(layer)], source[name.format(origin)]) == value
    # What stands before the layers counts with the first slice, what comes after them with the last, both at its start.
    assert factor(found["model.embed_tokens.weight"], source["model.embed_tokens.weight"]) == 5
    assert factor(found["lm_head.weight"], source["lm_head.weight"]) == 4


def test_filters_see_the_numbers_of_each_source_or_of_the_output(llamas: list[Path], merge: Merge) -> None:
    first, second = (read_tensors(path) for path in llamas[:2])
    sources = f"[{{model: {llamas[0]}, layer_range: [0, 2]%s}}, {{model: {llamas[1]}, layer_range: [2, 4]%s}}]"
    own = ", parameters: {weight: [{filter: layers.0., value: 1}, {filter: layers.2., value: 2}, {value: 3}]}"
    text = "slices:\n  - sources: " + sources % (own, own) + "\nmerge_method: linear\nparameters: {normalize: false}\n"
    found = merge(text)
    for layer, (a, b) in enumerate([(1, 2), (3, 3)]):
        torch.testing.assert_close(found[Q.format(layer)], a * first[Q.format(layer)] + b * second[Q.format(layer + 2)])
    shared = "[{filter: layers.0., value: 0}, {filter: layers.1., value: 1}, {value: 0.5}]"
    found = merge(
        "slices:\n  - sources: "
        + sources % ("", "")
        + f"\nmerge_method: slerp\nbase_model: {llamas[1]}\nparameters: {{t: {shared}}}\n"
    )
    torch.testing.assert_close(found[Q.format(0)], second[Q.format(2)])
    torch.testing.assert_close(found[Q.format(1)], first[Q.format(1)])


def test_a_base_that_is_not_listed_is_merged_by_methods_without_a_base(llamas: list[Path], merge: Merge) -> None:
    parts = [read_tensors(path)[Q.format(0)] for path in llamas]
    found = merge(
        f"models: [{{model: {llamas[1]}}}, {{model: {llamas[2]}}}]\nbase_model: {llamas[0]}\n"
        "merge_method: linear\nparameters: {weight: 1}\n"
    )
    torch.testing.assert_close(found[Q.format(0)], sum(parts) / 3)


# Strictness


def listed(*paths: Path, **parameters: object) -> str:
    own = f", parameters: {{{', '.join(f'{k}: {v}' for k, v in parameters.items())}}}" if parameters else ""
    return "models:\n" + "".join(f"  - {{model: {path}{own}}}\n" for path in paths)


WRONG: dict[str, tuple[str, str]] = {
    "unknown key": ("models: [{model: A}]\nmerge_methd: linear\n", "r.yaml:2: unknown key 'merge_methd': did you mean"),
    "no method": ("models: [{model: A}]\n", "merge_method is missing"),
    "unknown method": ("models: [{model: A}]\nmerge_method: tise\n", "r.yaml:2: there is no merge method 'tise'"),
    "unknown parameter": (
        "models: [{model: A}]\nmerge_method: passthrough\nparameters:\n  scael: 1\n",
        "r.yaml:4: passthrough has no parameter 'scael': did you mean 'scale'?",
    ),
    "unknown key of a model": ("models: [{model: A, paramaters: {weight: 1}}]\nmerge_method: linear\n", "paramaters"),
    "unknown key of a choice": (
        "models: [{model: A}]\nmerge_method: passthrough\nparameters: {scale: [{filtr: mlp, value: 1}]}\n",
        "a choice is a mapping of `filter` and `value`",
    ),
    "a filter that matches nothing": (
        "models: [{model: A}]\nmerge_method: passthrough\nparameters:\n  scale:\n    - {filter: w2, value: 2}\n",
        "r.yaml:5: the filter 'w2' matches no tensor",
    ),
    "a missing weight": (
        "models: [{model: A}, {model: B, parameters: {weight: 1}}]\nmerge_method: linear\n",
        "linear needs weight of A\nhint:  add `parameters: {weight: …}`",
    ),
    "a weight by filter that leaves tensors out": (
        "models: [{model: A, parameters: {weight: [{filter: mlp, value: 1}]}}]\nmerge_method: linear\n",
        "linear needs weight of A, and no filter gives it for lm_head.weight",
    ),
    "no base": (
        "models: [{model: A}, {model: B}]\nmerge_method: ties\nparameters: {weight: 1}\n",
        "needs a `base_model",
    ),
    "too many": (
        "models: [{model: A}, {model: B}, {model: C}]\nbase_model: A\nmerge_method: slerp\nparameters: {t: 1}\n",
        "r.yaml:1: slerp merges 2 models; here are 3",
    ),
    "twice the same": ("models: [{model: A}, {model: A}]\nmerge_method: linear\nparameters: {weight: 1}\n", "twice"),
    "weights that cancel": (
        "models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: -1}}]\nmerge_method: linear\n",
        "the weights sum to 0",
    ),
    "a word for a number": (
        "models: [{model: A}]\nmerge_method: linear\nparameters: {weight: half}\n",
        "weight is 'half' (text), expected a number",
    ),
    "out of range": (
        "models: [{model: A}]\nbase_model: B\nmerge_method: ties\nparameters: {weight: 1, density: 1.5}\n",
        "density is 1.5, expected at most 1",
    ),
    "a layer that is not there": (
        "slices: [{sources: [{model: A, layer_range: [0, 9]}]}]\nmerge_method: passthrough\n",
        "layer_range ends at 9, but",
    ),
    "different lengths": (
        "slices: [{sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 3]}]}]\n"
        "merge_method: linear\nparameters: {weight: 1}\n",
        "different numbers of layers: [2, 3]",
    ),
    "no layer range": ("slices: [{sources: [{model: A}]}]\nmerge_method: passthrough\n", "layer_range is None"),
    "models and slices": (
        "models: [{model: A}]\nslices: [{sources: [{model: A, layer_range: [0, 2]}]}]\nmerge_method: passthrough\n",
        "here is models and slices",
    ),
    "a base outside of the slice": (
        "slices: [{sources: [{model: A, layer_range: [0, 2]}]}]\nbase_model: B\nmerge_method: ties\n"
        "parameters: {weight: 1}\n",
        "must be a source of the slice",
    ),
    "no such dtype": ("models: [{model: A}]\nmerge_method: passthrough\ndtype: bfloat17\n", "did you mean 'bfloat16'?"),
    "no such model": ("models: [{model: ./nowhere}]\nmerge_method: passthrough\n", "r.yaml:1: "),
    "another architecture": (
        "models: [{model: A}, {model: M}]\nmerge_method: linear\nparameters: {weight: 1}\n",
        "mixtral",
    ),
    "not a recipe": ("- 1\n", "a merge recipe is a mapping"),
    "keys twice": (
        "models: [{model: A}]\nmerge_method: passthrough\nx: &x float16\ndtype: *x\ndtype: *x\n",
        "r.yaml:5: the key 'dtype' is given twice (first on line 4)",
    ),
    "a template that is none": (
        "models: [{model: A}]\nmerge_method: passthrough\nchat_template: chatmll\n",
        "r.yaml:3: chat_template is 'chatmll', no Jinja: did you mean 'chatml'?",
    ),
    "tokens that are no mapping": (
        "models: [{model: A}]\nmerge_method: passthrough\ntokenizer:\n  source: base\n  tokens: [a]\n",
        "r.yaml:5: tokens is a mapping",
    ),
    "a tokenizer of no model": (
        "models: [{model: A}]\nmerge_method: passthrough\ntokenizer_source: ./nowhere\n",
        "r.yaml:3: ./nowhere: no such directory",
    ),
    "a stage that uses itself": (
        "name: a\nmodels: [{model: b}]\nmerge_method: passthrough\n---\nname: b\nmodels: [{model: a}]\n"
        "merge_method: passthrough\n",
        "r.yaml:5: the stage 'b' uses itself",
    ),
    "a revision beside the name": (
        "models: [{model: A, revision: v1}]\nmerge_method: passthrough\n",
        "r.yaml:1: unknown key 'revision': write it behind the name, `model: org/name@revision`",
    ),
    "a slice with another method": (
        "slices:\n- sources: [{model: A, layer_range: [0, 2]}]\n  merge_method: linear\nmerge_method: passthrough\n",
        "r.yaml:3: unknown key 'merge_method': all slices of a recipe have one method",
    ),
    "a third model as the base": (
        "slices: [{sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]}]\nbase_model: C\n"
        "merge_method: slerp\nparameters: {t: 0.5}\n",
        "r.yaml:1: the base model of slerp is one of those that it merges, not C",
    ),
    "two seeds": (
        "models: [{model: A}]\nmerge_method: passthrough\nseed: 1\nrandom_seed: 2\n",
        "r.yaml:4: give seed or random_seed, not both",
    ),
    "no model at all beside a base": (
        "models: [{model: A}]\nbase_model: A\nmerge_method: nearswap\nparameters: {t: 0.1}\n",
        "r.yaml:1: nearswap merges 1 models beside the base model; here are 0",
    ),
    "two documents without names": (
        "models: [{model: A}]\nmerge_method: passthrough\n---\nmodels: [{model: A}]\nmerge_method: passthrough\n",
        "a second stage has no name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_have_a_line_and_a_reason(
    case: str, llamas: list[Path], mixtrals: list[Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    for letter, path in zip("ABCM", (*llamas, mixtrals[0]), strict=True):
        (tmp_path / letter).symlink_to(path)
    (tmp_path / "r.yaml").write_text(text)
    result = cli("merge", "r.yaml", "-o", "out")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_is_said_with_its_line(llamas: list[Path], ok: Cli, tmp_path: Path) -> None:
    """Recipes that are around hold such keys: they run, as with mergekit, but not in silence."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"""\
constant: &half 0.5
models:
  - model: {llamas[0]}
    parameters: {{weight: *half, t: 3}}
  - model: {llamas[1]}
    parameters: {{weight: *half, normalize: true}}
merge_method: linear
normalize: true
parameters: {{int8_mask: 1.0, normalize: 1.0}}
""")
    result = ok("merge", recipe, "-o", tmp_path / "out")
    for line, word in ((4, "t has no effect"), (6, "normalize has no effect on one model"), (8, "put it under")):
        assert f"warning: {recipe}:{line}: " in result.err
        assert word in result.err
    assert "int8_mask has no effect" in result.err
    assert "constant" not in result.err
    record = json.loads((tmp_path / "out" / "moesurgery.json").read_text())
    assert len(record["steps"][0]["warnings"]) == 4


IDLE: dict[str, tuple[str, str]] = {
    "a filter behind one that takes all": (
        "models: [{model: A}]\nmerge_method: passthrough\nparameters:\n  scale:\n  - {filter: mlp, value: 2}\n"
        "  - {filter: up_proj, value: 3}\n",
        "r.yaml:6: the filter 'up_proj' of scale has no effect",
    ),
    "a value behind one for all": (
        "models: [{model: A}]\nmerge_method: passthrough\nparameters: {scale: [{value: 2}, {filter: mlp, value: 3}]}\n",
        "r.yaml:3: the filter 'mlp' of scale has no effect",
    ),
    "a layer that is not in the slice": (
        "slices:\n- sources: [{model: A, layer_range: [0, 2]}]\nmerge_method: passthrough\nparameters:\n  scale:\n"
        "  - {filter: layers.3., value: 2}\n",
        "r.yaml:6: the filter 'layers.3.' of scale has no effect",
    ),
    "the base's own parameters": (
        "models:\n- {model: A, parameters: {weight: 1}}\n- {model: B, parameters: {weight: 1}}\n"
        "merge_method: ties\nbase_model: A\n",
        "r.yaml:2: weight has no effect on the base model of ties",
    ),
    "nothing to align": (
        "models: [{model: A}]\nmerge_method: passthrough\nalign: experts\n",
        "r.yaml:3: align has no effect: no two models are merged",
    ),
    "no experts to align": (
        "models: [A, B]\nmerge_method: karcher\nalign: experts\n",
        "r.yaml:3: align: A has no experts",
    ),
    "tensors taken by element": (
        "models: [A, B]\nmerge_method: linear\nparameters: {weight: 1}\ngranularity: tensor\n",
        "r.yaml:4: granularity has no effect: linear takes each element by itself",
    ),
    "a base alone": (
        "models: [{model: A, parameters: {weight: 1}}]\nmerge_method: ties\nbase_model: A\n",
        "r.yaml:1: only the base model is merged here: the result is A itself",
    ),
    "parameters of older versions": (
        "models: [A, B]\nmerge_method: slerp\nbase_model: A\nparameters:\n  t: 0.5\n  embed_slerp: true\n",
        "r.yaml:6: embed_slerp has no effect: it is no parameter of slerp",
    ),
    "padding beside the tokenizer": (
        "models: [A]\nmerge_method: passthrough\npad_to_multiple_of: 8\n",
        "r.yaml:3: pad_to_multiple_of has no effect here: put it under `tokenizer:`",
    ),
    "a slice with the recipe's own method": (
        "slices:\n- sources: [{model: A, layer_range: [0, 2]}]\n  merge_method: passthrough\n"
        "merge_method: passthrough\n",
        "r.yaml:3: merge_method has no effect here: the recipe's own says the same",
    ),
    "a stage that nothing uses": (
        "name: a\nmodels: [A]\nmerge_method: passthrough\n---\nmodels: [B]\nmerge_method: passthrough\n",
        "r.yaml:1: the stage 'a' has no effect: no other uses it",
    ),
}


@pytest.mark.parametrize("case", IDLE)
def test_what_decides_nothing_is_said(
    case: str, llamas: list[Path], ok: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = IDLE[case]
    monkeypatch.chdir(tmp_path)
    for letter, path in zip("AB", llamas, strict=False):
        (tmp_path / letter).symlink_to(path)
    (tmp_path / "r.yaml").write_text(text)
    result = ok("merge", "r.yaml", "-o", "out", "--dry-run")
    assert result.err.count("warning:") == 1
    assert f"warning: {message}" in result.err


@pytest.mark.parametrize(
    "method",
    [
        *("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della"),
        *("della_linear", "sce", "ram", "ramplus_tl"),
    ],
)
def test_a_base_alone_is_the_result(method: str, llamas: list[Path], merge: Merge) -> None:
    """As mergekit has it: so adapters are merged into models by many a published recipe."""
    base = read_tensors(llamas[0])
    found = merge(f"models: [{llamas[0]}]\nmerge_method: {method}\nbase_model: {llamas[0]}\n")
    assert all(same_bits(found[name], base[name]) for name in base)
    found = merge(f"models: [{llamas[0]}]\nmerge_method: {method}\nbase_model: {llamas[0]}\ndtype: bfloat16\n")
    assert all(same_bits(found[name], base[name].bfloat16()) for name in base)


def test_seeds_have_two_names_and_numbers_may_stand_in_quotes(llamas: list[Path], merge: Merge) -> None:
    text = (
        f"models: [{{model: {llamas[1]}, parameters: {{weight: WEIGHT}}}}]\nmerge_method: dare_linear\n"
        f"base_model: {llamas[0]}\nparameters: {{density: [0.5, 0.25]}}\n"
    )
    seven = merge(text.replace("WEIGHT", "0.5") + "seed: 7\n")
    same = merge(text.replace("WEIGHT", "'0.5'") + "random_seed: 7\n")
    other = merge(text.replace("WEIGHT", "0.5") + "random_seed: 8\n")
    assert all(same_bits(seven[name], same[name]) for name in seven)
    assert not all(same_bits(seven[name], other[name]) for name in seven)


@pytest.mark.parametrize(
    ("stored", "written"), [("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float32")]
)
def test_a_factor_and_another_dtype_round_once(
    stored: str, written: str, llamas: list[Path], merge: Merge, tmp_path: Path
) -> None:
    held = {name: t.to(getattr(torch, stored)) for name, t in read_tensors(llamas[0]).items()}
    source = write("llama", 0, tmp_path / "source", 4, made=held)
    found = merge(f"models: [{source}]\nmerge_method: passthrough\nparameters: {{scale: 0.7071}}\ndtype: {written}\n")
    assert all(same_bits(found[name], (t.float() * 0.7071).to(getattr(torch, written))) for name, t in held.items())


def test_recipes_hold_anchors_in_keys_of_their_own(llamas: list[Path], merge: Merge) -> None:
    """As a widely copied recipe does, under one key many times, and with merge keys."""
    found = merge(f"""\
const_tag: &MODEL {llamas[0]}
const_tag: &ATTENUATION 0.5
shared: &shared
  model: *MODEL
  parameters: {{scale: [{{filter: q_proj, value: *ATTENUATION}}, {{value: 1}}]}}
slices:
- sources: [{{<<: *shared, layer_range: [0, 2]}}]
- sources: [{{layer_range: [2, 4], parameters: {{scale: 2}}, <<: *shared}}]
merge_method: passthrough
""")
    source = read_tensors(llamas[0])
    assert [factor(found[Q.format(i)], source[Q.format(i)]) for i in range(4)] == [0.5, 0.5, 2, 2]


def test_disagreements_of_configs_and_tokenizers_are_said(mixtrals: list[Path], ok: Cli, tmp_path: Path) -> None:
    other = shutil.copytree(mixtrals[1], tmp_path / "other")
    config = read_config(other)
    (other / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 3, "rope_theta": 5e5}))
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    base = shutil.copytree(mixtrals[0], tmp_path / "base")
    (base / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0, "a": 1}}}')
    (tmp_path / "r.yaml").write_text(listed(base, other, weight=1) + "merge_method: linear\n")
    result = ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert "r.yaml:3: config.json of other disagrees, base's counts: num_experts_per_tok 2 and 3" in result.err
    assert "rope_theta null and 500000.0" in result.err
    assert "other has another tokenizer" in result.err
    assert read_config(tmp_path / "out")["num_experts_per_tok"] == 2


@pytest.mark.parametrize("change", ["extra", "missing", "shape"])
def test_no_tensor_is_dropped_or_made_up(change: str, llamas: list[Path], cli: Cli, tmp_path: Path) -> None:
    other = shutil.copytree(llamas[1], tmp_path / "other")
    held = read_tensors(other)
    if change == "extra":
        held["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(12)
    elif change == "missing":
        del held["model.layers.2.self_attn.q_proj.weight"]
    else:
        held["model.embed_tokens.weight"] = torch.zeros(17, 12)
    save_file(held, other / "model.safetensors")
    (tmp_path / "r.yaml").write_text(listed(llamas[0], other, weight=1) + "merge_method: linear\n")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert result.code == 2
    message = {
        "extra": "other: layer 2: has self_attn.q_proj.bias, which would be dropped",
        "missing": "other: layer 2: lacks self_attn.q_proj.weight",
        "shape": "model.embed_tokens.weight is [17, 12] in other and [16, 12] in llama0",
    }[change]
    assert f"r.yaml:3: {message}" in result.err


# Layouts and families


def fused(path: Path, target: Path) -> Path:
    """Write a Mixtral in the layout of transformers 5, with torch."""
    from tests.unit.merge.test_golden import as_mergekit

    return write("mixtral", 0, target, made={n: t.contiguous() for n, t in as_mergekit(read_tensors(path)).items()})


@pytest.mark.parametrize("method", ["slerp", "ties", "linear", "della"])
def test_layouts_mix_and_norms_are_of_one_expert(
    method: str, mixtrals: list[Path], merge: Merge, tmp_path: Path
) -> None:
    """The same bits from checkpoints per expert, fused, and mixed; the output has the base's layout."""
    from tests.unit.merge.test_golden import as_mergekit

    both = [(path, fused(path, tmp_path / f"fused{i}")) for i, path in enumerate(mixtrals[:2])]
    own = {
        "slerp": "t: 0.4",
        "ties": "weight: 1, density: 0.3",
        "linear": "weight: 1",
        "della": "weight: 1, density: 0.5",
    }
    results = []
    for first, second in ((0, 0), (0, 1), (1, 0), (1, 1)):
        a, b = both[0][first], both[1][second]
        found = merge(f"{listed(a, b)}merge_method: {method}\nbase_model: {a}\nparameters: {{{own[method]}}}\n")
        assert found.keys() == read_tensors(a).keys()
        results.append(found if first else as_mergekit(found))
    for found in results[1:]:
        for name, value in results[0].items():
            assert same_bits(found[name], value), name


def test_slerp_takes_an_angle_for_each_expert_unless_told(mixtrals: list[Path], merge: Merge) -> None:
    a, b = (read_tensors(path) for path in mixtrals[:2])
    text = listed(*mixtrals[:2]) + f"merge_method: slerp\nbase_model: {mixtrals[0]}\nparameters: {{t: 0.3}}\n"
    found = merge(text)
    together = merge(text + "granularity: tensor\n")

    def arc(first: torch.Tensor, second: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, second = first.double().flatten(), second.double().flatten()
        angle = torch.arccos(first @ second / (first.norm() * second.norm()))
        return ((torch.sin(0.7 * angle) * x + torch.sin(0.3 * angle) * y) / torch.sin(angle)).float()

    at = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"
    stacks = [torch.stack([t[at.format(e, w)] for e in range(3) for w in ("w1", "w3")]) for t in (a, b)]
    for e in range(3):
        for w in ("w1", "w2", "w3"):
            name = at.format(e, w)
            torch.testing.assert_close(found[name], arc(a[name], b[name], a[name], b[name]))
            if w != "w2":
                torch.testing.assert_close(together[name], arc(*stacks, a[name], b[name]))
                assert not torch.equal(found[name], together[name])


def test_granularity_is_of_routed_experts_only(models: Any, merge: Merge, tmp_path: Path) -> None:
    """`shared_experts` are one matrix each in any case."""
    model = models("deepseek_v3")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    for file in other.glob("*.safetensors"):
        generator = torch.Generator().manual_seed(len(file.name))
        held = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in load_file(file).items()}
        save_file(held, file, {"format": "pt"})
    text = listed(model, other) + f"merge_method: slerp\nbase_model: {model}\nparameters: {{t: 0.3}}\n"
    found, together = merge(text), merge(text + "granularity: tensor\n")
    differ = {name for name, value in found.items() if not same_bits(value, together[name])}
    assert differ
    assert all(".experts." in name for name in differ)


@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("w2", {"down"}),
        ("mlp.experts.down_proj", {"down"}),
        ("experts.1.w1", {"gate 1"}),
        ("block_sparse_moe.gate", {"router"}),
        ("mlp.gate.weight", {"router"}),
        ("gate_up_proj", {"gate", "up"}),
        ("experts", {"gate", "up", "down"}),
    ],
)
def test_filters_for_either_layout_work_on_both(
    text: str, changed: set[str], layout: str, mixtrals: list[Path], merge: Merge, tmp_path: Path
) -> None:
    from tests.unit.merge.test_golden import as_mergekit

    path = mixtrals[0] if layout == "hub" else fused(mixtrals[0], tmp_path / "fused")
    source = as_mergekit(read_tensors(mixtrals[0]))
    found = merge(
        f"models: [{{model: {path}}}]\nmerge_method: passthrough\n"
        f"parameters: {{scale: [{{filter: {text}, value: 2}}]}}\n"
    )
    found = found if layout == "fused" else as_mergekit(found)
    at = "model.layers.0.mlp."
    parts: dict[str, Any] = {"router": slice(None), "down": slice(None)}
    seen = set()
    for name, part, index in (
        (f"{at}gate.weight", "router", parts["router"]),
        (f"{at}experts.down_proj", "down", parts["down"]),
        (f"{at}experts.gate_up_proj", "gate", (slice(None), slice(0, 8))),
        (f"{at}experts.gate_up_proj", "up", (slice(None), slice(8, 16))),
        (f"{at}experts.gate_up_proj", "gate 1", (1, slice(0, 8))),
    ):
        if torch.equal(found[name][index], 2 * source[name][index]):
            seen.add(part)
    assert seen - ({"gate 1"} if "gate" in seen else set()) == changed
    assert torch.equal(found["lm_head.weight"], source["lm_head.weight"])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_filters_mean_the_same_in_either_layout(
    family: str, models: Any, merge: Merge, ok: Cli, tmp_path: Path
) -> None:
    """Names of experts are names of dense layers and shared experts too, and `up_proj` is a part of `gate_up_proj`."""
    source = read_tensors(models(family))
    recipe = "models: [{}]\nmerge_method: passthrough\nparameters: {{scale: [{{filter: {}, value: 3}}]}}\n"
    for text in ("gate_proj", "up_proj", ".experts.1.", "mlp.experts.down_proj"):
        found = merge(recipe.format(models(family), text))
        merge(recipe.format(models(family, fused=True), text))
        ok("convert", tmp_path / "out", "--layout", "per-expert", "-o", tmp_path / "hub", "--force")
        wanted = {n for n in source if re.search(text.replace("experts.down", r"experts\.\d.down"), n)}
        assert wanted == {n for n, value in source.items() if not same_bits(found[n], value)}
        for name, value in read_tensors(tmp_path / "hub").items():
            assert same_bits(found[name], value), (text, name)


@pytest.mark.parametrize("family", TINY)
def test_every_family_merges_with_all_its_tensors(family: str, models: Any, merge: Merge, tmp_path: Path) -> None:
    """Half of a model and half of itself is the model: names, layout, dtypes, and what transformers computes."""
    path = models(family)
    twin = shutil.copytree(path, tmp_path / "twin")
    found = merge(
        f"models: [{{model: {path}}}, {{model: {twin}}}]\nmerge_method: linear\nparameters: {{weight: 0.5}}\n"
    )
    source = read_tensors(path)
    assert found.keys() == source.keys()
    for name, value in source.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(path)))


# Stacked layers


def test_a_stack_is_the_layers_that_it_names_and_loads(mixtrals: list[Path], merge: Merge, tmp_path: Path) -> None:
    first, second = (read_tensors(path) for path in mixtrals[:2])
    found = merge(f"""\
slices:
  - sources: [{{model: {mixtrals[0]}, layer_range: [0, 2]}}]
  - sources: [{{model: {mixtrals[1]}, layer_range: [1, 2]}}]
  - sources: [{{model: {mixtrals[0]}, layer_range: [1, 2]}}]
merge_method: passthrough
""")
    assert read_config(tmp_path / "out")["num_hidden_layers"] == 4
    for layer, (held, origin) in enumerate([(first, 0), (first, 1), (second, 1), (first, 1)]):
        for name, value in held.items():
            if name.startswith(f"model.layers.{origin}."):
                assert same_bits(found[name.replace(f".{origin}.", f".{layer}.", 1)], value)
    assert bool(logits(load(tmp_path / "out"), torch.tensor([[1, 2, 3]])).isfinite().all())


def test_config_lists_by_layer_follow_the_stack(models: Any, merge: Merge, cli: Cli, tmp_path: Path) -> None:
    qwen = models("qwen3_moe")  # its first layer is dense: mlp_only_layers [0]
    merge(f"""\
slices:
  - sources: [{{model: {qwen}, layer_range: [1, 3]}}]
  - sources: [{{model: {qwen}, layer_range: [0, 1]}}]
  - sources: [{{model: {qwen}, layer_range: [2, 3]}}]
merge_method: passthrough
""")
    assert read_config(tmp_path / "out")["mlp_only_layers"] == [2]
    assert bool(logits(load(tmp_path / "out")).isfinite().all())
    lfm = models("lfm2_moe")
    merge(f"slices: [{{sources: [{{model: {lfm}, layer_range: [1, 2]}}]}}]\nmerge_method: passthrough\n")
    config = read_config(tmp_path / "out")
    assert (config["num_hidden_layers"], config["layer_types"], config["num_dense_layers"]) == (
        1,
        ["full_attention"],
        0,
    )
    deepseek = models("deepseek_v2")
    (tmp_path / "r.yaml").write_text(
        f"slices: [{{sources: [{{model: {deepseek}, layer_range: [1, 2]}}]}},"
        f" {{sources: [{{model: {deepseek}, layer_range: [0, 1]}}]}}]\nmerge_method: passthrough\n"
    )
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "no")
    assert result.code == 2
    assert "first_k_dense_replace" in result.err


def test_layers_for_multi_token_prediction(models: Any, merge: Merge, cli: Cli, tmp_path: Path) -> None:
    """They merge as they are; a new stack has none, and one model that has some does not merge with one without."""
    plain = models("deepseek_v3")
    held = read_tensors(plain)
    beyond = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in held.items() if ".layers.1." in n}
    rewrite(plain, tmp_path / "more", {**held, **beyond}, {"num_nextn_predict_layers": 1})
    twin = shutil.copytree(tmp_path / "more", tmp_path / "twin")
    found = merge(listed(tmp_path / "more", twin, weight=0.5) + "merge_method: linear\n")
    assert found.keys() == {*held, *beyond}
    (tmp_path / "r.yaml").write_text(listed(tmp_path / "more", plain, weight=0.5) + "merge_method: linear\n")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "no")
    assert result.code == 2
    assert "`slices:` with all layers of both leave out the layers for multi-token prediction" in result.err
    both = ", ".join(f"{{model: {path}, layer_range: [0, 2]}}" for path in (tmp_path / "more", plain))
    text = f"slices: [{{sources: [{both}]}}]\nmerge_method: linear\nparameters: {{weight: 0.5}}\n"
    (tmp_path / "r.yaml").write_text(text)
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "stack")
    assert result.code == 0
    assert "r.yaml:1: the layers for multi-token prediction (2 of more) are left out" in result.err
    assert read_tensors(tmp_path / "stack").keys() == held.keys()
    assert read_config(tmp_path / "stack")["num_nextn_predict_layers"] == 0


def test_layers_of_several_models_keep_their_own_kind(models: Any, merge: Merge, cli: Cli, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    first, second = (models("gpt_oss", layer_types=kinds[::step]) for step in (1, -1))
    text = f"""\
slices:
- sources: [{{model: {first}, layer_range: [0, 1]}}]
- sources: [{{model: {second}, layer_range: [1, 2]}}]
- sources: [{{model: {second}, layer_range: [0, 1]}}]
merge_method: passthrough
"""
    merge(text)
    assert read_config(tmp_path / "out")["layer_types"] == [kinds[0], kinds[0], kinds[1]]
    bare = shutil.copytree(second, tmp_path / "bare")
    config = read_config(bare)
    del config["layer_types"]
    (bare / "config.json").write_text(json.dumps(config))
    (tmp_path / "r.yaml").write_text(text.replace(str(second), str(bare)))
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "no")
    assert result.code == 2
    assert "r.yaml:1: config.json has layer_types, an entry for each layer" in result.err


# What ships


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "merge").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_shipped_recipes_run(path: Path, kind: str, merge: Merge, tmp_path: Path) -> None:
    """On small models of 32 layers; a filter for experts has nothing to match in a dense one."""
    text = path.read_text()
    names = dict.fromkeys(re.findall(r"(?:mistralai|NousResearch)/[\w.-]+", text))
    for i, name in enumerate(names):
        text = text.replace(name, str(write(kind, i, tmp_path / str(i), 32)))
    if kind == "llama":
        text = text.replace("mlp.experts.down_proj", "mlp.down_proj")
    found = merge(text)
    layers = read_config(tmp_path / "out")["num_hidden_layers"]
    assert layers == (48 if path.stem == "frankenmerge" else 32)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert bool(logits(load(tmp_path / "out"), torch.tensor([[1, 2, 3]])).isfinite().all())
    assert validate_checkpoint(tmp_path / "out", level="forward").errors == 0


# Stages, dtypes, records


def test_stages_stand_in_any_order(llamas: list[Path], merge: Merge) -> None:
    first = f"name: first\n{listed(*llamas[:2], weight=0.5)}merge_method: linear\n"
    second = f"name: second\n{listed(llamas[2])}merge_method: passthrough\nparameters: {{scale: 2}}\n"
    last = "models: [first, second]\nmerge_method: linear\nparameters: {weight: 0.5}\n"
    inside = merge("---\n".join((first, second, last)))
    for order in ((last, first, second), (second, last, first)):
        found = merge("---\n".join(order))
        assert all(same_bits(found[name], value) for name, value in inside.items())


def test_stages_in_one_pass_equal_one_merge_after_the_other(llamas: list[Path], merge: Merge, tmp_path: Path) -> None:
    inner = listed(llamas[1], llamas[2], weight=0.5, density=0.5) + (
        f"merge_method: ties\nbase_model: {llamas[0]}\ndtype: bfloat16\n"
    )
    outer = "models: [{model: %s}, {model: %s}]\nmerge_method: slerp\nbase_model: %s\nparameters: {t: 0.3}\n"
    merge(inner)
    shutil.move(tmp_path / "out", tmp_path / "inner")
    second = merge(outer % (llamas[0], tmp_path / "inner", llamas[0]))
    at_once = merge(f"name: middle\n{inner}---\n" + outer % (llamas[0], "middle", llamas[0]))
    assert at_once.keys() == second.keys()
    assert all(same_bits(at_once[name], second[name]) for name in second)
    record = json.loads((tmp_path / "out" / "moesurgery.json").read_text())
    assert [step["report"]["method"] for step in record["steps"]] == ["ties", "slerp"]
    assert len(record["inputs"]) == 3


def test_dtypes_of_the_output(llamas: list[Path], merge: Merge, tmp_path: Path) -> None:
    text = listed(*llamas[:2], weight=1) + "merge_method: linear\n"
    assert {t.dtype for t in merge(text).values()} == {torch.float32}
    assert {t.dtype for t in merge(text + "dtype: float16\n").values()} == {torch.float16}
    assert read_config(tmp_path / "out")["torch_dtype"] == "float16"
    assert {t.dtype for t in merge(text + "dtype: float16\nout_dtype: bfloat16\n").values()} == {torch.bfloat16}


def test_selection_biases_keep_their_dtype(models: Any, merge: Merge) -> None:
    path = models("deepseek_v3")
    found = merge(f"models: [{{model: {path}}}]\nmerge_method: passthrough\ndtype: bfloat16\n")
    kinds = {("bias" in name and "correction" in name, t.dtype) for name, t in found.items()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_card_names_all_parents_and_no_local_path(llamas: list[Path], merge: Merge, tmp_path: Path) -> None:
    merge(listed(*llamas[1:], weight=1) + f"merge_method: task_arithmetic\nbase_model: {llamas[0]}\n")
    card = (tmp_path / "out" / "README.md").read_text()
    record = (tmp_path / "out" / "moesurgery.json").read_text()
    for text in (card, record):
        assert all(path.name in text for path in llamas)
        assert str(llamas[0].parent) not in text
    assert "base_model_relation: merge" in card


def test_the_bases_own_readme_does_not_pass_for_the_merges(llamas: list[Path], merge: Merge, tmp_path: Path) -> None:
    base = shutil.copytree(llamas[0], tmp_path / "base")
    (base / "README.md").write_text("# I am the base")
    merge(listed(base, llamas[1], weight=1) + "merge_method: linear\n")
    assert llamas[1].name in (tmp_path / "out" / "README.md").read_text()


def test_recipes_of_either_kind_are_told_apart(llamas: list[Path], cli: Cli, tmp_path: Path) -> None:
    merge, steps = tmp_path / "merge.yaml", tmp_path / "steps.yaml"
    merge.write_text(listed(*llamas, weight=1) + "merge_method: linear\n")
    steps.write_text(f"model: {llamas[0]}\nsteps: [convert: {{dtype: bfloat16}}]\n")
    upcycle = tmp_path / "upcycle.yaml"
    upcycle.write_text(f"base_model: {llamas[0]}\ngate_mode: random\nexperts: [{{source_model: {llamas[1]}}}]\n")
    assert cli("recipes", "check", merge, steps).code == 0
    for command, file, hint in (("run", merge, "merge"), ("merge", steps, "run"), ("merge", upcycle, "run")):
        result = cli(command, file, "-o", tmp_path / "out")
        assert result.code == 2
        assert f"`moesurgery {hint} {file}`" in result.err


def test_a_merge_is_measured_without_being_written(demo: Path, ok: Cli, tmp_path: Path) -> None:
    other = shutil.copytree(demo, tmp_path / "other")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(listed(demo, other, weight=0.5) + "merge_method: linear\n")
    text = tmp_path / "text.txt"
    text.write_text("An expert is asked, and it answers. " * 40)
    options = [text, "--limit", 1, "--window", 64, "--json"]
    found = [ok("perplexity", model, *options).json for model in (demo, recipe)]
    assert found[0]["domains"] == found[1]["domains"]


def test_a_dry_run_writes_nothing(llamas: list[Path], ok: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(listed(*llamas, weight=1) + "merge_method: linear\n")
    result = ok("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--dry-run", "--json").json
    assert result["tensors"]["computed"] == len(tensors("llama", 0, 4))
    assert not (tmp_path / "out").exists()


def test_a_method_of_ones_own(llamas: list[Path], merge: Merge, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("""\
from typing import Annotated
from moesurgery import Param, merge_method

@merge_method("largest", models=(2, 2))
def largest(models, *, bias: Annotated[tuple[float, ...], Param("added to the magnitude")] = (0.0,)):
    \"\"\"The larger in magnitude of two.\"\"\"
    a, b = models
    return a.where(a.abs() + bias[0] >= b.abs() + bias[1], b)
""")
    text = listed(*llamas[:2]) + "merge_method: largest\n"
    found = merge(text, "--methods", tmp_path / "mine.py")
    a, b = (read_tensors(path) for path in llamas[:2])
    for name, value in found.items():
        assert torch.equal(value, torch.where(a[name].abs() >= b[name].abs(), a[name], b[name]))


BROKEN: dict[str, tuple[str, str]] = {
    "no module": ("import nothing_of_that_name", "broken.py cannot be run: ModuleNotFoundError"),
    "no method": ("x = 1", "broken.py registers no merge method"),
    "a base unasked for": (
        '@merge_method("broken")\ndef broken(models, base):\n    return base',
        'broken takes a base: say base="required"',
    ),
    "an error": (
        '@merge_method("broken")\ndef broken(models):\n    return models[7]',
        "the merge method broken of {file} failed: IndexError: list index out of range",
    ),
    "another shape": (
        '@merge_method("broken")\ndef broken(models):\n    return models[0].sum()',
        "the method broken returned [] for [16, 12]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_method_of_ones_own(case: str, llamas: list[Path], cli: Cli, tmp_path: Path) -> None:
    text, message = BROKEN[case]
    (tmp_path / "broken.py").write_text(f"from moesurgery import merge_method\n\n{text}\n")
    (tmp_path / "r.yaml").write_text(f"models: [{llamas[0]}]\nmerge_method: broken\n")
    result = cli("merge", tmp_path / "r.yaml", "-o", tmp_path / "out", "--methods", tmp_path / "broken.py")
    assert result.code == 2
    assert message.format(file=tmp_path / "broken.py") in result.err
    assert "bug" not in result.err


def test_a_method_of_a_package(llamas: list[Path], tmp_path: Path) -> None:
    """It is found by its entry point, in a process of its own, and where it is missing the recipe says so."""
    package, info = tmp_path / "site" / "mypackage", tmp_path / "site" / "mypackage-1.dist-info"
    for folder in (package, info):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text('''\
from moesurgery import merge_method

@merge_method("packaged", models=(1, 1), base="required")
def packaged(models, base):
    """The base less the model."""
    return base - models[0]
''')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moesurgery.merge_methods]\nmypackage = mypackage\n")
    (tmp_path / "r.yaml").write_text(f"models: [{llamas[1]}]\nbase_model: {llamas[0]}\nmerge_method: packaged\n")
    command = [sys.executable, "-m", "moesurgery", "merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "r.yaml:3: there is no merge method 'packaged'" in done.stderr
    found = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run(command, env=found, check=True, capture_output=True)
    a, b = (read_tensors(path) for path in llamas[:2])
    assert all(torch.equal(value, a[name] - b[name]) for name, value in read_tensors(tmp_path / "out").items())
