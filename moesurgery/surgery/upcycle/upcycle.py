"""Make a mixture of experts of one dense model, or of several of one shape.

What the experts are and why step 0 is exact: `upcycling.design`. Which type becomes which: `decoders.pairs`. Every
upcycle is proved on a shrunk clone: `upcycling.proof`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.clients import CLIENTS
from moesurgery.families.quantisation_settings import with_renamed_modules
from moesurgery.families.quantised import quantisation_config
from moesurgery.plan.plan import Plan, Step
from moesurgery.plan.side_files import quantisation_files
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.surgery.client_form import ClientName, obstacles
from moesurgery.surgery.upcycle.dense_model import DenseModel, dense_model_of
from moesurgery.surgery.upcycle.dense_sources import (
    DenseSource,
    ExpertSource,
    branches,
    open_sources,
    parents,
)
from moesurgery.surgery.upcycle.design import Design, Split, check_design, design_for
from moesurgery.surgery.upcycle.mixture import Mixture
from moesurgery.surgery.upcycle.routers import known_rows
from moesurgery.surgery.upcycle.target_type import choose_pair

_ONLY_MEASURED = ("verify", "text")  # parameters that change nothing in the output: their results are in the report
RouterKind = Literal["random", "uniform", "zero", "hidden", "hidden_avg", "cheap_embed"]


@operation("upcycle")
def upcycle(
    plan: Plan,
    *,
    experts: Annotated[
        int | None, Param("experts per layer; as many as there are sources by default", minimum=1, metavar="E")
    ] = None,
    top_k: Annotated[
        int | None, Param("experts per token; 2 by default, or the granularity", minimum=1, metavar="K")
    ] = None,
    to: Annotated[
        str | list[str] | None,
        Param("type to write, or several to choose from; the first exact one by default", metavar="TYPE"),
    ] = None,
    granularity: Annotated[
        int, Param("slices of a group of experts: every expert is a slice of the FFN", minimum=1, metavar="G")
    ] = 1,
    split: Annotated[
        Split | None, Param("cut the FFN itself into the experts, without copies, by this division of its neurons")
    ] = None,
    shared_expert: Annotated[
        float | None, Param("share of the FFN that a shared expert carries", minimum=0, maximum=1, metavar="SHARE")
    ] = None,
    sources: Annotated[
        list[str | ExpertSource] | None, Param("models or entries that the experts come from, in turn", reads="model")
    ] = None,
    shared_source: Annotated[ExpertSource | None, Param("where the shared expert comes from; the base model")] = None,
    rest: Annotated[
        Literal["base", "average"], Param("everything but the FFNs, with several sources: the base's, or their average")
    ] = "base",
    router: Annotated[
        RouterKind | str,
        Param(
            "random, uniform, zero, from prompts (hidden, hidden_avg, cheap_embed), or a safetensors file of rows",
            reads="file",
        ),
    ] = "random",
    router_std: Annotated[
        float | None, Param("standard deviation of a random router; initializer_range by default", minimum=0)
    ] = None,
    renormalise: Annotated[bool, Param("make the chosen gates sum to 1, where the type leaves a choice")] = True,
    reinit: Annotated[
        float, Param("draw this share of each expert's neurons anew (Drop-Upcycling)", minimum=0, maximum=1)
    ] = 0.0,
    noise: Annotated[float, Param("noise on the experts, in standard deviations of each tensor", minimum=0)] = 0.0,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, Param("type of all weights, if not the source's")
    ] = None,
    seed: Annotated[int, Param("seed of everything random", minimum=0)] = 0,
    client: Annotated[
        ClientName | None, Param("choose a type that this program runs exactly, or refuse", option="--for")
    ] = None,
    proof: Annotated[bool, Param("prove the rewrite on a shrunk clone")] = True,
    verify: Annotated[bool, Param("compare the real models' logits on a prompt before anything is written")] = False,
    text: Annotated[
        list[str] | None,
        Param("text files to measure the loss of both models on, before anything is written", reads="file"),
    ] = None,
) -> Plan:
    """Make a mixture of experts of a dense model, equal to it at step 0.

    Every expert is a copy of the FFN, or, with `granularity`, a slice of it; gates sum to 1, so the output is the
    dense model's until training moves the experts apart. `split` cuts one FFN into experts without growth, which is
    not exact below all experts. What pays: upcycling wins where the budget for the mixture is well below what the
    dense model cost; at about twice that budget training from scratch catches up (arXiv 2406.06563, 2409.02060), and
    heavily trained models gain less (arXiv 2502.03009).
    """
    given: dict[str, Any] = {
        "experts": experts,
        "top_k": top_k,
        "to": to,
        "granularity": granularity,
        "split": split,
        "shared_expert": shared_expert,
        "sources": sources,
        "shared_source": shared_source,
        "rest": rest,
        "router": router,
        "router_std": router_std,
        "renormalise": renormalise,
        "reinit": reinit,
        "noise": noise,
        "dtype": dtype,
        "seed": seed,
        "client": client,
        "verify": verify,
        "text": text,
    }
    count, k = _counts(experts, top_k, granularity, split, len(sources or []))
    pair, conversion = choose_pair(
        plan,
        to,
        shared=bool(shared_expert),
        client=CLIENTS[client] if client else None,
        routing={"experts": count, "top_k": k, "renormalise": renormalise},
    )
    base = dense_model_of(plan, pair.source)
    _refuse_named_ffns(base)
    opened = open_sources(base, sources or [])
    shared_from = open_sources(base, [shared_source])[0] if shared_source else None
    moe = pair.target.moe
    assert moe is not None
    design = design_for(
        moe,
        pair.target.family,
        experts=count,
        top_k=k,
        granularity=granularity,
        share=shared_expert,
        split=split,
        renormalise=renormalise,
    )
    check_design(design, base.layers[0].width)
    _check_sources(design, opened, rest)
    return _finished(Mixture(base, pair, conversion, moe, design, opened, shared_from, given), proof)


def _refuse_named_ffns(base: DenseModel) -> None:
    """Refuse where quantisation settings list an FFN's module by name: as several experts it has other names."""
    plan, ffn = base.plan, base.architecture.ffn
    modules = ffn.modules if ffn is not None else ()
    names = {f"{base.prefix}{layer}.{module}": None for layer in range(len(base.layers)) for module in modules}
    settings = [("config.json: quantization_config", quantisation_config(plan.config))]
    for file, content in (*settings, *quantisation_files(plan.checkpoint, plan.files)):
        if with_renamed_modules(content, names, file) != content:
            raise RefusedError(
                f"upcycle: {file} names modules of FFNs one by one, which become experts of other names",
                "name them there by an expression that fits experts too, or take the entries out",
            )


def _counts(
    experts: int | None, top_k: int | None, granularity: int, split: Split | None, entries: int
) -> tuple[int, int]:
    if experts is None:
        if not entries:
            raise RecipeError("upcycle: how many experts?", "give --experts E, or `sources`")
        experts = entries * granularity
    if split and granularity != 1:
        raise RecipeError("upcycle: --split and --granularity are two ways to cut the FFN", "choose one of them")
    if top_k is None:
        top_k = granularity if granularity > 1 else min(2, experts)
    return experts, top_k


def _check_sources(design: Design, sources: list[DenseSource], rest: str) -> None:
    if design.split and len(sources) > 1:
        raise RefusedError("upcycle: --split cuts one FFN into experts", "give one source")
    if sources and not design.split and design.groups % len(sources):
        raise RefusedError(
            f"upcycle: {len(sources)} sources cannot fill {design.groups} groups of experts evenly",
            f"choose --experts {len(sources) * design.granularity} or a multiple",
        )
    if rest == "average" and len(branches_of(sources)) < 2:
        raise RefusedError("upcycle: `rest: average` needs at least two different models in `sources`")


def branches_of(sources: list[DenseSource]) -> list[DenseModel]:
    """Return the different models among the sources of an upcycle."""
    return branches(sources[0].dense, sources) if sources else []


def _finished(mixture: Mixture, proof: bool) -> Plan:
    """Return the plan of a mixture, proved and measured as far as was asked for."""
    base, design, given = mixture.base, mixture.design, mixture.given
    known = known_rows(given["router"], base, mixture.sources, design)
    tensors, shard_of = mixture.tensors(known.layers if known else None)
    inexact, rounded = mixture.inexact(), mixture.rounded()
    if inexact:
        details = [f"step 0 differs from the dense model: {'; '.join(inexact)}"]
    else:
        but = f" up to rounding ({'; '.join(rounded)})" if rounded else ""
        details = [f"step 0 equals the dense model{but}: {design.why_exact()}"]
    if design.routed_factor != 1 and not mixture.moe.input_gates:
        details.append(f"the experts' down-projections take the factor {design.routed_factor:g}")
    report: dict[str, Any] = {
        "source": mixture.pair.source_type,
        "target": mixture.pair.target_type,
        "experts": design.experts,
        "top_k": design.top_k,
        "granularity": design.granularity,
        "shared": design.share,
        "routed_factor": design.routed_factor,
        "exact": not inexact,
        "inexact": inexact,
        "rounded": rounded,
        "load": known.loads if known else None,
    }
    if proof:
        from moesurgery.surgery.upcycle.proof import prove

        proved = prove(base, mixture.pair, given, upcycle)
        report["proof"] = proved.report
        details.append(proved.text)
    config = mixture.config()
    unread = {name: reasons for name, client in CLIENTS.items() if (reasons := obstacles(client, base.plan, config))}
    report["clients"] = unread
    notes = [f"not exact in {name}: {'; '.join(reasons)}" for name, reasons in unread.items()]
    step = Step(
        "upcycle",
        {k: v for k, v in given.items() if v is not None and k not in _ONLY_MEASURED},
        f"{mixture.pair.source_type} -> {mixture.pair.target_type}: {design.experts} experts, top-{design.top_k}",
        tuple(details),
        report,
        (*mixture.notes(exact=not inexact), *notes),
        (known.table,) if known and known.table else (),
        parents=parents(given, mixture.sources, mixture.shared_from),
    )
    made = base.plan.edited(step, tensors=tensors, config=config, shard_of=shard_of)
    others = [d.plan.checkpoint for d in branches(base, mixture.all_sources()) if d is not base]
    made = replace(made, sources=(*base.plan.sources, *others))
    return _measured(made, base.plan, given["text"] or [], verify=given["verify"])


def _measured(made: Plan, dense: Plan, texts: list[str], *, verify: bool) -> Plan:
    """Return the plan with what was asked to be measured on the real models in its last step."""
    step = made.steps[-1]
    details, report = list(step.details), dict(step.report)
    if verify:
        from moesurgery.surgery.upcycle.outcome import logits_compared

        line, report["verified"] = logits_compared(dense, made, texts, exact=report["exact"] and not report["rounded"])
        details.append(line)
    if texts:
        from moesurgery.surgery.upcycle.outcome import loss_compared

        line, report["measured"] = loss_compared(dense, made, texts)
        details.append(line)
    return replace(made, steps=(*made.steps[:-1], replace(step, details=tuple(details), report=report)))
