"""`moesurgery collect`: the statistics of experts that data-driven edits take as a parameter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.checkpoint.strict_json import write_json
from moesurgery.cli import _run_options
from moesurgery.cli._console import console
from moesurgery.cli._writing import Force, Json, Quiet
from moesurgery.errors import OutputError
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.run_settings import TOKENS, WINDOW, RunSettings
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.stats.statistics_file import SUFFIX
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    from moesurgery.stats.statistics_file import Stats


def collect_command(
    model: _run_options.ModelOrRecipe,
    text: _run_options.Texts,
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
    window: _run_options.Window = WINDOW,
    tokens: _run_options.CalibrationTokens = TOKENS,
    seed: _run_options.CalibrationSeed = 0,
    dtype: _run_options.DtypeOption = "float32",
    device: _run_options.DeviceOption = "cpu",
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
    settings = RunSettings(window, None, seed, device, dtype)
    settings.check()
    run = read_calibration(settings, plan, text, tokens)
    stats = run.statistics(NeededStatistics(top_k or (), recon or (), every_expert), _run_options.reporter)
    stats.save(target)
    document = _document(stats, target)
    with whole_file(target.with_suffix(".json")) as new:
        new.write_text(write_json(document))
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
