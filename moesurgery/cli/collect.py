"""`moesurgery collect`: the statistics of experts that data-driven edits take as a parameter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.checkpoint.strict_json import write_json
from moesurgery.cli import _run_options
from moesurgery.cli._common_options import Force, Json, Picture, Quiet, SchedulerAddress
from moesurgery.cli._console import console, duration, human_bytes
from moesurgery.cli._pictures import Heatmap, Panel, check_picture, write_picture
from moesurgery.errors import OutputError, RecipeError
from moesurgery.fitting.calibration_run import CalibrationRun, read_calibration
from moesurgery.fitting.imatrix_sums import ImatrixSums
from moesurgery.fitting.run_settings import AUTO, TOKENS, WINDOW, RunSettings
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.scheduler import Scheduler
from moesurgery.stats.imatrix_file import save_imatrix
from moesurgery.stats.statistics_file import SUFFIX
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    from moesurgery.stats.statistics_file import Stats


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
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            metavar="FILE",
            help="Also write what llama-imatrix would, as a GGUF that llama-quantize reads.",
        ),
    ] = None,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="Also find which neurons of each expert matter: for slim-experts.")
    ] = False,
    window: _run_options.Window = WINDOW,
    tokens: _run_options.CalibrationTokens = TOKENS,
    seed: _run_options.CalibrationSeed = 0,
    dtype: _run_options.DtypeOption = AUTO,
    device: _run_options.DeviceOption = "cpu",
    memory: _run_options.Memory = "",
    apart: _run_options.Apart = False,
    assistant_only: _run_options.AssistantOnly = False,
    scratch: _run_options.ScratchFolder = None,
    scheduler: SchedulerAddress = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time the first layer, and say what all of them will take.")
    ] = False,
    force: Force = False,
    picture: Picture = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a model over calibration text once, and keep what says which expert does what.

    The file is small, and everything that chooses or scales experts by data takes it as a parameter: `rescale`,
    `drop-experts`, `merge-experts`, `slim-experts`. The table says how far two halves of the text agree on who matters.
    """
    console.quiet = quiet
    target = output if output.suffix == SUFFIX else output.with_name(output.name + SUFFIX)
    for file in (target, *([imatrix] if imatrix is not None else ())):
        if file.exists() and not force:
            raise OutputError(f"{file} exists", "use --force to replace it, or another name")
    check_picture(picture)
    workers = Scheduler(scheduler) if scheduler is not None else None
    plan = _run_options.subject(model)
    settings = RunSettings(window, None, seed, device, dtype, memory, apart, assistant_only)
    settings.check()
    run = read_calibration(settings, plan, text, tokens)
    scratch = scratch or target.with_name(target.name.removesuffix(SUFFIX) + ".scratch")
    if dry_run:
        _show_forecast(run, scratch, as_json=as_json)
        return
    needed = NeededStatistics(top_k or (), recon or (), every_expert, neurons)
    sums = ImatrixSums() if imatrix is not None else None
    if workers is not None and sums is not None:
        raise RecipeError("--imatrix is collected on one machine", "leave --scheduler out")
    if workers is not None:
        stats = run.statistics_of_workers(needed, _run_options.reporter, workers.executor)
    else:
        stats = run.statistics(needed, _run_options.reporter, scratch, sums)
    stats.save(target)
    if imatrix is not None and sums is not None:
        save_imatrix(imatrix, sums.arrays(), [file.name for file in run.texts], len(run.windows), window)
    document = _document(stats, target)
    with whole_file(target.with_suffix(".json")) as new:
        new.write_text(write_json(document))
    if picture is not None:
        about = f"{stats.about['tokens']:,} tokens, seed {seed}"
        write_picture(picture, f"{plan.checkpoint.name}: what each expert does", about, _panels(document))
    if as_json:
        console.json(document)
        return
    also = f" and {len(stats.prediction)} of prediction layers" if stats.prediction else ""
    console.result(f"{len(stats.blocks)} MoE layers{also}, {stats.about['tokens']:,} tokens; wrote {target}")
    console.result()
    rows = [
        (by, f"{halves['spearman']:.3f}", f"{halves['spearman_worst']:.3f}", f"{100 * halves['overlap']:.0f} %")
        for by, halves in document["agreement"].items()
    ]
    console.table(
        ("criterion", "rank correlation of halves", "worst layer", "same lowest quarter"), rows, right=(1, 2, 3)
    )
    if document["super_experts"]:
        named = ", ".join(f"{where}: {', '.join(map(str, e))}" for where, e in document["super_experts"].items())
        console.result(f"experts with outputs far above all others: {named}")


def _show_forecast(run: CalibrationRun, scratch: Path, *, as_json: bool) -> None:
    from moesurgery.fitting.forecast import forecast

    devices, count = run.settings.devices, run.windows.count
    engines = run.settings.engines(run.plan, run.windows)
    expected = forecast(engines[0], run.windows, len(engines))
    if as_json:
        console.json({"schema_version": 1, "tokens": count, "scratch": str(scratch), **asdict(expected)})
        return
    console.result(f"{count:,} tokens through {expected.layers} layers on {', '.join(devices)}")
    console.table(
        ("what", "how much"),
        [
            ("time", duration(expected.seconds)),
            ("of which one layer computes", f"{expected.layer_seconds:.2f} s"),
            ("and is read in", f"{expected.load_seconds:.2f} s"),
            ("weights read", human_bytes(expected.read_bytes)),
            ("memory of each device", human_bytes(expected.memory_bytes)),
            (f"space in {scratch}", human_bytes(expected.scratch_bytes)),
        ],
        right=(1,),
    )


def _panels(document: dict[str, Any]) -> list[Panel]:
    """Return how often each expert is used, and its score by each criterion."""
    layers = document["layers"]
    rows = [f"layer {next((p for p in x['layer'].split('.') if p.isdigit()), x['layer'])}" for x in layers]
    framed = {(y, e) for y, x in enumerate(layers) for e in document["super_experts"].get(x["layer"], ())}
    experts = [str(e) for e in range(max(len(x["experts"]["tokens"]) for x in layers))]

    def of(title: str, values: list[list[float]], unit: str = "") -> Heatmap:
        return Heatmap(title, rows, experts, values, unit, framed=framed, frame="output far above all others'")

    used = [[100 * n / x["tokens"] for n in x["experts"]["tokens"]] for x in layers]
    criteria = [key for key in layers[0]["experts"] if key not in ("tokens", "largest_output", "frequency")]
    return [of("Share of tokens", used, "%"), *(of(by, [x["experts"][by] for x in layers]) for by in criteria)]


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
            for where, block in stats.with_prediction.items()
        ],
    }
