"""Make a mixture of experts of one dense model, or of several of one shape.

What the experts are and why step 0 is exact: `upcycling.design`. Which type becomes which: `families.pairs`. Every
upcycle is proved on a shrunk clone: `upcycling.proof`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.families.anatomy import model_type_of
from moesurgery.families.architectures.architecture import Moe
from moesurgery.families.pairs import NO_PAIR, Conversion, Pair, pairs_from, source_types, target_types
from moesurgery.plan.expr import Expr, cast
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.tensors import Filled
from moesurgery.surgery.operation import did_you_mean, operation
from moesurgery.surgery.parameters import Param
from moesurgery.surgery.upcycling import routers
from moesurgery.surgery.upcycling.dense import DenseModel, take_apart
from moesurgery.surgery.upcycling.design import Design, Split, check_design, design_for, router_settings
from moesurgery.surgery.upcycling.experts import (
    Changes,
    Ingredient,
    as_type,
    routed_tensors,
    shared_settings,
    shared_tensors,
)
from moesurgery.surgery.upcycling.sources import (
    ExpertSource,
    Source,
    averaged,
    branches,
    different_traits,
    in_dtype,
    open_sources,
    parameters_without_paths,
)

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000  # experts make shards grow: none larger than this, or than the source's largest
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FROM_PROMPTS = ("hidden", "hidden_avg", "cheap_embed")
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
        list[str | ExpertSource] | None, Param("models or entries that the experts come from, in turn")
    ] = None,
    shared_source: Annotated[ExpertSource | None, Param("where the shared expert comes from; the base model")] = None,
    rest: Annotated[
        Literal["base", "average"], Param("everything but the FFNs, with several sources: the base's, or their average")
    ] = "base",
    router: Annotated[
        RouterKind | str,
        Param("random, uniform, zero, from prompts (hidden, hidden_avg, cheap_embed), or a safetensors file of rows"),
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
        Literal["float32", "bfloat16", "float16"] | None, Param("type of all weights; the source's by default")
    ] = None,
    seed: Annotated[int, Param("seed of everything random", minimum=0)] = 0,
    proof: Annotated[bool, Param("prove the rewrite on a shrunk clone")] = True,
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
    }
    pair, conversion = choose_pair(plan, to, shared=bool(shared_expert))
    base = take_apart(plan, pair.source)
    opened = open_sources(base, sources or [])
    shared_from = open_sources(base, [shared_source])[0] if shared_source else None
    count, k = _counts(experts, top_k, granularity, split, len(opened))
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
    made = _Upcycled(base, pair, conversion, moe, design, opened, shared_from, given)
    return made.plan(proof)


def choose_pair(plan: Plan, to: str | list[str] | None, *, shared: bool) -> tuple[Pair, Conversion]:
    """Return the pair for a dense plan: the first among those asked for that is exact for this very config.

    Raises RefusedError with what would be lost, and the nearest pair that works.
    """
    if plan.anatomy.is_moe:
        raise RefusedError(
            f"upcycle: this is a mixture of experts already ({plan.anatomy.model_type})",
            "upcycling starts from a dense model",
        )
    model_type = model_type_of(plan.config)
    pairs = pairs_from(model_type)
    if not pairs:
        reason = NO_PAIR.get(model_type)
        raise RefusedError(
            f"upcycle: {model_type}: " + (f"no exact pair exists: {reason}" if reason else "this type is not known"),
            "known: " + ", ".join(source_types()),
        )
    wanted = [to] if isinstance(to, str) else to
    for name in wanted or ():
        if name not in target_types():
            hint = did_you_mean(name, target_types()) or f"known: {', '.join(target_types())}"
            raise RefusedError(f"upcycle: {name} is no type that a dense model becomes", hint)
    tried = {pair.target_type: (pair, *pair.conversion(plan.config)) for pair in pairs}
    for pair, _, reasons in tried.values():
        if shared and not reasons and (pair.target.moe is None or pair.target.moe.shared is None):
            reasons.append("it has no shared expert")
    working = {name: (pair, conversion) for name, (pair, conversion, reasons) in tried.items() if not reasons}
    for name in wanted or working:
        if name in working:
            return working[name]
    lost = []
    for name in wanted or tried:
        reasons = tried[name][2] if name in tried else Pair(model_type, name).conversion(plan.config)[1]
        lost.append(f"{name}: {'; '.join(reasons) or 'this pair was never measured to be exact'}")
    nearest = next(iter(working), None)
    raise RefusedError(
        f"upcycle: this {model_type} would lose something as {', or '.join(lost)}",
        f"the nearest type that keeps everything: --to {nearest}"
        if nearest
        else f"no type keeps everything; the nearest is {pairs[0].target_type}",
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


def _check_sources(design: Design, sources: list[Source], rest: str) -> None:
    if design.split and len(sources) > 1:
        raise RefusedError("upcycle: --split cuts one FFN into experts", "give one source")
    if sources and not design.split and design.groups % len(sources):
        raise RefusedError(
            f"upcycle: {len(sources)} sources cannot fill {design.groups} groups of experts evenly",
            f"choose --experts {len(sources) * design.granularity} or a multiple",
        )
    if rest == "average" and len(branches_of(sources)) < 2:
        raise RefusedError("upcycle: `rest: average` needs at least two different models in `sources`")


def branches_of(sources: list[Source]) -> list[DenseModel]:
    return branches(sources[0].dense, sources) if sources else []


@dataclass
class _Upcycled:
    """One upcycle as it is put together."""

    base: DenseModel
    pair: Pair
    conversion: Conversion
    moe: Moe
    design: Design
    sources: list[Source]
    shared_from: Source | None
    given: dict[str, Any]

    def plan(self, proof: bool) -> Plan:
        base, given = self.base, self.given
        notes = list(dict.fromkeys(rewrite.note for rewrite in self.conversion.rewrites))
        if base.dropped:
            notes.append(f"{len(base.dropped)} tables that loaders compute themselves left out")
        rows, tables, load = self._measured_rows()
        tensors, home = self._tensors(rows)
        config = self._config()
        inexact = self.inexact()
        details = []
        if inexact:
            details.append("step 0 differs from the dense model: " + "; ".join(inexact))
        else:
            details.append(f"step 0 equals the dense model: {self.design.why_exact()}")
        factor = self.design.routed_factor
        if factor != 1 and not self.moe.input_gates:
            details.append(f"the experts' down-projections take the factor {factor:g}")
        notes += self._advice(bool(inexact))
        report: dict[str, Any] = {
            "source": self.pair.source_type,
            "target": self.pair.target_type,
            "experts": self.design.experts,
            "top_k": self.design.top_k,
            "granularity": self.design.granularity,
            "shared": self.design.share,
            "routed_factor": factor,
            "exact": not inexact,
            "inexact": inexact,
            "load": load,
        }
        if proof:
            from moesurgery.surgery.upcycling.proof import prove

            found = prove(base, self.pair, given)
            report["proof"] = found.report
            details.append(found.text)
        step = Step(
            "upcycle",
            {k: v for k, v in parameters_without_paths(given, self.sources).items() if v is not None},
            f"{self.pair.source_type} -> {self.pair.target_type}: {self.design.experts} experts,"
            f" top-{self.design.top_k}",
            tuple(details),
            report,
            tuple(notes),
            tables,
        )
        made = base.plan.edited(step, tensors=tensors, config=config, home=home)
        others = [d.plan.checkpoint for d in branches(base, self.all_sources()) if d is not base]
        largest = max((h.file_size for h in base.plan.checkpoint.headers), default=0)
        return replace(
            made,
            sources=(*base.plan.sources, *others),
            max_shard_size=base.plan.max_shard_size or max(SHARD_BYTES, largest),
        )

    def all_sources(self) -> list[Source]:
        return [*self.sources, *([self.shared_from] if self.shared_from else [])]

    def inexact(self) -> list[str]:
        """Return why step 0 is not the dense model; empty where it is."""
        given, design = self.given, self.design
        found = []
        models = branches(self.base, self.all_sources())
        if len(models) > 1 or models[0] is not self.base:
            found.append(
                f"experts come from {len(models)} models" if len(models) > 1 else f"experts are {models[0].name}'s"
            )
        if any(source.scale != 1 for source in self.all_sources()):
            found.append("residual_scale changes what experts add")
        if any(source.noise for source in self.all_sources()) or given["noise"]:
            found.append("noise on the experts")
        if given["reinit"]:
            found.append(f"{given['reinit']:.0%} of each expert's neurons are drawn anew")
        if design.split and design.top_k < design.experts:
            found.append(f"a token uses {design.top_k} of the {design.experts} parts of its FFN")
        elif design.split and given["router"] != "zero":
            found.append("the parts of the FFN get unequal gates: --router zero makes them equal")
        if not design.renormalised and given["router"] != "zero":
            found.append("the gates do not sum to the same for every token: --router zero makes them equal")
        return found

    def _advice(self, inexact: bool) -> list[str]:
        """Say what training will meet."""
        design, given = self.design, self.given
        found = []
        alike = not inexact and design.granularity == 1 and not design.split
        if given["router"] == "zero":
            found.append("a router of zeros sends all tokens to the same experts until training moves it")
        elif design.top_k == 1 and design.renormalised and not design.split:
            found.append("with one expert per token and gates that sum to 1 the router never gets a gradient")
        elif alike and design.renormalised and not self.moe.input_gates:
            found.append("equal experts give the router no gradient at first: --granularity or a little --noise does")
        if design.share == 0 and self.moe.shared is not None and not self.moe.shared.optional:
            found.append("the shared expert, which this type must have, begins with a down-projection of zeros")
        if given["rest"] == "base" and (lost := different_traits(self.base, branches(self.base, self.sources))):
            found.append(f"the sources differ from the base in {', '.join(lost)}; the base's is kept")
        return found

    def _measured_rows(self) -> tuple[list[torch.Tensor] | None, tuple[Table, ...], list[list[float]] | None]:
        """Return known router rows per layer, and the load that prompts would give each expert."""
        kind: str = self.given["router"]
        if kind in ("random", "uniform", "zero"):
            return None, (), None
        if kind not in FROM_PROMPTS:
            return self._rows_from_file(kind), (), None
        from moesurgery.surgery.upcycling.prompts import rows_from_prompts

        if not self.sources or not all(source.prompts.positive for source in self.sources):
            raise RecipeError(
                f"upcycle: router {kind} needs prompts for every source", "give `prompts` in each entry of `sources`"
            )
        if len({source.prompts for source in self.sources}) == 1 and len(self.sources) > 1:
            raise RefusedError("upcycle: all sources have the same prompts, so no token could tell them apart")
        distinct = routers.distinct(self.design)
        if self.design.split or len(self.sources) != distinct:
            raise RefusedError(
                f"upcycle: {distinct} router rows are needed, and there are prompts for {len(self.sources)}: equal"
                " rows would tie",
                "give an entry with prompts for each, or --router random",
            )
        sets = min(max(1, self.design.top_k // self.design.granularity), len(self.sources))
        found = rows_from_prompts(self.base, [source.prompts for source in self.sources], kind, sets)  # type: ignore[arg-type]
        by_source = list(zip(*found.loads, strict=True))
        table = Table(
            (f"load on {found.tokens}, source", "mean", "least layer", "most layer"),
            tuple(
                (str(e), f"{sum(load) / len(load):.3f}", f"{min(load):.3f}", f"{max(load):.3f}")
                for e, load in enumerate(by_source)
            ),
        )
        return list(found.rows), (table,), found.loads

    def _rows_from_file(self, path: str) -> list[torch.Tensor]:
        from pathlib import Path

        from safetensors.torch import load_file

        if not Path(path).is_file():
            known = ("random", "uniform", "zero", *FROM_PROMPTS)
            hint = did_you_mean(path, known) or f"known: {', '.join(known)}"
            raise RecipeError(f"upcycle: router {path!r} is neither a kind of router nor a file", hint)
        tensors = load_file(path)
        hidden = self.base.layers[0].hidden
        sizes = {routers.distinct(self.design), self.design.experts}
        found = []
        for i in range(len(self.base.layers)):
            rows = tensors.get(f"layers.{i}")
            if rows is None or rows.ndim != 2 or rows.shape[1] != hidden or rows.shape[0] not in sizes:
                what = "is missing" if rows is None else f"has shape {list(rows.shape)}"
                raise RecipeError(
                    f"upcycle: {path}: layers.{i} {what}",
                    f"it should hold layers.0 … layers.{len(self.base.layers) - 1}, each"
                    f" [{routers.distinct(self.design)}, {hidden}]",
                )
            found.append(rows.float())
        return found

    def _tensors(self, rows: list[torch.Tensor] | None) -> tuple[dict[str, Expr], dict[str, str]]:
        """Return all tensors in the source's order, experts in their FFN's place, new tensors at the end.

        So copies keep the source's alignment, and a filesystem that can share their blocks does.
        """
        base, plan = self.base, self.base.plan
        models = branches(base, self.sources)
        others = averaged(base, models) if self.given["rest"] == "average" else dict(base.others)
        tensors: dict[str, Expr] = {}
        home: dict[str, str] = {}
        late: dict[str, Expr] = {}
        done: set[int] = set()

        def add(found: Mapping[str, Expr], to: dict[str, Expr], file: str) -> None:
            to.update(found)
            home.update(dict.fromkeys(found, file))

        for name in plan.tensors:
            if name in others:
                add(self._rewritten(name, others[name]), tensors, plan.home[name])
            elif name in base.layer_of and base.layer_of[name] not in done:
                layer = base.layer_of[name]
                done.add(layer)
                copies, new = self._layer(layer, None if rows is None else rows[layer])
                add(copies, tensors, plan.home[name])
                add(new, late, plan.home[name])
        tensors.update(late)
        if self.given["dtype"]:
            tensors = as_type(tensors, DTYPES[self.given["dtype"]])
        if correction := self.pair.target.correction:
            shape = (1,) * correction.axis + (self.design.experts,)
            for i in range(len(base.layers)):
                name = f"{base.prefix}{i}.{correction.path}"
                tensors[name] = Filled(0.0, "F32", shape)
                home[name] = home[f"{base.prefix}{i}.{self.pair.target.router.path}"]
        return tensors, home

    def _rewritten(self, name: str, expr: Expr) -> dict[str, Expr]:
        found = [(name, expr)]
        for rewrite in self.conversion.rewrites:
            found = [new for n, e in found for new in rewrite.tensor(n, e, self.conversion.traits)]
        return dict(found)

    def _layer(self, layer: int, rows: torch.Tensor | None) -> tuple[dict[str, Expr], dict[str, Expr]]:
        """Return the experts and the new tensors of one layer."""
        given, base = self.given, self.base
        ffn = base.layers[layer]
        prefix = f"{base.prefix}{layer}."
        groups = [source.ingredient(layer, given["noise"]) for source in self.sources]
        groups = groups or [Ingredient(ffn, noise=given["noise"], relative=True)]
        groups = [replace(group, ffn=in_dtype(group.ffn, ffn)) for group in groups]
        changes = Changes(given["seed"], f"{prefix}split", given["reinit"])
        shared = Ingredient(ffn) if self.shared_from is None else self.shared_from.ingredient(layer, 0.0)
        shared = replace(shared, ffn=in_dtype(shared.ffn, ffn))
        copies = routed_tensors(prefix, groups, self.design, self.pair.target.family.layouts[0], changes)
        new = shared_tensors(prefix, shared, self.design, self.moe, given["seed"])
        name = prefix + self.pair.target.router.path
        new[name] = cast(self._router(name, ffn.hidden, rows), DTYPES.get(given["dtype"], ffn.gate.dtype))
        return copies, new

    def _router(self, name: str, hidden: int, rows: torch.Tensor | None) -> Expr:
        kind: str = self.given["router"]
        if rows is not None:
            return routers.given_rows(rows, self.design)
        if kind == "zero":
            if self.design.granularity > 1 and self.design.top_k < self.design.experts:
                raise RefusedError(
                    "upcycle: with a router of zeros all experts tie, and slices of different groups mix",
                    "use --router random, or --granularity 1",
                )
            return routers.zero_rows(self.design, hidden)
        seed: int = self.given["seed"]
        if kind == "uniform":
            return routers.uniform_rows(name, self.design, hidden, seed)
        std = self.given["router_std"]
        if std is None:
            std = self.conversion.traits["initializer_range"]
        return routers.random_rows(name, self.design, hidden, float(std), seed)

    def _config(self) -> dict[str, Any]:
        design, moe, base = self.design, self.moe, self.base
        width = base.layers[0].width
        config = {k: v for k, v in self.conversion.config.items() if k != "auto_map"}
        config.update(model_type=self.pair.target_type, architectures=[self.pair.target.causal_lm])
        config["intermediate_size"] = width
        config.update(moe.settings)
        config.update({key: [value] * len(base.layers) for key, value in moe.per_layer.items()})
        config.update(router_settings(design, self.pair.target.family))
        config.update(shared_settings(design, moe, width))
        config[moe.width] = width // design.parts
        if self.given["dtype"]:
            for key in ("torch_dtype", "dtype"):
                if key in config:
                    config[key] = self.given["dtype"]
        return config
