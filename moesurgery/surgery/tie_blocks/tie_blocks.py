"""Let several positions of the stack run with the weights of one block, and store that block once.

`layer_tie_map[i]` in config.json names the block that position i uses. The checkpoint has a model_type of its own, and
the code that loads it, with parameters physically shared, is written beside it (moesurgery/tied/modeling_tied.py);
`materialize` writes every position out instead, for loaders that take no code. docs/surgery.md tells what each
scheme has been used for and what tying an untrained stack costs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import moesurgery.tied
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import TIED, Anatomy
from moesurgery.families.clients import adapter_readers
from moesurgery.families.components import MTP
from moesurgery.families.layer_config import LayerOrigin, restacked_config, without_prediction
from moesurgery.families.layer_stack import Stack, check_movable, stack_of
from moesurgery.families.quantised import method
from moesurgery.moe.expert_axis import Entries
from moesurgery.plan.plan import Plan, Step
from moesurgery.plan.side_files import refuse_named_layers
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.surgery.tie_blocks.distances import Compared, Distances, distance_table, relative_distances
from moesurgery.surgery.tie_blocks.relax import apart_for_relaxing, relaxed
from moesurgery.surgery.tie_blocks.schemes import TIE_BLOCKS, Init, Scheme, TieScheme, arranged, mapped
from moesurgery.surgery.tie_blocks.tied_stack import TiedStack

Norms = Literal["kept", "shared"]
Prediction = Literal["keep", "drop"]
_CODE = "modeling_tied.py"


@operation(TIE_BLOCKS)
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
    if anatomy.family is not None and (reason := anatomy.family.refuses.get(TIE_BLOCKS)):
        raise RefusedError(f"{TIE_BLOCKS}: {anatomy.family.name}: {reason}")
    stack = stack_of(anatomy, plan.tensors, TIE_BLOCKS)
    if anatomy.settings.tie_map is not None:
        if not materialize or blocks is not None or init is not None or relax is not None:
            raise RefusedError(
                f"{TIE_BLOCKS}: the blocks are tied already",
                f"write them out first: `- {TIE_BLOCKS}: {{materialize: true}}`",
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
        apart = apart_for_relaxing(plan, stack)
    tie = TiedStack(plan, stack, arrangement, apart)
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
        more, companions = relaxed(tie, relax)
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
        TIE_BLOCKS,
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
            *_notes(compared, by_kind, distances, stored_once, relax, anatomy.is_moe),
            *_left_out_note(left_out),
        ),
        tables=(distance_table(by_kind),) if by_kind else (),
    )
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files=files, companions=companions)


def _left_out_note(left_out: int) -> list[str]:
    """Say how much of the blocks the distances leave out."""
    if not left_out:
        return []
    return [
        f"the distances are without {left_out:,} values that are NaN or infinite:"
        " `moesurgery validate --level values` finds such tensors"
    ]


def _config(anatomy: Anatomy, arrangement: TieScheme, prediction_layers: Prediction) -> dict[str, Any]:
    """Return the config of the new stack, as a stock model."""
    if list(arrangement.own) != list(range(anatomy.settings.layers or 0)):
        check_movable(anatomy, anatomy.component, TIE_BLOCKS)
    try:
        config = restacked_config(anatomy.settings, [LayerOrigin(anatomy.settings, block) for block in arrangement.own])
    except RefusedError as error:
        raise RefusedError(f"{TIE_BLOCKS}: {error.message}", error.hint) from None
    return without_prediction(replace(anatomy.settings, config=config)) if prediction_layers == "drop" else config


def _tied_config(
    anatomy: Anatomy, stack: Stack, config: dict[str, Any], arrangement: TieScheme, apart: Sequence[str]
) -> dict[str, Any]:
    """Return the config of the form that is stored once. Raises RefusedError where its code does not fit the model."""
    hint = "use --materialize"
    architectures = config.get("architectures") or []
    if stack.container != "layers" or stack.root not in ("", "model."):
        raise RefusedError(
            f"{TIE_BLOCKS}: the blocks of this model are {stack.root}{stack.container}, not model.layers", hint
        )
    if config.get("num_hidden_layers") is None or "auto_map" in config:
        raise RefusedError(f"{TIE_BLOCKS}: this model has nested settings or code of its own", hint)
    if len(architectures) != 1 or not str(architectures[0]).endswith("ForCausalLM"):
        raise RefusedError(f"{TIE_BLOCKS}: architectures is {architectures}, not one causal language model", hint)
    if quantised := method(config):
        raise RefusedError(
            f"{TIE_BLOCKS}: the weights are quantised ({quantised}), which tied loading was not tried with", hint
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
    step = Step(
        TIE_BLOCKS, {"materialize": True}, f"all {len(tie_map)} positions written out as {config['model_type']}"
    )
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files={_CODE: None})


def _notes(
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
