"""Layers for multi-token prediction: left out, taken out and put back to the byte, and what `validate` says of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import RefusedError
from tests.commands.test_drop_experts import with_prediction_layer
from tests.conftest import Result
from tests.gguf_make import LAYERS, keys_of, stored_arrays, write_gguf
from tests.quantise import make_form, rewrite
from tests.tiny import load, logits, read_config, read_tensors, same_bits

Models = Callable[..., Path]
Cli = Callable[..., Result]
PARTS = {"enorm.weight": (32,), "hnorm.weight": (32,), "shared_head.norm.weight": (32,)}


@pytest.fixture
def predicting(models: Models, tmp_path: Path) -> Path:
    """DeepSeek-V3 with a prediction layer behind the stack that has its own embedding and head, as published."""
    tensors = with_prediction_layer(models("deepseek_v3"), tmp_path / "without-copies")
    extra = {f"model.layers.2.{name}": torch.randn(shape) for name, shape in PARTS.items()}
    extra["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    extra["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    rewrite(models("deepseek_v3"), tmp_path / "whole", {**tensors, **extra}, {"num_nextn_predict_layers": 1})
    return tmp_path / "whole"


@pytest.fixture
def with_module(models: Models, tmp_path: Path) -> Path:
    """Qwen3-Next with `mtp.*`, as published: a layer in a module of its own, which shares embedding and head."""
    tensors = read_tensors(models("qwen3_next"))
    last = max(int(n.split(".")[2]) for n in tensors if n.startswith("model.layers."))
    head = f"model.layers.{last}."
    extra = {n.replace(head, "mtp.layers.0."): t + 1 for n, t in tensors.items() if n.startswith(head)}
    extra |= {"mtp.fc.weight": torch.randn(32, 64), "mtp.norm.weight": torch.randn(32)}
    rewrite(models("qwen3_next"), tmp_path / "with-module", {**tensors, **extra}, {"num_nextn_predict_layers": 1})
    return tmp_path / "with-module"


def equal(one: Path, other: Path) -> bool:
    mine, theirs = read_tensors(one), read_tensors(other)
    return mine.keys() == theirs.keys() and all(same_bits(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize(("model", "trunk"), [("predicting", "deepseek_v3"), ("with_module", "qwen3_next")])
def test_extract_then_graft_is_byte_equal(
    request: pytest.FixtureRequest, models: Models, tmp_path: Path, ok: Cli, model: str, trunk: str
) -> None:
    whole = request.getfixturevalue(model)
    lost, draft, back = (tmp_path / name for name in ("lost", "draft", "back"))
    ok("mtp", "drop", whole, "-o", lost)
    ok("mtp", "extract", whole, "-o", draft)
    before = read_tensors(whole)
    gone = before.keys() - read_tensors(lost).keys()
    assert gone == before.keys() - read_tensors(models(trunk)).keys()
    assert read_config(lost)["num_nextn_predict_layers"] == 0
    for source in (whole, draft):
        ok("mtp", "graft", lost, "--from", source, "-o", back, "--force")
        assert equal(back, whole)
        assert read_config(back) == read_config(whole)
    ok("validate", back, "--level", "forward")
    assert torch.equal(logits(load(lost)), logits(load(models(trunk))))


def test_a_draft_holds_what_loaders_ask_for(predicting: Path, with_module: Path, tmp_path: Path, ok: Cli) -> None:
    """vLLM and llama.cpp count layers by the config, and read embedding, last norm and head beside the layers."""
    for whole, prefix in ((predicting, "model.layers.2."), (with_module, "mtp.")):
        draft = tmp_path / prefix
        ok("mtp", "extract", whole, "-o", draft)
        before, tensors = read_tensors(whole), read_tensors(draft)
        shared = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert tensors.keys() == {n for n in before if n.startswith(prefix)} | shared
        assert all(same_bits(tensor, before[name]) for name, tensor in tensors.items())
        assert read_config(draft) == read_config(whole)
        ok("validate", draft)
        report = ok("inspect", draft, "--json").json
        assert report["prediction"]["layers"] == report["prediction"]["declared"] == 1


def test_a_fine_tune_with_fewer_experts_gets_those_that_its_drop_kept(
    predicting: Path, tmp_path: Path, ok: Cli, cli: Cli
) -> None:
    kept = [0, 2, 4, 7]
    ok("drop-experts", predicting, "--keep", "0,2,4,7", "--plan", tmp_path / "p.json", "-o", tmp_path / "small")
    ok("mtp", "drop", predicting, "-o", tmp_path / "lost")
    ok("drop-experts", tmp_path / "lost", "--keep", "0,2,4,7", "-o", tmp_path / "tuned")
    # Its record knows no prediction layer, so their experts are ranked by router rows; the plan names them.
    result = ok("mtp", "graft", tmp_path / "tuned", "--from", predicting, "-o", tmp_path / "a")
    assert "router rows" in result.out
    ok("mtp", "graft", tmp_path / "tuned", "--from", predicting, "--plan", tmp_path / "p.json", "-o", tmp_path / "b")
    assert equal(tmp_path / "b", tmp_path / "small")
    assert read_config(tmp_path / "b") == read_config(tmp_path / "small")
    # A model that lost the layers after its drop: its record names them.
    record = json.loads((tmp_path / "small" / "moesurgery.json").read_text())
    assert record["steps"][0]["report"]["layers"][-1]["kept"] == kept
    small = read_tensors(tmp_path / "small")
    trunk = {n: t for n, t in small.items() if "layers.2." not in n}
    rewrite(tmp_path / "small", tmp_path / "later", trunk, {"num_nextn_predict_layers": 0})
    (tmp_path / "later" / "moesurgery.json").write_text(json.dumps(record))
    ok("mtp", "graft", tmp_path / "later", "--from", predicting, "-o", tmp_path / "c")
    assert equal(tmp_path / "c", tmp_path / "small")
    (tmp_path / "later" / "moesurgery.json").unlink()
    refused = cli("mtp", "graft", tmp_path / "later", "--from", predicting, "-o", tmp_path / "d")
    assert refused.code != 0
    assert "which were kept" in refused.err
    assert "--plan FILE" in refused.err


def test_published_deepseek_v4(models: Models, tmp_path: Path) -> None:
    """Names without a prefix, the layers in a list `mtp` of their own: their experts follow a drop, and come back."""
    tensors = {n.removeprefix("model."): t for n, t in read_tensors(models("deepseek_v4")).items()}
    extra = {n.replace("layers.1.", "mtp.0."): t + 1 for n, t in tensors.items() if n.startswith("layers.1.")}
    extra |= {"mtp.0.e_proj.weight": torch.randn(32, 32), "mtp.0.enorm.weight": torch.randn(32)}
    whole = tmp_path / "whole"
    rewrite(models("deepseek_v4"), whole, {**tensors, **extra}, {"num_nextn_predict_layers": 1})
    plan = plan_of(open_checkpoint(whole))
    assert [(b.where, b.mtp) for b in plan.anatomy.blocks] == [
        *((f"layers.{layer}", False) for layer in range(3)),
        ("mtp.0", True),
    ]
    kept = [0, 2, 3, 5, 6, 7]
    write_plan(apply(plan, "drop-experts", keep=kept), tmp_path / "small")
    small = read_tensors(tmp_path / "small")
    assert same_bits(small["mtp.0.ffn.gate.weight"], extra["mtp.0.ffn.gate.weight"][kept])
    assert same_bits(small["mtp.0.ffn.experts.5.w1.weight"], extra["mtp.0.ffn.experts.7.w1.weight"])
    assert "mtp.0.ffn.experts.6.w1.weight" not in small
    for model in (whole, tmp_path / "small"):
        lost, draft, back = (tmp_path / f"{model.name}-{name}" for name in ("lost", "draft", "back"))
        plan = apply(plan_of(open_checkpoint(model)), "mtp-drop")
        assert not any(name.startswith("mtp.") for name in plan.tensors)
        write_plan(plan, lost)
        write_plan(apply(plan_of(open_checkpoint(model)), "mtp-extract"), draft)
        write_plan(apply(plan_of(open_checkpoint(lost)), "mtp-graft", source=str(draft)), back)
        assert equal(back, model)


def test_what_does_not_fit_is_refused(predicting: Path, models: Models, tmp_path: Path) -> None:
    plain = plan_of(open_checkpoint(models("deepseek_v3")))
    with pytest.raises(RefusedError, match="mtp extract: the model has no prediction layers"):
        apply(plain, "mtp-extract")
    with pytest.raises(RefusedError, match="graft --from: the model has no prediction layers"):
        apply(plain, "mtp-graft", source=str(models("deepseek_v3")))
    with pytest.raises(RefusedError, match="this model has prediction layers"):
        apply(plan_of(open_checkpoint(predicting)), "mtp-graft", source=str(predicting))
    with pytest.raises(RefusedError, match="this is a mixtral, --from is a deepseek_v3"):
        apply(plan_of(open_checkpoint(models("mixtral"))), "mtp-graft", source=str(predicting))
    with pytest.raises(RefusedError, match="hidden size is 64, that of --from 32"):
        apply(plan_of(open_checkpoint(models("deepseek_v3", hidden_size=64))), "mtp-graft", source=str(predicting))
    with pytest.raises(RefusedError, match="vocab_size is 80, that of --from 64"):
        apply(plan_of(open_checkpoint(models("deepseek_v3", vocab_size=80))), "mtp-graft", source=str(predicting))


def test_quantised_layers_go_onto_models_of_their_form(predicting: Path, tmp_path: Path) -> None:
    make_form(predicting, tmp_path / "fp8", "fp8-block")
    lost = apply(plan_of(open_checkpoint(tmp_path / "fp8")), "mtp-drop")
    write_plan(lost, tmp_path / "lost")
    write_plan(
        apply(plan_of(open_checkpoint(tmp_path / "lost")), "mtp-graft", source=str(tmp_path / "fp8")), tmp_path / "back"
    )
    assert equal(tmp_path / "back", tmp_path / "fp8")
    assert read_config(tmp_path / "back") == read_config(tmp_path / "fp8")
    plain = apply(plan_of(open_checkpoint(predicting)), "mtp-drop")
    with pytest.raises(RefusedError, match="the weights of this model are plain, those of --from fp8"):
        apply(plain, "mtp-graft", source=str(tmp_path / "fp8"))
    with pytest.raises(RefusedError, match="the weights of this model are fp8, those of --from plain"):
        apply(lost, "mtp-graft", source=str(predicting))


def test_a_deeper_model_gets_them_behind_its_own_stack(predicting: Path, models: Models, tmp_path: Path) -> None:
    tensors = read_tensors(models("deepseek_v3"))
    more = {n.replace(".layers.1.", ".layers.2."): t.clone() for n, t in tensors.items() if ".layers.1." in n}
    settings: dict[str, Any] = {
        "quantization_config": {"quant_method": "fp8", "ignored_layers": ["model.layers.2.eh_proj"]}
    }
    rewrite(predicting, tmp_path / "base", read_tensors(predicting), settings)
    settings["quantization_config"]["ignored_layers"] = ["lm_head"]
    rewrite(models("deepseek_v3"), tmp_path / "deep", {**tensors, **more}, {"num_hidden_layers": 3, **settings})
    plan = apply(plan_of(open_checkpoint(tmp_path / "deep")), "mtp-graft", source=str(tmp_path / "base"))
    assert plan.config["quantization_config"]["ignored_layers"] == ["lm_head", "model.layers.3.eh_proj"]
    write_plan(plan, tmp_path / "out")
    after, before = read_tensors(tmp_path / "out"), read_tensors(predicting)
    grafted = {n for n in after if n.startswith("model.layers.3.")}
    assert len(grafted) == sum(n.startswith("model.layers.2.") for n in before)
    assert all(same_bits(after[n], before[n.replace(".layers.3.", ".layers.2.")]) for n in grafted)
    assert len(after) == len(tensors) + len(more) + len(grafted)


def test_lists_of_modules_left_out_follow(predicting: Path, tmp_path: Path) -> None:
    listed = ["lm_head", "model.layers.2.eh_proj", "model.layers.1.mlp.gate"]
    settings = {"quant_method": "fp8", "modules_to_not_convert": listed}
    rewrite(predicting, tmp_path / "m", read_tensors(predicting), {"quantization_config": settings})
    plan = apply(plan_of(open_checkpoint(tmp_path / "m")), "mtp-drop")
    assert plan.config["quantization_config"]["modules_to_not_convert"] == [listed[0], listed[2]]
    write_plan(plan, tmp_path / "lost")
    back = apply(plan_of(open_checkpoint(tmp_path / "lost")), "mtp-graft", source=str(tmp_path / "m"))
    assert sorted(back.config["quantization_config"]["modules_to_not_convert"]) == sorted(listed)


@pytest.mark.parametrize(("declared", "kept", "codes"), [(1, True, []), (1, False, ["C07"]), (0, True, ["C11"])])
def test_validate_says_what_is_missing_and_what_is_not_declared(
    predicting: Path, tmp_path: Path, cli: Cli, declared: int, kept: bool, codes: list[str]
) -> None:
    tensors = {n: t for n, t in read_tensors(predicting).items() if kept or ".layers.2." not in n}
    rewrite(predicting, tmp_path / "m", tensors, {"num_nextn_predict_layers": declared})
    report = cli("validate", tmp_path / "m", "--json").json
    found: list[Any] = [f for f in report["findings"] if f["code"] in ("C07", "C11")]
    assert sorted({f["code"] for f in found}) == codes
    assert all(f["severity"] == ("error" if f["code"] == "C07" else "warning") for f in found)


def test_a_layer_fewer_than_declared_is_an_error(predicting: Path, tmp_path: Path, cli: Cli) -> None:
    rewrite(predicting, tmp_path / "m", read_tensors(predicting), {"num_nextn_predict_layers": 2})
    report = cli("validate", tmp_path / "m", "--json").json
    messages = [f["message"] for f in report["findings"] if f["code"] == "C07"]
    assert messages == ["names 2 layers for multi-token prediction; the tensors hold 2"]


def test_inspect_and_count_params_name_them(predicting: Path, ok: Cli) -> None:
    tensors = {n: t for n, t in read_tensors(predicting).items() if ".layers.2." in n}
    parameters = sum(t.numel() for n, t in tensors.items() if "e_score_correction_bias" not in n)
    for command in ("inspect", "count-params"):
        document = ok(command, predicting, "--json").json["prediction"]
        assert (document["layers"], document["declared"]) == (1, 1)
        assert abs(document["parameters"] - parameters) <= 8
        assert document["nbytes"] == sum(t.nbytes for t in tensors.values())
        assert "1 token and the drafted ones that are accepted" in " ".join(ok(command, predicting).out.split())


def test_blocks_of_a_gguf_are_left_out(tmp_path: Path, ok: Cli, cli: Cli) -> None:
    """What is left is what the package gguf writes of the model without them: every tensor, every key."""
    by_block = {"feed_forward_length": [512, 256], "attention.sliding_window_pattern": [True, False]}
    unlike = {"rope.dimension_sections": [1, 1, 0, 0], "expert_gating_func": 2}
    plain = write_gguf(tmp_path / "plain.gguf", "Q4_0", architecture="glm4moe", dense=1, keys={**by_block, **unlike})
    longer = {key: [*values, *values] for key, values in by_block.items()}
    keys = {**longer, **unlike, "nextn_predict_layers": 2}
    model = write_gguf(tmp_path / "m.gguf", "Q4_0", architecture="glm4moe", dense=1, predicting=2, keys=keys)
    assert ok("inspect", model, "--json").json["prediction"]["layers"] == 2
    ok("validate", model)
    ok("mtp", "drop", model, "-o", tmp_path / "out", "--validate")
    out = tmp_path / "out" / "m.gguf"
    left, wanted = stored_arrays(out), stored_arrays(plain)
    assert list(left) == list(wanted)
    assert all((left[name] == data).all() for name, data in wanted.items())
    told = {key: value for key, value in keys_of(out).items() if not key.startswith(("GGUF.", "general."))}
    theirs = {key: value for key, value in keys_of(plain).items() if not key.startswith(("GGUF.", "general."))}
    assert told == {**theirs, "glm4moe.nextn_predict_layers": 0}
    assert ok("validate", tmp_path / "out", "--against", model).code == 0
    assert "no prediction layers" in cli("mtp", "drop", plain, "-o", tmp_path / "no").err
    for verb, more, hint in (("extract", (), "convert_hf_to_gguf.py --mtp"), ("graft", ("--from", model), "onto the")):
        refused = cli("mtp", verb, model, *more, "-o", tmp_path / "no")
        assert refused.code == 2
        assert hint in " ".join(refused.err.split())


def test_a_draft_has_nothing_else(tmp_path: Path, predicting: Path, ok: Cli, cli: Cli) -> None:
    ok("mtp", "extract", predicting, "-o", tmp_path / "draft")
    declared = write_gguf(tmp_path / "d.gguf", architecture="gemma4-assistant", keys={"nextn_predict_layers": LAYERS})
    for draft in (tmp_path / "draft", declared):
        refused = cli("mtp", "drop", draft, "-o", tmp_path / "no")
        assert refused.code == 2
        assert "this is a draft" in refused.err
