"""`moesurgery count-params`: exact counts, and whether decoding is memory or compute bound."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.cli._common_options import Json, Model, Picture
from moesurgery.cli._console import console, human_bytes, human_count
from moesurgery.cli._pictures import Bars, Heatmap, Panel, check_picture, write_picture
from moesurgery.count.accelerators import ACCELERATORS
from moesurgery.count.params import Counts, count_params
from moesurgery.count.prediction import prediction_part
from moesurgery.count.roofline import Roofline, roofline
from moesurgery.errors import RecipeError
from moesurgery.families.components import MAIN_COMPONENTS, VISION
from moesurgery.families.recognition import recognise

_BAR = 24  # characters of the longest bar

CONVENTIONS = {
    "all": "all weights a token uses (Mixtral, Qwen, OLMoE, Llama-4)",
    "without_input_embedding": "without an untied input embedding (gpt-oss)",
    "without_embeddings": "without embedding and head (GLM-4.5, MiniMax)",
}


def count_params_command(
    model: Model = ".",
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Count this many active experts instead of the config's.")
    ] = None,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Add a line per layer.")] = False,
    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens of context for the memory-or-compute section.")
    ] = 4096,
    accelerator: Annotated[str, typer.Option("--accelerator", help="One of " + ", ".join(ACCELERATORS) + ".")] = "h100",
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Count parameters exactly, total and active, from headers alone.

    Works on a folder, on hf://org/name (nothing but headers is downloaded), and on shards of which only the
    headers are there.
    """
    if accelerator not in ACCELERATORS:
        raise RecipeError(f"unknown accelerator {accelerator!r}", "known: " + ", ".join(ACCELERATORS))
    check_picture(picture)
    checkpoint = open_checkpoint(model, headers_only=True)
    anatomy = recognise(checkpoint.config, checkpoint.tensors)
    counts = count_params(anatomy, checkpoint.tensors, top_k)
    predicting = prediction_part(anatomy, checkpoint.tensors)
    cost = roofline(anatomy, checkpoint.tensors, counts, context, ACCELERATORS[accelerator])
    if picture is not None:
        about = f"{counts.total:,} parameters in all"
        write_picture(picture, f"{checkpoint.source.name}: where the parameters sit", about, _panels(counts))
    if as_json:
        document = counts.as_json()
        document["model"] = checkpoint.source.identity
        document["headers_only"] = checkpoint.headers_only
        document["prediction"] = predicting.as_json() if predicting else None
        document["notes"] = anatomy.notes
        document["roofline"] = cost.as_json() if cost else None
        if by_layer:
            document["layers"] = counts.by_layer
        console.json(document)
        return
    unknown = f"{anatomy.unknown_experts}, so its experts cannot be told apart"
    if anatomy.blocks:
        unknown = "config.json gives no number of active experts that is that of all layers"
    _show(checkpoint.source.identity, counts, unknown, headers_only=checkpoint.headers_only)
    if predicting is not None:
        console.result(f"prediction layers: {predicting.sentence(human_bytes(predicting.nbytes))}")
    for note in anatomy.notes:
        console.result(note)
    if by_layer:
        _show_layers(counts)
    if cost is not None:
        _show_roofline(cost, counts)


def _panels(counts: Counts) -> list[Panel]:
    """Return the parameters by component, and by layer and component."""
    names = [c for c in (*MAIN_COMPONENTS, VISION) if c in counts.components]
    titles = [name.replace("_", " ") for name in names]
    pictures: list[Panel] = [Bars("Parameters by component", titles, [counts.components[name] for name in names])]
    held = [n for n in names if any(n in entry["components"] for entry in counts.by_layer)]
    if held:
        values = [[float(entry["components"].get(n, 0)) for entry in counts.by_layer] for n in held]
        layers = [str(entry["layer"]) for entry in counts.by_layer]
        rows = [name.replace("_", " ") for name in held]
        pictures.append(Heatmap("Parameters by layer", rows, layers, values, "parameters", across="layer"))
    return pictures


def _show(identity: str, counts: Counts, unknown: str, *, headers_only: bool) -> None:
    kind = counts.family or ("dense" if counts.num_experts == 0 else "unknown family")
    console.result(f"{identity}: {counts.model_type} ({kind})")
    console.result(f"total       {counts.total:>20,}  {human_count(counts.total)}")
    if counts.active is None:
        console.result(f"active      unknown: {unknown}")
    else:
        for key, meaning in CONVENTIONS.items():
            value = counts.active[key]
            console.result(f"{'active' if key == 'all' else '':<11} {value:>20,}  {human_count(value)}  {meaning}")
    if counts.num_blocks != counts.num_layers and counts.executed is not None:
        console.result(
            f"executed    {counts.executed:>20,}  {human_count(counts.executed)}  {counts.num_layers} positions run"
            f" {counts.num_blocks} stored blocks"
        )
    if counts.num_experts and counts.active is not None:
        console.result(
            f"experts     {counts.num_moe_layers} MoE layers of {counts.num_layers} x {counts.num_experts} experts"
            f" = {counts.total_experts}, top-{counts.top_k}"
        )
    console.result()
    rows = []
    for component in (*MAIN_COMPONENTS, VISION):
        if component in counts.components:
            value = counts.components[component]
            share = value / counts.total
            rows.append((component.replace("_", " "), f"{value:,}", f"{100 * share:.2f} %", "█" * round(_BAR * share)))
    console.table(("component", "parameters", "share", ""), rows, right=(1, 2))
    for kind, value in counts.not_counted.items():
        console.result(f"not in the total: {value:,} {kind.replace('_', ' ')}")
    if counts.tied_embeddings:
        console.result("the head is tied to the embedding and counted once")
    if counts.unrecognised:
        console.result(f"unrecognised tensors: {len(counts.unrecognised)}, such as {counts.unrecognised[0]}")
    console.result()
    dtypes = ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in counts.bytes_by_dtype.items())
    console.result(f"on disk     {human_bytes(counts.stored_bytes)} ({dtypes})")
    form = f", stored as {counts.quantisation}" if counts.quantisation else ""
    console.result(f"in memory   {human_bytes(counts.memory_bytes)} as stored{form}")
    if headers_only:
        console.result("counted by headers: some shards end before their data does, so no edit can be written")


def _show_layers(counts: Counts) -> None:
    console.result()
    names = [c for c in (*MAIN_COMPONENTS, VISION) if any(c in entry["components"] for entry in counts.by_layer)]
    rows: list[tuple[str, ...]] = [
        (str(entry["layer"]), f"{entry['params']:,}", *(f"{entry['components'].get(n, 0):,}" for n in names))
        for entry in counts.by_layer
    ]
    header = ("layer", "parameters", *(n.replace("_", " ") for n in names))
    console.table(header, rows, right=range(len(header)))


def _show_roofline(cost: Roofline, counts: Counts) -> None:
    console.result()
    console.result(f"memory or compute: decoding with {cost.context:,} tokens of context on {cost.accelerator.name}")
    attention = f" + {cost.flops_attention / 1e9:.2f} of attention" if cost.flops_attention else ""
    console.result(
        f"  {cost.flops_weights / 1e9:.2f} GFLOP per token{attention}; density {cost.density:.3f} (executed / stored)"
    )
    rows: list[tuple[Any, ...]] = []
    for batch, nbytes in cost.weight_bytes.items():
        hit = f"{cost.experts_hit[batch]:.1f} of {counts.num_experts}" if counts.num_experts else "-"
        rows.append((f"batch {batch}", human_bytes(nbytes), hit))
    console.table(("", "weights read per step", "experts hit per layer"), rows, right=(1, 2))
    if cost.kv_bytes_per_token is None:
        console.result("  KV cache: unknown attention layout, so no batch is named at which it becomes compute bound")
        return
    console.result(
        f"  KV cache: {cost.kv_bytes_per_token / 1024:.1f} KiB per token;"
        f" as large as the weights read at batch 1 after {cost.kv_equals_weights_at:,} tokens"
    )
    ridge = f"{cost.accelerator.ridge:.0f} FLOP/byte"
    if cost.compute_bound_batch is None:
        console.result(f"  memory bound at every batch: KV reads keep it below the ridge of {ridge}")
    else:
        console.result(
            f"  memory bound below batch {cost.compute_bound_batch:,}, compute bound from there (ridge {ridge})"
        )
