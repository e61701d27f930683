"""Checkpoints that are broken in one way each: `validate` names it by its code, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesurgery
from moesurgery.checkpoint.source import LocalSource
from moesurgery.errors import CheckpointError
from moesurgery.validate.codes import CODES
from moesurgery.validate.run_checks import validate_checkpoint
from tests.broken import INDEX, BrokenCheckpoint, make_broken
from tests.conftest import ROOT
from tests.quantise import make_fp8, make_mxfp4

Break = Callable[[BrokenCheckpoint], Any]


@dataclass(frozen=True)
class Case:
    """A way to break the checkpoint `base`, and the findings that it must give: `C04`, or `P01!` for an error where
    the code is usually a warning, `C01?` for a warning where it is usually an error."""

    name: str
    base: str
    expected: tuple[str, ...]
    break_it: Break
    level: str
    against: bool
    client: str | None


CASES: list[Case] = []


def case(
    *expected: str, base: str = "mixtral", level: str = "values", against: bool = False, client: str | None = None
) -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        CASES.append(Case(function.__name__, base, expected, function, level, against, client))
        return function

    return register


EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
NORM = "model.layers.1.input_layernorm.weight"
LAYER = "model.layers.1."


# ---- clients: right in itself, and not for the program that is to read it


@case("K01", base="qwen2_moe", client="mlx")
def gates_that_the_client_does_not_renormalise(p: BrokenCheckpoint) -> None:
    older_rope(p)
    p.config("layer_types", norm_topk_prob=True)


@case("K02", base="fused", client="transformers4")
def a_layout_of_transformers_5(p: BrokenCheckpoint) -> None:
    older_rope(p)


@case("K03", "K07", client="mlx")
def rope_in_the_newer_spelling_alone(p: BrokenCheckpoint) -> None:
    pass


@case("K04", base="qwen3_moe", client="transformers4")
def experts_counted_under_another_key(p: BrokenCheckpoint) -> None:
    older_rope(p)
    p.json("config.json", lambda c: {**{k: v for k, v in c.items() if k != "num_experts"}, "num_local_experts": 8})


@case("K05", base="tied", client="sglang")
def a_tied_head_that_the_client_does_not_make(p: BrokenCheckpoint) -> None:
    pass


@case("K06", "K07", "V02?", base="qwen2_moe", client="llama.cpp")
def a_gate_of_zeros_that_the_client_divides_by(p: BrokenCheckpoint) -> None:
    p.config(norm_topk_prob=False)
    gates = {name: t for name, t in p.tensors().items() if name.endswith("shared_expert_gate.weight")}
    p.update({name: torch.zeros_like(t) for name, t in gates.items()})


@case("K07", base="mixtral", client="llama.cpp")
def a_width_that_k_quants_do_not_take(p: BrokenCheckpoint) -> None:
    pass


def older_rope(p: BrokenCheckpoint) -> None:
    p.json("config.json", lambda c: {**c, "rope_theta": c["rope_parameters"]["rope_theta"]})


# ---- policy


class Call:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@case("P01")
def pickle_of_training_arguments(p: BrokenCheckpoint) -> None:
    torch.save({"a": torch.zeros(2)}, p.folder / "training_args.bin")


@case("P01")
def old_pickle_under_another_name(p: BrokenCheckpoint) -> None:
    p.text("notes.txt", pickle.dumps({"a": [1, 2], "b": {"c": 3}}, protocol=4))


@case("P01!")
def pickle_that_calls_the_shell(p: BrokenCheckpoint) -> None:
    p.text("scheduler.dat", pickle.dumps(Call(), protocol=4))


@case("P01!")
def pickle_of_protocol_0_that_calls_the_shell(p: BrokenCheckpoint) -> None:
    p.text("vocab.txt", b"cos\nsystem\n(S'true'\ntR.")


@case("P01", "P02")
def only_pickled_weights(p: BrokenCheckpoint) -> None:
    for path in (*p.shards, p.folder / INDEX):
        path.unlink()
    p.text("pytorch_model.bin", b"PK\x03\x04")


@case("P02")
def no_weights(p: BrokenCheckpoint) -> None:
    for path in (*p.shards, p.folder / INDEX):
        path.unlink()


@case("I02", "P03")
def index_leads_out(p: BrokenCheckpoint) -> None:
    shutil.copy(p.shards[0], p.folder.parent / "outside.safetensors")
    p.json(INDEX, lambda i: i["weight_map"].update({EXPERT: "../outside.safetensors"}))


@case("I02", "I04", "P03")
def index_names_an_absolute_path(p: BrokenCheckpoint) -> None:
    p.json(INDEX, lambda i: i["weight_map"].update({EXPERT: str(p.shards[0])}))


@case("I02", "P03")
def index_names_a_path_of_another_system(p: BrokenCheckpoint) -> None:
    p.json(INDEX, lambda i: i["weight_map"].update({EXPERT: "C:\\model.safetensors"}))


@case("P03")
def shard_is_a_link_out(p: BrokenCheckpoint) -> None:
    shard = p.shards[0]
    shutil.move(shard, p.folder.parent / "elsewhere.safetensors")
    shard.symlink_to(p.folder.parent / "elsewhere.safetensors")


@case("P03")
def side_file_is_a_link_out(p: BrokenCheckpoint) -> None:
    (p.folder / "notes.md").symlink_to("/etc/passwd")


@case("P04")
def pipe(p: BrokenCheckpoint) -> None:
    os.mkfifo(p.folder / "extra.safetensors")


@case("P05")
def auto_map(p: BrokenCheckpoint) -> None:
    p.config(auto_map={"AutoModel": "modeling_evil.Evil"})


@case("P05")
def code_beside_the_weights(p: BrokenCheckpoint) -> None:
    p.text("modeling_evil.py", "raise SystemExit")


@case("P06")
def kernel_from_the_hub(p: BrokenCheckpoint) -> None:
    p.config(_attn_implementation_internal="evil/kernel")


@case("P06")
def attention_of_a_nested_config(p: BrokenCheckpoint) -> None:
    p.config(vision_config={"attn_implementation": {"": "evil/kernel"}})


@case("P07")
def tensor_name_with_a_path(p: BrokenCheckpoint) -> None:
    p.update({"../../etc/cron.d/x": torch.zeros(1, dtype=torch.bfloat16)})


@case("P07")
def tensor_name_that_moves_the_cursor(p: BrokenCheckpoint) -> None:
    p.update({"model.\x1b[2J\u202e": torch.zeros(1, dtype=torch.bfloat16)})


@case("P07?")
def file_name_with_a_newline(p: BrokenCheckpoint) -> None:
    p.text("read\nme", "")


@case("P08")
def template_that_reaches_for_classes(p: BrokenCheckpoint) -> None:
    p.text("chat_template.jinja", "{{ messages.__class__.__mro__ }}")


@case("P08")
def template_that_hides_it(p: BrokenCheckpoint) -> None:
    p.text("chat_template.jinja", "{{ messages | attr('__cla' ~ 'ss__') }}")


@case("P08")
def template_in_the_tokenizer_config(p: BrokenCheckpoint) -> None:
    p.json("tokenizer_config.json", lambda t: t.update(chat_template="{% include '/etc/passwd' %}"))


@case("P09")
def names_that_differ_in_case(p: BrokenCheckpoint) -> None:
    p.text("Config.json", "{}")


# ---- container


@case("S01")
def empty_shard(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: b"")


@case("S01")
def header_longer_than_the_file(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: (2**40).to_bytes(8, "little") + raw[8:])


@case("S02")
def header_is_no_json(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: raw[:8] + b"{" + b"!" + raw[10:])


@case("S02?")
def header_begins_with_space(p: BrokenCheckpoint) -> None:
    p.header(lambda t: b"  " + json.dumps(t).encode())


@case("S03")
def name_twice_in_a_header(p: BrokenCheckpoint) -> None:
    def twice(table: dict[str, Any]) -> bytes:
        name, entry = next((n, e) for n, e in table.items() if n != "__metadata__")
        return json.dumps(table).encode()[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()

    p.header(twice)


@case("S04")
def unknown_dtype(p: BrokenCheckpoint) -> None:
    p.header(lambda t: t[first(t)].update(dtype="F7"))


@case("S04")
def shape_of_booleans(p: BrokenCheckpoint) -> None:
    p.header(lambda t: t[first(t)].update(shape=[True]))


@case("S05")
def range_that_does_not_fit(p: BrokenCheckpoint) -> None:
    p.header(lambda t: t[first(t)].update(shape=[7, *t[first(t)]["shape"]]))


@case("S06")
def truncated(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: raw[:-100])


@case("S06")
def bytes_after_the_end(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: raw + b"PK\x03\x04")


@case("S06")
def overlapping_tensors(p: BrokenCheckpoint) -> None:
    def overlap(table: dict[str, Any]) -> None:
        same = [e for n, e in table.items() if n != "__metadata__" and e["shape"] == [48, 32]]
        same[1]["data_offsets"] = same[0]["data_offsets"]

    p.header(overlap)


@case("S07")
def metadata_without_format(p: BrokenCheckpoint) -> None:
    p.header(lambda t: t.pop("__metadata__"))


@case("S07!")
def metadata_of_numbers(p: BrokenCheckpoint) -> None:
    p.header(lambda t: t.update(__metadata__={"format": 1}))


@case("S08")
def pointer_of_git_lfs(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


@case("S08")
def error_page_in_place_of_weights(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: b"<!DOCTYPE html><html><body>503</body></html>")


@case("S09", base="edited")
def shard_of_another_run(p: BrokenCheckpoint) -> None:
    p.edit(EXPERT, lambda t: t + 1)


@case("S09", base="edited")
def one_value_changed_later(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: raw.__setitem__(-3, raw[-3] ^ 1))


@case("S09", base="edited")
def record_that_is_cut_off(p: BrokenCheckpoint) -> None:
    path = p.folder / "moesurgery.json"
    path.write_text(path.read_text()[:200])


@case("S09?", base="edited")
def config_edited_by_hand(p: BrokenCheckpoint) -> None:
    p.config(router_aux_loss_coef=0.5)


@case("S10", "V02", "V02?", "V05", base="demo")
def hole_in_a_shard(p: BrokenCheckpoint) -> None:
    with open(p.shards[1], "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.truncate(size // 2 // 4096 * 4096)
        file.truncate(size)


@case("S11")
def disk_that_fails(p: BrokenCheckpoint) -> None:
    """See `failing_disk`: reads of the second shard's header fail."""


# ---- index


@case("I01")
def index_is_a_list(p: BrokenCheckpoint) -> None:
    p.text(INDEX, "[]")


@case("I01")
def index_without_metadata(p: BrokenCheckpoint) -> None:
    p.json(INDEX, lambda i: i.pop("metadata") and i)


@case("I01")
def index_maps_a_name_twice(p: BrokenCheckpoint) -> None:
    path = p.folder / INDEX
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{EXPERT}": "x.safetensors", '))


@case("I02")
def missing_shard(p: BrokenCheckpoint) -> None:
    p.shards[1].unlink()


@case("I02")
def name_mapped_to_the_wrong_shard(p: BrokenCheckpoint) -> None:
    held = load_file(p.shards[0])
    p.json(INDEX, lambda i: i["weight_map"].update({next(iter(held)): p.shards[1].name}))


@case("I02")
def name_that_no_shard_holds(p: BrokenCheckpoint) -> None:
    p.json(INDEX, lambda i: i["weight_map"].update({"model.extra.weight": p.shards[1].name}))


@case("I03")
def tensor_in_two_shards(p: BrokenCheckpoint) -> None:
    held, other = load_file(p.shards[0]), load_file(p.shards[1])
    name = next(iter(held))
    save_file({**other, name: held[name]}, p.shards[1], metadata={"format": "pt"})


@case("I03")
def tensor_that_the_index_does_not_know(p: BrokenCheckpoint) -> None:
    p.json(INDEX, lambda i: i["weight_map"].pop(EXPERT) and i)


@case("I04")
def wrong_total(p: BrokenCheckpoint) -> None:
    p.json(INDEX, lambda i: i["metadata"].update(total_size=1))


@case("I04")
def shards_numbered_for_another_count(p: BrokenCheckpoint) -> None:
    for shard in p.shards:
        shard.rename(shard.with_name(shard.name.replace("-of-00003", "-of-00004")))
    p.reindex()


@case("I05")
def two_checkpoints(p: BrokenCheckpoint) -> None:
    save_file(p.tensors(), p.folder / "model.safetensors", metadata={"format": "pt"})


@case("I05?")
def stale_shard(p: BrokenCheckpoint) -> None:
    shutil.copy(p.shards[0], p.folder / "model-00001-of-00009.safetensors")


@case("I06")
def shards_without_an_index(p: BrokenCheckpoint) -> None:
    (p.folder / INDEX).unlink()


# ---- config against tensors


@case("C01")
def no_config(p: BrokenCheckpoint) -> None:
    (p.folder / "config.json").unlink()


@case("C01")
def config_cut_off(p: BrokenCheckpoint) -> None:
    path = p.folder / "config.json"
    path.write_text(path.read_text()[:-40])


@case("C01?")
def key_twice_in_the_config(p: BrokenCheckpoint) -> None:
    path = p.folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"vocab_size": 99, ', 1))


@case("C02", "C03")
def another_expert_width(p: BrokenCheckpoint) -> None:
    p.config(intermediate_size=40)


@case("C02", "C03")
def another_hidden_size(p: BrokenCheckpoint) -> None:
    p.edit(NORM, lambda t: t[:16])


@case("C02", "C03")
def every_expert_transposed(p: BrokenCheckpoint) -> None:
    p.update({n: t.T for n, t in p.tensors().items() if ".experts." in n})


@case("C02", "C03", base="fused")
def fused_experts_the_other_way(p: BrokenCheckpoint) -> None:
    p.update({n: t.transpose(1, 2) for n, t in p.tensors().items() if n.endswith("experts.down_proj")})


@case("C03")
def attention_of_another_shape(p: BrokenCheckpoint) -> None:
    p.config(num_key_value_heads=4)


@case("C03")
def norm_is_missing(p: BrokenCheckpoint) -> None:
    p.update({NORM: None})


@case("C03", "C11")
def prefix_twice(p: BrokenCheckpoint) -> None:
    p.rename(lambda n: n.replace("self_attn.", "self_attn.self_attn."))


@case("C03", base="qwen2_moe")
def shared_expert_lost(p: BrokenCheckpoint) -> None:
    p.update({n: None for n in p.tensors() if ".shared_expert.up_proj" in n})


@case("C03", base="gpt_oss")
def biases_lost(p: BrokenCheckpoint) -> None:
    p.update({n: None for n in p.tensors() if n.endswith("down_proj_bias")})


@case("C03", "C04")
def one_expert_missing(p: BrokenCheckpoint) -> None:
    p.update({n: None for n in p.tensors() if "layers.0.block_sparse_moe.experts.5." in n})


@case("C03", "C04")
def one_part_of_an_expert_missing(p: BrokenCheckpoint) -> None:
    p.update({EXPERT: None})


@case("C04")
def experts_numbered_from_one(p: BrokenCheckpoint) -> None:
    def up(name: str) -> str:
        head, found, rest = name.partition(".experts.")
        number, _, part = rest.partition(".")
        return f"{head}.experts.{int(number) + 1}.{part}" if found else name

    p.rename(up)


@case("C03", "C04")
def pruned_and_the_config_not_told(p: BrokenCheckpoint) -> None:
    kept = {n: t[:6] for n, t in p.tensors().items() if n.endswith("gate.weight")}
    p.update({**{n: None for n in p.tensors() if ".experts.6." in n or ".experts.7." in n}, **kept})


@case("C03", "C04")
def config_counts_more_experts(p: BrokenCheckpoint) -> None:
    p.config(num_local_experts=16)


@case("C03", "C04")
def one_expert_of_another_width(p: BrokenCheckpoint) -> None:
    p.edit(EXPERT, lambda t: t[:40])


@case("C03", "C04", base="fused")
def fused_experts_not_as_many_as_stated(p: BrokenCheckpoint) -> None:
    p.config(num_local_experts=4)


@case("C03", "C05")
def router_not_pruned(p: BrokenCheckpoint) -> None:
    p.update({n: None for n in p.tensors() if ".experts.6." in n or ".experts.7." in n})
    p.config(num_local_experts=6)


@case("C03", "C05")
def router_pruned_alone(p: BrokenCheckpoint) -> None:
    p.edit(ROUTER, lambda t: t[:6])


@case("C03", "C05")
def router_transposed(p: BrokenCheckpoint) -> None:
    p.edit(ROUTER, lambda t: t.T)


@case("C03", "C05")
def router_lost(p: BrokenCheckpoint) -> None:
    p.update({ROUTER: None})


@case("C03", "C05", base="deepseek_v3")
def correction_bias_of_another_length(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.1.mlp.gate.e_score_correction_bias", lambda t: t[:6])


@case("C05", base="deepseek_v3")
def groups_that_do_not_divide(p: BrokenCheckpoint) -> None:
    p.config(n_group=3)


@case("C05", base="deepseek_v3")
def more_groups_kept_than_there_are(p: BrokenCheckpoint) -> None:
    p.config(topk_group=5)


@case("C06")
def top_k_over_the_experts(p: BrokenCheckpoint) -> None:
    p.config(num_experts_per_tok=9)


@case("C06")
def top_k_of_zero(p: BrokenCheckpoint) -> None:
    p.config(num_experts_per_tok=0)


@case("C06", base="deepseek_v3")
def top_k_over_the_groups_that_are_kept(p: BrokenCheckpoint) -> None:
    p.config(num_experts_per_tok=5)


@case("C03", "C06")
def top_k_in_words(p: BrokenCheckpoint) -> None:
    p.config(num_experts_per_tok="two")


@case("C03", "C07")
def layer_missing(p: BrokenCheckpoint) -> None:
    p.update({n: None for n in p.tensors() if n.startswith(LAYER)})


@case("C11", "C07")
def layer_left_over(p: BrokenCheckpoint) -> None:
    p.config(num_hidden_layers=1)


@case("C03", "C07", "C11", base="qwen3_moe")
def dense_layer_said_to_be_sparse(p: BrokenCheckpoint) -> None:
    p.config(mlp_only_layers=[])


@case("C03", "C08")
def head_missing(p: BrokenCheckpoint) -> None:
    p.update({"lm_head.weight": None})


@case("C08", "C03", "C09", base="tied")
def head_of_another_shape_beside_tied_embeddings(p: BrokenCheckpoint) -> None:
    p.update({"lm_head.weight": torch.ones(60, 32, dtype=torch.bfloat16)})


@case("C03", "C09")
def vocabulary_of_another_size(p: BrokenCheckpoint) -> None:
    p.config(vocab_size=70)


@case("C09", "C09?")
def end_token_without_a_row(p: BrokenCheckpoint) -> None:
    p.config(eos_token_id=64)


@case("C09?")
def generation_config_of_another_model(p: BrokenCheckpoint) -> None:
    p.json("generation_config.json", lambda g: g.update(eos_token_id=40))


@case("C10")
def one_expert_in_another_type(p: BrokenCheckpoint) -> None:
    p.edit(EXPERT, lambda t: t.float())


@case("C10?")
def config_says_another_type(p: BrokenCheckpoint) -> None:
    p.config(dtype="float16")


@case("C10", base="fp8")
def quantisation_config_lost(p: BrokenCheckpoint) -> None:
    p.config("quantization_config")


@case("C11")
def left_over_from_a_dense_model(p: BrokenCheckpoint) -> None:
    p.update({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.bfloat16)})


@case("C12")
def tie_map_of_another_length(p: BrokenCheckpoint) -> None:
    p.config(layer_tie_map=[0, 0, 0])


@case("C12")
def tied_layer_that_is_stored(p: BrokenCheckpoint) -> None:
    p.config(layer_tie_map=[0, 0])


@case("C13", base="fp8")
def scales_lost(p: BrokenCheckpoint) -> None:
    p.update({n: None for n in p.tensors() if n.endswith("layers.1.self_attn.o_proj.weight_scale_inv")})


@case("C11", "C13", base="fp8")
def weight_dequantised_and_its_scale_left(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.1.self_attn.o_proj.weight", lambda t: t.bfloat16())


@case("C13", base="fp8")
def scales_of_another_shape(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.1.self_attn.o_proj.weight_scale_inv", lambda t: t[:1])


@case("C13")
def quantisation_config_of_another_model(p: BrokenCheckpoint) -> None:
    p.config(quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})


@case("C14")
def architecture_of_another_model(p: BrokenCheckpoint) -> None:
    p.config(architectures=["Qwen3MoeForCausalLM"])


@case("C16")
def not_a_number_in_the_config(p: BrokenCheckpoint) -> None:
    p.config(routed_scaling_factor=float("nan"))


@case("C16?")
def infinity_in_a_side_file(p: BrokenCheckpoint) -> None:
    (p.folder / "generation_config.json").write_text('{\n  "max_time": -Infinity,\n  "note": "NaN"\n}')


# ---- tokenizer


@case("T01")
def tokenizer_of_a_larger_model(p: BrokenCheckpoint) -> None:
    p.json("tokenizer.json", lambda t: t["model"]["vocab"].update(larger=64))


@case("T01")
def tokenizer_cut_off(p: BrokenCheckpoint) -> None:
    path = p.folder / "tokenizer.json"
    path.write_text(path.read_text()[:-9])


@case("T02")
def special_token_that_does_not_exist(p: BrokenCheckpoint) -> None:
    p.json("tokenizer_config.json", lambda t: t.update(eos_token="<|end|>"))


@case("T02")
def template_that_does_not_parse(p: BrokenCheckpoint) -> None:
    p.text("chat_template.jinja", "{% for m in messages %}{{ m }}")


# ---- values


@case("V01")
def not_a_number(p: BrokenCheckpoint) -> None:
    p.edit(EXPERT, lambda t: t.view(-1)[5].fill_(float("nan")) and None)


@case("V01")
def infinite(p: BrokenCheckpoint) -> None:
    p.edit(ROUTER, lambda t: t.view(-1)[5].fill_(float("inf")) and None)


@case("V01", base="fp8")
def not_a_number_in_fp8(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.1.self_attn.o_proj.weight", lambda t: t.view(torch.uint8)[0].fill_(0x7F) is None or None)


@case("V02")
def norm_of_zeros(p: BrokenCheckpoint) -> None:
    p.edit(NORM, torch.zeros_like)


@case("V02")
def head_of_zeros(p: BrokenCheckpoint) -> None:
    p.edit("lm_head.weight", torch.zeros_like)


@case("V02?")
def expert_of_zeros(p: BrokenCheckpoint) -> None:
    p.edit(EXPERT, torch.zeros_like)


@case("V02?", base="fused")
def fused_expert_of_zeros(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.0.mlp.experts.down_proj", lambda t: t[2].zero_() is None or None)


@case("V02?")
def router_of_zeros(p: BrokenCheckpoint) -> None:
    p.edit(ROUTER, torch.zeros_like)


@case("V03")
def twins(p: BrokenCheckpoint) -> None:
    held = p.tensors()
    p.update({n.replace(".experts.3.", ".experts.5."): held[n] for n in held if "layers.0" in n and ".experts.3." in n})


@case("V03", base="fused")
def fused_twins(p: BrokenCheckpoint) -> None:
    for part in ("gate_up_proj", "down_proj"):
        p.edit(f"model.layers.1.mlp.experts.{part}", lambda t: t[4].copy_(t[1]) is None or None)


@case("V04")
def expert_out_of_line(p: BrokenCheckpoint) -> None:
    p.edit(EXPERT, lambda t: t * 4096)


@case("V04", base="fused")
def fused_expert_out_of_line(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.0.mlp.experts.down_proj", lambda t: t[2].mul_(4096) is None or None)


@case("V04")
def close_to_overflow(p: BrokenCheckpoint) -> None:
    p.update({n: t.half() for n, t in p.tensors().items()})
    p.config(dtype="float16")
    p.edit(EXPERT, lambda t: t.view(-1)[3].fill_(65504) is None or None)


@case("V05", base="demo")
def zeros_inside_a_weight(p: BrokenCheckpoint) -> None:
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    p.edit(name, lambda t: t.view(-1)[1000:9000].zero_() is None or None)


@case("V02", "V02?", "V05", base="demo")
def shard_that_ends_in_zeros(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: raw[: len(raw) // 2] + b"\0" * (len(raw) - len(raw) // 2))


@case("V06", base="tied")
def head_that_differs_from_its_tie(p: BrokenCheckpoint) -> None:
    p.update({"lm_head.weight": torch.ones(64, 32, dtype=torch.bfloat16)})


@case("V07")
def layer_written_twice(p: BrokenCheckpoint) -> None:
    held = p.tensors()
    p.update({n: held[n.replace(LAYER, "model.layers.0.")] for n in held if n.startswith(LAYER)})


# ---- more of what surgery and interrupted copies leave behind


@case("I02")
def shards_swapped(p: BrokenCheckpoint) -> None:
    a, b = p.shards[:2]
    first_bytes, second_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(second_bytes)
    b.write_bytes(first_bytes)


@case("C10")
def shard_of_the_float32_version(p: BrokenCheckpoint) -> None:
    held = load_file(p.shards[1])
    p.update({n: t.float() for n, t in held.items()})


@case("V06")
def config_ties_what_is_not_tied(p: BrokenCheckpoint) -> None:
    p.config(tie_word_embeddings=True)


@case("C03", "C09")
def embedding_resized_and_the_head_not(p: BrokenCheckpoint) -> None:
    p.edit("model.embed_tokens.weight", lambda t: torch.cat([t, t[:6]]))
    p.config(vocab_size=70)


@case("C03", "C09", "T01")
def embedding_cut(p: BrokenCheckpoint) -> None:
    p.edit("model.embed_tokens.weight", lambda t: t[:50])


@case("C03", "C04")
def one_layer_pruned(p: BrokenCheckpoint) -> None:
    held = p.tensors()
    gone = {n: None for n in held if n.startswith(LAYER) and (".experts.6." in n or ".experts.7." in n)}
    p.update({**gone, LAYER + "block_sparse_moe.gate.weight": held[LAYER + "block_sparse_moe.gate.weight"][:6]})


@case("C03", "C07", "C11", base="deepseek_v3")
def one_dense_layer_more(p: BrokenCheckpoint) -> None:
    p.config(first_k_dense_replace=2)


@case("C03", base="deepseek_v3")
def correction_bias_lost(p: BrokenCheckpoint) -> None:
    p.update({"model.layers.1.mlp.gate.e_score_correction_bias": None})


def add_prediction_layer(p: BrokenCheckpoint) -> None:
    held = p.tensors()
    more = {n.replace(LAYER, "model.layers.2."): t + 1 for n, t in held.items() if n.startswith(LAYER)}
    for part in ("eh_proj", "enorm", "hnorm"):
        more[f"model.layers.2.{part}.weight"] = torch.ones(32, 64)[0 if part != "eh_proj" else slice(None)].bfloat16()
    p.update(more)


@case("C11", base="deepseek_v3")
def prediction_layer_left_over(p: BrokenCheckpoint) -> None:
    add_prediction_layer(p)


@case("C07", base="deepseek_v3")
def prediction_layer_lost(p: BrokenCheckpoint) -> None:
    p.config(num_nextn_predict_layers=1)


@case("C11", base="qwen3_moe")
def prediction_module_left_over(p: BrokenCheckpoint) -> None:
    p.update({"mtp.fc.weight": torch.ones(32, 64).bfloat16(), "mtp.layers.0.mlp.gate.weight": torch.ones(8, 32)})


@case("C13", "C11", base="fp8")
def scales_of_pruned_experts(p: BrokenCheckpoint) -> None:
    gone = {n: None for n in p.tensors() if ".experts.6." in n or ".experts.7." in n}
    p.update({n: t for n, t in gone.items() if not n.endswith("scale_inv")})
    p.update({n: t[:6] for n, t in p.tensors().items() if ".mlp.gate." in n})
    p.config(n_routed_experts=6)


@case("C10", base="fp8")
def one_expert_left_unquantised(p: BrokenCheckpoint) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    p.update({name: p.tensors()[name].bfloat16(), f"{name}_scale_inv": None})


@case("C15", base="mixtral")
def plain_weights_beside_a_file_that_says_nvfp4(p: BrokenCheckpoint) -> None:
    p.text(
        "hf_quant_config.json", json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}})
    )


@case("C15", base="fp8")
def quantised_router_that_the_settings_leave_out(p: BrokenCheckpoint) -> None:
    def leave_out(config: dict[str, Any]) -> None:
        config["quantization_config"]["modules_to_not_convert"] = ["model.layers.1.mlp.experts.0.up_proj", "lm_head"]

    p.json("config.json", leave_out)


@case("C15?", base="fp8")
def settings_of_experts_that_are_gone(p: BrokenCheckpoint) -> None:
    named = ["model.layers.1.mlp.experts.9.up_proj"]
    p.text("hf_quant_config.json", json.dumps({"quantization": {"quant_algo": "FP8", "exclude_modules": named}}))


@case("C15", base="fp8")
def a_description_of_quantisation_that_is_no_json(p: BrokenCheckpoint) -> None:
    p.text("quantize_config.json", "{bits: 4}")


@case("C11")
def adapters_not_merged(p: BrokenCheckpoint) -> None:
    p.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32).bfloat16()})


@case("C02", "C03", "C09", "T01")
def embedding_transposed(p: BrokenCheckpoint) -> None:
    p.edit("model.embed_tokens.weight", lambda t: t.T)


@case("C02", "C03")
def one_axis_more(p: BrokenCheckpoint) -> None:
    p.edit(NORM, lambda t: t[None])


@case("C06", "C03")
def top_k_true(p: BrokenCheckpoint) -> None:
    p.config(num_experts_per_tok=True)


@case("C03", "C07")
def layers_in_words(p: BrokenCheckpoint) -> None:
    p.config(num_hidden_layers="2")


@case("C04?")
def one_layer_fused_and_one_not(p: BrokenCheckpoint) -> None:
    held = p.tensors()
    stack = {n: t for n, t in held.items() if n.startswith(LAYER) and ".experts." in n}
    parts = {
        w: torch.stack([stack[f"{LAYER}block_sparse_moe.experts.{e}.{w}.weight"] for e in range(8)])
        for w in ("w1", "w2", "w3")
    }
    fused = {"gate_up_proj": torch.cat([parts["w1"], parts["w3"]], 1), "down_proj": parts["w2"]}
    p.update({**dict.fromkeys(stack), **{f"{LAYER}mlp.experts.{n}": t for n, t in fused.items()}})


@case("C10?")
def types_mislabelled(p: BrokenCheckpoint) -> None:
    for shard in range(len(p.shards)):
        p.header(lambda t: [e.update(dtype="F16") for n, e in t.items() if n != "__metadata__"] and None, shard)


@case("V02")
def last_norm_of_zeros(p: BrokenCheckpoint) -> None:
    p.edit("model.norm.weight", torch.zeros_like)


@case("V04", base="demo")
def router_out_of_line(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.2.block_sparse_moe.gate.weight", lambda t: t * 10000)


@case("V01")
def scaled_past_the_end_of_the_type(p: BrokenCheckpoint) -> None:
    p.update({n: (t.float() * 1e4).half() for n, t in p.tensors().items()})
    p.edit(EXPERT, lambda t: t * 1e4)
    p.config(dtype="float16")


@case("I05?")
def shard_under_two_names(p: BrokenCheckpoint) -> None:
    shutil.copy(p.shards[0], p.folder / "model-00004-of-00004.safetensors")


@case("S06")
def download_that_was_cut_off(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: raw[: len(raw) // 2], shard=2)


@case("S02")
def text_in_place_of_weights(p: BrokenCheckpoint) -> None:
    p.bytes(lambda raw: (50).to_bytes(8, "little") + b"Entry not found, please authenticate first." + b" " * 50)


@case("C01")
def config_in_another_encoding(p: BrokenCheckpoint) -> None:
    path = p.folder / "config.json"
    path.write_bytes(path.read_text().encode("utf-16"))


@case("R03", "S09", base="edited", against=True)
def edit_applied_twice(p: BrokenCheckpoint) -> None:
    p.update({n: t * 1.5 for n, t in p.tensors().items() if n.endswith(".w2.weight")})


@case("F02", "R02", level="forward", against=True)
def gate_and_up_swapped(p: BrokenCheckpoint) -> None:
    held = p.tensors()
    turn = {".w1.": ".w3.", ".w3.": ".w1."}
    p.update({n.replace(a, b): held[n] for n in held for a, b in turn.items() if a in n})


# ---- forward


@case("F01", level="forward")
def activations_that_overflow(p: BrokenCheckpoint) -> None:
    p.edit("lm_head.weight", lambda t: t * 1e25)
    p.edit("model.norm.weight", lambda t: t * 1e20)


@case("F02", "R02", level="forward", against=True)
def experts_permuted_and_the_router_not(p: BrokenCheckpoint) -> None:
    held = p.tensors()
    turned = {n: held[n.replace(".experts.0.", ".experts.1.")] for n in held if ".experts.0." in n}
    p.update({**turned, **{n.replace(".experts.0.", ".experts.1."): held[n] for n in turned}})


@case("F03", base="deepseek_v3", level="forward")
def router_that_collapsed(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.1.mlp.gate.e_score_correction_bias", lambda t: t.index_fill(0, torch.tensor([0, 1]), 10.0))


# ---- against a reference


@case("R01", base="edited", against=True)
def recipe_of_an_unknown_operation(p: BrokenCheckpoint) -> None:
    p.json("moesurgery.json", lambda m: m["recipe"].update(steps=[{"amputate": {}}]))


@case("R02", "S09", base="edited", against=True)
def untouched_tensor_that_was_touched(p: BrokenCheckpoint) -> None:
    p.edit(NORM, lambda t: t + 1)


@case("R03", "S09", base="edited", against=True)
def edited_tensor_that_is_not_what_was_computed(p: BrokenCheckpoint) -> None:
    p.edit("model.layers.0.block_sparse_moe.experts.3.w2.weight", lambda t: t * 1.01)


@case("C11", "R04", "S09", base="edited", against=True)
def tensor_that_the_recipe_does_not_leave(p: BrokenCheckpoint) -> None:
    p.update({"model.extra.weight": torch.ones(3, dtype=torch.bfloat16)})


@case("R05", "S09?", base="edited", against=True)
def config_that_the_recipe_does_not_leave(p: BrokenCheckpoint) -> None:
    p.config(rope_theta=5.0)


@case("R06?", base="edited", against=True)
def tokenizer_that_is_not_the_references(p: BrokenCheckpoint) -> None:
    p.json("tokenizer_config.json", lambda m: m.update(eos_token="w3"))


def first(table: dict[str, Any]) -> str:
    """Return the name of the last tensor of a header: after it, nothing moves."""
    return max((n for n in table if n != "__metadata__"), key=lambda n: int(table[n]["data_offsets"][1]))


TOKENS = {"<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 60)}, "<unk>": 0}


def add_tokenizer(folder: Path) -> None:
    model = {"type": "WordLevel", "vocab": TOKENS, "unk_token": "<unk>"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="session")
def bases(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The good checkpoints: `bases("mixtral")`."""
    root = tmp_path_factory.mktemp("bases")

    def make(name: str, folder: Path) -> None:
        if name == "fp8":
            make_fp8(models("deepseek_v3", dtype="bfloat16"), folder)
        elif name == "mxfp4":
            make_mxfp4(models("gpt_oss", dtype="bfloat16"), folder)
        elif name == "demo":
            shutil.copytree(ROOT / "examples" / "demo" / "model", folder)
            return
        elif name == "edited":
            plan = moesurgery.plan_of(moesurgery.open_checkpoint(get("mixtral")))
            plan = moesurgery.apply(plan, "rescale", top_k=3, scale=1.5)
            moesurgery.write_plan(plan, folder, moesurgery.WriteOptions(checksums=True))
            return
        elif name in ("fused", "tied", "mixtral"):
            changes = {"tie_word_embeddings": True} if name == "tied" else {}
            shutil.copytree(models("mixtral", dtype="bfloat16", fused=name == "fused", **changes), folder)
        else:
            shutil.copytree(models(name, dtype="bfloat16"), folder)
        add_tokenizer(folder)

    def get(name: str) -> Path:
        if not (root / name).exists():
            make(name, root / name)
        return root / name

    return get


def spell(code: str, severity: str) -> str:
    usual = CODES[code].severity
    return code + {"error": "!", "warning": "?", "note": "-"}[severity] * (severity != usual)


@pytest.mark.parametrize("base", sorted({c.base for c in CASES} | {"mxfp4"}))
def test_what_is_broken_here_was_right_before(bases: Callable[[str], Path], base: str) -> None:
    assert validate_checkpoint(bases(base)).findings == ()


@pytest.mark.parametrize("one", CASES, ids=lambda c: c.name)
def test_each_fault_is_found_by_its_code(
    bases: Callable[[str], Path], tmp_path: Path, one: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = make_broken(bases(one.base), tmp_path / "model")
    one.break_it(patient)
    if one.break_it is disk_that_fails:
        failing_disk(monkeypatch, patient.shards[1].name)
    reference = bases("mixtral") if one.against else None
    report = validate_checkpoint(patient.folder, level=one.level, against=reference, client=one.client)
    found = {spell(f.code, f.severity) for f in report.findings}
    assert found == set(one.expected), [(f.code, f.severity, f.where, f.message) for f in report.findings]


def test_prediction_layers_that_config_json_declares_are_right(bases: Callable[[str], Path], tmp_path: Path) -> None:
    model = make_broken(bases("deepseek_v3"), tmp_path / "stack")
    add_prediction_layer(model)
    model.config(num_nextn_predict_layers=1)
    assert validate_checkpoint(model.folder).findings == ()
    (left,) = validate_checkpoint(make_left_over(model, tmp_path / "twice").folder).findings
    assert (left.code, left.severity) == ("C11", "warning")
    assert "does not name: 3" in left.message


def make_left_over(model: BrokenCheckpoint, folder: Path) -> BrokenCheckpoint:
    """One prediction layer more than declared."""
    more = make_broken(model.folder, folder)
    more.update({n.replace("layers.2.", "layers.3."): t for n, t in more.tensors().items() if "layers.2." in n})
    more.edit("model.layers.3.input_layernorm.weight", lambda t: t + 1)
    return more


def failing_disk(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    read = LocalSource.read

    def failing(self: LocalSource, name: str, start: int, length: int) -> bytes:
        if name == file:
            raise CheckpointError(f"{name}: {os.strerror(errno.EIO)}")
        return read(self, name, start, length)

    monkeypatch.setattr(LocalSource, "read", failing)


def test_every_code_has_a_case() -> None:
    covered = {code.rstrip("!?") for one in CASES for code in one.expected}
    assert covered == {code for code in CODES if code[0] != "G"}  # those in tests/unit/checkpoint/test_gguf_header.py
