"""`moesurgery probe`: who does the work. The loss without each expert, what each is sent, and pictures of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.checkpoint.strict_json import write_json
from moesurgery.cli import _run_options
from moesurgery.cli._common_options import Force, Json, Quiet
from moesurgery.cli._console import console
from moesurgery.errors import OutputError, RecipeError
from moesurgery.fitting.calibration_run import read_calibration
from moesurgery.fitting.run_settings import AUTO, WINDOW, RunSettings
from moesurgery.recipe.text_needs import NeededStatistics
from moesurgery.whole_file import whole_file

if TYPE_CHECKING:
    from moesurgery.fitting.ablation import Ablations
    from moesurgery.stats.statistics_file import BlockStats, Stats

_TOKENS = 4096
MODES = {"mask": ["mask"], "zero": ["zero"], "both": ["mask", "zero"]}


def probe_command(
    model: _run_options.ModelOrRecipe,
    text: _run_options.WeightedTexts,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write NAME.json, NAME.html, NAME.svg and, with matplotlib, NAME.png."),
    ] = None,
    png: Annotated[bool, typer.Option("--png/--no-png", help="NAME.png too (needs matplotlib).")] = True,
    mode: Annotated[
        str,
        typer.Option(
            "--mode", help="mask: the router may not choose it, as if dropped; zero: what it says is lost; or both."
        ),
    ] = "both",
    every: Annotated[
        bool,
        typer.Option("--all", help="Leave out every expert; by default at most 16 per layer, by reap-sum."),
    ] = False,
    window: _run_options.Window = WINDOW,
    tokens: _run_options.CalibrationTokens = _TOKENS,
    seed: _run_options.CalibrationSeed = 0,
    dtype: _run_options.DtypeOption = AUTO,
    device: _run_options.DeviceOption = "cpu",
    memory: _run_options.Memory = "",
    apart: _run_options.Apart = False,
    assistant_only: _run_options.AssistantOnly = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a model loses without each of its experts, and what each expert does.

    Each expert of each layer is left out in turn, then each index of all layers at once: a chart of the latter alone
    says little, since expert 3 of one layer has nothing to do with expert 3 of another.
    """
    console.quiet = quiet
    if mode not in MODES:
        raise RecipeError(f"--mode is {mode!r}, expected one of {', '.join(MODES)}")
    files = (
        [] if output is None else [output.with_name(output.name + end) for end in (".json", ".html", ".svg", ".png")]
    )
    for file in files:
        if file.exists() and not force:
            raise OutputError(f"{file} exists", "use --force to replace it, or another -o")
    settings = RunSettings(window, None, seed, device, dtype, memory, apart, assistant_only)
    settings.check()
    plan = _run_options.subject(model)
    plan.anatomy.require_family("probe")
    run = read_calibration(settings, plan, text, tokens)
    windows = run.windows

    from moesurgery.fitting.ablation import ablate_over, screened, takers, work
    from moesurgery.fitting.kept_losses import KeptLosses
    from moesurgery.stats.criteria import scores

    scratch = None if output is None else output.with_name(f"{output.name}.scratch")
    stats = run.statistics(NeededStatistics(), _run_options.reporter, scratch)
    engines = settings.engines(plan, windows)
    routed = engines[0].routed
    wanted = {b.where: screened(b, scores(stats.blocks[b.where], "reap-sum").tolist(), every) for b in routed}
    modes: Any = MODES[mode]
    about = {**run.about, "left out": wanted, "devices": settings.devices}
    kept = [KeptLosses(scratch and scratch / f"losses-{i}.json", about) for i in range(len(engines))]
    with console.progress("leaving out", work(engines[0], windows, wanted, len(modes)), of_bytes=False) as watch:
        ablations = ablate_over(engines, windows, wanted, modes, watch.progress, kept)
    from moesurgery.checkpoint.filenames import TOKENIZER
    from moesurgery.forward.text_windows import load_tokenizer

    # Text that was given as token ids needs no tokenizer.
    known = TOKENIZER in plan.checkpoint.file_sizes
    shown = load_tokenizer(plan.checkpoint).decode if known else lambda ids: f"token {ids[0]}"
    taken = {
        where: [[{"text": shown([t]), "count": n, "share": share} for t, n, share in expert] for expert in experts]
        for where, experts in takers(engines, windows).items()
    }
    document = _document(plan.checkpoint.name, stats, ablations, taken, modes)
    if output is not None:
        from moesurgery.cli._pictures import has_matplotlib, write_picture
        from moesurgery.cli._probe_page import about_probe, panels, probe_page

        for file, content in ((files[0], write_json(document)), (files[1], probe_page(document))):
            with whole_file(file) as new:
                new.write_text(content)
        title, drawn = f"{document['name']}: what each expert does", panels(document)
        write_picture(files[2], title, about_probe(document), drawn)
        if png and has_matplotlib():
            write_picture(files[3], title, about_probe(document), drawn)
        elif png:
            console.warning("no PNG without matplotlib: `pip install moesurgery[plot]`; the SVG shows the same")
    for each in kept:
        each.remove()
    if as_json:
        console.json(document)
        return
    _show(document)
    if output is not None:
        console.result()
        console.result("wrote " + ", ".join(str(f) for f in files if f.exists()))


def _document(name: str, stats: Stats, found: Ablations, taken: dict[str, Any], modes: list[str]) -> dict[str, Any]:
    from moesurgery.stats.criteria import scores, super_experts

    flagged = super_experts(stats)
    layers = []
    for where, block in stats.blocks.items():
        reap, count = scores(block, "reap"), block.total("count")
        experts = [
            {
                "change": {
                    m: found.single[m][where][e] - found.base  # type: ignore[index]
                    for m in modes
                    if e in found.single[m][where]  # type: ignore[index]
                },
                "usage": float(count[e] / block.total("tokens")),
                "gate": float(block.total("gate")[e] / max(count[e], 1)),
                "reap": float(reap[e]),
                "peak": float(block.total("peak")[e]),
                "takes": taken[where][e],
            }
            for e in range(block.experts)
        ]
        layers.append(
            {
                "layer": where,
                "number": int(next(part for part in where.split(".") if part.isdigit())),
                "entropy": float(block.total("entropy") / block.total("tokens")),
                "balance": _balance(block),
                "super_experts": flagged.get(where, []),
                "experts": experts,
            }
        )
    indices = {m: {e: loss - found.base for e, loss in by.items()} for m, by in found.index.items()}
    about = {key: stats.about[key] for key in ("model", "tokens", "text", "window", "seed", "dtype")}
    return {
        "schema_version": 1,
        "name": name,
        **about,
        "loss": found.base,
        "modes": modes,
        "indices": indices,
        "layers": layers,
    }


def _balance(block: BlockStats) -> float:
    """Return the load balance E * sum of f_e P_e: 1 where experts share the work evenly (arXiv 2101.03961)."""
    count, probability = block.total("count"), block.total("probability")
    if not probability.sum() or not count.sum():
        return 1.0
    return float(block.experts * (count / count.sum()) @ (probability / probability.sum()))


def _show(document: dict[str, Any]) -> None:
    mode = document["modes"][0]
    rows = []
    for layer in document["layers"]:
        known = {e: x["change"][mode] for e, x in enumerate(layer["experts"]) if mode in x["change"]}
        worst, least = (max, min)
        needed = f"{worst(known, key=known.__getitem__)} ({max(known.values()):+.4f})" if known else "–"
        spare = f"{least(known, key=known.__getitem__)} ({min(known.values()):+.4f})" if known else "–"
        usage = [x["usage"] for x in layer["experts"]]
        super_experts = ", ".join(map(str, layer["super_experts"]))
        rows.append(
            (
                layer["layer"],
                needed,
                spare,
                f"{100 * min(usage):.1f} to {100 * max(usage):.1f} %",
                f"{layer['entropy']:.2f}",
                f"{layer['balance']:.2f}",
                super_experts,
            )
        )
    console.table(
        ("layer", f"most needed ({mode})", "least", "share of tokens", "entropy", "balance", "super"),
        rows,
        right=(1, 2, 3, 4, 5),
    )
    console.result()
    for name, by in document["indices"].items():
        ordered = sorted(by.items(), key=lambda item: -item[1])[:8]
        shown = ", ".join(f"{e} {change:+.3f}" for e, change in ordered)
        console.result(f"one index out of all layers ({name}): {shown}")
    console.result(f"nats per token over {document['tokens']:,} tokens; the model has {document['loss']:.4f}")
