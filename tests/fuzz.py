"""Inputs without end for everything that reads what strangers wrote: `python -m tests.fuzz 10000 [TARGET…]`.

Every file that is read gets its share: headers, configs and tensors of real families, index, recipes, merge recipes,
statistics, repairs, fits, adapters, provenance, tokenizers, calibration text. A reader may refuse in its own words and
nothing else: no other exception, nothing that computes for longer than `SECONDS`, no more memory than `LIMIT`.
Input I of a target is the same in every run; `python -m tests.fuzz I:I+1 TARGET` makes that one again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from moesurgery.checkpoint.checkpoint import checkpoint_of, open_checkpoint
from moesurgery.checkpoint.file_reader import FileReader
from moesurgery.checkpoint.gguf_header import scan_gguf_header
from moesurgery.checkpoint.header import scan_header
from moesurgery.checkpoint.scan import scan_checkpoint
from moesurgery.checkpoint.source import LocalSource
from moesurgery.checkpoint.strict_json import write_json
from moesurgery.cli.inspect import _facts, tensor_groups
from moesurgery.count.params import count_params
from moesurgery.count.prediction import prediction_part
from moesurgery.errors import CheckpointError, SurgeryError
from moesurgery.families.anatomy import MoeBlock
from moesurgery.families.recognition import recognise
from moesurgery.forward.text_documents import documents
from moesurgery.forward.text_windows import load_tokenizer, start_token, token_count
from moesurgery.lora.apply import _Names, adapted
from moesurgery.merge.chat_templates import chat_template
from moesurgery.merge.merge_recipe import parse_merge_recipe
from moesurgery.merge.recipe.tokenizer_config import TokenizerConfig
from moesurgery.merge.tokenizer_union import MergedTokenizer
from moesurgery.moe.canonical_names import CanonicalTensors
from moesurgery.plan.plan import Plan, plan_of
from moesurgery.recipe.reader import parse_recipe
from moesurgery.recipe.registry import apply
from moesurgery.stats.imatrix_file import load_imatrix
from moesurgery.validate.check import CHECKS
from moesurgery.validate.check_architecture import check_architecture
from moesurgery.validate.pickle_scan import find_pickle
from moesurgery.validate.report_formats import BY_SUFFIX, FORMATS
from moesurgery.validate.run_checks import validate_checkpoint
from moesurgery.write.card import card_text, provenance
from moesurgery.write.shard_layout import companion_tasks, shard_tasks
from tests.fuzz_make import WIDTH, as_json, changed, changed_json, changed_tensors, damaged, safetensors, value
from tests.gguf_make import KEYS, header_bytes
from tests.gguf_make import TENSORS as GGUF_TENSORS

LIMIT = 1 << 30  # bytes of memory, the interpreter and its libraries included
SECONDS = 10
ROOT = Path(__file__).parents[1]
_SCRATCH = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
FOLDER, BASE, DENSE = (Path(_SCRATCH.name, name) for name in ("model", "base", "dense"))
LAYERS, EXPERTS, HIDDEN, INTER, WORDS = 2, 4, 4, 8, 12
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "vocab_size": WORDS,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "quantization_config": None,
    "layer_tie_map": None,
    "text_config": None,
    "rope_parameters": {"rope_theta": 1.0},
    "dtype": "float32",
}
TOKENIZER = {
    "version": "1.0",
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3}, "merges": [["a", "b"]]},
    "added_tokens": [{"id": 4, "content": "</s>", "special": True}, {"id": 5, "content": "<s>", "special": True}],
}
SETTINGS = {
    "eos_token": "</s>",
    "bos_token": {"content": "<s>"},
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    "added_tokens_decoder": {"4": {"content": "</s>"}},
}
TEMPLATE = b"{% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
SHARD = "model-00001-of-00001.safetensors"
Rng = random.Random


def model_tensors() -> dict[str, tuple[str, list[int]]]:
    shapes = {"model.embed_tokens.weight": [WORDS, HIDDEN], "lm_head.weight": [WORDS, HIDDEN]}
    shapes["model.norm.weight"] = [HIDDEN]
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        shapes |= {f"{layer}self_attn.{p}_proj.weight": [HIDDEN, HIDDEN] for p in "qkvo"}
        shapes |= {f"{layer}{norm}_layernorm.weight": [HIDDEN] for norm in ("input", "post_attention")}
        shapes[f"{layer}block_sparse_moe.gate.weight"] = [EXPERTS, HIDDEN]
        for e in range(EXPERTS):
            shapes |= {f"{layer}block_sparse_moe.experts.{e}.{w}.weight": [INTER, HIDDEN] for w in ("w1", "w3")}
            shapes[f"{layer}block_sparse_moe.experts.{e}.w2.weight"] = [HIDDEN, INTER]
    return {name: ("F32", shape) for name, shape in shapes.items()}


def floats(size: int) -> bytes:
    import numpy as np

    return np.random.default_rng(0).standard_normal(size // 4).astype("<f4").tobytes()


TENSORS = model_tensors()
MODEL, _ = safetensors(TENSORS, fill=floats)
INDEX = {"metadata": {"total_size": 4 * len(MODEL)}, "weight_map": dict.fromkeys(TENSORS, SHARD)}
BLOCKS = [f"model.layers.{i}" for i in range(LAYERS)]


def dense_files() -> dict[str, bytes]:
    """Return a Llama of the same sizes."""
    config = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    shapes = {name: of for name, of in TENSORS.items() if "block_sparse_moe" not in name}
    for layer in BLOCKS:
        shapes |= {f"{layer}.mlp.{p}_proj.weight": ("F32", [INTER, HIDDEN]) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = ("F32", [HIDDEN, INTER])
    return {"config.json": as_json(config), "model.safetensors": safetensors(shapes, fill=floats)[0]}


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Have exactly these files in a folder."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def checkpoint_files(**others: bytes) -> dict[str, bytes]:
    return {"config.json": as_json(CONFIG), "model.safetensors": MODEL, "tokenizer.json": as_json(TOKENIZER), **others}


def shown(plan: Plan) -> None:
    """What is told of a plan before, and written beside, its tensors."""
    tasks = [*shard_tasks(plan), *companion_tasks(plan)]
    write_json(provenance(plan, [{"file": task.name} for task in tasks]))
    write_json(plan.config)
    card_text(plan)


def computed(plan: Plan) -> None:
    """The values of a plan's small tensors."""
    reader = FileReader()
    try:
        for expr in plan.tensors.values():
            if expr.numel < 4096:
                expr.evaluate(0, expr.numel, reader)
    finally:
        reader.close()


def validated(level: Any, **options: Any) -> None:
    report = validate_checkpoint(FOLDER, level=level, **options)
    for form in (*FORMATS.values(), *BY_SUFFIX.values()):
        assert all(c.isprintable() or c in "\n\t" for c in form(report))


# Headers, checkpoints, configs


def header(rng: Rng) -> None:
    good = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    good["b"] = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}
    text = as_json(changed(rng, good)) if rng.random() < 0.6 else as_json(value(rng))
    length = len(text) if rng.random() < 0.8 else rng.choice([0, 1, 2**63, 2**64 - 1, 10**8, rng.randrange(999)])
    content = length.to_bytes(8, "little") + text + bytes(rng.choice([0, 8, 16, 24]))
    content = damaged(rng, content) if rng.random() < 0.3 else content
    found = scan_header("x.safetensors", len(content), lambda start, n: content[start : start + n])
    if not any(problem.fatal for problem in found.problems):
        assert sum(t.nbytes for t in found.tensors) + found.data_start == len(content)
    find_pickle(len(content), lambda start, n: content[start : start + n])


def gguf(rng: Rng) -> None:
    """A header with wrong numbers, texts and bytes, of a model or of an imatrix; one in eight through everything."""
    keys = [(k, t, rng.choice([0, 1, 2, 3, 2**31]) if t == 4 and rng.random() < 0.2 else v) for k, t, v in KEYS]
    if rng.random() < 0.3:
        keys[rng.randrange(len(keys))] = (rng.choice(["", "x", "general.alignment"]), 4, rng.choice([0, 3, 32, 2**31]))
    tensors = [list(tensor) for tensor in GGUF_TENSORS]
    if rng.random() < 0.5:
        tensor = rng.choice(tensors)
        at = rng.randrange(4)
        sizes = [(2**63, 2), (32,), (), (0, 32), (32,) * 9]
        tensor[at] = rng.choice([["", "x" * 99, tensor[0][:-1]], sizes, [1, 2, 4, 99], [0, 31, 2**40]][at])
    counts = rng.choice([(None, None)] * 6 + [(2**63, None), (None, 2**32), (9, 9), (0, 0)])
    content = header_bytes(keys, tensors, counts=counts, version=rng.choice([3, 3, 3, 2, 1, 2**32 - 1]))
    content = damaged(rng, content) if rng.random() < 0.6 else content
    found = scan_gguf_header("x.gguf", len(content), lambda start, n: content[start : start + n])
    if not found.problems:
        assert all(t.start + t.nbytes <= len(content) for t in found.tensors)
    if rng.random() < 0.125:
        write(FOLDER, {"x.gguf": content})
        for form in FORMATS.values():
            form(validate_checkpoint(FOLDER / "x.gguf", level="config"))
        with suppress(SurgeryError):
            load_imatrix(FOLDER / "x.gguf")
        shown(apply(plan_of(open_checkpoint(FOLDER / "x.gguf")), "drop-experts", count=1, by="random"))


def checkpoint(rng: Rng) -> None:
    files = {"config.json": as_json(CONFIG), "model.safetensors.index.json": as_json(INDEX), SHARD: MODEL}
    kinds: dict[str, Any] = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, "tokenizer.json": TOKENIZER}
    kinds |= {"tokenizer_config.json": SETTINGS, "generation_config.json": {"eos_token_id": [1], "bos_token_id": 0}}
    for file in rng.sample([*kinds, SHARD, "chat_template.jinja"], 2):
        if file in kinds:
            files[file] = changed_json(rng, kinds[file])
        else:
            files[file] = damaged(rng, MODEL if file == SHARD else TEMPLATE)
    write(FOLDER, files)
    with suppress(SurgeryError):
        checkpoint_of(scan_checkpoint(LocalSource(FOLDER)))
    validated("values")


FAMILIES: list[dict[str, Any]] = [{"config": CONFIG, "tensors": TENSORS}]


def family(rng: Rng) -> None:
    """A real family's config and tensors, one of them changed, through all that reads headers and every operation."""
    good = rng.choice(FAMILIES)
    both = rng.random()
    config = changed(rng, good["config"]) if both < 0.7 else good["config"]
    tensors = changed_tensors(rng, good["tensors"]) if both > 0.5 else good["tensors"]
    content, size = safetensors(tensors)
    write(FOLDER, {"config.json": as_json(config), "model.safetensors": content})
    os.truncate(FOLDER / "model.safetensors", size)
    validated("config")
    model = open_checkpoint(FOLDER)
    broken: list[tuple[MoeBlock, CheckpointError]] = []
    anatomy = recognise(model.config, model.tensors, broken)
    [group.as_json() for group in tensor_groups(anatomy, model.tensors)]
    write_json(_facts(anatomy, model.tensors, prediction_part(anatomy, model.tensors)))
    start_token(model.config)
    token_count(model.config)
    plan = plan_of(model)
    with suppress(SurgeryError):
        count_params(plan.anatomy, plan.tensors, rng.choice([None, 1, 99]))
    operation, parameters = rng.choice(OPERATIONS)
    shown(apply(plan, operation, **parameters))


OPERATIONS: list[tuple[str, dict[str, Any]]] = [
    *(("rescale", {"top_k": k, "scale": s}) for k in (1, 3) for s in ("router", "published", "none", 1.5)),
    *(("drop-experts", {"count": 1, "by": b}) for b in ("router-norm", "random")),
    *(("merge-experts", {"to": 2}), ("merge-experts", {"to": 1, "router": "lse", "align": "weights"})),
    *(("add-expert", {"source": str(BASE)}), ("add-expert", {"source": str(FOLDER)}), ("to-dense", {})),
    *(("tie-blocks", {"group_size": 2}), ("convert", {"dtype": "float16"}), ("convert", {"dequantize": True})),
    *(("upcycle", {"experts": 2, "top_k": 1, "proof": False}), ("convert", {"layout": "fused"})),
]


# Recipes


def texts(rng: Rng, folder: str) -> str:
    """Return a recipe that ships, of models that are here, with something wrong in it."""
    text = rng.choice(RECIPES[folder])
    if rng.random() < 0.7:
        documents = list(yaml.safe_load_all(text))
        documents[0] = changed(rng, documents[0])
        try:
            return yaml.safe_dump_all(documents, sort_keys=False)
        except (yaml.YAMLError, TypeError):
            return text
    if rng.random() < 0.2:
        return "".join(rng.choices("&*!|>-?:,[]{}#'\"\\ \n\tabc01.e~=<%@`", k=rng.randrange(200)))
    return damaged(rng, text.encode()).decode("utf-8", "surrogateescape")


def _shipped(folder: Path) -> list[str]:
    """Return recipes with the model that is here in place of those that they name."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        documents = list(yaml.safe_load_all(path.read_text()))
        names: list[str] = []
        model = DENSE if "upcycle" in path.name else BASE
        found.append(yaml.safe_dump_all([_here(d, model, names) for d in documents], sort_keys=False))
    return found


def _here(whole: Any, model: Path, names: list[str], key: str = "") -> Any:
    """Put `model`, called by as many names as there are models, in place of those that a recipe names."""
    if isinstance(whole, dict):
        here = {name: _here(inner, model, names, name) for name, inner in whole.items()}
        return {**here, "proof": False, "router": "random"} if key == "upcycle" else here
    if isinstance(whole, list):
        return [0, LAYERS] if key == "layer_range" else [_here(inner, model, names, key) for inner in whole]
    if key not in ("model", "base_model", "source_model", "sources") or not isinstance(whole, str) or "/" not in whole:
        return whole
    if whole not in names:
        names.append(whole)
    return f"{model}{'/.' * names.index(whole)}"


RECIPES = {"operations": _shipped(ROOT / "recipes"), "merge": _shipped(ROOT / "recipes" / "merge")}


def recipe(rng: Rng) -> None:
    shown(parse_recipe(texts(rng, "operations"), "fuzz.yaml").plan())


def merge(rng: Rng) -> None:
    plan = parse_merge_recipe(texts(rng, "merge"), "fuzz.yaml").plan()
    shown(plan)
    if rng.random() < 0.2:
        computed(plan)


# Files of measurements

ABOUT = {"model_type": "mixtral", "top_k": 2, "other_top_k": [1, 3], "blocks": BLOCKS, "recon": [3], "unread": {}}
ABOUT |= {"every_expert": True, "text": [{"file": "a.txt", "sha256": ""}], "tokens": 9, "kind": "down"}


def statistics_tensors() -> dict[str, tuple[str, list[int]]]:
    e = EXPERTS
    sums = {name: [2, e] for name in ("count", "gate", "gate2", "probability", "norm", "gate_norm", "peak")}
    sums |= {"tokens": [2], "mass": [2], "entropy": [2], "gram": [2, e, e], "logits": [2, e, e]}
    for k in (1, 3):
        sums |= {f"gram@{k}": [2, e, e], f"gate2@{k}": [2, e], f"mass@{k}": [2], f"cross@{k}": [2, e]}
    found = {name: ("F64", shape) for name, shape in sums.items()}
    found |= {"recon@3": ("F64", [e])}
    found |= {name: ("F32", [e, HIDDEN]) for name in ("output", "output_all", "gated_all")}
    return {f"{where}/{name}": of for where in BLOCKS for name, of in found.items()}


STATISTICS = statistics_tensors()


def _positive(size: int) -> bytes:
    import numpy as np

    # Of these, two together are a positive number, too.
    return np.random.default_rng(1).uniform(0.5, 2, size // 4 + 1).astype("<f4").tobytes()[:size]


def statistics(rng: Rng) -> None:
    about = changed_json(rng, ABOUT) if rng.random() < 0.6 else as_json(ABOUT)
    tensors = changed_tensors(rng, STATISTICS) if rng.random() < 0.5 else STATISTICS
    metadata = {"format": "moesurgery statistics 1", "about": about.decode("utf-8", "replace")}
    content, _ = safetensors(tensors, metadata, fill=rng.choice([_positive, _positive, bytes, rng.randbytes]))
    path = FOLDER.with_name("s.safetensors")
    path.write_bytes(damaged(rng, content) if rng.random() < 0.1 else content)
    uses: list[tuple[str, dict[str, Any]]] = [("rescale", {"top_k": k, "scale": "measured"}) for k in (1, 3)]
    uses += [("rescale", {"top_k": 1, "scale": "measured-expert"}), ("merge-experts", {"to": 2})]
    uses += [("drop-experts", {"count": 1, "by": by}) for by in ("recon", "reap", "frequency")]
    operation, parameters = rng.choice(uses)
    shown(apply(plan_of(open_checkpoint(BASE)), operation, **parameters, stats=str(path)))


REPAIR = {
    "format": "moesurgery refit 1",
    "kind": "down",
    "tokens": 9,
    "layers": [
        {
            "layer": where,
            "factors": None if i else [1.5] * EXPERTS,
            "file": "layer-001.safetensors" if i else None,
            "tokens": [3] * EXPERTS,
            "skipped": [],
            "ridges": [0.1],
            "error_before": 0.5,
            "error_after": 0.25,
            "error_held_out": None if i else 0.3,
        }
        for i, where in enumerate(BLOCKS)
    ],
}
MATRICES = {f"{e}.down": ("F32", [HIDDEN, INTER]) for e in range(EXPERTS)} | {"0.gate": ("F32", [INTER, HIDDEN])}


def repair(rng: Rng) -> None:
    tensors = changed_tensors(rng, MATRICES) if rng.random() < 0.5 else MATRICES
    document = changed_json(rng, REPAIR) if rng.random() < 0.7 else as_json(REPAIR)
    write(FOLDER, {"refit.json": document, "layer-001.safetensors": safetensors(tensors, fill=bytes)[0]})
    plan = apply(plan_of(open_checkpoint(BASE)), "refit", repair=str(FOLDER))
    shown(plan)
    computed(plan)


FIT = {"align": "activations", "router": "lse", "text": [{"file": "a"}]}
FIT |= {"blocks": {where: {"groups": [[0, 1], [2, 3]], "dominant": [0, 2]} for where in BLOCKS}}
ORDERS = {f"{where}/order/{e}": ("I64", [INTER]) for where in BLOCKS for e in range(EXPERTS)}
ORDERS |= {f"{where}/router": ("F32", [2, HIDDEN]) for where in BLOCKS}


def fit(rng: Rng) -> None:
    import numpy as np

    def data(size: int) -> bytes:
        order = np.arange(INTER, dtype="<i8").tobytes()
        return (order * (size // len(order) + 1))[:size]

    about = changed_json(rng, FIT) if rng.random() < 0.6 else as_json(FIT)
    metadata = {"format": "moesurgery fit 1", "about": about.decode("utf-8", "replace")}
    tensors = changed_tensors(rng, ORDERS) if rng.random() < 0.5 else ORDERS
    path = FOLDER.with_name("f.safetensors")
    path.write_bytes(safetensors(tensors, metadata, fill=rng.choice([data, bytes, rng.randbytes]))[0])
    values: dict[str, Any] = {"groups": [[0, 1], [2, 3]], "weights": "equal", "fit": str(path)}
    plan = apply(plan_of(open_checkpoint(BASE)), "merge-experts", **values, align="activations", router="lse")
    shown(plan)
    computed(plan)


# What stands beside a model

ADAPTER = {
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": False,
    "bias": "none",
    "base_model_name_or_path": "a/b",
    "alpha_pattern": {"layers.0.*": 8},
    "rank_pattern": {"q_proj": 2},
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
}
_AT = "base_model.model.model.layers"
FACTORS = {
    **{f"{_AT}.0.self_attn.{p}_proj.lora_A.weight": ("F32", [2, HIDDEN]) for p in "qv"},
    **{f"{_AT}.0.self_attn.{p}_proj.lora_B.weight": ("F32", [HIDDEN, 2]) for p in "qv"},
    f"{_AT}.1.mlp.experts.lora_A.weight": ("F32", [2 * EXPERTS, INTER]),
    f"{_AT}.1.mlp.experts.lora_B.weight": ("F32", [HIDDEN, 2 * EXPERTS]),
    f"{_AT}.1.block_sparse_moe.experts.0.w1.lora_A.weight": ("F32", [2, HIDDEN]),
    f"{_AT}.1.block_sparse_moe.experts.0.w1.lora_B.weight": ("F32", [INTER, 2]),
    "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", [2, WORDS]),
    "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", [HIDDEN, 2]),
}


def adapter(rng: Rng) -> None:
    tensors = changed_tensors(rng, FACTORS) if rng.random() < 0.6 else FACTORS
    tensors = (
        dict(rng.sample(sorted(tensors.items()), rng.randrange(len(tensors) + 1))) if rng.random() < 0.3 else tensors
    )
    config = changed_json(rng, ADAPTER) if rng.random() < 0.7 else as_json(ADAPTER)
    write(FOLDER, {"adapter_config.json": config, "adapter_model.safetensors": safetensors(tensors, fill=bytes)[0]})
    plan = adapted(plan_of(open_checkpoint(BASE)), str(FOLDER))
    shown(plan)
    if rng.random() < 0.3:
        computed(plan)


RECORDS: list[Any] = []


def record(rng: Rng) -> None:
    """A provenance record, replayed on the model that it names."""
    if not RECORDS:
        for text in (
            "model: {}\nsteps: [rescale: {{top_k: 1, scale: 1.5}}]",
            "model: {}\nsteps: [drop-experts: {{count: 1}}]",
        ):
            RECORDS.append(provenance(parse_recipe(text.format(BASE)).plan(), [{"file": "config.json", "sha256": ""}]))
        merged = f"merge_method: linear\nmodels: [{{model: {BASE}}}, {{model: {BASE}}}]\nparameters: {{weight: 1}}"
        RECORDS.append(provenance(parse_merge_recipe(merged.replace(f"{BASE}}}]", f"{BASE}/.}}]")).plan(), []))
    write(FOLDER, checkpoint_files(**{"moesurgery.json": changed_json(rng, rng.choice(RECORDS))}))
    validated("container", against=rng.choice([[str(BASE)], [f"base={BASE}"], [str(BASE), f"x={BASE}"]]))


def tokenizer(rng: Rng) -> None:
    """A tokenizer and its templates, checked, united with another's, and loaded."""
    good = (
        dict(TOKENIZER)
        if rng.random() < 0.7
        else {**TOKENIZER, "model": {"type": "Unigram", "vocab": [["a", 0.5], ["b", -1]]}}
    )
    files = {"tokenizer.json": changed_json(rng, good) if rng.random() < 0.8 else as_json(good)}
    files["tokenizer_config.json"] = changed_json(rng, SETTINGS)
    files["special_tokens_map.json"] = changed_json(rng, {"eos_token": "</s>"})
    files["generation_config.json"] = changed_json(rng, {"eos_token_id": [1, 2], "bos_token_id": 0})
    if rng.random() < 0.5:
        files["chat_template.jinja"] = damaged(rng, TEMPLATE)
    write(FOLDER, checkpoint_files(**files))
    validated("config")
    pair = {
        str(path): CanonicalTensors(plan_of(open_checkpoint(path)), path.name) for path in rng.sample([BASE, FOLDER], 2)
    }
    chat_template("auto", pair)
    if rng.random() < 0.1:
        with suppress(SurgeryError):
            load_tokenizer(open_checkpoint(FOLDER))
    made = MergedTokenizer(TokenizerConfig(rng.choice(["union", "base", str(FOLDER)]), {}, rng.choice([None, 8])), pair)
    made.files()
    name = "model.embed_tokens.weight"
    made.resized({model: parts.plan.tensors[name] for model, parts in pair.items() if name in parts.plan.tensors})


LINES: list[Any] = [
    {"text": "a b"},
    {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]},
    [1, 2, 3],
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "[]"},
    {"prompt": "a", "completion": "b"},
]


def text(rng: Rng) -> None:
    path = FOLDER.with_name(rng.choice(["t.jsonl", "t.txt"]))
    path.write_bytes(b"\n".join(changed_json(rng, rng.choice(LINES)) for _ in range(rng.randrange(4))))
    for document, where in documents(str(path)):
        assert where.startswith(str(path))
        assert not isinstance(document, list) or min(document, default=0) >= 0


TARGETS: dict[str, Callable[[Rng], None]] = {
    made.__name__: made
    for made in (
        header,
        gguf,
        checkpoint,
        family,
        recipe,
        merge,
        statistics,
        repair,
        fit,
        adapter,
        record,
        tokenizer,
        text,
    )
}


def peak_bytes() -> int:
    """Return the most memory that this process had: `ru_maxrss` would be that of the one that started it, if larger."""
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run(name: str, numbers: range) -> int:
    """Run inputs of a target; return how many ended in anything but a refusal, and print each kind once."""
    wrong: dict[str, int] = {}
    slowest, refused, begun, memory = 0.0, 0, time.monotonic(), peak_bytes()
    for number in numbers:
        before = time.process_time()
        kind = ""
        try:
            TARGETS[name](random.Random(f"{name} {number}"))
        except SurgeryError:
            refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "moesurgery" in f.filename] or [None]
            place = f"{frames[-1].filename.rpartition('moesurgery/')[2]}:{frames[-1].lineno}" if frames[-1] else "?"
            kind = f"{type(error).__name__} at {place}: {str(error)[:100]!r}"
            if kind.partition(": ")[0] not in wrong:
                print(f"--- {name} {number}: {kind}", "".join(traceback.format_tb(error.__traceback__)[-6:]), sep="\n")
        took = time.process_time() - before
        slowest = max(slowest, took)
        if took > SECONDS:
            kind = f"{number} took {took:.0f} s"
            print(f"--- {name} {kind}")
        if kind:
            key = kind.partition(": ")[0]
            wrong[key] = wrong.get(key, 0) + 1
    peak = peak_bytes()
    print(
        f"{name}: {len(numbers)} inputs, {refused} refused, {sum(wrong.values())} wrong, slowest {slowest:.2f} s,"
        f" {time.monotonic() - begun:.0f} s in all, peak {peak >> 20} MB",
        flush=True,
    )
    return sum(wrong.values()) + (peak - memory > LIMIT)


def main(count: str, *names: str) -> int:
    first, _, last = count.rpartition(":")
    numbers = range(int(first or 0), int(last))
    resource.setrlimit(resource.RLIMIT_AS, (8 * LIMIT, 8 * LIMIT))  # a swelling input ends before the machine does
    # What transformers does with a config is its own affair, and far too slow to be done so often.
    CHECKS[:] = [check for check in CHECKS if check.function is not check_architecture]
    _Names._in_memory = property(lambda self: {})  # type: ignore[assignment,method-assign]
    write(BASE, checkpoint_files())
    write(DENSE, dense_files())
    warnings.simplefilter("ignore")
    if families := os.environ.get("FUZZ_FAMILIES"):
        FAMILIES.extend(json.loads(Path(families).read_text()))
    for name in {w for entry in FAMILIES for w, _ in entry["tensors"].values()}:
        WIDTH.setdefault(name, 1)
    return sum(run(name, numbers) for name in names or TARGETS)


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
