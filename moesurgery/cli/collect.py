"""`moesurgery collect`: the statistics of experts that data-driven edits take as a parameter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.cli import _run_options
from moesurgery.cli._console import console, duration, human_bytes
from moesurgery.cli._writing import Force, Json, Quiet
from moesurgery.errors import OutputError

if TYPE_CHECKING:
    from moesurgery.forward.tokens import Tokens
    from moesurgery.plan.plan import Plan
    from moesurgery.stats.statistics_file import Stats

SUFFIX = ".safetensors"


def collect_command(
    model: _run_options.ModelOrRecipe,
    text: _run_options.WeightedTexts,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: NAME.safetensors and NAME.json.")],
    top_k: Annotated[
        list[int] | None,
        typer.Option("--top-k", min=1, help="Also collect what `rescale` to this top-k needs; repeat for more."),
    ] = None,
    recon: Annotated[
        list[int] | None,
        typer.Option("--recon", min=1, help="Also find which of this many experts reproduce each layer best; repeat."),
    ] = None,
    every_expert: Annotated[
        bool,
        typer.Option("--every-expert", help="Also run all experts on all tokens: for merge-experts --group hc."),
    ] = False,
    window: _run_options.Window = 512,
    tokens: _run_options.CalibrationTokens = _run_options.TOKENS,
    seed: _run_options.CalibrationSeed = 0,
    dtype: _run_options.DtypeOption = _run_options.AUTO,
    device: _run_options.DeviceOption = "cpu",
    memory: _run_options.Memory = "",
    apart: _run_options.Apart = False,
    assistant_only: _run_options.AssistantOnly = False,
    scratch: _run_options.Scratch = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time the first layer, and say what all of them will take.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over calibration text once, and keep what says which expert does what.

    The file is small, and everything that chooses or scales experts by data takes it as a parameter: `rescale`,
    `drop-experts`, `merge-experts`. The table says how far two halves of the text agree on who matters.
    """
    console.quiet = quiet
    target = output if output.suffix == SUFFIX else output.with_name(output.name + SUFFIX)
    if target.exists() and not force:
        raise OutputError(f"{target} exists", "use --force to replace it, or another -o")
    plan = _run_options.subject(model)
    run = _run_options.Run(window, None, seed, device, dtype, memory, apart, assistant_only)
    run.check()
    windows, _ = run.calibration(plan.checkpoint, text, tokens)
    scratch = scratch or target.with_name(target.name.removesuffix(SUFFIX) + ".scratch")
    if dry_run:
        _forecast(plan, windows, run, scratch, as_json=as_json)
        return
    stats = collect_stats(plan, windows, run, text, top_k or [], recon or [], every_expert, scratch)
    stats.save(target)
    document = _document(stats, target)
    target.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    if as_json:
        console.json(document)
        return
    console.result(f"{len(stats.blocks)} MoE layers, {stats.about['tokens']:,} tokens; wrote {target}")
    console.result()
    rows = [
        (by, f"{found['spearman']:.3f}", f"{found['spearman_worst']:.3f}", f"{100 * found['overlap']:.0f} %")
        for by, found in document["agreement"].items()
    ]
    console.table(
        ("criterion", "rank correlation of halves", "worst layer", "same lowest quarter"), rows, right=(1, 2, 3)
    )
    if document["super_experts"]:
        named = ", ".join(f"{where}: {', '.join(map(str, e))}" for where, e in document["super_experts"].items())
        console.result(f"experts with outputs far above all others: {named}")


def collect_stats(
    plan: Plan,
    windows: Tokens,
    run: _run_options.Run,
    text: Sequence[str],
    top_k: list[int],
    keep: list[int],
    every_expert: bool = False,
    scratch: Path | None = None,
) -> Stats:
    """Collect statistics with a progress bar, and note what they were collected on.

    With `scratch`, what is done is kept there between layers, and the same call goes on from it.
    """
    from moesurgery.fitting.collector import collect_over
    from moesurgery.forward.scratch import Scratch, each_part

    engines = run.engines(plan)
    about = _run_options.calibrated_on(plan, windows, run, text)
    kept: list[Scratch | None] = [None] * len(engines)
    if scratch is not None:
        asked = {"top_k": top_k, "recon": keep, "every_expert": every_expert, "devices": run.devices}
        kept = [Scratch(part, {**about, **asked}, console.note) for part in each_part(scratch, len(engines))]
    with console.passing("collecting", windows.count, len(engines[0].layers)) as watch:
        stats = collect_over(engines, windows, top_k, keep, watch.progress, every_expert=every_expert, scratch=kept)
    stats.about |= about
    for each in kept:
        if each is not None:
            each.remove()
    if scratch is not None and scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()
    return stats


def _forecast(plan: Plan, windows: Tokens, run: _run_options.Run, scratch: Path, *, as_json: bool) -> None:
    from moesurgery.fitting.forecast import forecast

    found = forecast(run.engine(plan), windows, len(run.devices))
    if as_json:
        console.json({"schema_version": 1, "tokens": windows.count, "scratch": str(scratch), **asdict(found)})
        return
    console.result(f"{windows.count:,} tokens through {found.layers} layers on {', '.join(run.devices)}")
    console.table(
        ("what", "how much"),
        [
            ("time", duration(found.seconds)),
            ("of which one layer computes", f"{found.layer_seconds:.2f} s"),
            ("and is read in", f"{found.load_seconds:.2f} s"),
            ("weights read", human_bytes(found.read_bytes)),
            ("memory of each device", human_bytes(found.memory_bytes)),
            (f"space in {scratch}", human_bytes(found.scratch_bytes)),
        ],
        right=(1,),
    )


def _document(stats: Stats, target: Path) -> dict[str, Any]:
    from moesurgery.stats.criteria import CRITERIA, agreement, scores, super_experts

    return {
        "schema_version": 1,
        "statistics": target.name,
        **stats.about,
        "agreement": {by: agreement(stats, by) for by in CRITERIA},
        "super_experts": super_experts(stats),
        "layers": [
            {
                "layer": where,
                "tokens": float(block.total("tokens")),
                "entropy": float(block.total("entropy") / block.total("tokens")),
                "experts": {
                    "tokens": block.total("count").tolist(),
                    "largest_output": block.total("peak").tolist(),
                    **{by: scores(block, by).tolist() for by in CRITERIA},
                },
            }
            for where, block in stats.blocks.items()
        ],
    }
