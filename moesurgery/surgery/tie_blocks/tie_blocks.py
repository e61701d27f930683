"""Let several positions of the stack run with the weights of one block, and store that block once.

`layer_tie_map[i]` in config.json names the block that position i uses. The checkpoint has a model_type of its own, and
the code that loads it, with parameters physically shared, is written beside it (moesurgery/tied/modeling_tied.py);
`materialize` writes every position out instead, for loaders that take no code. docs/surgery.md tells what each
scheme has been used for and what tying an untrained stack costs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import moesurgery.tied
from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.expr.tensors import mean
from moesurgery.families.anatomy import TIED, Anatomy
from moesurgery.families.clients import adapter_readers
from moesurgery.families.components import MTP
from moesurgery.families.layer_config import LayerOrigin, layer_settings, restacked_config, without_prediction
from moesurgery.families.layer_stack import Stack, check_movable, stack_of
from moesurgery.families.quantised import method
from moesurgery.moe.expert_axis import Entries
from moesurgery.plan.plan import Plan, Step, Table
from moesurgery.plan.side_files import refuse_named_layers
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.surgery.tie_blocks.distances import Compared, Distances, distance_table, relative_distances
from moesurgery.surgery.tie_blocks.relax import RENAMED, LowRankAdapter, expert_parameters, is_linear
from moesurgery.surgery.tie_blocks.schemes import Init, Scheme, TieScheme, arranged, mapped

Norms = Literal["kept", "shared"]
Prediction = Literal["keep", "drop"]
_NAME = "tie-blocks"
_CODE = "modeling_tied.py"


@operation(_NAME)
def tie_blocks(
    plan: Plan,
    *,
    scheme: Annotated[
        Scheme, Param("which positions share a block: 0,0,2,2; 0,1,0,1; all; ends apart; or every block repeated")
    ] = "immediate",
    group_size: Annotated[int, Param("positions to a block", minimum=1)] = 2,
    blocks: Annotated[
        list[int] | None, Param("in place of a scheme: the block that each position of the new stack runs, as 0,0,2,2")
    ] = None,
    init: Annotated[
        Init | None, Param("whose weights a group gets: its first or last block, their average, or evenly spaced ones")
    ] = None,
    norms: Annotated[Norms, Param("norms are kept for each position, or shared with the rest")] = "kept",
    materialize: Annotated[bool, Param("write every position out, for loaders that take no code")] = False,
    relax: Annotated[
        int | None, Param("add a PEFT adapter of this rank that gives each position its difference back", minimum=1)
    ] = None,
    prediction_layers: Annotated[Prediction, Param("prediction (MTP) layers: keep behind the stack, or drop")] = "keep",
    distances: Annotated[
        Distances, Param("compare blocks with what replaces them: by a sample of values, by all, or not")
    ] = "sampled",
) -> Plan:
    """Share blocks between positions of the stack; stored once, loaded once, run as often as before.

    `materialize: true` alone writes out a model whose blocks are tied already. Saves memory and disk, never
    computation or KV cache. Ties between blocks that were trained apart damage a model, and need training.
    """
    anatomy = plan.anatomy
    if anatomy.family is not None and (reason := anatomy.family.refuses.get(_NAME)):
        raise RefusedError(f"{_NAME}: {anatomy.family.name}: {reason}")
    stack = stack_of(anatomy, plan.tensors, _NAME)
    if anatomy.settings.tie_map is not None:
        if not materialize or blocks is not None or init is not None or relax is not None:
            raise RefusedError(
                f"{_NAME}: the blocks are tied already", f"write them out first: `- {_NAME}: {{materialize: true}}`"
            )
        return _written_out(plan, anatomy, stack)
    if blocks is None:
        arrangement = arranged(scheme, stack.depth, group_size, init or "first")
    else:
        arrangement = mapped(blocks, stack.depth, init)
    config = _config(anatomy, arrangement, prediction_layers)
    if arrangement.own != tuple(range(len(arrangement.own))):
        refuse_named_layers(plan.checkpoint, plan.files)
    apart = ["norm"] if norms == "kept" else []
    if relax is not None:
        apart = _apart_for_relaxing(plan, anatomy, stack)
    tie = _Tie(plan, stack, arrangement, apart)
    tie.check()
    stored_once = arrangement.tied and not materialize
    if stored_once:
        config = _tied_config(anatomy, stack, config, arrangement, apart)
    tensors, shard_of = plan.substituted(
        tie.entries(everywhere=not stored_once) | _behind(plan, stack, arrangement, prediction_layers)
    )

    files: dict[str, bytes | None] = {}
    companions: dict[str, Mapping[str, Expr]] = {}
    if stored_once:
        files[_CODE] = Path(moesurgery.tied.__file__).with_name(_CODE).read_bytes()
    if relax is not None:
        more, companions = _relaxed(plan, anatomy, tie, relax)
        files |= more
    compared = tie.compared()
    by_kind: dict[str, dict[int, float]] = {}
    left_out = 0
    if distances != "none" and compared:
        by_kind, left_out = relative_distances(compared, distances)
    parameters: dict[str, Any] = (
        {"blocks": blocks} if blocks is not None else {"scheme": scheme, "group_size": group_size}
    )
    given = {"init": init, "norms": norms, "materialize": materialize, "relax": relax}
    parameters |= {key: value for key, value in given.items() if value is not None}
    parameters |= {"prediction_layers": prediction_layers, "distances": distances}
    used = len(set(arrangement.tie_map))
    step = Step(
        _NAME,
        parameters,
        f"{len(arrangement.tie_map)} positions run {used} blocks ({stack.depth} before)",
        details=(f"layer_tie_map: {', '.join(map(str, arrangement.tie_map))}",),
        report={
            "layer_tie_map": list(arrangement.tie_map),
            "blocks": {str(s): list(of) for s, of in arrangement.sources.items()},
            "apart": apart,
            "distances": {kind: {str(i): d for i, d in by.items()} for kind, by in by_kind.items()},
            "distances_from": distances,
        },
        notes=(
            *_notes(arrangement, compared, by_kind, distances, stored_once, relax, anatomy.is_moe),
            *_odd_note(left_out),
        ),
        tables=_tables(by_kind),
    )
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files=files, companions=companions)


@dataclass(frozen=True)
class _Tie:
    """An arrangement of the blocks of one model; `apart` are texts in the names of tensors that are not shared."""

    plan: Plan
    stack: Stack
    arrangement: TieScheme
    apart: Sequence[str]

    def shared(self, inside: str) -> bool:
        return not any(text in inside for text in self.apart)

    def check(self) -> None:
        """Refuse blocks that cannot take each other's place: other tensors, other shapes, another kind of layer."""
        settings = self.plan.anatomy.settings
        tensors, blocks = self.plan.tensors, self.stack.blocks
        for position, old in enumerate(self.arrangement.own):
            for source in self.arrangement.sources[self.arrangement.tie_map[position]]:
                if source == old:
                    continue
                forms = [
                    {inside: (tensors[name].dtype, tensors[name].shape) for inside, name in blocks[block].items()}
                    for block in (source, old)
                ]
                if different := sorted(
                    i for i in forms[0].keys() | forms[1].keys() if forms[0].get(i) != forms[1].get(i)
                ):
                    raise RefusedError(
                        f"{_NAME}: block {old} cannot run with the weights of block {source}: {different[0]} differs"
                        f" ({_form(forms[0], different[0])}; {_form(forms[1], different[0])})",
                        "choose groups of blocks of one kind, with --blocks if no scheme has them",
                    )
                kinds = layer_settings(settings, source), layer_settings(settings, old)
                if kinds[0] != kinds[1]:
                    key = next(k for k in kinds[0].keys() | kinds[1].keys() if kinds[0].get(k) != kinds[1].get(k))
                    raise RefusedError(
                        f"{_NAME}: block {old} cannot run with the weights of block {source}: {key} says"
                        f" {kinds[1].get(key)!r} of one and {kinds[0].get(key)!r} of the other",
                        "choose groups of blocks of one kind, with --blocks if no scheme has them",
                    )

    def weights(self, source: int, inside: str) -> Expr:
        """Return what the positions of a group share."""
        parts = [self.plan.tensors[self.stack.blocks[block][inside]] for block in self.arrangement.sources[source]]
        if len(parts) > 1 and parts[0].dtype not in PLAIN_FLOATS:
            raise RefusedError(
                f"{_NAME}: {inside} is quantised ({parts[0].dtype}): its average has no exact form",
                "use --init first, or dequantise first with `moesurgery convert --dequantize`",
            )
        return mean(parts)

    def entries(self, *, everywhere: bool) -> Entries:
        """Return what takes the place of each block's tensors: those of its positions, tied ones only `everywhere`."""
        entries: Entries = {}
        for old, names in self.stack.blocks.items():
            if old >= self.stack.depth:
                continue
            positions = [i for i, block in enumerate(self.arrangement.own) if block == old]
            for inside, name in names.items():
                replacements = []
                for position in positions:
                    source = self.arrangement.tie_map[position]
                    if not self.shared(inside):
                        replacements.append((self.stack.name(position, inside), self.plan.tensors[name]))
                    elif everywhere or source == position:
                        replacements.append((self.stack.name(position, inside), self.weights(source, inside)))
                entries[name] = replacements
        return entries

    def compared(self) -> list[Compared]:
        """Return each shared tensor whose weights come from other blocks than its own, with those."""
        pairs: list[Compared] = []
        for position, old in enumerate(self.arrangement.own):
            sources = self.arrangement.sources[self.arrangement.tie_map[position]]
            if sources == (old,):
                continue
            for inside, name in self.stack.blocks[old].items():
                if self.shared(inside):
                    others = [self.plan.tensors[self.stack.blocks[block][inside]] for block in sources]
                    pairs.append((inside, position, self.plan.tensors[name], others))
        return pairs


def _odd_note(left_out: int) -> list[str]:
    """Say how much of the blocks the distances leave out."""
    if not left_out:
        return []
    return [
        f"the distances are without {left_out:,} values that are NaN or infinite:"
        " `moesurgery validate --level values` finds such tensors"
    ]


def _form(forms: Mapping[str, Any], inside: str) -> str:
    return f"{forms[inside][0]} {list(forms[inside][1])}" if inside in forms else "absent"


def _config(anatomy: Anatomy, arrangement: TieScheme, prediction_layers: Prediction) -> dict[str, Any]:
    """Return the config of the new stack, as a stock model."""
    if list(arrangement.own) != list(range(anatomy.settings.layers or 0)):
        check_movable(anatomy, anatomy.component, _NAME)
    try:
        config = restacked_config(anatomy.settings, [LayerOrigin(anatomy.settings, block) for block in arrangement.own])
    except RefusedError as error:
        raise RefusedError(f"{_NAME}: {error.message}", error.hint) from None
    return without_prediction(replace(anatomy.settings, config=config)) if prediction_layers == "drop" else config


def _tied_config(
    anatomy: Anatomy, stack: Stack, config: dict[str, Any], arrangement: TieScheme, apart: Sequence[str]
) -> dict[str, Any]:
    """Return the config of the form that is stored once. Raises RefusedError where its code does not fit the model."""
    hint = "use --materialize"
    architectures = config.get("architectures") or []
    if stack.container != "layers" or stack.root not in ("", "model."):
        raise RefusedError(
            f"{_NAME}: the blocks of this model are {stack.root}{stack.container}, not model.layers", hint
        )
    if config.get("num_hidden_layers") is None or "auto_map" in config:
        raise RefusedError(f"{_NAME}: this model has nested settings or code of its own", hint)
    if len(architectures) != 1 or not str(architectures[0]).endswith("ForCausalLM"):
        raise RefusedError(f"{_NAME}: architectures is {architectures}, not one causal language model", hint)
    if quantised := method(config):
        raise RefusedError(
            f"{_NAME}: the weights are quantised ({quantised}), which tied loading was not tried with", hint
        )
    name = f"{_CODE.removesuffix('.py')}.Tied{architectures[0]}"
    # The stock family's classes refuse a depth of null, where they would fill the tied blocks with random numbers.
    config |= {
        "model_type": TIED + anatomy.model_type,
        "architectures": [f"Tied{architectures[0]}"],
        "num_hidden_layers": None,
        "layer_tie_map": list(arrangement.tie_map),
        "auto_map": {"AutoConfig": f"{name}Config", "AutoModelForCausalLM": name},
    }
    if apart:
        config["layer_tie_exclude"] = list(apart)
    return config


def _behind(plan: Plan, stack: Stack, arrangement: TieScheme, prediction_layers: Prediction) -> Entries:
    """Return what becomes of the prediction layers: they move behind the new stack, or go.

    Left where they are, they would be layers of a longer model.
    """
    if prediction_layers == "drop":
        return {name: [] for name, part in plan.anatomy.component.items() if part == MTP}
    shift = len(arrangement.tie_map) - stack.depth
    return {
        name: [(stack.name(layer + shift, inside), plan.tensors[name])]
        for layer in stack.behind
        for inside, name in stack.blocks[layer].items()
    }


def _apart_for_relaxing(plan: Plan, anatomy: Anatomy, stack: Stack) -> list[str]:
    """Return texts that name what stays with each position because no LoRA can give it back: all but large matrices."""
    experts = {m.name for block in anatomy.blocks for m in block.members if m.part is not None and m.stem.main}
    routers = {m.name for block in anatomy.blocks for m in block.members if m.along is not None}
    apart = ["norm"]
    for block in range(stack.depth):
        for inside, name in stack.blocks[block].items():
            linear = is_linear(inside, plan.tensors[name].shape) and name not in routers
            if linear or name in experts or any(text in inside for text in apart):
                continue
            module, _, leaf = inside.rpartition(".")
            router = re.search(r"\.(gate|router)\.", inside)
            if name in routers and router:
                apart.append(router[0])  # the one part of its path that is the same on disk and in memory
            elif leaf == "weight":
                apart.append(f"{module.rpartition('.')[2]}.weight")
            else:
                apart.append(f".{leaf}" if module else leaf)
    return apart


def _relaxed(
    plan: Plan, anatomy: Anatomy, tie: _Tie, rank: int
) -> tuple[dict[str, bytes | None], dict[str, Mapping[str, Expr]]]:
    """Return the files of the adapter that holds each position's difference."""
    if anatomy.model_type in RENAMED:
        raise RefusedError(f"{_NAME}: relax: PEFT knows {anatomy.model_type} under other names", "leave relax out")
    adapter = LowRankAdapter(rank)
    by_layer = {block.layer: block for block in anatomy.main_blocks}
    experts = {m.name for block in anatomy.blocks for m in block.members if m.part is not None}
    done: set[int] = set()
    for inside, position, own, _ in tie.compared():
        old = tie.arrangement.own[position]
        layer = tie.stack.name(position, "").removesuffix(".")
        shared = tie.weights(tie.arrangement.tie_map[position], inside)
        if own.dtype not in PLAIN_FLOATS:
            raise RefusedError(f"{_NAME}: relax: {inside} is quantised", "dequantise first")
        if tie.stack.blocks[old][inside] not in experts:
            adapter.add_linear(f"{layer}.{inside.removesuffix('.weight')}", own, shared)
        elif position not in done:
            done.add(position)
            replaced = {
                name: tie.weights(tie.arrangement.tie_map[position], inside)
                for inside, name in tie.stack.blocks[old].items()
                if name in experts and tie.shared(inside)
            }
            layouts = anatomy.settings.family.layouts
            block = by_layer[old]
            adapter.add_experts(
                layer,
                expert_parameters(block, plan.tensors, layouts),
                expert_parameters(block, {**plan.tensors, **replaced}, layouts),
            )
    if not adapter.tensors:
        raise RefusedError(f"{_NAME}: relax: every position has its own weights already", "leave relax out")
    return adapter.files()


def _written_out(plan: Plan, anatomy: Anatomy, stack: Stack) -> Plan:
    """Return the stock form of a model whose blocks are tied: every position with its weights."""
    tie_map = anatomy.settings.tie_map
    assert tie_map is not None
    entries: Entries = {}
    for source in sorted(set(tie_map)):
        for inside, name in stack.blocks[source].items():
            positions = [i for i, s in enumerate(tie_map) if s == source]
            missing = [i for i in positions if i == source or inside not in stack.blocks.get(i, {})]
            entries[name] = [(stack.name(i, inside), plan.tensors[name]) for i in missing]
    tensors, shard_of = plan.substituted(entries)
    config = copy.deepcopy(dict(plan.config))
    for key in ("layer_tie_map", "layer_tie_exclude", "auto_map"):
        config.pop(key, None)
    config["model_type"] = anatomy.model_type.removeprefix(TIED)
    config["architectures"] = [str(name).removeprefix("Tied") for name in config.get("architectures") or ()]
    config["num_hidden_layers"] = len(tie_map)
    step = Step(_NAME, {"materialize": True}, f"all {len(tie_map)} positions written out as {config['model_type']}")
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files={_CODE: None})


def _notes(
    arrangement: TieScheme,
    compared: Sequence[Compared],
    found: Mapping[str, Any],
    distances: Distances,
    stored_once: bool,
    relax: int | None,
    moe: bool,
) -> list[str]:
    notes = []
    if compared:
        notes.append("blocks that were trained apart now share weights: expect damage, and train (docs/surgery.md)")
    if stored_once:
        notes.append(
            "loads in transformers 5 with trust_remote_code=True, or without where moesurgery is installed and"
            " imported; transformers 4 and other programs refuse it: write them a copy with --materialize"
        )
    if found and distances == "sampled":
        notes.append("distances ||W - R|| / ||W|| are from a sample of the values (--distances exact reads all)")
    if compared and not found and distances != "none":
        notes.append("the weights are quantised, so their distances were not taken")
    if relax is not None:
        notes.append(f"adapter/: a PEFT LoRA of rank {relax} that gives each position its difference back")
        notes.append(adapter_readers(experts=moe))
    return notes


def _tables(found: Mapping[str, Mapping[int, float]]) -> tuple[Table, ...]:
    return (distance_table(found),) if found else ()
