"""Layers for multi-token prediction (MTP): left out, taken out as a draft model, put onto a model that lost them.

What draft loaders read, from their source (vLLM: `config/speculative.py` and `models/*_mtp.py`; llama.cpp:
`convert_hf_to_gguf.py --mtp`): they find the layers by the config's number of layers of the trunk and of prediction
layers, skip the trunk's, and want the embedding and the head beside them unless each layer has its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from moesurgery.checkpoint.checkpoint import open_checkpoint
from moesurgery.checkpoint.filenames import PROVENANCE
from moesurgery.checkpoint.gguf_files import without_prediction_entries
from moesurgery.checkpoint.scan import read_object
from moesurgery.errors import RefusedError
from moesurgery.expr.nodes import Expr
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.families.components import MTP, VISION, is_mtp
from moesurgery.families.config_keys import Settings
from moesurgery.families.layer_config import prediction_layers, with_prediction, without_prediction
from moesurgery.families.quantisation_settings import with_changed_settings, with_left_out, without_entries
from moesurgery.families.quantised import holds_quantised, quantisation_config
from moesurgery.families.tensor_names import containers_of, find_layer
from moesurgery.moe.expert_axis import Entries, selected
from moesurgery.plan.plan import Plan, Step, plan_of
from moesurgery.plan.side_files import changed_files, quantisation_files
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.stats.plan_file import load_plan_file
from moesurgery.surgery.choose_experts import kept_by_router_rows

_HOME = "prediction layers"  # the shard that grafted tensors go to
_FORM_KEYS = ("quant_method", "weight_block_size", "bits", "w_bit", "group_size", "config_groups", "fmt")


@operation("mtp-drop")
def mtp_drop(plan: Plan) -> Plan:
    """Leave the prediction (MTP) layers out; config.json then declares none.

    The model computes what it did. Decoding no longer drafts with them.
    """
    anatomy = plan.anatomy
    names = _prediction_names(anatomy)
    if not names and not prediction_layers(anatomy.settings):
        raise RefusedError("mtp drop: this model has no prediction layers, and config.json declares none")
    _refuse_draft(plan, names)
    tensors, shard_of = plan.substituted({name: [] for name in names})
    theirs = _about_prediction(anatomy)
    config = with_changed_settings(without_prediction(anatomy.settings), lambda of, _: without_entries(of, theirs))
    if plan.checkpoint.gguf is not None:
        depth = anatomy.settings.layers or 0
        config = without_prediction_entries(config, depth + prediction_layers(anatomy.settings), depth)
    files = changed_files(plan.checkpoint, plan.files, lambda content, _: without_entries(content, theirs))
    size = sum(plan.tensors[name].nbytes for name in names)
    step = Step(
        "mtp-drop",
        {},
        f"{len(names)} tensors of prediction layers left out, {size:,} bytes",
        report={"tensors": len(names), "bytes": size},
    )
    return plan.edited(step, tensors=tensors, shard_of=shard_of, config=config, files=files)


@operation("mtp-extract")
def mtp_extract(plan: Plan) -> Plan:
    """Take the prediction (MTP) layers out as a draft model, with the embedding, the last norm and the head.

    config.json stays as it is: by its number of layers loaders find those for prediction. vLLM takes the folder as
    `model` of its speculative config (method mtp), llama.cpp by `convert_hf_to_gguf.py --mtp`, `mtp graft` as --from.
    """
    anatomy = plan.anatomy
    _required(anatomy, "mtp extract")
    kept = {
        name
        for name, component in anatomy.component.items()
        if component == MTP or (component != VISION and name not in anatomy.layer)
    }
    tensors, shard_of = plan.substituted({name: [] for name in plan.tensors if name not in kept})
    layers = len(_prediction_names(anatomy))
    step = Step(
        "mtp-extract",
        {},
        f"{layers} tensors of prediction layers and {len(kept) - layers} that they share with the model",
        report={"tensors": layers, "shared": len(kept) - layers},
        notes=("a draft for its model, no model of its own: the layers of the trunk are not in it",),
    )
    return plan.edited(step, tensors=tensors, shard_of=shard_of)


@operation("mtp-graft")
def mtp_graft(
    plan: Plan,
    *,
    source: Annotated[
        str,
        Param(
            "the model, or the draft of `mtp extract`, that the prediction layers come from",
            reads="model",
            option="--from",
        ),
    ],
    plan_file: Annotated[
        str | None,
        Param(
            "the plan by which experts of this model were dropped, where its moesurgery.json does not say",
            metavar="FILE",
            reads="file",
            option="--plan",
        ),
    ] = None,
) -> Plan:
    """Put the prediction (MTP) layers of another model onto this one, as onto a fine-tune that lost them.

    Both have one type, hidden size and vocabulary. Where this model has fewer experts, those that its drop kept are
    taken. The layers were trained with the other model: a fine-tune accepts fewer of their tokens the further it went.
    """
    anatomy, other = plan.anatomy, plan_of(open_checkpoint(source))
    if _prediction_names(anatomy):
        raise RefusedError("mtp graft: this model has prediction layers", "leave them out first with `mtp drop`")
    names = _required(other.anatomy, "mtp graft --from")
    _check_fit(anatomy, other.anatomy)
    _check_form(plan, other, names)
    entries, notes = _with_experts(plan, other, plan_file)
    added: dict[str, Expr] = {}
    for name in names:
        for new, expr in entries.get(name, [(name, other.tensors[name])]):
            added[_placed(new, anatomy, other.anatomy)] = expr
    if twice := sorted(added.keys() & plan.tensors.keys()):
        raise RefusedError(f"mtp graft: this model has a tensor {twice[0]} already")
    config = with_prediction(anatomy.settings, other.anatomy.settings)
    settings, about = quantisation_config(other.config), _about_prediction(other.anatomy)

    def left_out(entry: str) -> str | None:
        return _placed(entry, anatomy, other.anatomy) if about(entry) else None

    config = with_changed_settings(config, lambda of, _: with_left_out(of, settings, left_out))
    described = dict(quantisation_files(other.checkpoint, other.files))
    files = changed_files(
        plan.checkpoint, plan.files, lambda content, file: with_left_out(content, described.get(file), left_out)
    )
    parameters = {"source": source} | ({"plan_file": plan_file} if plan_file is not None else {})
    step = Step(
        "mtp-graft",
        parameters,
        f"{len(added)} tensors of prediction layers from {other.checkpoint.name}",
        report={"tensors": len(added), "from": other.checkpoint.name},
        notes=(*notes, "measure how many of their tokens are accepted: they were trained with the other model"),
        parents={source: (other.checkpoint,)},
    )
    edited = plan.edited(
        step,
        tensors={**plan.tensors, **added},
        shard_of={**plan.shard_of, **dict.fromkeys(added, _HOME)},
        config=config,
        files=files,
    )
    return replace(edited, sources=(*plan.sources, other.checkpoint))


def _prediction_names(anatomy: Anatomy) -> list[str]:
    return [name for name, component in anatomy.component.items() if component == MTP]


def _refuse_draft(plan: Plan, names: Sequence[str]) -> None:
    """Raise RefusedError where nothing would be left: a draft, of which a GGUF may declare all blocks as prediction."""
    anatomy = plan.anatomy
    if names:
        draft = all(component == MTP for name, component in anatomy.component.items() if name in anatomy.layer)
    else:
        draft = plan.checkpoint.gguf is not None and prediction_layers(anatomy.settings) >= (
            anatomy.settings.layers or 0
        )
    if draft:
        raise RefusedError(
            "mtp drop: all its layers are prediction layers: this is a draft", "name the model it is for"
        )


def _required(anatomy: Anatomy, who: str) -> list[str]:
    names = _prediction_names(anatomy)
    if not names:
        declared = prediction_layers(anatomy.settings)
        more = f", though config.json names {declared}" if declared else ""
        raise RefusedError(f"{who}: the model has no prediction layers{more}", "`moesurgery inspect` shows what it has")
    return names


def _about_prediction(anatomy: Anatomy) -> Callable[[str], bool]:
    """Return whether an entry of quantisation settings names a module of a prediction layer; no expression does."""
    depth = anatomy.settings.layers
    containers = containers_of(anatomy.family)

    def about(entry: str) -> bool:
        module = entry.rstrip("*").rstrip(".")
        if not re.fullmatch(r"[\w.]+", module):
            return False
        layer = find_layer(module + ".", containers)
        return is_mtp(module) or (depth is not None and layer is not None and layer[1] >= depth)

    return about


def _check_fit(anatomy: Anatomy, other: Anatomy) -> None:
    """Raise RefusedError where the layers do not fit: another type, hidden size or vocabulary."""

    def sizes(of: Settings) -> dict[str, Any]:
        return {"hidden size": of.hidden, "vocab_size": of.first(("vocab_size",))}

    if anatomy.model_type != other.model_type:
        raise RefusedError(f"mtp graft: this is a {anatomy.model_type}, --from is a {other.model_type}")
    theirs = sizes(other.settings)
    for what, value in sizes(anatomy.settings).items():
        if value != theirs[what]:
            hint = "the tokens that were added are unknown to the layers" if what == "vocab_size" else None
            raise RefusedError(f"mtp graft: this model's {what} is {value}, that of --from {theirs[what]}", hint)


def _check_form(plan: Plan, other: Plan, names: Sequence[str]) -> None:
    """Raise RefusedError where loaders would read the layers in another form than they have."""
    ours, theirs = quantisation_config(plan.config), quantisation_config(other.config)
    quantised = holds_quantised({name: other.tensors[name] for name in names})
    if ours.get("quant_method") == theirs.get("quant_method") and (
        not quantised or all(ours.get(key) == theirs.get(key) for key in _FORM_KEYS)
    ):
        return
    forms = [str(of.get("quant_method") or "plain") for of in (ours, theirs)]
    raise RefusedError(
        f"mtp graft: the weights of this model are {forms[0]}, those of --from {forms[1]}, and config.json speaks of"
        " one form for all",
        "bring --from into this form first; `moesurgery convert --dequantize` makes plain weights",
    )


def _with_experts(plan: Plan, other: Plan, plan_file: str | None) -> tuple[Entries, tuple[str, ...]]:
    """Return the layers' expert tensors with as many experts as this model has, and what is to be known of the choice.

    Raises RefusedError where the numbers differ and nothing says which experts were kept.
    """
    blocks = [block for block in other.anatomy.blocks if block.mtp]
    if not blocks or (plan_file is None and all(block.experts == plan.anatomy.experts for block in blocks)):
        return {}, ()
    kept, origin = _kept_experts(plan, plan_file, blocks)
    entries: Entries = {}
    ranked = []
    for block in blocks:
        stay = kept.get(block.where)
        if stay is None:
            ranked.append(block.where)
            stay = kept_by_router_rows(other, block, block.experts - plan.anatomy.experts)
        if not len(stay) == plan.anatomy.experts == len(set(stay) & set(range(block.experts))):
            raise RefusedError(
                f"mtp graft: {origin} keeps {len(stay)} of the {block.experts} experts of {block.where}, and this model"
                f" has {plan.anatomy.experts}"
            )
        entries.update(selected(block, other.tensors, stay))
    if ranked:
        note = f"{', '.join(ranked)}: not in {origin}, so as many experts were chosen by their router rows"
        return entries, (note,)
    return entries, (f"experts as {origin} keeps them",)


def _kept_experts(plan: Plan, plan_file: str | None, blocks: Sequence[MoeBlock]) -> tuple[Mapping[str, list[int]], str]:
    """Return which experts of the prediction layers were kept, as far as that is said, and where it is said."""
    if plan_file is not None:
        layers = load_plan_file(plan_file).layers
        entries = [layers.get(b.where) or layers.get(str(b.layer)) for b in blocks]
        found = {b.where: entry.kept(b.experts) for b, entry in zip(blocks, entries, strict=True) if entry is not None}
        return {where: stay for where, stay in found.items() if stay is not None}, plan_file
    steps = _recorded(plan)
    if any(name == "merge-experts" for name, _ in steps):
        raise RefusedError(
            "mtp graft: the experts of this model were merged, and those of prediction layers were not there to follow",
            "graft first, then merge",
        )
    drops = [report for name, report in steps if name == "drop-experts"]
    if not drops:
        raise RefusedError(
            f"mtp graft: --from has {blocks[0].experts} experts in {blocks[0].where}, this model"
            f" {plan.anatomy.experts}, and no {PROVENANCE} says which were kept",
            "give the plan of the drop with --plan FILE",
        )
    kept: dict[str, list[int]] = {}
    try:
        for report in drops:
            for layer in report["layers"]:
                where, stay = str(layer["layer"]), [int(expert) for expert in layer["kept"]]
                kept[where] = [kept[where][expert] for expert in stay] if where in kept else stay
    except (KeyError, TypeError, ValueError, IndexError):
        raise RefusedError(
            f"mtp graft: {PROVENANCE} does not say in its own form which experts were kept",
            "remove it, and give the plan of the drop with --plan FILE",
        ) from None
    return kept, PROVENANCE


def _recorded(plan: Plan) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the operations and reports of the steps that made this model, those of this recipe last."""
    checkpoint = plan.checkpoint
    record: Mapping[str, Any] = {}
    if PROVENANCE in checkpoint.file_sizes:
        try:
            record = read_object(checkpoint.source, PROVENANCE, checkpoint.file_sizes[PROVENANCE])
        except ValueError as error:
            raise RefusedError(
                f"{PROVENANCE} {error}", "remove it, and give the plan of the drop with --plan"
            ) from None
    steps = record.get("steps")
    found = [
        (str(step.get("operation")), step["report"])
        for step in (steps if isinstance(steps, list) else ())
        if isinstance(step, dict) and isinstance(step.get("report"), dict)
    ]
    return [*found, *((step.operation, step.report) for step in plan.steps)]


def _placed(name: str, anatomy: Anatomy, other: Anatomy) -> str:
    """Return the name of a tensor, or module, of a prediction layer behind this model's stack.

    In a module of its own it keeps its name.
    """
    place = None if is_mtp(name) else find_layer(f"{name}.", containers_of(other.family))
    if place is None:
        return name
    root, layer, inside = place
    containers = containers_of(anatomy.family)
    places = (find_layer(n, containers) for n in anatomy.layer if anatomy.component[n] not in (MTP, VISION))
    ours = next((at[0] for at in places if at is not None), root)
    return f"{ours}{layer - (other.settings.layers or 0) + (anatomy.settings.layers or 0)}.{inside}".rstrip(".")
