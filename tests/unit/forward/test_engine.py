"""The streamed forward pass: equal to transformers' own, for every family and layout, in little memory."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurgery import apply, open_checkpoint, plan_of, write_plan
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.forward import engine as engine_module
from moesurgery.forward.coroutine import Coroutine
from moesurgery.forward.engine import Engine
from moesurgery.forward.hooks import ExpertsCall, Hooks
from moesurgery.forward.tokens import Tokens, padded
from moesurgery.forward.unit_runner import Resume
from tests.families import ROWS
from tests.quantise import fp8_value, make_fp8, make_mxfp4, mxfp4_value, rewrite
from tests.tiny import PROMPT, TINY, build, load, logits, read_tensors, save_tiny

WINDOWS = Tokens(PROMPT)


@pytest.fixture(autouse=True)
def one_window_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BATCH_TOKENS", PROMPT.shape[1])


def engine_of(path: Path, **options: Any) -> Engine:
    return Engine(plan_of(open_checkpoint(path)), keep=0, **options)


def calls_of(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, ...]]:
    """Run a transformers model on the prompt and return the inputs of each `experts` module."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda m, args, kwargs, n=name: found.__setitem__(n, (*args, *kwargs.values())), with_kwargs=True
            )
    logits(model)
    return found


# Families whose code hands no chosen experts to a module: what is read of them is in test_adapters.py.
ADAPTED = {"jetmoe", "llama4", "llama4_text", "doge"}
LOOPED = {"inkling2_loop", "inkling2_loop_text"}  # layers run more than once a pass, and `calls_of` keeps one call
ENCODER_DECODERS = {"switch_transformers", "nllb-moe"}
CASES = [(t, False) for t in ROWS if t not in ENCODER_DECODERS] + [(t, True) for t in TINY]


@pytest.mark.parametrize(("model_type", "fused"), CASES)
def test_logits_and_routing_are_those_of_transformers(models: Any, model_type: str, fused: bool) -> None:
    path = models(model_type, fused=fused)
    engine = engine_of(path)
    seen: dict[str, list[ExpertsCall]] = {}
    found: list[torch.Tensor] = []
    torch.manual_seed(0)  # a diffusion model starts from noise
    engine.run(
        WINDOWS,
        Hooks(experts=lambda call: seen.setdefault(call.block.experts, []).append(call), router_logits=True),
        logits=lambda first, part, values: found.append(values.float()),
    )
    reference = load(path)
    # Doge's own code gives other logits for windows side by side than one by one.
    alone = [logits(reference, window) for window in PROMPT.split(1)] if model_type == "doge" else [logits(reference)]
    assert (torch.cat(found) - torch.cat(alone)).abs().max() < 1e-5
    assert engine.meta_model.unused == []
    assert len(seen) == len(engine.routed)
    assert len(engine.routed) == len(engine.blocks) or model_type in ("jetmoe", "doge")
    if model_type in ADAPTED | LOOPED:
        return
    expected = calls_of(reference)
    for name, calls in seen.items():
        hidden, index, weights = expected[name]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        found_hidden = torch.cat([c.hidden.reshape(-1, hidden.shape[-1]) for c in calls])
        assert (found_hidden - hidden).abs().max() < 1e-5 * max(1, float(hidden.abs().max()))
        assert torch.equal(torch.cat([c.index for c in calls]), index)
        assert (torch.cat([c.weights for c in calls]) - weights).abs().max() < 1e-5
        if model_type in TINY:
            assert all(c.logits is not None and c.logits.shape == (24, 8) for c in calls)


@pytest.mark.parametrize("model_type", sorted(ENCODER_DECODERS))
def test_encoder_decoders_are_not_run(models: Any, model_type: str) -> None:
    with pytest.raises(RefusedError, match="encoder-decoder"):
        engine_of(models(model_type))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"intermediate_size": 48}),
        # later layers attend to the keys and values of earlier ones
        (
            "gemma3n_text",
            {
                "intermediate_size": 48,
                "head_dim": 8,
                "num_hidden_layers": 4,
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 8,
                "laurel_rank": 4,
                "activation_sparsity_pattern": [0.5] * 4,
            },
        ),
        # asks its freed embedding for a device before it is at the door
        (
            "llama4_text",
            {
                "intermediate_size": 48,
                "intermediate_size_mlp": 48,
                "head_dim": 8,
                "num_local_experts": 8,
                "attention_chunk_size": 16,
                "interleave_moe_layer_step": 2,
            },
        ),
    ],
)
def test_models_that_are_no_stack_of_equal_layers(models: Any, model_type: str, changes: dict[str, Any]) -> None:
    path = models(model_type, **changes)
    assert (engine_of(path).logits(WINDOWS) - logits(load(path))).abs().max() < 1e-5


def test_bfloat16_weights_in_float32(models: Any) -> None:
    path = models("mixtral", dtype="bfloat16")
    assert (engine_of(path).logits(WINDOWS) - logits(load(path))).abs().max() < 1e-5


def test_computing_in_bfloat16(models: Any) -> None:
    path = models("qwen3_moe")
    found = engine_of(path, dtype="bfloat16").logits(WINDOWS)
    expected = logits(load(path).to(torch.bfloat16))
    exact = logits(load(path))
    assert (found - expected).abs().max() <= (expected - exact).abs().max()


def test_fp8_is_dequantised_on_the_fly(models: Any, tmp_path: Path) -> None:
    source = models("deepseek_v3")
    make_fp8(source, tmp_path / "fp8")
    tensors = read_tensors(tmp_path / "fp8")
    values = {
        name: fp8_value(t, tensors[f"{name}_scale_inv"]) if f"{name}_scale_inv" in tensors else t
        for name, t in tensors.items()
        if not name.endswith("_scale_inv")
    }
    rewrite(source, tmp_path / "plain", values, {})
    expected = logits(load(tmp_path / "plain"))
    assert (engine_of(tmp_path / "fp8").logits(WINDOWS) - expected).abs().max() < 1e-5
    assert (logits(load(source)) - expected).abs().max() > 1e-3


def test_mxfp4_is_dequantised_on_the_fly(models: Any, tmp_path: Path) -> None:
    source = models("gpt_oss")
    make_mxfp4(source, tmp_path / "mxfp4")
    tensors = read_tensors(tmp_path / "mxfp4")
    values = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            values[base] = mxfp4_value(tensor, tensors[f"{base}_scales"]).flatten(-2).transpose(1, 2)
        elif not name.endswith("_scales"):
            values[name] = tensor
    rewrite(source, tmp_path / "plain", values, {})
    engine = engine_of(tmp_path / "mxfp4")
    assert (engine.logits(WINDOWS) - logits(load(tmp_path / "plain"))).abs().max() < 1e-5
    assert [b.experts for b in engine.blocks] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_an_edit_that_was_never_written(models: Any, tmp_path: Path, model_type: str) -> None:
    plan = apply(plan_of(open_checkpoint(models(model_type))), "rescale", top_k=3, where="weights")
    write_plan(plan, tmp_path / "out")
    unwritten = Engine(plan, keep=0).logits(WINDOWS)
    assert torch.equal(unwritten, engine_of(tmp_path / "out").logits(WINDOWS))
    assert (unwritten - logits(load(tmp_path / "out"))).abs().max() < 1e-5


def test_padding_changes_nothing(models: Any) -> None:
    path = models("mixtral")
    sequences = [PROMPT[0, :9].tolist(), PROMPT[1].tolist()]
    found = engine_of(path).logits(padded(sequences))
    reference = load(path)
    for row, ids in enumerate(sequences):
        assert (found[row, : len(ids)] - logits(reference, torch.tensor([ids]))[0]).abs().max() < 1e-5


def test_only_one_unit_is_in_memory(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(models("mixtral", num_hidden_layers=4))
    held: list[int] = []
    load_unit = engine.meta_model.load

    def watched(unit: Any) -> None:
        load_unit(unit)
        parameters = engine.meta_model.model.parameters()
        held.append(sum(p.untyped_storage().nbytes() for p in parameters if p.untyped_storage().nbytes() > 4))

    monkeypatch.setattr(engine.meta_model, "load", watched)
    engine.logits(WINDOWS)
    assert len(held) == 7  # embedding, four layers, norm, head
    # The norm stays beside the head while batches are finished one by one.
    assert max(held) <= max(u.nbytes for u in engine.meta_model.units.values()) + 32 * 4


def test_units_under_the_budget_stay(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(plan_of(open_checkpoint(models("mixtral"))))
    engine.logits(WINDOWS)
    monkeypatch.setattr(engine.meta_model, "load", lambda unit: pytest.fail(f"{unit.path} is read again"))
    engine.logits(WINDOWS)


def test_resuming_in_the_middle(models: Any) -> None:
    engine = engine_of(models("qwen3_moe"))
    base = engine.start(WINDOWS)
    base.to_layer(2)
    resumed = engine.start(WINDOWS, resume=Resume(2, base.outputs))
    base.to_layer(3)
    resumed.to_layer(3)
    for i in range(2):
        assert torch.equal(base.finish(i), resumed.finish(i))


def test_peeking_changes_nothing(models: Any) -> None:
    engine = engine_of(models("mixtral"))
    expected = engine.logits(WINDOWS)
    passes = engine.start(WINDOWS)
    seen: list[str] = []
    for layer in range(2):
        passes.to_layer(layer)
        passes.peek(Hooks(experts=lambda call: seen.append(call.block.where)))
    passes.to_layer(2)
    assert torch.equal(torch.cat([passes.finish(0), passes.finish(1)]), expected)
    assert seen == ["model.layers.0"] * 2 + ["model.layers.1"] * 2


def without_expert(path: Path, layer: int, expert: int) -> torch.Tensor:
    """The logits of a transformers model from which one expert of one layer was cut out."""
    model = load(path)
    module = model.get_submodule(f"model.layers.{layer}.mlp")
    kept = [e for e in range(8) if e != expert]
    for holder in (module.experts, module.gate):
        for name, tensor in [*holder.named_parameters(), *holder.named_buffers()]:
            if tensor.shape[0] == 8:
                setattr(holder, name, torch.nn.Parameter(tensor[kept], requires_grad=False))
        for count in ("num_experts", "n_routed_experts"):
            if hasattr(holder, count):
                setattr(holder, count, 7)
    return logits(model)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen2_moe"])
def test_a_banned_expert_is_one_that_is_not_there(models: Any, model_type: str) -> None:
    path = models(model_type)
    engine = engine_of(path)
    found: list[torch.Tensor] = []
    engine.run(
        WINDOWS,
        Hooks(ban=lambda block: [5] if block.block.layer == 1 else []),
        logits=lambda first, part, values: found.append(values),
    )
    assert (torch.cat(found) - without_expert(path, 1, 5)).abs().max() < 1e-5
    assert (torch.cat(found) - logits(load(path))).abs().max() > 1e-4


@pytest.mark.parametrize("model_type", ["deepseek_v3", "lfm2_moe", "phimoe", "gpt_oss", "deepseek_v2"])
def test_a_banned_expert_is_never_chosen(models: Any, model_type: str) -> None:
    """Also where a selection bias would favour it; and the bias is put back afterwards."""
    engine = engine_of(models(model_type))
    expected = engine.logits(WINDOWS)
    chosen: list[torch.Tensor] = []
    banned = [2, 3]
    engine.run(WINDOWS, Hooks(experts=lambda call: chosen.append(call.index), ban=lambda block: banned))
    assert chosen
    assert not torch.isin(torch.cat(chosen), torch.tensor(banned)).any()
    assert torch.equal(engine.logits(WINDOWS), expected)


def test_experts_can_be_replaced(models: Any) -> None:
    path = models("mixtral")
    engine = engine_of(path)
    found: list[torch.Tensor] = []
    engine.run(
        WINDOWS,
        Hooks(experts=lambda call: call.run(call.hidden, call.index, call.weights * 2)),
        logits=lambda first, part, values: found.append(values),
    )
    reference = load(path)
    for layer in reference.model.layers:
        layer.mlp.experts.down_proj.data *= 2
    assert (torch.cat(found) - logits(reference)).abs().max() < 1e-5


# What cannot be run


def test_a_missing_tensor(models: Any, tmp_path: Path) -> None:
    source = models("mixtral")
    tensors = read_tensors(source)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    rewrite(source, tmp_path / "hole", tensors, {})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj"):
        engine_of(tmp_path / "hole").logits(WINDOWS)


def test_a_tensor_of_another_shape(models: Any, tmp_path: Path) -> None:
    source = models("mixtral")
    tensors = read_tensors(source)
    tensors["model.norm.weight"] = torch.ones(31)
    rewrite(source, tmp_path / "odd", tensors, {})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[31\].*\[32\]"):
        engine_of(tmp_path / "odd").logits(WINDOWS)


def test_a_model_type_without_code(models: Any, tmp_path: Path) -> None:
    shutil.copytree(models("mixtral"), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(json.dumps({**config, "model_type": "never_heard_of"}))
    with pytest.raises(RefusedError, match="no model code for model_type 'never_heard_of'"):
        engine_of(tmp_path / "new")


def test_code_beside_a_checkpoint_is_not_run(models: Any, tmp_path: Path) -> None:
    shutil.copytree(models("mixtral"), tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (tmp_path / "code" / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "evil.py").write_text("raise SystemExit('imported')")
    expected = logits(load(models("mixtral")))
    assert (engine_of(tmp_path / "code").logits(WINDOWS) - expected).abs().max() < 1e-5


def test_a_form_that_cannot_be_dequantised(models: Any, tmp_path: Path) -> None:
    source = models("mixtral")
    tensors = read_tensors(source)
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    base = "model.layers.0.self_attn.q_proj."
    tensors |= {f"{base}qweight": torch.zeros(4, 32, dtype=torch.int32), f"{base}scales": weight[:1].half()}
    rewrite(source, tmp_path / "gptq", tensors, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(RefusedError, match="gptq"):
        engine_of(tmp_path / "gptq")


# Coroutines


def test_a_coroutine_waits_for_answers() -> None:
    routine: Coroutine

    def body() -> int:
        return int(routine.ask("one")) + int(routine.ask("two"))

    routine = Coroutine(body)
    asked = []
    routine.advance()
    while not routine.done:
        asked.append(routine.request)
        routine.advance(len(asked) * 10)
    assert (asked, routine.result) == (["one", "two"], 30)


def test_errors_come_out_and_no_thread_is_left(models: Any) -> None:
    before = threading.active_count()
    routine = Coroutine(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        routine.advance()

    def fail(call: ExpertsCall) -> None:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        engine_of(models("mixtral")).run(WINDOWS, Hooks(experts=fail))
    engine = engine_of(models("mixtral"))
    passes = engine.start(WINDOWS)
    passes.step()
    passes.close()
    assert threading.active_count() == before


def test_saved_models_are_those_that_were_built(tmp_path: Path) -> None:
    """The reference itself: what the engine is compared with is what was in memory before saving."""
    save_tiny("mixtral", tmp_path / "m")
    assert (engine_of(tmp_path / "m").logits(WINDOWS) - logits(build("mixtral"))).abs().max() < 1e-5
