"""Our pass over a model against transformers' plain forward, on the same device and tokens, in one run.

    python benchmarks/engine.py FOLDER [WHAT…] [--device cuda] [--dtype bfloat16] [--tokens 49152]
    taskset -c 0,1 python benchmarks/engine.py FOLDER parity collect --shape tiny --tokens 8192    # for a processor
    python benchmarks/engine.py FOLDER --shape large --layers 8 --device cuda --dtype bfloat16 --tokens 1000000

Writes a random Qwen3-MoE into FOLDER: `small` has 775 M parameters (128 experts, top-8, 10 layers), `tiny` 28 M
(64 experts), `large` layers of 6 GB (256 experts in FP8 with a scale per 128 x 128 block), `medium` layers of 1.5 GB.
Then it times, after a pass to warm up: `forward` (weights in memory, and read again in each pass), `load` (a layer's
way to the device), `collect`, `probe`, `refit` (scalar and down), `devices` (all GPUs against one: windows shared, for
each of `--tokens`), `pipeline` (layers spread over all GPUs, `--memory` of each), `parity` (our pass and transformers'
in turn, several rounds). transformers is not run on `medium` and `large`, which need not fit into memory.
docs/performance.md has figures. Read the ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moesurgery import apply, open_checkpoint, plan_of
from moesurgery.fitting.ablation import ablate, ablate_over
from moesurgery.fitting.collector import collect, collect_over
from moesurgery.fitting.layer_fit import RepairOptions, fit_layers
from moesurgery.forward import engine as engine_module
from moesurgery.forward.device_threads import side_by_side
from moesurgery.forward.engine import Engine
from moesurgery.forward.loss import losses_over
from moesurgery.forward.memory_budget import parse_bytes
from moesurgery.forward.text_windows import Domain
from moesurgery.forward.tokens import Tokens, shared_out
from moesurgery.plan.plan import Plan

VOCABULARY, WINDOW, HEAD = 4096, 512, 64
SHAPES = {
    "tiny": {"hidden": 256, "width": 64, "experts": 64, "layers": 8, "heads": 4, "kv": 2},
    "small": {"hidden": 768, "width": 256, "experts": 128, "layers": 10, "heads": 12, "kv": 4},
    "medium": {"hidden": 5120, "width": 1536, "experts": 64, "layers": 8, "heads": 64, "kv": 8},
    "large": {"hidden": 5120, "width": 1536, "experts": 256, "layers": 8, "heads": 64, "kv": 8},
}
WHAT = ("forward", "load", "collect", "probe", "refit", "devices", "pipeline", "parity")
ROUNDS = 5  # of `parity`
BLOCK = 128


def write(folder: Path, hidden: int, width: int, experts: int, layers: int, heads: int, kv: int, *, fp8: bool) -> None:
    """Write a random Qwen3-MoE, a shard per layer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    }
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}

    def random(*shape: int, std: float | None = None) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return (values * (std or shape[-1] ** -0.5)).to(torch.bfloat16).cpu()

    def matrix(tensors: dict[str, torch.Tensor], name: str, out: int, width: int) -> None:
        if not fp8:
            tensors[name] = random(out, width)
            return
        values = torch.randn(out, width, generator=generator, device=device).mul_(32).to(torch.float8_e4m3fn)
        tensors[name] = values.cpu()
        tensors[f"{name}_scale_inv"] = torch.full((out // BLOCK, width // BLOCK), width**-0.5 / 32)

    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for layer in range(-1, layers):
        tensors = {"model.embed_tokens.weight": random(VOCABULARY, hidden, std=1.0)}
        tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if layer >= 0:
            base = f"model.layers.{layer}."
            tensors = {
                f"{base}{n}_layernorm.weight": torch.ones(hidden).bfloat16() for n in ("input", "post_attention")
            }
            tensors |= {f"{base}self_attn.{n}_norm.weight": torch.ones(HEAD).bfloat16() for n in "qk"}
            for name, out in (("q", heads * HEAD), ("k", kv * HEAD), ("v", kv * HEAD)):
                matrix(tensors, f"{base}self_attn.{name}_proj.weight", out, hidden)
            matrix(tensors, f"{base}self_attn.o_proj.weight", hidden, heads * HEAD)
            tensors[f"{base}mlp.gate.weight"] = random(experts, hidden)
            for e in range(experts):
                for name, out, inner in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
                    matrix(tensors, f"{base}mlp.experts.{e}.{name}_proj.weight", out, inner)
        file = f"model-{layer + 2:05}-of-{layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    total = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


class Table:
    """What was measured, as lines and, at the end, as JSON."""

    def __init__(self, tokens: int, device: str) -> None:
        self.tokens, self.device, self.base = tokens, device, 0.0
        self.rows: dict[str, float] = {}

    def time(self, name: str, job: Callable[[], Any], rounds: int = 1, work: int | None = None) -> float:
        """Run a job; print the least seconds it took, and tokens per second."""
        seconds = min(self._once(job) for _ in range(rounds))
        rate = (work or self.tokens) / seconds
        self.rows[name] = rate
        ratio = f"{rate / self.base:8.3f} of transformers' best" if self.base else ""
        print(f"{name:44} {seconds:9.3f} s {rate:12,.0f} tokens/s {ratio}", flush=True)
        return rate

    def _once(self, job: Callable[[], Any]) -> float:
        self._wait()
        began = time.perf_counter()
        job()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            for i in range(torch.cuda.device_count()):
                torch.cuda.synchronize(i)


def parity(engine: Engine, model: Path, ids: torch.Tensor, device: str, dtype: str) -> None:
    """Print the seconds of our pass and of transformers', run in turn, so that other work on the machine hits both."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), experts_implementation="grouped_mm"
    )
    loaded = loaded.to(device).eval()

    def theirs(windows: int) -> None:
        with torch.no_grad():
            for part in ids.split(windows):
                loaded(input_ids=part.to(device), use_cache=False)

    def ours(windows: int) -> None:
        engine_module.BATCH_TOKENS = windows * WINDOW
        engine.run(Tokens(ids), logits=lambda *seen: None)

    jobs = {(name, b): job for b in (1, 2, 4, 8) for name, job in (("transformers", theirs), ("ours", ours))}
    usual = engine_module.BATCH_TOKENS
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in jobs}
    for _ in range(ROUNDS + 1):  # the first warms up
        for (name, windows), job in jobs.items():
            began = time.perf_counter()
            job(windows)
            seconds[name, windows].append(time.perf_counter() - began)
    engine_module.BATCH_TOKENS = usual
    for (name, windows), runs in seconds.items():
        print(f"{name:14} {windows} windows: median {statistics.median(runs[1:]):.3f} s, least {min(runs[1:]):.3f} s")


def all_devices(device: str) -> list[str]:
    """Return all GPUs; to try this script, the processor twice."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device.startswith("cuda") else ["cpu", "cpu"]


def over_devices(
    table: Table, plan: Plan, edited: Plan, tokens: Tokens, dtype: str, keep: int | None, kinds: tuple[str, ...]
) -> None:
    """Time what runs a model on all GPUs, windows shared, against one. A repair has one model on each half of them."""
    devices = all_devices(table.device)
    engines = [Engine(plan, device=device, dtype=dtype, keep=keep) for device in devices]
    pairs = {
        n: [Engine(p, device=devices[i % n], dtype=dtype, keep=keep) for i, p in enumerate((plan, edited))]
        for n in (1, 2)
    }
    few = Tokens(tokens.ids[: len(tokens) // 8])
    wanted = {block.where: list(range(4)) for block in engines[0].routed}
    none: list[Any] = [None] * len(engines)

    def through(count: int) -> None:
        parts = shared_out(tokens, count)
        side_by_side([partial(engine.run, part) for engine, part in zip(engines, parts, strict=False)])

    def refit(count: int, kind: Any, some: Tokens) -> None:
        fit_layers(*pairs[min(count, 2)], some, RepairOptions(kind, minimum=0.5), lambda fitted: None)  # type: ignore[misc]

    jobs: dict[str, tuple[Tokens, int, Callable[[int], Any]]] = {  # tokens, runs that are timed
        "losses": (tokens, 3, lambda n: losses_over(engines[:n], [Domain("random", tokens.ids)])),
        "pass without logits": (tokens, 3, through),
        "collect": (tokens, 3, lambda n: collect_over(engines[:n], tokens, scratch=none)),
        "probe": (few, 1, lambda n: ablate_over(engines[:n], few, wanted, ["zero"], kept=none)),
    }
    for kind in kinds:
        some = tokens if kind == "scalar" else few
        jobs[f"--refit {kind}"] = some, kind == "scalar", lambda n, kind=kind, some=some: refit(n, kind, some)  # type: ignore[misc]
    for name, (some, rounds, job) in jobs.items():
        rates = {}
        for count in (1, len(engines)):
            if rounds:
                job(count)  # warms up
            label = f"{name}, {some.ids.numel():,} tokens, {count} GPUs"
            rates[count] = table.time(label, lambda job=job, n=count: job(n), rounds or 1, some.ids.numel())  # type: ignore[misc]
        print(f"{'':44} {rates[len(engines)] / rates[1]:9.2f} times one", flush=True)


def pipeline(table: Table, plan: Plan, tokens: Tokens, dtype: str, memory: int) -> None:
    """Time layers spread over all GPUs against one GPU with as much memory, which reads what it cannot hold."""
    devices = all_devices(table.device)
    names = {1: "one GPU", len(devices): f"layers over {len(devices)} GPUs"}
    found: dict[int, Any] = {}
    for count, name in names.items():
        engine = Engine(plan, device=devices[:count], dtype=dtype, memory=memory)
        few = Tokens(tokens.ids[:8])
        found[count] = engine.logits(few)
        engine.run(tokens)
        table.time(f"{name}, {memory / 1e9:.0f} GB each", lambda engine=engine: engine.run(tokens), 2)  # type: ignore[misc]
        held = [engine.weights.held(i) / 1e9 for i in range(count)]
        print(f"{'':44} held: {', '.join(f'{nbytes:.1f} GB' for nbytes in held)}")
        del engine
        torch.cuda.empty_cache()
    same = torch.equal(found[1], found[len(devices)])
    print(f"{'':44} logits of {few.ids.numel():,} tokens: {'the same bits' if same else 'other bits'}")


def plain_forwards(table: Table, model: Path, ids: torch.Tensor, device: str, dtype: str) -> None:
    """Time transformers' own forward, with each implementation of experts, at the best of some batch sizes."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    best = 0.0
    for experts in ("grouped_mm", "eager") if ids.numel() < 100_000 else ("grouped_mm",):  # the loop takes minutes
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), experts_implementation=experts
        )
        loaded = loaded.to(device).eval()

        def forward(batch: int, loaded: Any = loaded) -> None:
            with torch.no_grad():
                for part in ids.split(batch):
                    loaded(input_ids=part.to(device), use_cache=False)

        sizes = [b for b in (2, 8, 32, 96) if b <= len(ids)] if experts == "grouped_mm" else [8]
        for batch in sizes:
            forward(batch)
            best = max(best, table.time(f"transformers, {experts}, {batch} windows", lambda b=batch: forward(b), 3))
        del loaded
    table.base = best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", nargs="*", default=[], choices=[*WHAT, []])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[49_152], help="several for `devices`")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--memory", default="", help="of each GPU, for `pipeline`")
    parser.add_argument("--json", type=Path)
    given = parser.parse_intermixed_args()
    what = given.what or [name for name in WHAT if name not in ("devices", "pipeline", "parity")]
    large = given.shape in ("medium", "large")
    shape = SHAPES[given.shape] | ({"layers": given.layers} if given.layers else {})
    model = given.folder / given.shape
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        began = time.perf_counter()
        write(model, **shape, fp8=large)
        print(f"wrote {model} in {time.perf_counter() - began:.0f} s", flush=True)
    plan = plan_of(open_checkpoint(model))
    device, dtype = given.device, given.dtype
    count = given.tokens[0] // WINDOW
    ids = torch.randint(0, VOCABULARY, (count, WINDOW), generator=torch.Generator().manual_seed(1))
    tokens = Tokens(ids)
    table = Table(ids.numel(), device)
    print(f"{ids.numel():,} tokens in windows of {WINDOW}, {device}, {dtype}")
    edited = apply(plan, "drop-experts", experts=list(range(shape["experts"] // 4)))
    if not large and {"forward", "collect"} & set(what):
        plain_forwards(table, model, ids, device, dtype)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    keep = 1 << 40 if not large else None
    for number in given.tokens if "devices" in what else ():
        some = Tokens(ids.repeat(-(-number // ids.numel()), 1)[: number // WINDOW])
        kinds = ("scalar", "down") if number == given.tokens[0] else ("scalar",)
        over_devices(table, plan, edited, some, dtype, keep, kinds)
    if "pipeline" in what:
        pipeline(table, plan, tokens, dtype, parse_bytes(given.memory))
    if not set(what) - {"devices", "pipeline"}:
        return
    engine = Engine(plan, device=device, dtype=dtype, keep=keep)
    if "parity" in what:
        parity(engine, model, ids, device, dtype)
    if "forward" in what:
        if not large:
            engine.run(tokens)
            table.time("ours, weights in memory, no head", lambda: engine.run(tokens), 3)
            table.time("ours, weights in memory", lambda: engine.run(tokens, logits=lambda *seen: None), 3)
        streamed = Engine(plan, device=device, dtype=dtype, keep=0)
        streamed.run(tokens)
        table.time("ours, weights read in each pass", lambda: streamed.run(tokens), 2)
    if "load" in what:
        fresh = Engine(plan, device=device, dtype=dtype, keep=0)
        fresh.meta_model.read(fresh.layers[0])
        layers = fresh.layers[: min(4, len(fresh.layers))]
        seconds = table._once(lambda: [fresh.meta_model.read(layer) for layer in layers])
        nbytes = sum(e.nbytes for layer in layers for g in layer.groups for _, n in g.names for e in stored(fresh, n))
        print(f"a layer arrives: {nbytes / 1e9:.2f} GB as stored in {seconds:.2f} s, {nbytes / seconds / 1e9:.2f} GB/s")
    if "collect" in what:
        if not large:
            collect(engine, Tokens(ids[:2]))
        table.time("collect", lambda: collect(engine, tokens), 1 if large else 2)
        if large:
            collect_seconds = table.tokens / table.rows["collect"]
            whole = sum(f.stat().st_size for f in model.glob("*.safetensors"))
            print(f"so 300 GB take {collect_seconds * 300e9 / whole / 60:.1f} minutes, in proportion")
    if "probe" in what:
        wanted = {block.where: list(range(16)) for block in engine.routed}
        few = Tokens(ids[:8])
        table.time("probe, 16 experts a layer, 4,096 tokens", lambda: ablate(engine, few, wanted, ["mask", "zero"]))
    if "refit" in what:
        for kind in ("scalar", "down"):
            other = Engine(edited, device=device, dtype=dtype, keep=0)
            options = RepairOptions(kind, minimum=0.5)  # type: ignore[arg-type]
            table.time(
                f"--refit {kind}", lambda o=other, p=options: fit_layers(engine, o, tokens, p, lambda fitted: None)
            )
    if device.startswith("cuda"):
        print(f"peak memory on the GPU: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    if given.json:
        given.json.write_text(json.dumps({"base": table.base, "rows": table.rows}, indent=1))


def stored(engine: Engine, name: str) -> list[Any]:
    return list(engine.meta_model.tensors[name].stored())


if __name__ == "__main__":
    main()
