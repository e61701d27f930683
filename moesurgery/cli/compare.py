"""`moesurgery compare`: models side by side on the same text, and how far each is from the first, token by token."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurgery.cli import _run_options
from moesurgery.cli._common_options import Json, Quiet
from moesurgery.cli._console import console
from moesurgery.cli._evidence import Evidence, EvidenceSection, ReportKinds, check_reports, command_line, write_evidence
from moesurgery.cli._pictures import Bars, Heatmap
from moesurgery.cli.perplexity import domain_entry
from moesurgery.errors import RecipeError
from moesurgery.fitting.run_settings import AUTO, WINDOW, RunSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from moesurgery.checkpoint.checkpoint import Checkpoint
    from moesurgery.forward.comparison import TokenDistance, WorstWindow
    from moesurgery.forward.generation import Continuations
    from moesurgery.forward.loss import Loss
    from moesurgery.forward.text_windows import Domain
    from moesurgery.plan.plan import Plan

_WORST = 3  # windows shown of each model
_SHOWN = 160  # characters of their text
_PROMPT = 32  # tokens at most


def compare_command(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints, and recipes of some never written; the first is the reference.")
    ],
    text: _run_options.Texts,
    window: _run_options.Window = WINDOW,
    limit: _run_options.Limit = None,
    details: Annotated[
        bool,
        typer.Option("--details", help="Also show tables by text and by class of token, and the worst windows."),
    ] = False,
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="Also let every model continue this many prompts from the texts.")
    ] = 0,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of a continuation at most.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Sample continuations at this temperature; 0: the likeliest.")
    ] = 0.0,
    seed: _run_options.Seed = None,
    dtype: _run_options.DtypeOption = AUTO,
    device: _run_options.DeviceOption = "cpu",
    memory: _run_options.Memory = "",
    apart: _run_options.Apart = False,
    assistant_only: _run_options.AssistantOnly = False,
    report: ReportKinds = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models side by side: loss on each text, and how far each is from the first model.

    All run layer by layer. A recipe gives the figures that its written checkpoint would give. Beside the KL
    divergence: how often both have the same likeliest token, the sum of the lesser of both probabilities (what
    speculative decoding would accept), and 95 % intervals by bootstrap over windows. With --details also by class of
    token, such as end tokens and marks of thinking, which a mean hides; --json has everything.

    --generate loads each model whole, so it has to fit: it says how many continuations loop, and how many end.
    --report html writes EDITED.report.html here, after the second model; card is Markdown for its README.
    """
    console.quiet = quiet
    check_reports(report or ())
    settings = RunSettings(window, limit, seed, device, dtype, memory, apart, assistant_only)
    settings.check()
    if len(models) < 2:
        raise RecipeError("compare needs two models or more", "`moesurgery perplexity` measures one")
    plans = [_run_options.subject(model) for model in models]
    domains = settings.domains(plans[0].checkpoint, text)

    from moesurgery.forward.comparison import targets, worst_windows
    from moesurgery.forward.loss import compared_over, mean_loss
    from moesurgery.forward.token_classes import token_classes
    from moesurgery.forward.tokens import joined

    groups = settings.groups(plans, joined([domain.as_tokens for domain in domains]))
    work = sum(d.windows.numel() for d in domains) * sum(len(engine.layers) for engine in groups[0])
    with console.progress("evaluating", work, of_bytes=False) as watch:
        by_model = [[*losses, mean_loss(losses)] for losses in compared_over(groups, domains, watch.progress)]
    names = _names(models)
    classes = token_classes(plans[0].checkpoint, targets(domains))
    worst = [worst_windows(domains, by_model[0], losses, _WORST) for losses in by_model]
    spoken = _continuations(plans, domains, settings, generate, new_tokens, temperature) if generate else None
    entries = []
    for i, (name, model, losses) in enumerate(zip(names, models, by_model, strict=True)):
        entry: dict[str, Any] = {"name": name, "reference": model}
        entry["domains"] = [_entry(base, loss, i) for base, loss in zip(by_model[0], losses, strict=True)]
        if i:
            entry["classes"] = [
                {"name": c, **distance.as_json()} for c, distance in _by_class(by_model[0][-1], losses[-1], classes)
            ]
            entry["worst"] = [_window_entry(plans[0].checkpoint, domains, w) for w in worst[i]]
        if spoken:
            entry["generated"] = {key: getattr(spoken[i], key) for key in ("prompts", "loops", "ends", "tokens")}
        entries.append(entry)
    for kind in report or ():
        path = Path(f"{names[1]}.report.{'md' if kind == 'card' else kind}".replace("/", "-"))
        write_evidence(_report(entries), kind, path)
        console.note(f"the report is in {path}")
    if as_json:
        document = {"schema_version": 1, "window": window, "dtype": settings.computed_in, "reference": names[0]}
        console.json({**document, "models": entries})
        return
    header = ["model", *(d.name for d in domains)] + (["all"] if len(domains) > 1 else []) + ["over the first", "KL"]
    rows = []
    for name, losses in zip(names, by_model, strict=True):
        total = losses[-1]
        shown = losses if len(domains) > 1 else losses[:1]
        divergence = "" if total.divergence is None else f"{total.divergence:.5f}"
        over = "" if total.divergence is None else f"{total.nats - by_model[0][-1].nats:+.4f}"
        rows.append((name, *(f"{loss.nats:.4f}" for loss in shown), over, divergence))
    console.table(header, rows, right=range(1, len(header)))
    console.note(f"nats per token over {by_model[0][-1].tokens:,} predicted tokens; KL from {names[0]}")
    for name, losses in zip(names[1:], by_model[1:], strict=True):
        console.note(f"{name}: {_in_short(by_model[0][-1], losses[-1])}")
    if details:
        _show_details(names, plans[0].checkpoint, domains, by_model, classes, worst)
    if spoken:
        console.result()
        console.table(
            ("model", "continuations", "that loop", "that end"),
            [
                (name, str(s.prompts), f"{100 * s.loops:.0f} %", f"{100 * s.ends:.0f} %")
                for name, s in zip(names, spoken, strict=True)
            ],
            right=(1, 2, 3),
        )


def _by_class(reference: Loss, model: Loss, classes: dict[str, Any]) -> list[tuple[str, TokenDistance]]:
    from moesurgery.forward.comparison import token_distance

    distances = [(name, token_distance(reference, model, chosen)) for name, chosen in classes.items()]
    return [(name, distance) for name, distance in distances if distance.tokens]


def _entry(reference: Loss, loss: Loss, number: int) -> dict[str, Any]:
    """Return what JSON has of one text and model; of all but the first with the distance from it."""
    from moesurgery.forward.comparison import over_interval

    entry = domain_entry(loss)
    if number:
        entry |= {"agreement": loss.agreement, "overlap": loss.overlap, "over": loss.nats - reference.nats}
        entry["interval"] = over_interval(reference, loss)
    return entry


def _report(entries: Sequence[dict[str, Any]]) -> Evidence:
    """Return the report of a comparison, from what JSON has of each model."""
    first, *others = entries
    texts = [domain["name"] for domain in first["domains"]]
    sections = [
        EvidenceSection(
            "Loss, nats per token",
            ("model", *texts),
            [(e["name"], *(f"{d['nats']:.4f}" for d in e["domains"])) for e in entries],
        ),
        EvidenceSection(
            "Loss over the first, by text",
            ("model", *texts),
            [
                (
                    e["name"],
                    *(f"{d['over']:+.4f} ({d['interval'][0]:+.4f} to {d['interval'][1]:+.4f})" for d in e["domains"]),
                )
                for e in others
            ],
            Heatmap(
                "nats per token over the first",
                [e["name"] for e in others],
                texts,
                [[d["over"] for d in e["domains"]] for e in others],
                across="text",
            ),
        ),
        EvidenceSection(
            "How often both have the same likeliest token",
            ("model", *texts),
            [(e["name"], *(f"{100 * d['agreement']:.1f} %" for d in e["domains"])) for e in others],
            Heatmap(
                "share of tokens",
                [e["name"] for e in others],
                texts,
                [[100 * d["agreement"] for d in e["domains"]] for e in others],
                "%",
                across="text",
            ),
        ),
    ]
    for e in others:
        sections.append(
            EvidenceSection(
                f"{e['name']}: by class of the token that is predicted",
                ("class", "tokens", "over the first", "KL", "same top-1", "sum min(p, q)"),
                [
                    (c["name"], f"{c['tokens']:,}", *_figures(c["over"], c["kl"], c["agreement"], c["overlap"]))
                    for c in e["classes"]
                ],
                Bars(
                    "nats per token over the first",
                    [c["name"] for c in e["classes"]],
                    [c["over"] for c in e["classes"]],
                ),
            )
        )
        sections.append(
            EvidenceSection(
                f"{e['name']}: the windows that lost most",
                ("text", "window", "over the first", "begins"),
                [
                    (w["domain"], str(w["window"]), f"{w['over']:+.4f}", " ".join(w["text"].split())[:_SHOWN])
                    for w in e["worst"]
                ],
            )
        )
    if "generated" in first:
        generated = [(e["name"], e["generated"]) for e in entries]
        rows = [(n, str(g["prompts"]), f"{100 * g['loops']:.0f} %", f"{100 * g['ends']:.0f} %") for n, g in generated]
        sections.append(EvidenceSection("Continuations", ("model", "prompts", "that loop", "that end"), rows))
    about = f"{first['domains'][-1]['tokens']:,} predicted tokens; intervals are 95 % by bootstrap over windows"
    title = f"{', '.join(e['name'] for e in others)} against {first['name']}"
    return Evidence(title, about, sections, {"models": list(entries)}, command_line())


def _in_short(reference: Loss, loss: Loss) -> str:
    from moesurgery.forward.comparison import over_interval

    low, high = over_interval(reference, loss)
    return (
        f"{loss.nats - reference.nats:+.4f} over the first, 95 % interval {low:+.4f} to {high:+.4f}; the same likeliest"
        f" token at {100 * (loss.agreement or 0):.1f} %; sum of the lesser probabilities {loss.overlap:.4f}"
    )


def _show_details(
    names: Sequence[str],
    checkpoint: Checkpoint,
    domains: Sequence[Domain],
    found: Sequence[Sequence[Loss]],
    classes: dict[str, Any],
    worst: Sequence[Sequence[WorstWindow]],
) -> None:
    """Print for all but the first model how far it is from it: by text, by class of token, and where most."""
    from moesurgery.forward.comparison import over_interval

    for name, losses, windows in zip(names[1:], found[1:], worst[1:], strict=True):
        console.result(f"\n{name} against {names[0]}")
        rows = []
        for base, loss in zip(found[0], losses, strict=True):
            low, high = over_interval(base, loss)
            figures = (loss.nats - base.nats, loss.divergence or 0.0, loss.agreement or 0.0, loss.overlap or 0.0)
            over, *rest = _figures(*figures)
            rows.append((loss.domain, f"{loss.tokens:,}", over, f"{low:+.4f} to {high:+.4f}", *rest))
        usual = ("KL", "same top-1", "sum min(p, q)")
        console.table(("text", "tokens", "over the first", "95 % interval", *usual), rows, right=range(1, 7))
        console.result()
        rows = [
            (c, f"{a.tokens:,}", *_figures(a.over, a.kl, a.agreement, a.overlap))
            for c, a in _by_class(found[0][-1], losses[-1], classes)
        ]
        console.table(("class of token", "tokens", "over the first", *usual), rows, right=range(1, 6))
        console.result("\nthe windows that lost most:")
        for window in windows:
            entry = _window_entry(checkpoint, domains, window)
            text = " ".join(entry["text"].split())[:_SHOWN]
            console.result(f"  {window.over:+.4f}  {window.domain} {window.window}: {text}")


def _figures(over: float, kl: float, agreement: float, overlap: float) -> tuple[str, str, str, str]:
    return f"{over:+.4f}", f"{kl:.5f}", f"{100 * agreement:.1f} %", f"{overlap:.4f}"


def _window_entry(checkpoint: Checkpoint, domains: Sequence[Domain], window: WorstWindow) -> dict[str, Any]:
    """Return a window with its text, which is empty where there is no tokenizer."""
    from moesurgery.checkpoint.filenames import TOKENIZER
    from moesurgery.forward.text_windows import load_tokenizer

    ids = _real(next(d for d in domains if d.name == window.domain), window.window).tolist()
    text = (
        load_tokenizer(checkpoint).decode(ids, skip_special_tokens=False) if TOKENIZER in checkpoint.file_sizes else ""
    )
    return {"domain": window.domain, "window": window.window, "over": window.over, "text": text}


def _real(domain: Domain, window: int) -> torch.Tensor:
    """Return the tokens [S] of a window without its padding."""
    ids = domain.windows[window]
    return ids if domain.mask is None else ids[domain.mask[window]]


def _continuations(
    plans: Sequence[Plan],
    domains: Sequence[Domain],
    settings: RunSettings,
    count: int,
    new_tokens: int,
    temperature: float,
) -> list[Continuations]:
    """Let every model continue the beginnings of `count` windows, taken from the texts in turn."""
    from moesurgery.forward.generation import continuations
    from moesurgery.forward.token_classes import end_tokens

    most = max(len(d.windows) for d in domains)
    rows = [_real(d, i) for i in range(most) for d in domains if i < len(d.windows)]
    prompts = [row[: min(_PROMPT, max(1, len(row) // 2))] for row in rows[:count]]
    ends = end_tokens(plans[0].checkpoint)
    by_model = []
    for plan in plans:
        with _written(plan) as folder:
            by_model.append(
                continuations(folder, prompts, ends, new_tokens, temperature, settings.device, settings.computed_in)
            )
    return by_model


@contextmanager
def _written(plan: Plan) -> Iterator[Path]:
    """Give a folder with the plan's checkpoint: its own where nothing was edited, else one for the time being."""
    from moesurgery.write.write_plan import write_plan

    config = plan.checkpoint.source.local("config.json")
    if not plan.steps and config is not None:
        yield config.parent
        return
    with tempfile.TemporaryDirectory() as place:
        yield Path(write_plan(plan, Path(place, "model")).path)


def _names(models: list[str]) -> list[str]:
    """Return the last part of each path; the whole where two are alike."""
    short = [Path(model).name or model for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]
