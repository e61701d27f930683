"""`moesurgery perplexity` and `compare`: held-out loss of checkpoints and of recipes never written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.cli import _run_options
from moesurgery.cli._console import console
from moesurgery.cli._writing import Json, Quiet
from moesurgery.errors import RecipeError
from moesurgery.fitting.run_settings import AUTO, WINDOW, RunSettings

if TYPE_CHECKING:
    from moesurgery.forward.loss import Loss


def perplexity_command(
    model: _run_options.ModelOrRecipe,
    text: Annotated[list[str], typer.Argument(help=f"Files, one domain each: {_run_options.TEXT_FORMS}.")],
    window: _run_options.Window = WINDOW,
    limit: _run_options.Limit = None,
    seed: _run_options.Seed = None,
    dtype: _run_options.DtypeOption = AUTO,
    device: _run_options.DeviceOption = "cpu",
    memory: _run_options.Memory = "",
    apart: _run_options.Apart = False,
    assistant_only: _run_options.AssistantOnly = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model's loss and perplexity on text it was not trained on.

    The model is run layer by layer, so it may be larger than memory, and a recipe is measured without being
    written. In a text file, form feeds separate documents.
    """
    console.quiet = quiet
    settings = RunSettings(window, limit, seed, device, dtype, memory, apart, assistant_only)
    settings.check()
    plan = _run_options.subject(model)
    domains = settings.domains(plan.checkpoint, text)

    from moesurgery.forward.loss import losses, mean_loss

    engine = settings.engine(plan)
    work = sum(d.windows.numel() for d in domains) * len(engine.layers)
    with console.progress("evaluating", work, of_bytes=False) as watch:
        found = losses(engine, domains, watch.progress)
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "model": plan.checkpoint.source.identity,
                "window": window,
                "dtype": settings.computed_in,
                "domains": [_entry(f) for f in (*found, mean_loss(found))],
            }
        )
        return
    shown = found if len(found) == 1 else [*found, mean_loss(found)]
    rows = [(f.domain, f"{f.tokens:,}", f"{f.nats:.4f}", f"{f.perplexity:.3f}") for f in shown]
    console.table(("text", "tokens", "nats/token", "perplexity"), rows, right=(1, 2, 3))


def compare_command(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, and recipes of some never written; the first is the reference.")
    ],
    text: _run_options.Texts,
    window: _run_options.Window = WINDOW,
    limit: _run_options.Limit = None,
    seed: _run_options.Seed = None,
    dtype: _run_options.DtypeOption = AUTO,
    device: _run_options.DeviceOption = "cpu",
    memory: _run_options.Memory = "",
    apart: _run_options.Apart = False,
    assistant_only: _run_options.AssistantOnly = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models side by side: loss on each text, and KL divergence from the first model.

    All run layer by layer. A recipe gives the figures that its written checkpoint would give.
    """
    console.quiet = quiet
    settings = RunSettings(window, limit, seed, device, dtype, memory, apart, assistant_only)
    settings.check()
    if len(models) < 2:
        raise RecipeError("compare needs two models or more", "`moesurgery perplexity` measures one")
    plans = [_run_options.subject(model) for model in models]
    domains = settings.domains(plans[0].checkpoint, text)

    from moesurgery.forward.loss import compared, mean_loss

    engines = [settings.engine(plan) for plan in plans]
    work = sum(d.windows.numel() for d in domains) * sum(len(engine.layers) for engine in engines)
    with console.progress("evaluating", work, of_bytes=False) as watch:
        found = [[*losses, mean_loss(losses)] for losses in compared(engines, domains, watch.progress)]
    names = _names(models)
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "window": window,
                "dtype": settings.computed_in,
                "reference": names[0],
                "models": [
                    {"name": name, "reference": model, "domains": [_entry(loss) for loss in losses]}
                    for name, model, losses in zip(names, models, found, strict=True)
                ],
            }
        )
        return
    header = ["model", *(d.name for d in domains)] + (["all"] if len(domains) > 1 else []) + ["over the first", "KL"]
    rows = []
    for name, losses in zip(names, found, strict=True):
        total = losses[-1]
        shown = losses if len(domains) > 1 else losses[:1]
        distance = "" if total.divergence is None else f"{total.divergence:.5f}"
        over = "" if total.divergence is None else f"{total.nats - found[0][-1].nats:+.4f}"
        rows.append((name, *(f"{loss.nats:.4f}" for loss in shown), over, distance))
    console.table(header, rows, right=range(1, len(header)))
    console.note(f"nats per token over {found[0][-1].tokens:,} predicted tokens; KL from {names[0]}")


def _entry(loss: Loss) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": loss.domain,
        "tokens": loss.tokens,
        "nats": loss.nats,
        "perplexity": loss.perplexity,
    }
    if loss.divergence is not None:
        entry["kl"] = loss.divergence
    return entry


def _names(models: list[str]) -> list[str]:
    """Return the last part of each path; the whole where two are alike."""
    short = [Path(model).name or model for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]
