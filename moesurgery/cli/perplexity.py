"""`moesurgery perplexity`: held-out loss of checkpoints and of recipes never written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.cli import _run_options
from moesurgery.cli._common_options import Json, Quiet
from moesurgery.cli._console import console
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

    from moesurgery.forward.loss import losses_over, mean_loss
    from moesurgery.forward.tokens import joined

    engines = settings.engines(plan, joined([domain.as_tokens for domain in domains]))
    work = sum(d.windows.numel() for d in domains) * len(engines[0].layers)
    with console.progress("evaluating", work, of_bytes=False) as watch:
        domain_losses = losses_over(engines, domains, watch.progress)
    if as_json:
        console.json(
            {
                "schema_version": 1,
                "model": plan.checkpoint.source.identity,
                "window": window,
                "dtype": settings.computed_in,
                "domains": [domain_entry(f) for f in (*domain_losses, mean_loss(domain_losses))],
            }
        )
        return
    shown = domain_losses if len(domain_losses) == 1 else [*domain_losses, mean_loss(domain_losses)]
    rows = [(f.domain, f"{f.tokens:,}", f"{f.nats:.4f}", f"{f.perplexity:.3f}") for f in shown]
    console.table(("text", "tokens", "nats/token", "perplexity"), rows, right=(1, 2, 3))


def domain_entry(loss: Loss) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": loss.domain,
        "tokens": loss.tokens,
        "nats": loss.nats,
        "perplexity": loss.perplexity,
    }
    if loss.divergence is not None:
        entry["kl"] = loss.divergence
    return entry
