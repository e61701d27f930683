"""A few inputs of `tests.fuzz`, in a process of its own; ten thousand of each are run by hand. And what was found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.errors import CheckpointError, RefusedError, SurgeryError
from moesurgery.lora.apply import LoraAdapter, adapted
from moesurgery.merge.merge_recipe import parse_merge_recipe
from tests import fuzz
from tests.conftest import ROOT
from tests.fuzz_make import as_json, safetensors


def test_readers_refuse_and_never_crash_hang_or_swell(tmp_path: Path) -> None:
    families = tmp_path / "families.json"
    subprocess.run([sys.executable, "-m", "tests.fuzz_families", families, "6"], cwd=ROOT, check=True, timeout=600)
    command = [sys.executable, "-m", "tests.fuzz", "60"]
    environment = {**fuzz.os.environ, "FUZZ_FAMILIES": str(families)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(": 60 inputs, ") == len(fuzz.TARGETS)


def test_an_input_can_be_made_again() -> None:
    """And the fuzzer sees what is wrong: a reader that raises, and one that takes too long, are counted."""
    seen: list[float] = []
    fuzz.TARGETS["seen"] = lambda rng: seen.append(rng.random())
    fuzz.TARGETS["wrong"] = lambda rng: 1 / int(rng.random() > 0.5)  # type: ignore[assignment, return-value]
    try:
        assert fuzz.run("seen", range(3)) == 0
        assert fuzz.run("seen", range(1, 2)) == 0
        assert seen[1] == seen[3]
        count = sum(random.Random(f"wrong {i}").random() <= 0.5 for i in range(20))
        assert fuzz.run("wrong", range(20)) == count > 0
    finally:
        del fuzz.TARGETS["seen"], fuzz.TARGETS["wrong"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    fuzz.write(folder, fuzz.checkpoint_files())
    return folder


# Statistics

ABOUT, SUMS = fuzz.ABOUT, fuzz.STATISTICS
STATISTICS = {
    "about is missing": (None, {}, "Expecting value"),
    "no object": ([], {}, "it is not a JSON object"),
    "no model_type": ({"model_type": ...}, {}, "model_type is missing"),
    "top_k is text": ({"top_k": "2"}, {}, "top_k is '2', expected a whole number"),
    "top_k is true": ({"top_k": True}, {}, "top_k is True, expected a whole number"),
    "top_k is huge": ({"top_k": 10**40}, {}, "top_k is 1000"),
    "other_top_k is no list": ({"other_top_k": 3}, {}, "other_top_k is 3, expected a list, each a whole number"),
    "other_top_k of text": ({"other_top_k": ["3"]}, {}, "other_top_k is"),
    "blocks is missing": ({"blocks": ...}, {}, "blocks is missing"),
    "blocks of numbers": ({"blocks": [0, 1]}, {}, "blocks is"),
    "blocks of others": ({"blocks": ["a", "b"]}, {}, "'a' is in its list of blocks only"),
    "a block too few": ({"blocks": ["model.layers.0"]}, {}, "'model.layers.1' is in its tensors only"),
    "unread is a list": ({"unread": ["a"]}, {}, "unread is"),
    "text is no list of files": ({"text": ["a"]}, {}, "text is"),
    "recon is a number": ({"recon": 3}, {}, "recon is 3"),
    "recon without sums": ({"recon": [1]}, {}, "model.layers.0 has no recon@1"),
    "top-k without sums": ({"other_top_k": [2]}, {}, "model.layers.0 has no gram@2"),
    "no count": ({}, {"count": None}, "model.layers.0 has no count"),
    "no gram": ({}, {"gram": None}, "model.layers.0 has no gram"),
    "count of another length": ({}, {"count": ("F64", [2, 5])}, "gate is float64 [2, 4], expected floats 2 x E"),
    "a scalar": ({}, {"count": ("F64", [])}, "count is float64 [], expected floats 2 x E"),
    "gram of two dimensions": ({}, {"gram": ("F64", [2, 4])}, "gram is float64 [2, 4], expected floats 2 x E x E"),
    "whole numbers": ({}, {"count": ("I64", [2, 4])}, "count is int64 [2, 4], expected floats"),
    "no experts": ({}, {"count": ("F64", [2, 0])}, "count is float64 [2, 0]"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_that_are_none(case: str, base: Path, tmp_path: Path) -> None:
    changes, sums, message = STATISTICS[case]
    about: Any = {**ABOUT, **changes} if isinstance(changes, dict) else changes
    if isinstance(about, dict):
        about = {key: value for key, value in about.items() if value is not ...}
    tensors = dict(SUMS)
    for name, of in sums.items():
        tensors[f"model.layers.0/{name}"] = of or ("F64", [1])
        if of is None:
            del tensors[f"model.layers.0/{name}"]
    metadata = {"format": "moesurgery statistics 1"} | ({} if about is None else {"about": json.dumps(about)})
    path = tmp_path / "s.safetensors"
    path.write_bytes(safetensors(tensors, metadata, fill=fuzz._positive)[0])
    for operation, values in (
        ("rescale", {"top_k": 1, "scale": "measured"}),
        ("drop-experts", {"count": 1, "by": "reap"}),
    ):
        with pytest.raises(CheckpointError) as raised:
            apply(plan_of(open_checkpoint(base)), operation, **values, stats=str(path))
        assert raised.value.message.startswith(f"{path} cannot be read as statistics: ")
        assert message in raised.value.message
        assert "moesurgery collect" in (raised.value.hint or "")


def test_statistics_of_nan(base: Path, tmp_path: Path) -> None:
    metadata = {"format": "moesurgery statistics 1", "about": json.dumps(ABOUT)}
    path = tmp_path / "s.safetensors"
    path.write_bytes(safetensors(SUMS, metadata, fill=lambda size: b"\xff" * size)[0])
    with pytest.raises(RefusedError, match=f"{path}: .* of model.layers.0 holds numbers that are not finite") as raised:
        apply(plan_of(open_checkpoint(base)), "rescale", top_k=1, scale="measured", stats=str(path))
    assert "NaN or infinity" in raised.value.message
    assert "collect again" in (raised.value.hint or "")


# Repairs and fits

REPAIRS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no object": (lambda d: [], "it is not a JSON object"),
    "no kind": (lambda d: d.pop("kind"), "kind is missing"),
    "tokens is text": (lambda d: d.update(tokens="9"), "tokens is '9', expected a whole number"),
    "layers is an object": (lambda d: d.update(layers={}), "layers is {}, expected a list"),
    "a layer is text": (lambda d: d["layers"].append("x"), "layer 2: it is not a JSON object"),
    "no factors": (lambda d: d["layers"][0].pop("factors"), "layer 0: factors is missing"),
    "factors of text": (lambda d: d["layers"][0].update(factors=["1"]), "layer 0: factors is ['1'], expected"),
    "no error": (lambda d: d["layers"][1].pop("error_after"), "layer 1: error_after is missing"),
    "an error is text": (lambda d: d["layers"][1].update(error_before="x"), "layer 1: error_before is 'x'"),
    "another file": (lambda d: d["layers"][1].update(file="../x"), "../x is missing"),
    "file is a number": (lambda d: d["layers"][1].update(file=3), "layer 1: file is 3, expected text or null"),
}


@pytest.mark.parametrize("case", REPAIRS)
def test_repairs_that_are_none(case: str, base: Path, tmp_path: Path) -> None:
    change, message = REPAIRS[case]
    document = json.loads(as_json(fuzz.REPAIR))
    replaced = change(document)
    folder = tmp_path / "repair"
    whole = replaced if case == "no object" else document
    fuzz.write(
        folder, {"refit.json": as_json(whole), "layer-001.safetensors": safetensors(fuzz.MATRICES, fill=bytes)[0]}
    )
    with pytest.raises(CheckpointError) as raised:
        apply(plan_of(open_checkpoint(base)), "refit", repair=str(folder))
    assert message in raised.value.message
    assert raised.value.hint in ("make one with `moesurgery … --refit down --text FILE`", "make the repair again")


@pytest.mark.parametrize("factor", [float("nan"), float("-inf"), 0.0])
def test_a_repair_of_factors_that_are_not_finite_and_positive(factor: float, base: Path, tmp_path: Path) -> None:
    document = json.loads(as_json(fuzz.REPAIR))
    document["layers"][0].update(factors=[1.5, factor, 1.5, 1.5])
    folder = tmp_path / "repair"
    fuzz.write(
        folder, {"refit.json": as_json(document), "layer-001.safetensors": safetensors(fuzz.MATRICES, fill=bytes)[0]}
    )
    with pytest.raises(RefusedError) as raised:
        apply(plan_of(open_checkpoint(base)), "refit", repair=str(folder))
    assert raised.value.message == (
        f"{folder}/refit.json: {document['layers'][0]['layer']}, expert 1: the factor on the output is {factor:.6g},"
        " not a finite and positive number"
    )
    assert "make the repair again" in (raised.value.hint or "")


@pytest.mark.parametrize("name", ["x.down", "0.other", "-1.down", "00.down", "down", "٣.down"])
def test_a_repair_of_other_tensors(name: str, base: Path, tmp_path: Path) -> None:
    tensors = {**fuzz.MATRICES, name: ("F32", [4, 8])}
    folder = tmp_path / "repair"
    fuzz.write(
        folder, {"refit.json": as_json(fuzz.REPAIR), "layer-001.safetensors": safetensors(tensors, fill=bytes)[0]}
    )
    with pytest.raises(CheckpointError, match=r"is no matrix of an expert"):
        apply(plan_of(open_checkpoint(base)), "refit", repair=str(folder))


FITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no align": ({"align": ...}, {}, "align is missing"),
    "blocks is a list": ({"blocks": []}, {}, "blocks is []"),
    "a block without groups": (
        {"blocks": {"model.layers.0": {"dominant": [0]}}},
        {},
        "model.layers.0: groups is missing",
    ),
    "no order": ({}, {"model.layers.0/order/1": None}, "model.layers.0/order/1 is missing"),
    "an order of floats": ({}, {"model.layers.0/order/1": ("F32", [8])}, "model.layers.0/order/1 is F32 [8]"),
    "an order too short": (
        {},
        {f"model.layers.0/order/{e}": ("I64", [4]) for e in range(4)},
        "has 8 neurons, and the fit",
    ),
    "a router of another width": ({}, {"model.layers.0/router": ("F32", [2, 5])}, "has rows of [4], the fit of [5]"),
    "a router of more groups": ({}, {"model.layers.0/router": ("F32", [3, 4])}, "has 3 entries for 2 groups"),
}


@pytest.mark.parametrize("case", FITS)
def test_fits_that_are_none(case: str, base: Path, tmp_path: Path) -> None:
    changes, tensors, message = FITS[case]
    about = {key: value for key, value in {**fuzz.FIT, **changes}.items() if value is not ...}
    with pytest.raises(SurgeryError) as raised:
        _with_fit(base, tmp_path, about, {n: of for n, of in {**fuzz.ORDERS, **tensors}.items() if of}, None)
    assert message in raised.value.message
    assert "--text FILE" in (raised.value.hint or "")


def test_an_order_that_leaves_neurons_out(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not name each of 8 neurons once"):
        _with_fit(base, tmp_path, fuzz.FIT, fuzz.ORDERS, bytes)


def _with_fit(base: Path, tmp_path: Path, about: Any, tensors: Any, fill: Callable[[int], bytes] | None) -> None:
    def orders(size: int) -> bytes:
        return (b"".join(i.to_bytes(8, "little") for i in range(8)) * size)[:size]

    path = tmp_path / "fit.safetensors"
    metadata = {"format": "moesurgery fit 1", "about": json.dumps(about)}
    short = all(of == ("I64", [4]) for name, of in tensors.items() if name.startswith("model.layers.0/order"))
    made = (lambda size: (b"".join(i.to_bytes(8, "little") for i in range(4)) * size)[:size]) if short else orders
    path.write_bytes(safetensors(tensors, metadata, fill=fill or made)[0])
    values = {"groups": [[0, 1], [2, 3]], "weights": "equal", "align": "activations", "router": "lse"}
    apply(plan_of(open_checkpoint(base)), "merge-experts", **values, fit=str(path))


# Adapters

ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "alpha is text": ({"lora_alpha": "4"}, {}, "lora_alpha is '4' for model.layers."),
    "alpha is nothing": ({"lora_alpha": None}, {}, "lora_alpha is None"),
    "alpha is NaN": ({"lora_alpha": float("nan")}, {}, "lora_alpha is nan"),
    "patterns are a list": ({"alpha_pattern": ["a"]}, {}, "alpha_pattern is no object"),
    "no expression": ({"alpha_pattern": {"(": 1}}, {}, "alpha_pattern holds no regular expression"),
    "an alpha by pattern": ({"alpha_pattern": {".*q_proj": []}}, {}, "lora_alpha is [] for model.layers.0"),
    "one factor": ({}, {f"{fuzz._AT}.0.self_attn.q_proj.lora_B.weight": None}, "has only one factor of"),
    "a scalar": ({}, {f"{fuzz._AT}.0.self_attn.q_proj.lora_A.weight": ("F32", [])}, "factor A of model.layers.0"),
    "bytes": ({}, {f"{fuzz._AT}.0.self_attn.q_proj.lora_A.weight": ("U8", [2, 4])}, "is U8 [2, 4], expected floats"),
    "rank 0": (
        {},
        {f"{fuzz._AT}.0.self_attn.q_proj.lora_{x}.weight": ("F32", s) for x, s in (("A", [0, 4]), ("B", [4, 0]))},
        "has rank 0",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_that_are_none(case: str, base: Path, tmp_path: Path) -> None:
    config, factors, message = ADAPTERS[case]
    tensors = {name: of for name, of in {**fuzz.FACTORS, **factors}.items() if of is not None}
    folder = tmp_path / "adapter"
    content = safetensors(tensors, fill=bytes)[0]
    fuzz.write(
        folder, {"adapter_config.json": as_json({**fuzz.ADAPTER, **config}), "adapter_model.safetensors": content}
    )
    assert LoraAdapter(str(folder)).name == "adapter"
    with pytest.raises(CheckpointError) as raised:
        adapted(plan_of(open_checkpoint(base)), str(folder))
    assert message in raised.value.message
    assert raised.value.message.startswith("adapter")


def _adapter_with_patterns(tmp_path: Path, patterns: dict[str, Any]) -> str:
    folder = tmp_path / "adapter"
    config = as_json({**fuzz.ADAPTER, "alpha_pattern": patterns})
    content = safetensors(fuzz.FACTORS, fill=bytes)[0]
    fuzz.write(folder, {"adapter_config.json": config, "adapter_model.safetensors": content})
    return str(folder)


@pytest.mark.parametrize(
    "pattern", ["(([a-z._0-9]+)+)+[A-Z]", "(.*)*(.*)*(.*)*[A-Z]", "(a|b|.)*(a|b|.)*(a|b|.)*(?<=zz)"]
)
def test_expressions_that_take_other_engines_for_ever(pattern: str, base: Path, tmp_path: Path) -> None:
    begun = time.process_time()
    adapted(plan_of(open_checkpoint(base)), _adapter_with_patterns(tmp_path, {pattern: 1}))
    assert time.process_time() - begun < 5


def test_an_expression_has_a_second(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def fullmatch(self, module: str, timeout: float) -> None:
            assert timeout == 1
            raise TimeoutError

    monkeypatch.setattr(LoraAdapter, "_patterns", [(Slow(), 1)])
    with pytest.raises(CheckpointError, match="alpha_pattern takes more than a second to match"):
        adapted(plan_of(open_checkpoint(base)), _adapter_with_patterns(tmp_path, {}))


def test_patterns_without_number(base: Path, tmp_path: Path) -> None:
    reference = _adapter_with_patterns(tmp_path, {f"x{i}": 1 for i in range(10_001)})
    with pytest.raises(CheckpointError, match="alpha_pattern is no object of at most 10,000 entries"):
        adapted(plan_of(open_checkpoint(base)), reference)


# Tokenizers

TOKENIZERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no model": (lambda t: t.pop("model"), "it has no object `model`"),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), "model.vocab is neither"),
    "a list of words": (lambda t: t["model"].update(vocab=["a", "b"]), "model.vocab is neither"),
    "a number of text": (lambda t: t["model"]["vocab"].update(a="0"), "the token 'a' has the number '0'"),
    "a number of its own": (
        lambda t: t["model"]["vocab"].update(a=2**40),
        "the token 'a' has the number 1099511627776",
    ),
    "a number below zero": (lambda t: t["model"]["vocab"].update(a=-1), "the token 'a' has the number -1"),
    "an added number": (lambda t: t["added_tokens"][0].update(id={}), "the token '</s>' has the number {}"),
    "added text": (lambda t: t["added_tokens"].append("x"), "added_tokens is not a list of objects"),
    "added tokens are none": (lambda t: t.update(added_tokens=3), "added_tokens is not a list of objects"),
    "merges of numbers": (lambda t: t["model"].update(merges=[1]), "model.merges is not a list of pairs"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_that_are_none(case: str, base: Path, tmp_path: Path) -> None:
    change, message = TOKENIZERS[case]
    tokenizer = json.loads(as_json(fuzz.TOKENIZER))
    change(tokenizer)
    other = tmp_path / "other"
    fuzz.write(other, fuzz.checkpoint_files(**{"tokenizer.json": as_json(tokenizer)}))
    recipe = f"merge_method: linear\nparameters: {{weight: 1}}\ntokenizer_source: union\nmodels: [{base}, {other}]\n"
    with pytest.raises(SurgeryError) as raised:
        parse_merge_recipe(recipe).plan()
    assert f"tokenizer.json of other is not understood: {message}" in raised.value.message
    assert raised.value.hint == "save the tokenizer again"


def test_padding_without_end(base: Path) -> None:
    recipe = f"merge_method: linear\nmodels: [{base}]\ntokenizer: {{pad_to_multiple_of: 1000000000}}\n"
    with pytest.raises(SurgeryError, match="recipe:3: pad_to_multiple_of is 1000000000, expected a whole number up to"):
        parse_merge_recipe(recipe)
