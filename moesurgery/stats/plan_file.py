"""Plan files: which experts of each layer stay, or become one, and which of their neurons, as JSON without weights.

`moesurgery drop-experts MODEL --keep 25% --text F --plan FILE` writes one (`write.plan_document`), and with
`--plan FILE` alone a command carries it out on any checkpoint of the same model, in whatever form it is stored.
docs/plan-file.md describes the format; `plan_file_schema` is the same for programs.

Plainer shapes that others publish are read too: kept or dropped experts by layer, as an object or as a list of lists,
and the profiles of vLLM's load-time pruning (github.com/vllm-project/vllm/pull/37824).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.gguf_files import MODEL_TYPE
from moesurgery.checkpoint.strict_json import parse_json
from moesurgery.errors import CheckpointError, RefusedError
from moesurgery.escape import one_line
from moesurgery.families.anatomy import Anatomy, MoeBlock
from moesurgery.plan.fingerprint import router_digest
from moesurgery.plan.plan import Plan
from moesurgery.stats import entry_rules

FORMAT = "moesurgery plan 1"
_MAX_BYTES = 1 << 30
_KEEP = ("keep", "kept", "keep_experts", "kept_experts", "retained", "retained_experts")
_DROP = ("drop", "dropped", "drop_experts", "dropped_experts", "pruned", "pruned_experts")
_LAYER = re.compile(r"(?:.*\.)?(?:layers?|blocks?|h)[._ -]?(\d{1,9})(?:\..*)?")
_WRAP = 'say which in the file: {{"keep": {0}}} or {{"drop": {0}}}'

_EXPERTS = entry_rules.listed(entry_rules.COUNT)
_LISTS = entry_rules.listed(_EXPERTS)
_ABOUT = {"operation": entry_rules.A_TEXT, "model": entry_rules.mapping_to(entry_rules.maybe(entry_rules.A_TEXT))}
_ALSO = {"text": entry_rules.FILES}
_ENTRY = {"experts": entry_rules.COUNT}
_OF_ENTRY = {
    "keep": _EXPERTS,
    "groups": _LISTS,
    "shares": entry_rules.listed(entry_rules.listed(entry_rules.NUMBER)),
    "scores": entry_rules.listed(entry_rules.NUMBER),
    "neurons": entry_rules.mapping_to(_EXPERTS),
}


@dataclass(frozen=True)
class LayerPlan:
    """What a plan says of one layer, experts by their numbers in the model that it was made on; None: nothing.

    `keep` and `drop` are the same choice from two sides; `scores` has a number for each expert, higher being more worth
    keeping. `groups` become one expert each, in this order, with the share of each member in `shares`. `neurons` has
    for each expert that it names the neurons that stay.
    """

    experts: int | None = None
    keep: list[int] | None = None
    drop: list[int] | None = None
    groups: list[list[int]] | None = None
    shares: list[list[float]] | None = None
    neurons: Mapping[int, list[int]] | None = None
    scores: list[float] | None = None

    def kept(self, experts: int) -> list[int] | None:
        """Return the experts of `experts` that stay, in ascending order; None where nothing is said."""
        if self.keep is not None:
            return sorted(self.keep)
        return None if self.drop is None else [e for e in range(experts) if e not in set(self.drop or ())]


@dataclass(frozen=True)
class PlanFile:
    """A plan by layer, as the file names layers. `about` is the rest of a file of our own, empty for plain shapes.

    `in_order`: the layers are numbered as they follow each other among the MoE layers, not as in the model. `ffns` has
    the shared experts and dense FFNs that lose neurons, by module.
    """

    path: str
    sha256: str
    layers: Mapping[str, LayerPlan]
    about: Mapping[str, Any] = field(default_factory=dict)
    in_order: bool = False
    ffns: Mapping[str, LayerPlan] = field(default_factory=dict)

    def by_block(self, anatomy: Anatomy, operation: str) -> dict[str, LayerPlan]:
        """Return what is said of each MoE block, by its name; blocks of which nothing is said are left out.

        Raises RefusedError for a layer that is not there, or an expert or a number of experts that a layer has not.
        """
        by_block: dict[str, LayerPlan] = {}
        main = anatomy.main_blocks
        if self.in_order and len(self.layers) != len(main):
            raise RefusedError(
                f"{operation}: {self.path} lists {len(self.layers)} layers, the model has {len(main)} with experts",
                'give the layers by number: {"keep": {"0": […], …}}',
            )
        for key, entry in self.layers.items():
            block = main[int(key)] if self.in_order else _block(anatomy, key)
            if block is None:
                layers = ", ".join(str(b.layer) for b in main)
                raise RefusedError(
                    f"{operation}: {self.path} speaks of {one_line(repr(key), 80)}, which is no MoE layer",
                    f"the MoE layers are {layers}",
                )
            if block.where in by_block:
                raise RefusedError(f"{operation}: {self.path} speaks of {block.where} twice", "leave one of them out")
            _check_entry(operation, self.path, block, entry)
            by_block[block.where] = entry
        return by_block

    def check(self, plan: Plan, operation: str) -> str | None:
        """Raise RefusedError where this is a plan for another type of model. Return a warning about its routers."""
        model = self.about.get("model", {})
        theirs, ours = model.get("model_type"), plan.anatomy.model_type
        if theirs and ours.startswith(MODEL_TYPE) and not theirs.startswith(MODEL_TYPE):
            return (
                f"{self.path} is a plan for a {theirs}, and a GGUF does not say what it was made from: layers and"
                " experts go by their numbers"
            )
        if theirs and theirs != ours:
            raise RefusedError(
                f"{operation}: {self.path} is a plan for a {theirs}, this is a {ours}",
                "a plan is for checkpoints of one model",
            )
        if not model.get("routers") or model["routers"] == router_digest(plan):
            return None
        return (
            f"the routers are not those of {model.get('name') or 'the model'} on which {self.path} was made: if this is"
            " no copy of it in another form, or a fine-tune, its experts have nothing to do with the plan"
        )


def _block(anatomy: Anatomy, key: str) -> MoeBlock | None:
    """Return the block that a key means: a number, a name of a layer or of a module in it; None for none."""
    for block in anatomy.blocks:
        if key == block.where or key.startswith(f"{block.layer_path}.") or key == block.layer_path:
            return block
    matched = _LAYER.fullmatch(key)
    number = matched[1] if matched else key
    return next((b for b in (*anatomy.main_blocks, *anatomy.blocks) if str(b.layer) == number), None)


def _check_entry(operation: str, path: str, block: MoeBlock, entry: LayerPlan) -> None:
    if entry.experts is not None and entry.experts != block.experts:
        raise RefusedError(
            f"{operation}: {path} is for {entry.experts} experts in {block.where}, which has {block.experts}",
            "a plan is for checkpoints of one model, before its experts are cut",
        )
    named = [*(entry.keep or ()), *(entry.drop or ()), *(e for group in entry.groups or () for e in group)]
    for expert in named:
        if expert >= block.experts:
            raise RefusedError(
                f"{operation}: {path} names expert {expert} of {block.where}, whose experts are 0 to"
                f" {block.experts - 1}"
            )
    if len(set(named)) != len(named):
        raise RefusedError(f"{operation}: {path} names an expert of {block.where} twice", "name each once")
    if entry.groups is not None and entry.shares is not None and len(named) != block.experts:
        raise RefusedError(
            f"{operation}: {path} has {len(named)} of the {block.experts} experts of {block.where} in its groups",
            "an expert that stays as it is has a group of its own",
        )


def load_plan_file(path: str | Path) -> PlanFile:
    """Read a plan file or one of the plainer shapes. Raises CheckpointError for what is none, or says two things."""
    try:
        if (size := Path(path).stat().st_size) > _MAX_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes, and a plan at most {_MAX_BYTES:,}")
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read as a plan: {error.strerror or error}",
            "to write a plan there, say what to choose as well, as with --keep 25%",
        ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        document = parse_json(data, config=True)
        if isinstance(document, dict) and "format" in document:
            about = {k: v for k, v in document.items() if k not in ("layers", "ffns")}
            ffns = _entries(document["ffns"], "ffns") if "ffns" in document else {}
            return PlanFile(str(path), sha256, _own(document), about, ffns=ffns)
        layers, in_order = _plain(document)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as a plan: {error}", "docs/plan-file.md has the format") from None
    return PlanFile(str(path), sha256, layers, {}, in_order)


def _own(document: dict[str, Any]) -> dict[str, LayerPlan]:
    """Return the layers of a file of our own format. Raises ValueError."""
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {one_line(repr(document['format']), 80)}, expected {FORMAT!r}")
    entry_rules.check_entries(document, _ABOUT, _ALSO)
    return _entries(document.get("layers"), "layers")


def _entries(layers: Any, key: str) -> dict[str, LayerPlan]:
    if not isinstance(layers, dict):
        raise ValueError(f"{key} is missing or no object")
    found = {}
    for where, entry in layers.items():
        entry_rules.check_entries(entry, _ENTRY, _OF_ENTRY, f"{key}.{one_line(where, 80)}: ")
        neurons, groups, shares = entry.get("neurons"), entry.get("groups"), entry.get("shares")
        if neurons is not None and not all(expert.isdecimal() for expert in neurons):
            raise ValueError(f"{key}.{one_line(where, 80)}: neurons is keyed by something else than expert numbers")
        if shares is not None and [len(s) for s in shares] != [len(g) for g in groups or ()]:
            raise ValueError(f"{key}.{one_line(where, 80)}: shares are not as many as the members of groups")
        by_expert = None if neurons is None else {int(expert): value for expert, value in neurons.items()}
        found[where] = LayerPlan(
            entry["experts"], entry.get("keep"), None, groups, shares, by_expert, entry.get("scores")
        )
    return found


def _plain(document: Any) -> tuple[dict[str, LayerPlan], bool]:
    """Return the layers of a plainer shape, and whether they are a list in order. Raises ValueError."""
    if isinstance(document, list):
        raise ValueError(f"it does not say whether these experts are kept or dropped; {_WRAP.format('[[…], …]')}")
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    if "layers" in document and not _side(document):
        document = document["layers"]
    side = _side(document)
    if side is None:
        return _by_entry(document), False
    key, choice = side
    if isinstance(choice, dict):
        return {str(layer): _chosen(key, experts, layer) for layer, experts in choice.items()}, False
    if not _LISTS.fits(choice):
        raise ValueError(f"{key} is {one_line(repr(choice), 80)}, expected a list of experts for each layer")
    if key == "pruned_experts" and all(len(pair) == 2 for pair in choice):
        # Pairs of layer and expert, as vLLM's load-time pruning has them.
        by_layer: dict[str, list[int]] = {}
        for layer, expert in choice:
            by_layer.setdefault(str(layer), []).append(expert)
        return {layer: LayerPlan(drop=experts) for layer, experts in by_layer.items()}, False
    return {str(number): _chosen(key, experts, number) for number, experts in enumerate(choice)}, True


def _side(document: Any) -> tuple[str, Any] | None:
    """Return the one key that says what is kept or dropped, with its value; None for none. Raises ValueError."""
    keys = [key for key in (*_KEEP, *_DROP) if isinstance(document, dict) and key in document]
    if len(keys) > 1:
        raise ValueError(f"it has {' and '.join(keys)}: leave one, the other follows from it")
    return (keys[0], document[keys[0]]) if keys else None


def _by_entry(document: Any) -> dict[str, LayerPlan]:
    """Return the layers of an object by layer whose entries say themselves what is kept or dropped."""
    if not isinstance(document, dict) or not document:
        raise ValueError("it says nothing of any layer")
    layers = {}
    for layer, entry in document.items():
        side = _side(entry)
        if side is None:
            if _EXPERTS.fits(entry):
                what = f'{{"{one_line(layer, 80)}": […], …}}'
                raise ValueError(f"it does not say whether these experts are kept or dropped; {_WRAP.format(what)}")
            raise ValueError(f"{one_line(layer, 80)} is none of {', '.join((*_KEEP, *_DROP))} and no layer with one")
        layers[layer] = _chosen(*side, layer)
    return layers


def _chosen(key: str, experts: Any, layer: object) -> LayerPlan:
    if not _EXPERTS.fits(experts):
        raise ValueError(f"{key} of {layer} is {one_line(repr(experts), 80)}, expected a list of expert numbers")
    return LayerPlan(keep=experts) if key in _KEEP else LayerPlan(drop=experts)


def plan_file_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 7) of plan files."""
    text, number = {"type": "string"}, {"type": "number"}
    experts = {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True}
    layer = {
        "experts": {"type": "integer", "minimum": 1, "description": "how many experts the layer had"},
        "keep": {**experts, "description": "the experts that stay, by their numbers in that layer, ascending"},
        "groups": {"type": "array", "items": experts, "description": "experts that become one, in the new order"},
        "shares": {
            "type": "array",
            "items": {"type": "array", "items": number},
            "description": "the share of each member of each group in the mean",
        },
        "scores": {"type": "array", "items": number, "description": "the criterion's score of each expert"},
        "neurons": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": experts,
            "description": "the neurons that stay in each expert, by the expert's number in that layer",
        },
    }
    one_of = [{"required": ["keep"]}, {"required": ["groups"]}, {"required": ["neurons"]}]
    model = {
        "name": {**text, "description": "what the model was called; never a local path"},
        "model_type": {**text, "description": "as in config.json"},
        "digest": {
            **text,
            "description": "SHA-256 of config.json and samples of the weights: of one stored form",
        },
        "routers": {
            "type": ["string", "null"],
            "description": "SHA-256 of router rows in bfloat16: of all forms",
        },
    }
    files = {"type": "object", "required": ["file"], "properties": {"file": text, "sha256": text, "weight": number}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "moesurgery plan file",
        "type": "object",
        "required": ["format", "operation", "model", "layers"],
        "properties": {
            "format": {"const": FORMAT},
            "version": {**text, "description": "of moesurgery"},
            "operation": {**text, "description": "what chose"},
            "criterion": {"type": "object", "description": "the parameters of the choice, as a recipe has them"},
            "model": {"type": "object", "required": ["model_type"], "properties": model},
            "text": {"type": "array", "items": files, "description": "what the criterion was measured on"},
            "statistics": {"type": "object", "description": "the statistics file: its SHA-256 and what it was made of"},
            "layers": {
                "type": "object",
                "description": "by the name of the layer, as model.layers.3",
                "additionalProperties": {
                    "type": "object",
                    "required": ["experts"],
                    "anyOf": one_of,
                    "properties": layer,
                },
            },
            "ffns": {
                "type": "object",
                "description": "shared experts and dense FFNs that lose neurons, by module, as model.layers.3.mlp",
                "additionalProperties": {"type": "object", "required": ["experts", "neurons"], "properties": layer},
            },
        },
    }
