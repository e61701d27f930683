"""Surgery on GGUF files, against the bytes and values that the package gguf reads from them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.checkpoint.block_values import FACTORS
from moesurgery.checkpoint.dtypes import BLOCKS
from moesurgery.checkpoint.gguf_files import PROVENANCE_KEY
from moesurgery.stats.criteria import scores, spearman
from moesurgery.stats.imatrix_file import block_sums, imatrix_scores, load_imatrix, neuron_scores, save_imatrix
from moesurgery.stats.statistics_file import stats_for
from moesurgery.validate.run_checks import validate_checkpoint
from tests.conftest import DEMO, ROOT, Result
from tests.gguf_make import EXPERTS, HIDDEN, INTER, LAYERS, header_bytes, keys_of, stored_arrays, write_gguf

Ok = Callable[..., Result]
EXPERT_TENSORS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp", "exp_probs_b")


def values_of_file(*paths: Path) -> dict[str, np.ndarray]:
    """Return all tensors as float32, dequantised by the package gguf."""
    kinds = {name: info.dtype for path in paths for name, info in open_checkpoint(path).tensors.items()}
    arrays = stored_arrays(*paths)
    return {name: dequantize(data, GGMLQuantizationType[kinds[name]]) for name, data in arrays.items()}


def changed_keys(before: Path, after: Path) -> dict[str, object]:
    old, new = keys_of(before), keys_of(after)
    return {k: new.get(k) for k in old.keys() | new.keys() if old.get(k) != new.get(k) and not k.startswith("GGUF.")}


WRITERS_OWN = {"general.name", "general.size_label", PROVENANCE_KEY}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", *sorted(BLOCKS.keys() - {"Q8_0", "Q4_0"})])
def test_drop_takes_the_bytes_of_the_experts_that_stay(kind: str, tmp_path: Path, ok: Ok) -> None:
    if kind in ("Q1_0", "Q2_0", "Q8_1", "Q8_K"):
        pytest.skip("the package gguf has no such tensors")
    model = write_gguf(tmp_path / "m.gguf", kind, bias=True)
    ok("drop-experts", model, "--keep", "{0: [3, 1], 1: [0, 2]}", "-o", tmp_path / "out", "--validate")
    before, after = stored_arrays(model), stored_arrays(tmp_path / "out" / "m.gguf")
    assert list(before) == list(after)
    for name, data in before.items():
        along = any(part in name for part in EXPERT_TENSORS)
        kept = ([1, 3] if ".0." in name else [0, 2]) if along else slice(None)
        assert (after[name] == data[kept]).all()
    changed = changed_keys(model, tmp_path / "out" / "m.gguf")
    assert changed.pop("general.name") == "Tiny (drop-experts)"
    assert str(changed.pop(PROVENANCE_KEY)).endswith("2 of 4 experts dropped in each of 2 layers")
    assert changed == {"qwen3moe.expert_count": 2, "general.size_label": None}
    assert ok("validate", tmp_path / "out", "--against", model).code == 0


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "Q5_1"])
def test_rescale_multiplies_what_experts_say(kind: str, tmp_path: Path, ok: Ok) -> None:
    model = write_gguf(tmp_path / "m.gguf", kind)
    ok("rescale", model, "--top-k", 3, "--scale", 0.5, "-o", tmp_path / "half", "-q")
    out = tmp_path / "half" / "m.gguf"
    before, after = values_of_file(model), values_of_file(out)
    for name, values in before.items():
        factor = 0.5 if "ffn_down_exps" in name else 1
        assert np.abs(after[name] - factor * values).max() <= (2**-24 if kind == "F16" else 0)  # below normal numbers
    assert changed_keys(model, out).keys() - WRITERS_OWN == {"qwen3moe.expert_used_count"}
    told = ok("rescale", model, "--top-k", 3, "--scale", 0.7, "-o", tmp_path / "x").out
    assert ("scale of each block" in told) == (kind in FACTORS)
    inexact = values_of_file(tmp_path / "x" / "m.gguf")["blk.1.ffn_down_exps.weight"]
    wanted = 0.7 * before["blk.1.ffn_down_exps.weight"]
    step = {"F32": 2**-23, "BF16": 2**-8}.get(kind, 2**-10)
    assert np.abs(inexact - wanted).max() <= step * np.abs(wanted).max()


def test_the_factor_goes_where_llama_cpp_reads_one(tmp_path: Path, ok: Ok, cli: Ok) -> None:
    """DeepSeek's architecture has a number for it; NVFP4 has scales per expert; MXFP4 and IQ1_M have nothing exact."""
    keys = {"expert_weights_scale": 2.5, "expert_gating_func": 2}
    model = write_gguf(tmp_path / "d.gguf", "Q4_K", architecture="deepseek2", keys=keys)
    ok("rescale", model, "--top-k", 3, "--scale", 0.5, "-o", tmp_path / "d", "-q")
    changed = changed_keys(model, tmp_path / "d" / "d.gguf")
    assert {k: v for k, v in changed.items() if k not in WRITERS_OWN} == {
        "deepseek2.expert_used_count": 3,
        "deepseek2.expert_weights_scale": 1.25,
    }
    for kind in ("MXFP4", "IQ1_M"):
        model = write_gguf(tmp_path / f"{kind}.gguf", kind)
        refused = cli("rescale", model, "--top-k", 3, "--scale", 0.5, "-o", tmp_path / "no")
        assert refused.code == 2
        assert "--scale none" in refused.err
        ok("rescale", model, "--top-k", 3, "--scale", "none", "-o", tmp_path / kind, "-q")


def test_the_data_free_factor_reads_quantised_embeddings(tmp_path: Path) -> None:
    """The estimate is that of the same values stored in full."""
    quantised = write_gguf(tmp_path / "q.gguf", "Q4_K")
    report = apply(plan_of(open_checkpoint(quantised)), "rescale", top_k=3).steps[0].report
    assert report["rule"] == "router"
    assert all(0.5 < layer["factor"] < 2 and layer["factor"] != 1 for layer in report["layers"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_merges_of_types_that_requantise(kind: str, tmp_path: Path, ok: Ok, cli: Ok) -> None:
    model = write_gguf(tmp_path / "m.gguf", kind)
    ok("merge-experts", model, "--groups", "[[0, 2]]", "-o", tmp_path / "out", "-q")
    before, raw = values_of_file(model), stored_arrays(model)
    after = stored_arrays(tmp_path / "out" / "m.gguf")
    for name in (f"blk.{layer}.{part}.weight" for layer in range(LAYERS) for part in EXPERT_TENSORS[:3]):
        mean = 0.5 * before[name][0] + 0.5 * before[name][2]
        assert (after[name][0] == quantize(mean.astype(np.float32), GGMLQuantizationType[kind])).all()
        assert (after[name][1:] == raw[name][[1, 3]]).all()  # those alone are copied
    refused = cli(
        "merge-experts", write_gguf(tmp_path / "k.gguf", "Q4_K"), "--groups", "[[0, 2]]", "-o", tmp_path / "k"
    )
    assert refused.code == 2
    assert "Q4_K" in refused.err


def test_parts_are_kept_or_cut_anew(tmp_path: Path, ok: Ok) -> None:
    model = write_gguf(tmp_path / "m.gguf", "Q4_0", parts=3)
    whole = stored_arrays(*sorted(tmp_path.glob("*.gguf")))
    ok("drop-experts", model, "--experts", "0", "-o", tmp_path / "out", "--validate", "-q")
    names = [path.name for path in sorted(tmp_path.glob("*.gguf"))]
    parts = sorted((tmp_path / "out").glob("*.gguf"))
    assert [path.name for path in parts] == names
    after = stored_arrays(*parts)
    assert all((after[n] == (d[1:] if any(p in n for p in EXPERT_TENSORS) else d)).all() for n, d in whole.items())
    ok("drop-experts", model, "--experts", "0", "-o", tmp_path / "cut", "--max-shard-size", "200KB", "--validate", "-q")
    cut = sorted((tmp_path / "cut").glob("*.gguf"))
    assert len(cut) > 3
    assert {n: d.tobytes() for n, d in stored_arrays(*cut).items()} == {n: d.tobytes() for n, d in after.items()}
    assert keys_of(cut[1])["split.count"] == len(cut)
    assert "general.architecture" not in keys_of(cut[1])
    ok("rescale", cut[0], "--top-k", 1, "--scale", "none", "-o", tmp_path / "one", "--max-shard-size", "9GB", "-q")
    assert [p.name for p in (tmp_path / "one").glob("*.gguf")] == ["m.gguf"]
    assert "split.count" not in keys_of(tmp_path / "one" / "m.gguf")


def test_the_output_is_whole_or_not_there_and_resumes(tmp_path: Path, ok: Ok) -> None:
    """Killed while it writes, it leaves a working folder, and the same command gives the bytes of an unbroken run."""
    model = write_gguf(tmp_path / "m.gguf", "Q8_0", parts=3)
    ok("drop-experts", model, "--experts", "1", "-o", tmp_path / "whole", "-q")
    command = [
        sys.executable,
        "-m",
        "moesurgery",
        "drop-experts",
        model,
        "--experts",
        "1",
        "-o",
        tmp_path / "out",
        "-q",
    ]
    killer = (
        "import os,signal,sys;import moesurgery.write.shard as s;done=s.write_manifest;calls=[]\n"
        "def once(*a,**k):\n done(*a,**k);calls.append(1)\n"
        " if len(calls)==1: os.kill(os.getpid(),signal.SIGKILL)\n"
        "s.write_manifest=once\nfrom moesurgery.cli import main;sys.argv=sys.argv[1:];main(sys.argv)"
    )
    killed = subprocess.run([sys.executable, "-c", killer, *command[3:], "-j", "1"], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert ok(*command[3:], "--json").json["shards_resumed"] == 1
    for path in (tmp_path / "whole").glob("*.gguf"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_is_not_for_gguf_says_so(tmp_path: Path, cli: Ok) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    text = tmp_path / "t.txt"
    text.write_text("words")
    for command in (
        ("convert", model, "--dtype", "float16"),
        ("upcycle", model, "--experts", 2, "--top-k", 1),
        ("tie-blocks", model, "--group-size", 2),
        ("add-expert", model, "--source", model),
    ):
        refused = cli(*command, "-o", tmp_path / "out")
        assert refused.code == 2
        assert "GGUF" in refused.err
    for command in (("collect", model, "--text", text, "-o", tmp_path / "s"), ("perplexity", model, text)):
        refused = cli(*command)
        assert refused.code == 2
        assert "GGUF" in refused.err or "tokenizer" in refused.err


def test_diff_sees_what_changed(tmp_path: Path, ok: Ok, cli: Ok) -> None:
    model = write_gguf(tmp_path / "m.gguf", "Q4_K")
    ok("rescale", model, "--top-k", 2, "--scale", 0.5, "-o", tmp_path / "out", "-q")
    found = cli("diff", model, tmp_path / "out", "--json").json
    assert {t["name"] for t in found["tensors"]} == {f"blk.{i}.ffn_down_exps.weight" for i in range(LAYERS)}
    assert ok("diff", model, model).code == 0


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics and an imatrix of the demo's trained model, and that model's experts as a GGUF."""
    folder = tmp_path_factory.mktemp("collected")
    from moesurgery.cli import main

    text = ROOT / "examples" / "demo" / "calibration-code.txt"
    options = ["--tokens", "4096", "--window", "256", "-o", folder / "s", "--imatrix", folder / "i.gguf", "-q"]
    assert main(["collect", str(DEMO), "--text", str(text), *map(str, options)]) == 0
    return folder


def test_an_imatrix_ranks_experts_as_collect_does(collected: Path) -> None:
    """Usage is the same number; the size of outputs is an estimate from neurons, and orders experts alike."""
    plan = plan_of(open_checkpoint(DEMO))
    stats = stats_for(collected / "s.safetensors", plan.anatomy, "test")
    imatrix = load_imatrix(collected / "i.gguf")
    assert list(imatrix.datasets) == ["calibration-code.txt"]
    alike = []
    for block in plan.anatomy.blocks:
        measured = stats.blocks[block.where]
        assert imatrix_scores(imatrix, plan, block, "frequency") == scores(measured, "frequency").tolist()
        alike.append(spearman(np.array(imatrix_scores(imatrix, plan, block, "ean")), scores(measured, "ean")))
        squares, _ = block_sums(imatrix, block)
        assert neuron_scores(imatrix, plan, block).shape == squares.shape
    assert np.mean(alike) >= 0.95


def test_an_imatrix_sums_what_experts_read(collected: Path) -> None:
    """Against a forward pass of transformers with hooks of its own: all linear maps have sums, of all tokens."""
    imatrix = load_imatrix(collected / "i.gguf")
    layers = len(plan_of(open_checkpoint(DEMO)).anatomy.blocks)
    names = {name.partition(".")[2].partition(".")[2] for name in imatrix.sums}
    assert {f"attn_{part}.weight" for part in ("q", "k", "v", "output")} <= names
    queries = imatrix.counts["blk.0.attn_q.weight"]
    assert queries.tolist() == [4096]
    chosen = imatrix.counts["blk.0.ffn_down_exps.weight"]
    top_k = json.loads((DEMO / "config.json").read_text())["num_experts_per_tok"]
    assert chosen.sum() == 4096 * top_k
    assert sum("ffn_down_exps" in name for name in imatrix.sums) == layers


def test_drop_by_an_imatrix(tmp_path: Path, ok: Ok, cli: Ok) -> None:
    model = write_gguf(tmp_path / "m.gguf", "Q8_0")
    counts = np.array([[5, 9, 1, 7], [1, 2, 3, 4]], np.float32)
    squares = np.ones((EXPERTS, INTER), np.float32)
    sums = {f"blk.{i}.ffn_down_exps.weight": (squares * counts[i][:, None], counts[i]) for i in range(LAYERS)}
    save_imatrix(tmp_path / "i.gguf", sums, ["text.txt"], 1, 512)
    done = ok(
        "drop-experts", model, "--count", 1, "--by", "frequency", "--stats", tmp_path / "i.gguf", "-o", tmp_path / "a"
    )
    assert "imatrix of text.txt" in done.out
    steps = json.loads((tmp_path / "a" / "moesurgery.json").read_text())["steps"]
    assert [layer["dropped"] for layer in steps[0]["report"]["layers"]] == [[2], [0]]
    down = values_of_file(model)["blk.0.ffn_down_exps.weight"].astype(np.float64)
    plan = plan_of(open_checkpoint(model))
    wanted = np.sqrt(counts[0] * (counts[0] * np.square(down).sum(axis=(1, 2))))
    made = imatrix_scores(load_imatrix(tmp_path / "i.gguf"), plan, plan.anatomy.blocks[0], "ean")
    assert np.allclose(made, wanted)
    refused = cli(
        "drop-experts", model, "--count", 1, "--by", "reap", "--stats", tmp_path / "i.gguf", "-o", tmp_path / "b"
    )
    assert "does not say what reap needs" in refused.err


def test_the_older_format_of_imatrices(tmp_path: Path) -> None:
    """It holds means times the number of chunks, of all experts in a row, and no counts."""
    name, means = b"blk.0.ffn_down_exps.weight", np.arange(EXPERTS * INTER, dtype="<f4")
    path = tmp_path / "i.dat"
    content = (1).to_bytes(4, "little") + len(name).to_bytes(4, "little") + name
    path.write_bytes(content + (3).to_bytes(4, "little") + means.size.to_bytes(4, "little") + (3 * means).tobytes())
    plan = plan_of(open_checkpoint(write_gguf(tmp_path / "m.gguf", "Q8_0")))
    block, imatrix = plan.anatomy.blocks[0], load_imatrix(path)
    squares, counts = block_sums(imatrix, block)
    assert counts is None
    assert np.allclose(squares, means.reshape(EXPERTS, INTER))
    assert len(imatrix_scores(imatrix, plan, block, "msan")) == EXPERTS


@pytest.mark.parametrize("content", [b"", b"GGUF", header_bytes(), b"\xff" * 40, b"\x01\0\0\0\xff\xff\0\0"])
def test_what_is_no_imatrix_says_so(content: bytes, tmp_path: Path, cli: Ok) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    model = write_gguf(tmp_path / "m.gguf")
    refused = cli("drop-experts", model, "--count", 1, "--by", "msan", "--stats", path, "-o", tmp_path / "out")
    assert refused.code == 2
    assert "i.dat" in refused.err


def test_statistics_of_the_original_serve_its_gguf(collected: Path, tmp_path: Path, ok: Ok) -> None:
    """Layers go by their numbers, so what is dropped is what would be dropped of the original."""
    config = json.loads((DEMO / "config.json").read_text())
    count = config.get("num_local_experts", config.get("num_experts"))
    model = tmp_path / "demo.gguf"
    _as_gguf(model, count, config["num_experts_per_tok"], config["num_hidden_layers"])
    options = ("--count", 2, "--by", "reap-sum", "--stats", collected / "s.safetensors", "--json")
    dropped = [
        [
            layer["dropped"]
            for layer in ok("drop-experts", m, *options, "-o", tmp_path / o).json["steps"][0]["report"]["layers"]
        ]
        for m, o in ((DEMO, "a"), (model, "b"))
    ]
    assert dropped[0] == dropped[1]
    assert validate_checkpoint(tmp_path / "b").findings == ()


def test_a_plan_for_the_original_serves_its_gguf(tmp_path: Path, ok: Ok) -> None:
    """Layers and experts go by their numbers, and it is said that nothing more is known."""
    layers = {f"model.layers.{i}": {"keep": [1, 3 - i], "experts": EXPERTS} for i in range(LAYERS)}
    plan = {
        "format": "moesurgery plan 1",
        "version": "0",
        "operation": "drop-experts",
        "criterion": {},
        "layers": layers,
    }
    plan["model"] = {"name": "original", "model_type": "qwen3_moe", "digest": "0" * 64, "routers": "0" * 64}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    model = write_gguf(tmp_path / "m.gguf", "Q4_0")
    done = ok("drop-experts", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    assert "by their numbers" in done.err
    before, after = (stored_arrays(path)["blk.1.ffn_up_exps.weight"] for path in (model, tmp_path / "out" / "m.gguf"))
    assert (after == before[[1, 2]]).all()


def _as_gguf(path: Path, experts: int, top_k: int, layers: int) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, layers),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, HIDDEN),
        (writer.add_head_count, 4),
        (writer.add_expert_count, experts),
        (writer.add_expert_used_count, top_k),
    ):
        add(value)
    writer.add_tensor("token_embd.weight", np.ones((2, HIDDEN), np.float32))
    rng = np.random.default_rng(2)
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", rng.random((experts, HIDDEN), np.float32))
        for part in EXPERT_TENSORS[:3]:
            writer.add_tensor(f"blk.{layer}.{part}.weight", rng.random((experts, HIDDEN, HIDDEN), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
