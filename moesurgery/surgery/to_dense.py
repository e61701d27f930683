"""A mixture of experts back to a dense model: one expert, the mean of all, or several side by side.

The reverse of upcycling. It undoes an upcycle exactly, and is a start for training otherwise: a trained router
sends each token to other experts, and no single one, nor their mean, can stand in for all (docs/surgery.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.decoders.dense_names import DENSE_NAMES, MOE_KEYS, DensePair, pairs_of
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.elementwise import scale
from moesurgery.expr.evaluate import values_of
from moesurgery.expr.nodes import Expr, Slice, concat
from moesurgery.expr.tensors import concat_last, mean
from moesurgery.families.anatomy import Anatomy, BlockTensor, MoeBlock
from moesurgery.families.clients import CLIENTS, Client, Wants, with_keys
from moesurgery.families.components import MTP
from moesurgery.families.layer_config import without_prediction
from moesurgery.families.layer_keys import KEYED
from moesurgery.families.quantisation_settings import with_renamed_settings
from moesurgery.moe.expert_axis import Entries, refuse_strays
from moesurgery.moe.neurons import expert_tensors
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.side_files import renamed_files
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.surgery.choose_experts import FreeCriterion, LayerKey, check_indices, expert_scores, per_block
from moesurgery.surgery.client_form import ClientName, obstacles

SharedExpertUse = Literal["auto", "join", "drop"]
_NAME = "to-dense"
_ROLES = ("gate", "up", "down")


@operation(_NAME)
def to_dense(
    plan: Plan,
    *,
    expert: Annotated[
        int | dict[LayerKey, int] | None, Param("the expert that becomes the FFN, the same in all layers or per layer")
    ] = None,
    average: Annotated[bool, Param("use the mean of all experts' weights")] = False,
    concat_top: Annotated[
        int | None,
        Param("put this many experts side by side, chosen by --by, each at its share", minimum=1, metavar="N"),
    ] = None,
    by: Annotated[FreeCriterion, Param("how --concat-top chooses: longest router rows, or by lot")] = "router-norm",
    seed: Annotated[int, Param("seed of --by random", minimum=0)] = 0,
    shared: Annotated[
        SharedExpertUse, Param("shared experts: join them to the FFN, drop them, or auto: join unless they add nothing")
    ] = "auto",
    to: Annotated[str | None, Param("dense model_type, where several fit")] = None,
    client: Annotated[
        ClientName | None, Param("choose a type that this program runs, or refuse", option="--for")
    ] = None,
) -> Plan:
    """Turn a mixture of experts into a dense model of its sister family.

    Give one of `expert`, `average` and `concat_top`. Undoes an upcycle exactly with `expert: 0`; a model trained as a
    mixture needs training afterwards. Routers and prediction layers go.
    """
    anatomy = plan.anatomy
    anatomy.require_family(_NAME)
    if (expert is not None) + average + (concat_top is not None) != 1:
        raise RecipeError(
            f"{_NAME} needs one of expert, average and concat_top", f"as in `moesurgery {_NAME} --expert 0`"
        )
    pair = _pair(plan, to, CLIENTS[client] if client else None)
    chosen = _chosen(plan, anatomy, expert, average, concat_top, by, seed)
    joins = bool(pair.shared) and _has_shared(plan, anatomy, pair) and _joins(plan, anatomy, pair, shared)
    routed = anatomy.settings.routed_scale_key or 1.0

    entries: Entries = {name: [] for name, part in anatomy.component.items() if part == MTP}
    widths: dict[str, int] = {}
    for block in anatomy.main_blocks:
        ffn = _Ffn(plan, block, pair, chosen[block.where], average, routed, joins)
        entries.update(ffn.entries())
        widths[block.where] = ffn.width
    tensors, shard_of = plan.substituted(entries)
    width = _one_width(anatomy, tensors, pair, widths)
    modules = _renamed_modules(anatomy, pair, chosen)
    config = with_renamed_settings(_dense_config(anatomy, pair, width), modules)
    files = renamed_files(plan.checkpoint, plan.files, modules)

    parameters: dict[str, Any] = {"expert": expert} if expert is not None else {"average": True} if average else {}
    if concat_top is not None:
        parameters |= {"concat_top": concat_top, "by": by} | ({"seed": seed} if by == "random" else {})
    parameters["shared"] = shared
    if to is not None:
        parameters["to"] = to
    if client is not None:
        parameters["client"] = client
    what = (
        "the mean of all experts" if average else f"{concat_top} experts side by side" if concat_top else "one expert"
    )
    step = Step(
        _NAME,
        parameters,
        f"{pair.source} -> {pair.target}, FFN of width {width} from {what}"
        + (" and the shared expert" if joins else ""),
        report={
            "source": pair.source,
            "target": pair.target,
            "width": width,
            "shared_joined": joins,
            "layers": [{"layer": where, "experts": experts} for where, experts in chosen.items()],
        },
        notes=(*_notes(plan, anatomy, pair, joins), *_unread(plan, config)),
        tables=_tables(chosen, average),
    )
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files=files)


def _unread(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Say which clients do not run the dense model."""
    by_client = {name: obstacles(client, plan, config) for name, client in CLIENTS.items()}
    return [f"not for {name}: {'; '.join(reasons)}" for name, reasons in by_client.items() if reasons]


def _pair(plan: Plan, to: str | None, client: Client | None) -> DensePair:
    """Return the first pair whose conditions the config meets, in `client` too, or the one that was asked for."""
    anatomy = plan.anatomy
    if anatomy.config.get("layer_tie_map") is not None:
        raise RefusedError(f"{_NAME}: the blocks are tied", "write them out first: `- tie-blocks: {materialize: true}`")
    pairs = pairs_of(anatomy.model_type)
    if not pairs:
        known = ", ".join(dict.fromkeys(pair.source for pair in DENSE_NAMES))
        raise RefusedError(
            f"{_NAME}: no dense family of transformers has the attention, norms and biases of {anatomy.model_type}",
            f"it works for {known}",
        )
    if to is not None:
        pairs = tuple(pair for pair in pairs if pair.target == to)
        if not pairs:
            targets = ", ".join(pair.target for pair in pairs_of(anatomy.model_type))
            raise RefusedError(f"{_NAME}: {anatomy.model_type} does not become {to}", f"it becomes {targets}")
    unmet = {}
    for pair in pairs:
        wrong = [key for key, allowed in pair.needs.items() if anatomy.settings.first((key,)) not in allowed]
        lost = [f"{key} is {anatomy.settings.first((key,))!r}" for key in wrong]
        if client is not None and not wrong:
            config = _dense_config(anatomy, pair, 0)
            lost = [f"{client.name}: {reason}" for reason in obstacles(client, plan, config)]
        if not lost:
            return pair
        unmet[pair.target] = ", ".join(lost)
    reasons = "; ".join(f"{target}: {why}" for target, why in unmet.items())
    raise RefusedError(f"{_NAME}: the dense family would compute something else ({reasons})")


def _chosen(
    plan: Plan,
    anatomy: Anatomy,
    expert: int | dict[LayerKey, int] | None,
    average: bool,
    concat_top: int | None,
    by: FreeCriterion,
    seed: int,
) -> dict[str, list[int]]:
    """Return the experts that make up the FFN of each layer."""
    blocks = anatomy.main_blocks
    if average:
        return {block.where: list(range(block.experts)) for block in blocks}
    if concat_top is not None:
        top_experts = {}
        for block in blocks:
            if concat_top > block.experts:
                raise RefusedError(f"{_NAME}: {block.where} has {block.experts} experts, fewer than {concat_top}")
            scores = expert_scores(plan, block, by, seed)
            order = sorted(range(block.experts), key=lambda e: (-scores[e], e))
            top_experts[block.where] = sorted(order[:concat_top])
        return top_experts
    given = per_block(anatomy, _NAME, expert)
    for block in blocks:
        if block.where not in given:
            raise RefusedError(f"{_NAME}: no expert is named for {block.where}", "name one for each MoE layer")
        check_indices(_NAME, block, [given[block.where]])
    return {block.where: [given[block.where]] for block in blocks}


def _shared_names(plan: Plan, block: MoeBlock, pair: DensePair) -> dict[str, str]:
    """Return the shared expert's tensors of a block by role; empty where it has none."""
    names = {role: f"{block.where}.{path}.weight" for role, path in pair.shared.items()}
    return names if all(name in plan.tensors for name in names.values()) else {}


def _has_shared(plan: Plan, anatomy: Anatomy, pair: DensePair) -> bool:
    return any(_shared_names(plan, block, pair) for block in anatomy.main_blocks)


def _joins(plan: Plan, anatomy: Anatomy, pair: DensePair, shared: SharedExpertUse) -> bool:
    """Whether the shared experts become part of the FFN; `auto` leaves out those whose down-projections are zero."""
    if shared != "auto":
        return shared == "join"
    names = (_shared_names(plan, block, pair) for block in anatomy.main_blocks)
    return not all(_is_zero(plan.tensors[by_role["down"]]) for by_role in names if by_role)


def _is_zero(expr: Expr) -> bool:
    """Whether all values are zero; reads no further than the first that is not."""
    step = max(1, (1 << 20) // max(1, expr.nbytes // expr.shape[0]))
    starts = range(0, expr.shape[0], step)
    return all(not values_of(expr, (start, min(start + step, expr.shape[0]))).any() for start in starts)


@dataclass
class _Ffn:
    """The dense FFN that one block becomes. `routed` is the config's factor on the routed sum."""

    plan: Plan
    block: MoeBlock
    pair: DensePair
    experts: Sequence[int]
    average: bool
    routed: float
    joins: bool
    width: int = 0

    def entries(self) -> Entries:
        """Return what takes the place of the block's tensors; all but the chosen experts' go."""
        tensors = self.plan.tensors
        refuse_strays(self.block, tensors)
        if any(member.along and member.along.extra for member in self.block.members):
            raise RefusedError(f"{_NAME}: {self.block.where} has experts of more than one kind")
        entries: Entries = {member.name: [] for member in self.block.members}
        family = self.plan.anatomy.settings.family
        for path in family.shared:
            entries |= {name: [] for name in tensors if name.startswith(f"{self.block.where}.{path}.")}
        parts = [self._projections(expert) for expert in self.experts]
        shared = self._shared_projections() if self.joins else None
        for role in _ROLES:
            old, suffixes = parts[0][role]
            for suffix, first in suffixes.items():
                exprs = [first, *(part[role][1][suffix] for part in parts[1:])]
                extra = shared[role] if shared else None
                unchanged = len(exprs) == 1 and extra is None and self._share == 1.0
                expr = first if unchanged else self._joined(role, suffix, exprs, extra)
                name = f"{self.block.where}.{self.pair.ffn[role]}{suffix}"
                entries[old[suffix]].append((name, expr))
                if suffix == ".weight":
                    self.width = expr.shape[1] if role == "down" else expr.shape[0]
        return entries

    @property
    def _share(self) -> float:
        """The weight of each expert: all of the routed sum for one or for the mean, an equal part side by side."""
        return self.routed / (1 if self.average else len(self.experts))

    def _joined(self, role: str, suffix: str, exprs: list[Expr], extra: Expr | None) -> Expr:
        if suffix != ".weight" or exprs[0].dtype not in PLAIN_FLOATS:
            raise RefusedError(
                f"{_NAME}: the experts of {self.block.where} are quantised or have biases, so they cannot be joined",
                "dequantise first with `moesurgery convert --dequantize`",
            )
        if self.average:
            exprs = [mean(exprs)]
        if role != "down":
            return concat([*exprs, *([extra] if extra else [])])
        exprs = [scale(expr, self._share) for expr in exprs]
        return concat_last([*exprs, *([extra] if extra else [])])

    def _projections(self, expert: int) -> dict[str, tuple[dict[str, str], dict[str, Expr]]]:
        """Return, for each role, the names whose place it takes and its tensors, by suffix."""
        by_role: dict[str, tuple[dict[str, str], dict[str, Expr]]] = {role: ({}, {}) for role in _ROLES}
        for member, expr in expert_tensors(self.block, self.plan.tensors, expert):
            assert member.part is not None
            if member.expert is None and (member.stem.suffix not in ("", ".weight") or member.part.order != "oi"):
                raise RefusedError(f"{_NAME}: {member.name} cannot be taken apart as it is stored")
            suffix = member.stem.suffix or ".weight"
            halves = _halves(member, expr) if member.role == "gate_up" else {member.role: expr}
            for role, half in halves.items():
                by_role[role][0][suffix], by_role[role][1][suffix] = member.name, half
        return by_role

    def _shared_projections(self) -> dict[str, Expr]:
        names = _shared_names(self.plan, self.block, self.pair)
        if not names:
            raise RefusedError(f"{_NAME}: {self.block.where} has no shared expert, other layers have one")
        by_role = {role: self.plan.tensors[name] for role, name in names.items()}
        if both := by_role.pop("gate_up", None):
            half = both.shape[0] // 2
            by_role |= {"gate": Slice(both, 0, half), "up": Slice(both, half, 2 * half)}
        if any("shared_expert_gate" in path for path in self.plan.anatomy.settings.family.shared):
            by_role["down"] = scale(by_role["down"], 0.5)  # sigmoid of an untold gate
        return by_role


def _halves(member: BlockTensor, expr: Expr) -> Mapping[str, Expr]:
    assert member.part is not None
    if member.part.interleaved:
        raise RefusedError(f"{_NAME}: {member.name}: gate and up alternate")
    half = expr.shape[0] // 2
    return {"gate": Slice(expr, 0, half), "up": Slice(expr, half, 2 * half)}


def _renamed_modules(anatomy: Anatomy, pair: DensePair, chosen: Mapping[str, Sequence[int]]) -> dict[str, str | None]:
    """Return what becomes of each module's name, for quantisation settings. Routers and prediction layers go."""
    new_names: dict[str, str | None] = {}
    for block in anatomy.blocks:
        if block.mtp:
            new_names[block.layer_path] = None
            continue
        new_names |= {module.removesuffix("."): None for module in block.router_modules}
        new_names |= {f"{block.where}.{path}": None for path in anatomy.settings.family.shared}
        for part in block.layout.parts if block.layout else ():
            experts = range(block.experts) if "#" in part.path else (None,)
            for expert in experts:
                own = part.path.replace("#", str(expert))
                stays = chosen[block.where] == [expert] and part.role in pair.ffn
                new_names[f"{block.where}.{own}"] = f"{block.where}.{pair.ffn[part.role]}" if stays else None
    return new_names


def _one_width(anatomy: Anatomy, tensors: Mapping[str, Expr], pair: DensePair, widths: Mapping[str, int]) -> int:
    """Return the width of all FFNs; refuse where layers that were dense before are of another width."""
    width = next(iter(widths.values()))
    ending = "." + pair.ffn["down"] + ".weight"
    for name, expr in tensors.items():
        if name.endswith(ending) and expr.shape[1] != width and name in anatomy.layer:
            count = (expr.shape[1] - width) % width == 0
            times = expr.shape[1] // width
            raise RefusedError(
                f"{_NAME}: {name} of a dense layer has width {expr.shape[1]}, the new FFNs {width};"
                f" a {pair.target} model has one width",
                f"use --concat-top {times}, which makes them as wide" if count and times > 1 else None,
            )
    return width


def _dense_config(anatomy: Anatomy, pair: DensePair, width: int) -> dict[str, Any]:
    config = without_prediction(anatomy.settings)
    for keyed in config.keys() & KEYED:
        entries = config[keyed] if isinstance(config[keyed], dict) else {}
        for layer, entry in entries.items():
            if isinstance(entry, dict) and "intermediate_size" in entry:
                raise RefusedError(
                    f"{_NAME}: {keyed} gives layer {layer} its own intermediate_size; the new FFNs have one width",
                    f"take it out of {keyed} in config.json",
                )
        config[keyed] = {layer: {k: v for k, v in e.items() if k not in MOE_KEYS} for layer, e in entries.items()}
    rope = {"rope_theta"} if "rope_parameters" in config else set()
    for key, value in pair.defaults.items():
        if key not in rope:
            config.setdefault(key, value)
    for key in (*MOE_KEYS, *pair.drops, "auto_map"):
        config.pop(key, None)
    config.update(pair.writes)
    config["intermediate_size"] = width
    config["model_type"] = pair.target
    config["architectures"] = [pair.architecture]
    return with_keys(config, Wants(config).keys)


def _notes(plan: Plan, anatomy: Anatomy, pair: DensePair, joins: bool) -> list[str]:
    notes = [
        "this needs training: one expert, or the mean of experts, does not do the work of a trained mixture; only"
        " copies of one FFN, as a fresh upcycle has them, come back unchanged"
    ]
    if not anatomy.settings.renormalised and anatomy.settings.score != "top-softmax":
        notes.append(
            "this router uses raw weights, which add up to less than one: the FFN is larger than what the experts added"
        )
    if _has_shared(plan, anatomy, pair):
        gated = any("shared_expert_gate" in path for path in anatomy.settings.family.shared)
        at = ", at half its size in place of its gate" if gated else ""
        notes.append(f"the shared expert was joined to the FFN{at}" if joins else "the shared expert was left out")
    if any(part == MTP for part in anatomy.component.values()):
        notes.append(f"the prediction (MTP) layers were left out: {pair.target} has none")
    return notes


def _tables(chosen: Mapping[str, Sequence[int]], average: bool) -> tuple[Table, ...]:
    if average or len({tuple(experts) for experts in chosen.values()}) == 1:
        return ()
    return (Table(("layer", "experts"), tuple((w, ", ".join(map(str, e))) for w, e in chosen.items())),)
