"""The same model in another form: layout of the experts, dtype, plain weights for quantised ones, shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from moesurgery.checkpoint.dtypes import BY_CONFIG_NAME, CONFIG_NAMES, PLAIN_FLOATS
from moesurgery.errors import RecipeError, RefusedError
from moesurgery.expr.elementwise import cast
from moesurgery.families.anatomy import Anatomy
from moesurgery.families.clients import CLIENTS, Client
from moesurgery.families.config_keys import DTYPE_KEYS, with_dtype
from moesurgery.families.family import Layout
from moesurgery.families.quantisation_settings import with_renamed_settings
from moesurgery.families.quantised import method, without_quantisation
from moesurgery.moe.expert_axis import Entries
from moesurgery.moe.layouts import moved_name, relaid
from moesurgery.plan.dequantise import dequantised
from moesurgery.plan.plan import Plan, Step
from moesurgery.plan.side_files import renamed_files
from moesurgery.recipe.parameters import Param
from moesurgery.recipe.registry import operation
from moesurgery.recipe.text_needs import TextNeeds
from moesurgery.stats.input_squares import input_squares
from moesurgery.surgery.client_form import ClientName, readable
from moesurgery.surgery.quantise_linears import Linears, QuantisedAs, quantised_linears, stays_fused

_Kind = Literal["per-expert", "fused"]
StoredDtype = Literal["bf16", "f16", "f32", "bfloat16", "float16", "float32"]
_NAME = "convert"
_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32", **BY_CONFIG_NAME}


@operation(_NAME, text=TextNeeds(takes_text=False))
def convert(
    plan: Plan,
    *,
    layout: Annotated[
        _Kind | None, Param("store the experts one by one, or all of a layer in one tensor, as transformers 5 does")
    ] = None,
    dtype: Annotated[StoredDtype | None, Param("cast plain weights; selection biases of routers keep theirs")] = None,
    dequantize: Annotated[bool, Param("write quantised weights as plain ones, in --dtype or the config's")] = False,
    quantize: Annotated[
        QuantisedAs | None,
        Param("write plain weights as quantised ones, rounded to the nearest step, without calibration"),
    ] = None,
    linears: Annotated[
        Linears | None, Param("what --quantize is for: the routed experts (the default), or all linear layers")
    ] = None,
    stats: Annotated[
        str | None,
        Param(
            "with --quantize: statistics from `moesurgery collect --neurons`, or an imatrix, that rounding errors are"
            " weighed by",
            metavar="FILE",
            reads="file",
        ),
    ] = None,
    client: Annotated[
        ClientName | None, Param("the form that this program reads: layout, config keys, head", option="--for")
    ] = None,
) -> Plan:
    """Write the same model in another form: layout of the experts, dtype, plain weights, shards.

    Layouts and shards move bytes and compute nothing, so there and back gives the same tensors. With none of the
    options the model is copied, as with --max-shard-size alone, which works for every checkpoint. What each program
    reads, and which models it computes wrongly in any form, is in docs/clients.md.
    """
    parameters: dict[str, Any] = {"layout": layout, "dtype": dtype, "dequantize": dequantize or None}
    parameters |= {"quantize": quantize, "linears": linears, "stats": stats, "client": client}
    if linears is not None and quantize is None:
        raise RecipeError(f"{_NAME}: --linears says what --quantize is for", "give --quantize, too")
    if stats is not None and quantize is None:
        raise RecipeError(f"{_NAME}: --stats is for --quantize", "give --quantize, too, or leave it out")
    done: list[str] = []
    notes: list[str] = []
    changed = plan
    if dequantize:
        changed, what = _dequantised(changed, _DTYPES[dtype] if dtype else None)
        done.append(what)
    if dtype is not None:
        changed, what = _cast(changed, _DTYPES[dtype])
        done.append(what)
        if left := sorted({expr.dtype for expr in changed.tensors.values()} - {_DTYPES[dtype]}):
            notes.append(f"{', '.join(left)} stays for what is no plain weight, and for selection biases of routers")
    if layout is not None:
        changed, what = _relaid(changed, layout)
        done.append(what)
        if others := unread_layout(changed):
            notes.append(f"{', '.join(others)} {'does' if len(others) == 1 else 'do'} not read this layout")
    if client is not None:
        changed, what = _for_client(changed, CLIENTS[client], layout)
        done.append(what)
    if quantize is not None:
        if not stays_fused(changed, quantize) and any(
            b.layout and b.layout.kind == "fused" for b in changed.anatomy.blocks
        ):
            changed, what = _relaid(changed, "per-expert")
            done.append(what)
        squares = {} if stats is None else input_squares(stats, changed, _NAME)
        changed, what = quantised_linears(changed, quantize, linears or "experts", _NAME, squares)
        done.append(what)
    step = Step(
        _NAME,
        {key: value for key, value in parameters.items() if value is not None},
        "; ".join(done) or "copied as it is",
        report={"done": done},
        notes=tuple(notes),
    )
    return plan.edited(
        step, tensors=changed.tensors, shard_of=changed.shard_of, config=changed.config, files=changed.files
    )


def unread_layout(plan: Plan) -> list[str]:
    """Return the clients that have code for the type of a plan, and not for the layout that its experts are in."""
    family = plan.anatomy.family
    if family is None or all(block.layout == (block.of or family).layouts[0] for block in plan.anatomy.blocks):
        return []
    kind = plan.anatomy.model_type
    return [
        name
        for name, client in CLIENTS.items()
        if client.has_code(kind) and client.other_layouts is not None and kind not in client.other_layouts
    ]


def _for_client(plan: Plan, client: Client, layout: _Kind | None) -> tuple[Plan, str]:
    """Return the plan in the form that a client reads."""
    tensors, shard_of, config, what = readable(plan, client, _NAME)
    done = [what] if what else []
    plan = plan.edited(Step(_NAME, {}, what), tensors=tensors, shard_of=shard_of, config=config)
    if client.name in unread_layout(plan):
        if layout is not None:
            raise RefusedError(
                f"{_NAME}: {client.name} does not read experts that are {layout} in this type", "leave --layout out"
            )
        plan, what = _relaid(plan, None)
        done.append(what)
    return plan, f"for {client.name}: " + ("; ".join(done) or "it reads the model as it is")


def _dequantised(plan: Plan, dtype: str | None) -> tuple[Plan, str]:
    """Return the plan with plain weights: of `dtype`, else of the one that the config names, else bf16."""
    stated = plan.anatomy.settings.first(DTYPE_KEYS)
    target = dtype or BY_CONFIG_NAME.get(str(stated), "BF16")
    tensors, renamed = dequantised(plan, target)
    if tensors.keys() == plan.tensors.keys():
        raise RefusedError(f"{_NAME}: no weight is quantised", "leave --dequantize out")
    shard_of = {renamed.get(name, name): file for name, file in plan.shard_of.items()}
    form = method(plan.config)
    what = (
        f"{sum(tensors[n] is not plan.tensors.get(n) for n in tensors)} weights from {form or 'quantised'} to {target}"
    )
    config = without_quantisation(plan.config)
    return plan.edited(
        Step(_NAME, {}, what), tensors=tensors, shard_of={n: shard_of[n] for n in tensors}, config=config
    ), what


def _cast(plan: Plan, dtype: str) -> tuple[Plan, str]:
    """Return the plan with its plain weights in `dtype`, and the config saying so."""
    kept = _kept(plan.anatomy)
    tensors = {
        name: expr if name in kept or expr.dtype not in PLAIN_FLOATS else cast(expr, dtype)
        for name, expr in plan.tensors.items()
    }
    count = sum(tensors[name] is not expr for name, expr in plan.tensors.items())
    config = with_dtype(plan.config, CONFIG_NAMES[dtype])
    what = f"{count} tensors cast to {dtype}"
    return plan.edited(Step(_NAME, {}, what), tensors=tensors, config=config), what


def _kept(anatomy: Anatomy) -> set[str]:
    """Return the tensors that no cast touches: what is no parameter (scales, buffers), and selection biases.

    Those decide by small differences, and are float32 in bf16 models for that reason.
    """
    kept = {name for name, count in anatomy.parameters.items() if count == 0}
    return kept | {m.name for block in anatomy.blocks for m in block.members if m.role == "correction_bias"}


def _relaid(plan: Plan, kind: _Kind | None) -> tuple[Plan, str]:
    """Return the plan with its experts in the family's first layout of a kind, or in the published one for None."""
    anatomy = plan.anatomy
    family = anatomy.require_family(_NAME)
    entries: Entries = {}
    targets: dict[str, tuple[Layout, Layout]] = {}  # by the path of the layer
    for block in anatomy.blocks:
        assert block.layout is not None
        layouts = block.of.layouts if block.of else family.layouts
        target = next((layout for layout in layouts if kind is None or layout.kind == kind), None)
        if kind == "fused" and method(plan.config) == "mlx" and block.of is None:
            target = family.mlx_layout or target
        if target is None:
            raise RefusedError(f"{_NAME}: {family.name} stores its experts {layouts[0].kind} only")
        if block.layout == target or block.layout.kind == kind:
            continue
        entries.update(relaid(block, plan.tensors, target, _NAME))
        targets[block.layer_path] = (block.layout, target)
    entries.update(_moved(anatomy, plan, entries, targets))
    tensors, shard_of = plan.substituted(entries)
    modules = _renamed_modules(anatomy, entries, targets)
    config = with_renamed_settings(plan.config, modules)
    files = renamed_files(plan.checkpoint, plan.files, modules)
    what = f"experts {kind or 'as published'} in {len(targets)} of {len(anatomy.blocks)} layers"
    if not targets:
        what = f"experts are {kind or 'as published'} already"
    return plan.edited(Step(_NAME, {}, what), tensors=tensors, shard_of=shard_of, config=config, files=files), what


def _renamed_modules(
    anatomy: Anatomy, entries: Entries, targets: Mapping[str, tuple[Layout, Layout]]
) -> dict[str, str | None]:
    """Return the new names of modules that quantisation settings may list: experts are one module where fused."""
    new_names: dict[str, str | None] = {}
    for old, [(new, _), *more] in ((old, made) for old, made in entries.items() if made):
        if old != new and not more:
            new_names[old.rpartition(".")[0]] = new.rpartition(".")[0]
    for block in anatomy.blocks:
        if block.layer_path not in targets:
            continue
        before, after = targets[block.layer_path]
        for part in before.parts:
            module = next((p.path.rpartition(".")[0] for p in after.parts if "#" not in p.path), None)
            for expert in range(block.experts) if "#" in part.path else ():
                own = part.path.replace("#", str(expert))
                new_names[f"{block.where}.{own}"] = None if module is None else f"{block.where}.{module}"
    return new_names


def _moved(
    anatomy: Anatomy,
    plan: Plan,
    entries: Entries,
    targets: Mapping[str, tuple[Layout, Layout]],
) -> Entries:
    """Return the new names of the other tensors of the layers that change their layout."""
    moved_entries: Entries = {}
    layers: dict[int, list[str]] = {}
    for block in anatomy.blocks:
        layers.setdefault(block.layer, []).append(block.layer_path)
    for name, expr in plan.tensors.items():
        for path in layers.get(anatomy.layer.get(name, -1), ()) if name not in entries else ():
            if name.startswith(path + ".") and path in targets:
                moved_entries[name] = [(f"{path}.{moved_name(name[len(path) + 1 :], *targets[path])}", expr)]
    return moved_entries
