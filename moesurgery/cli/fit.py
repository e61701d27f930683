"""`moesurgery fit`: the best model that a machine has room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moesurgery.budget.budget import Budget, budget_of
from moesurgery.budget.candidates import AXES, USUAL_AXES
from moesurgery.budget.limits import Limits, parse_parameters, parse_speed, parse_tokens
from moesurgery.budget.shape import FORMS, USUAL_FORMS
from moesurgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from moesurgery.cli import _run_options
from moesurgery.cli._common_options import Model
from moesurgery.cli._console import console, human_bytes
from moesurgery.cli._fit_report import document_of, shapes_document, show_fitted, show_shapes, write_front
from moesurgery.cli._operations import taking_text_and_flags, write_plan_file
from moesurgery.cli._output_name import default_name
from moesurgery.cli._writer_flags import WriterFlags, check_early, size_of_option
from moesurgery.cli._writing import carry_out
from moesurgery.count.accelerators import ACCELERATORS
from moesurgery.errors import RecipeError
from moesurgery.expr.nodes import Expr, Stored
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.recognition import recognise
from moesurgery.fitting.calibrate import CalibrationOptions
from moesurgery.fitting.shape_steps import TIE
from moesurgery.plan.plan import Plan
from moesurgery.recipe.reader import Recipe
from moesurgery.recipe.registry import apply, find_operation
from moesurgery.stats.criteria import CRITERIA

_AXES = ", ".join(AXES)
_OF_GGUF = ("experts", "top-k")


@taking_text_and_flags
def fit_command(
    flags: WriterFlags,
    options: CalibrationOptions,
    memory_limit: Annotated[
        str, typer.Option("--memory", help="What weights and KV cache may take together, as 24GB.", show_default=False)
    ],
    model: Model = ".",
    context: Annotated[str, typer.Option("--context", help="Tokens of each sequence in the KV cache, as 32k.")] = "4k",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    active: Annotated[
        str | None, typer.Option("--active", help="The most active parameters, as 3B; by default as many as now.")
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option("--speed", help="The least tokens per second of a sequence, as 40tok/s, by the roofline."),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="What it runs on: " + ", ".join(ACCELERATORS) + ".")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Only numbers that its kernels take well: vllm, sglang, llama.cpp, mlx."),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help=f"What may change, of {_AXES}. [default: all but tie]")
    ] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="What stays as it is, as top-k.")] = None,
    forms: Annotated[
        str | None,
        typer.Option(
            "--forms",
            help=f"Stored forms that may be chosen where they are narrower: {', '.join(FORMS)}."
            f" [default: {', '.join(USUAL_FORMS)}, as far as --engine reads them]",
        ),
    ] = None,
    by: Annotated[
        str, typer.Option("--by", help="How experts are chosen, as in drop-experts; auto is the best of several.")
    ] = "auto",
    measured: Annotated[int, typer.Option("--measured", min=1, help="Shapes to measure without repair.")] = 6,
    repaired: Annotated[int, typer.Option("--repaired", min=1, help="Shapes to repair and to measure again.")] = 4,
    device_memory: _run_options.DeviceMemory = "",
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", help="Write which experts and neurons stay, for slim-experts and drop-experts."),
    ] = None,
) -> None:
    """Find the best model that fits a machine: fewer experts, narrower experts, another top-k, a narrower form.

    The budget is weights as stored plus KV cache for the context. One pass over --text predicts the loss of every shape
    that fits; a few are measured on held-out text without being written, repaired, and measured again; the best is
    written. Without text, --dry-run shows what fits, from headers alone.
    """
    console.quiet = flags.quiet
    axes = _chosen_axes(only, keep)
    limits = Limits(
        size_of_option("--memory", memory_limit),
        None if active is None else parse_parameters(active),
        None if speed is None else parse_speed(speed),
    )
    if accelerator is not None and accelerator not in ACCELERATORS:
        raise RecipeError(f"unknown accelerator {accelerator!r}", "known: " + ", ".join(ACCELERATORS))
    if by != "auto" and by not in CRITERIA:
        raise RecipeError(f"--by is {by!r}, expected auto, {', '.join(CRITERIA)}")
    options = replace(options, memory=device_memory)
    options.check()
    looking = flags.dry_run and not options.text
    if not looking and not flags.print_recipe:
        check_early(flags)
    plan = None if looking and not model.endswith((".yaml", ".yml")) else _run_options.subject(model)
    checkpoint = open_checkpoint(model, headers_only=True) if plan is None else plan.checkpoint
    if checkpoint.gguf is not None:
        axes = [axis for axis in axes if axis in _OF_GGUF]
        if not axes:
            raise RecipeError(f"fit: of a GGUF only {' and '.join(_OF_GGUF)} can change")
    budget = budget_of(
        recognise(checkpoint.config, checkpoint.tensors) if plan is None else plan.anatomy,
        _expressions(checkpoint) if plan is None else plan.tensors,
        limits,
        context=parse_tokens(context),
        batch=batch,
        accelerator=ACCELERATORS[accelerator] if accelerator else None,
        axes=axes,
        engine="transformers5" if engine == "transformers" else engine,
        forms=None if forms is None else _words("--forms", forms, FORMS),
        # A header is padded to a place in a block of 4096 bytes, and has no more tensors than its source's.
        header_bytes=sum(header.data_start + 4096 for header in checkpoint.headers),
        tied=_with_tied_blocks(plan, checkpoint) if "tie" in axes else None,
    )
    if not budget.costs.kv_known:
        console.warning("its attention layout is not known, so the KV cache is not counted")
    if budget.fits_already:
        _say_it_fits(budget, as_json=flags.as_json)
        return
    budget.check()
    if looking or plan is None:
        write_front(flags.picture, checkpoint.name, budget, None)
        if flags.as_json:
            console.json(shapes_document(budget))
        else:
            measure = "which of them costs least, --text FILE finds out"
            make = "drop-experts and rescale --top-k make them of this GGUF; fit with --text wants the original"
            show_shapes(budget, measure if checkpoint.gguf is None else make)
        return
    _search(plan, model, budget, (by, measured, repaired), options, flags, plan_file)


def _search(
    plan: Plan,
    model: str,
    budget: Budget,
    how: tuple[Any, int, int],
    options: CalibrationOptions,
    flags: WriterFlags,
    plan_file: Path | None,
) -> None:
    """Search, show what was found, and write the winner as the flags say."""
    from moesurgery.fitting.fit_search import SearchOptions, best_fit
    from moesurgery.write.plan_document import plan_of_steps

    by, measured, repaired = how
    output = flags.folder or Path(f"{default_name(plan)}-fit")
    found = best_fit(
        plan,
        budget,
        SearchOptions(measured, repaired, None if by == "auto" else by),
        options,
        output,
        force=flags.force,
        reporter=_run_options.reporter,
    )
    write_front(flags.picture, plan.checkpoint.name, budget, found)
    if not flags.as_json and not flags.print_recipe:
        show_fitted(budget, found)
    recipe = Recipe(model, found.steps, origin="command line", max_shard_size=flags.shard_bytes)
    written = recipe.finished(found.plan)
    if plan_file is not None and not flags.print_recipe:
        choosing = [step for step in found.plan.steps if find_operation(step.operation).chooses]
        criterion = {"shape": found.winner.shape.name, "by": found.by}
        write_plan_file(plan_of_steps(plan, choosing, "fit", criterion, found.about), plan_file, flags)
    shown = document_of(budget, found)
    carry_out(recipe, replace(flags, output=flags.output or str(output), picture=None), written, more=shown)


def _with_tied_blocks(plan: Plan | None, checkpoint: Checkpoint) -> tuple[Anatomy, Mapping[str, Expr]]:
    """Return the model with pairs of blocks tied, of which only headers may be there. Raises RefusedError."""
    if plan is None:
        shard_of = {name: info.file for name, info in checkpoint.tensors.items()}
        plan = Plan((checkpoint,), _expressions(checkpoint), shard_of, checkpoint.config)
    tied = apply(plan, "tie-blocks", **TIE)
    return tied.anatomy, tied.tensors


def _expressions(checkpoint: Checkpoint) -> dict[str, Expr]:
    """Return the tensors of a checkpoint of which only headers may be there."""
    return {name: Stored(checkpoint.source, info) for name, info in checkpoint.tensors.items()}


def _chosen_axes(only: str | None, keep: str | None) -> list[str]:
    chosen = list(USUAL_AXES) if only is None else _words("--only", only, AXES)
    kept = [] if keep is None else _words("--keep", keep, AXES)
    left = [axis for axis in chosen if axis not in kept]
    if not left:
        raise RecipeError("--only and --keep leave nothing to change", f"the axes are {_AXES}")
    return left


def _words(option: str, text: str, known: Any) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise RecipeError(f"{option}: {word!r} is not known", f"known: {', '.join(known)}")
    return words


def _say_it_fits(budget: Budget, *, as_json: bool) -> None:
    cost = budget.costs.of(budget.original)
    if as_json:
        console.json({"schema_version": 1, "fits": True, **asdict(cost)})
        return
    console.result(
        f"it fits as it is: {human_bytes(cost.weight_bytes)} of weights and {human_bytes(cost.kv_bytes)} of KV cache,"
        f" in {human_bytes(budget.limits.memory)}; nothing is written"
    )
