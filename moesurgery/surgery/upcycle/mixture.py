"""One upcycle put together: all tensors and the config of the mixture, and whether it equals the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moesurgery.checkpoint.dtypes import BY_CONFIG_NAME
from moesurgery.decoders.architecture import Moe
from moesurgery.decoders.dense_names import MOE_KEYS
from moesurgery.decoders.pairs import Conversion, Pair
from moesurgery.errors import RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import Full
from moesurgery.families.clients import Wants, with_keys
from moesurgery.families.family import Layout, Projection
from moesurgery.surgery.upcycle import routers
from moesurgery.surgery.upcycle.dense_model import DenseModel
from moesurgery.surgery.upcycle.dense_sources import DenseSource, averaged, branches, different_traits, in_dtype
from moesurgery.surgery.upcycle.design import Design, router_settings
from moesurgery.surgery.upcycle.expert_tensors import (
    Changes,
    Ingredient,
    as_type,
    routed_tensors,
    shared_settings,
    shared_tensors,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Mixture:
    """What is to be made of `base`. `given` are the operation's parameters, as they were given."""

    base: DenseModel
    pair: Pair
    conversion: Conversion
    moe: Moe
    design: Design
    sources: list[DenseSource]
    shared_from: DenseSource | None
    given: Mapping[str, Any]

    def all_sources(self) -> list[DenseSource]:
        return [*self.sources, *([self.shared_from] if self.shared_from else [])]

    def inexact(self) -> list[str]:
        """Return why step 0 is not the dense model; empty where it is."""
        given, design = self.given, self.design
        reasons = []
        models = branches(self.base, self.all_sources())
        if len(models) > 1 or models[0] is not self.base:
            reasons.append(
                f"experts come from {len(models)} models" if len(models) > 1 else f"experts are {models[0].name}'s"
            )
        if any(source.scale != 1 for source in self.all_sources()):
            reasons.append("residual_scale changes what experts add")
        if any(source.noise for source in self.all_sources()) or given["noise"]:
            reasons.append("noise on the experts")
        if given["reinit"]:
            reasons.append(f"{given['reinit']:.0%} of each expert's neurons are drawn anew")
        if design.split and design.top_k < design.experts:
            reasons.append(f"a token uses {design.top_k} of the {design.experts} parts of its FFN")
        elif design.split and given["router"] != "zero":
            reasons.append("the parts of the FFN get unequal gates: --router zero makes them equal")
        if not design.renormalised and given["router"] != "zero":
            reasons.append("the gates do not sum to the same for every token: --router zero makes them equal")
        return reasons

    def rounded(self) -> list[str]:
        """Return what is rounded to 16 bits on the way: step 0 is then the dense model's but for that."""
        down, moe, design = self.base.layers[0].down, self.moe, self.design
        roundings = []
        if down.dtype in ("BF16", "F16"):
            factors = [0.0 if moe.input_gates else design.routed_factor]
            if moe.shared is not None:
                factors.append(design.share / moe.shared.factor)
            odd = [f"{factor:g}" for factor in factors if factor and math.frexp(factor)[0] != 0.5]
            if odd:
                what = "a power" if len(odd) == 1 else "powers"
                roundings.append(f"down-projections times {' and '.join(odd)}, not {what} of two, in {down.dtype}")
            if any(rewrite.rounds for rewrite in self.conversion.rewrites):
                roundings.append(f"norms or embeddings that this pair rewrites, in {down.dtype}")
        if dtype := self.given["dtype"]:
            exact = ("F32", "BF16", "F16") if dtype == "float32" else (BY_CONFIG_NAME[dtype],)
            if any(expr.dtype not in exact for expr in self.base.plan.tensors.values()):
                roundings.append(f"all weights, to {dtype}")
        return roundings

    def notes(self, *, exact: bool) -> list[str]:
        """Say what else was changed, and what training will meet."""
        design, given = self.design, self.given
        remarks = list(dict.fromkeys(rewrite.note for rewrite in self.conversion.rewrites))
        if self.base.dropped:
            remarks.append(f"{len(self.base.dropped)} tables that loaders compute themselves left out")
        alike = exact and design.granularity == 1 and not design.split
        if given["router"] == "zero":
            remarks.append("a router of zeros sends all tokens to the same experts until training moves it")
        elif design.top_k == 1 and design.renormalised and not design.split:
            remarks.append("with one expert per token and gates that sum to 1 the router never gets a gradient")
        elif alike and design.renormalised and not self.moe.input_gates:
            remarks.append("equal experts give the router no gradient at first: --granularity or a little --noise does")
        if design.share == 0 and self.moe.shared is not None and not self.moe.shared.optional:
            remarks.append("the shared expert, which this type must have, begins with a down-projection of zeros")
        if given["rest"] == "base" and (lost := different_traits(self.base, branches(self.base, self.sources))):
            remarks.append(f"the sources differ from the base in {', '.join(lost)}; the base's is kept")
        return remarks

    def tensors(self, rows: list[torch.Tensor] | None) -> tuple[dict[str, Expr], dict[str, str]]:
        """Return all tensors in the source's order, experts in their FFN's place, new tensors at the end.

        So copies keep the source's alignment, and a filesystem that can share their blocks does.
        """
        base, plan = self.base, self.base.plan
        models = branches(base, self.sources)
        others = averaged(base, models) if self.given["rest"] == "average" else dict(base.others)
        tensors: dict[str, Expr] = {}
        shard_of: dict[str, str] = {}
        late: dict[str, Expr] = {}
        places: dict[int, dict[str, dict[str, Expr]]] = {}  # of each layer: what stands where each tensor stood

        def add(added: Mapping[str, Expr], to: dict[str, Expr], file: str) -> None:
            to.update(added)
            shard_of.update(dict.fromkeys(added, file))

        for name in plan.tensors:
            if name in others:
                add(self._rewritten(name, others[name]), tensors, plan.shard_of[name])
            elif name in base.layer_of:
                layer = base.layer_of[name]
                if layer not in places:
                    copies, new = self._layer(layer, None if rows is None else rows[layer])
                    places[layer] = {}
                    for copy, expr in copies.items():
                        places[layer].setdefault(self._place(expr) or name, {})[copy] = expr
                    add(new, late, plan.shard_of[name])
                add(places[layer].get(name, {}), tensors, plan.shard_of[name])
        tensors.update(late)
        if self.given["dtype"]:
            tensors = as_type(tensors, BY_CONFIG_NAME[self.given["dtype"]])
        if correction := self.pair.target.correction:
            shape = (1,) * correction.axis + (self.design.experts,)
            for i in range(len(base.layers)):
                name = f"{base.prefix}{i}.{correction.path}"
                tensors[name] = Full(0.0, "F32", shape)
                shard_of[name] = shard_of[f"{base.prefix}{i}.{self.pair.target.router.path}"]
        return tensors, shard_of

    def _place(self, expr: Expr) -> str | None:
        """Return the tensor of the base's FFNs from which a copy is taken."""
        source = self.base.plan.checkpoint.source
        names = (stored.info.name for stored in expr.stored() if stored.source == source)
        return next((name for name in names if name in self.base.layer_of), None)

    def _rewritten(self, name: str, expr: Expr) -> dict[str, Expr]:
        pairs = [(name, expr)]
        for rewrite in self.conversion.rewrites:
            pairs = [new for n, e in pairs for new in rewrite.tensor(n, e, self.conversion.traits)]
        return dict(pairs)

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
        copies = routed_tensors(prefix, groups, self.design, self._layout(), changes)
        new = shared_tensors(prefix, shared, self.design, self.moe, given["seed"])
        name = prefix + self.pair.target.router.path
        new[name] = cast(self._router(name, ffn.hidden, rows), BY_CONFIG_NAME.get(given["dtype"], ffn.gate.dtype))
        return copies, new

    def _layout(self) -> Layout:
        """Return the published layout with its parts in the dense FFN's order: the way back gives the same file."""
        ffn, layout = self.base.architecture.ffn, self.pair.target.family.layouts[0]
        assert ffn is not None
        names = [name for name, layer in self.base.layer_of.items() if layer == 0]
        modules = {"gate": ffn.gate_up or ffn.gate, "up": ffn.gate_up or ffn.up, "down": ffn.down}

        def place(part: Projection) -> int:
            module = modules["gate" if part.role == "gate_up" else part.role]
            return next(i for i, name in enumerate(names) if f".{module}." in name)

        return replace(layout, parts=tuple(sorted(layout.parts, key=place)))

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

    def config(self) -> dict[str, Any]:
        design, moe, base = self.design, self.moe, self.base
        width = base.layers[0].width
        # Left-overs of a mixture in a dense config, which it does not read, the new type would.
        stale = MOE_KEYS | {"auto_map"}
        config = {k: v for k, v in self.conversion.config.items() if k not in stale}
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
        return with_keys(config, Wants(config).keys)
