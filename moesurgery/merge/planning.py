"""From a merge recipe to a plan: which part of which model goes where, and with which parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.errors import RecipeError, RefusedError, SurgeryError
from moesurgery.families.settings import Settings as ConfigSettings
from moesurgery.families.settings import with_value
from moesurgery.merge.agreement import config_differences, tokenizers_differ
from moesurgery.merge.aligned import Aligner
from moesurgery.merge.filters import Filters, check_filters
from moesurgery.merge.layers import restacked
from moesurgery.merge.merged import Merged
from moesurgery.merge.method import per_model, scalar
from moesurgery.merge.parts import Holder, Key, Parts
from moesurgery.merge.recipe import DTYPES, Input, MergeRecipe, Slice, Stage
from moesurgery.merge.references import Models, label
from moesurgery.merge.setting import Settings, resolve
from moesurgery.merge.tokenizers import TEMPLATE, MergedTokenizer, chat_template
from moesurgery.plan.drawn import random_key
from moesurgery.plan.elementwise import cast, scale
from moesurgery.plan.expr import Expr, Rows, concat
from moesurgery.plan.plan import Plan, Step
from moesurgery.surgery.parameters import MISSING, Parameter
from moesurgery.write.card import CARD

_NAMES = {code: name for name, code in DTYPES.items()}
_RANK = ("BF16", "F16", "F32", "F64")


def plan_merge(recipe: MergeRecipe) -> Plan:
    """Return the plan of a recipe's last stage; earlier stages become part of its expressions.

    Opens headers only. Raises SurgeryError, with the recipe's line where it has one.
    """
    models = Models()
    for stage in recipe.stages:
        plan = _Merger(stage, models, recipe.origin, recipe.device).plan()
        if stage is recipe.result:
            return plan
        assert stage.name is not None
        models.stages[stage.name] = plan
    raise AssertionError("a recipe has a stage")


@dataclass(frozen=True)
class _Source:
    """One input of a slice."""

    reference: str
    parts: Parts
    settings: Settings
    first: int  # the layer that the slice's first layer comes from
    line: int

    def key(self, path: str, place: _Place) -> Key:
        """Return the key of a part of the output in this model."""
        return Key(None if place.offset is None else self.first + place.offset, path)


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the output comes from: a slice, a layer within it, and how far along it that is."""

    slice: int
    offset: int | None  # None outside of layers
    layer: int | None  # of the output
    t: float


class _Merger:
    """Plans one stage."""

    def __init__(self, stage: Stage, models: Models, origin: str, device: str) -> None:
        self.stage, self.models, self.origin = stage, models, origin
        self.device = device
        self.method = stage.method
        self.warnings: list[str] = [f"{origin}:{line}: {text}" for line, text in stage.warnings]
        self.filters = Filters()
        self._aligners: dict[tuple[int, int], Aligner] = {}
        self._groups: dict[tuple[_Place, tuple[str, ...]], Expr] = {}

    def plan(self) -> Plan:
        self.sources = [self._sources(part) for part in self.stage.slices]
        donor = self.donor
        others = {s.reference: s for found in self.sources for s in found if s.parts is not donor}
        self._agree(list(others.values()))
        placed = list(self._placed())
        used = {id(s.parts): s.parts for found in self.sources for s in found}
        check_filters(self.stage, (name for name, _, _ in placed), used.values(), self.origin)
        tensors: dict[str, Expr] = {}
        home: dict[str, str] = {}
        last = next(iter(donor.plan.home.values()))
        for name, holder, place in placed:
            tensors[name] = self._tensor(holder, place)
            last = home[name] = donor.plan.home.get(name, last)
        files = self._files()
        inner = {id(step): step for p in (donor, *(s.parts for s in others.values())) for step in p.plan.steps}.values()
        checkpoints = {id(c): c for p in (donor, *(s.parts for s in others.values())) for c in p.plan.sources}
        return Plan(
            tuple(checkpoints.values()),
            tensors,
            home,
            self._config(placed, tensors),
            steps=(*inner, self._step(len(tensors))),
            max_shard_size=self._shard_size() if self.stage.stacked else None,
            files=files,
        )

    @cached_property
    def donor(self) -> Parts:
        """The model whose names, layout, config and side files the output takes: the base, or the first."""
        return self._opened(self.stage.models[0])

    def _opened(self, reference: str) -> Parts:
        """Return a model; its quantised weights as plain numbers, unless they are only put elsewhere."""
        return self.models.parts(reference, plain=self.method.name != "passthrough" or self.stage.dtype is not None)

    def _sources(self, part: Slice) -> list[_Source]:
        """Return the models of a slice in the order in which the method takes them, the base first or apart."""
        found = []
        for entry in part.inputs:
            with self._at(entry.line):
                parts = self._opened(entry.model)
                self._check_range(entry, parts)
            found.append(
                _Source(entry.model, parts, entry.settings, entry.layers[0] if entry.layers else 0, entry.line)
            )
        base = part.base or self.stage.base
        if base is None:
            return found
        if all(s.reference != base for s in found):
            line = self.stage.line_of("base_model")
            with self._at(line):
                if not self.stage.stacked:
                    found.append(_Source(base, self._opened(base), {}, 0, line))
        if self.method.base == "first":
            found.sort(key=lambda s: s.reference != base)
        return found

    def _check_range(self, entry: Input, parts: Parts) -> None:
        if entry.layers is not None and entry.layers[1] > parts.layers:
            raise RecipeError(f"layer_range ends at {entry.layers[1]}, but {entry.model} has {parts.layers} layers")

    def _at(self, line: int) -> _Line:
        return _Line(self.origin, line)

    def _agree(self, others: list[_Source]) -> None:
        """Refuse models of another kind, and warn of what config and tokenizer disagree on."""
        donor = self.donor
        for source in others:
            with self._at(source.line):
                if source.parts.anatomy.model_type != donor.anatomy.model_type:
                    raise RefusedError(
                        f"{source.parts.label} is a {source.parts.anatomy.model_type}, {donor.label} a"
                        f" {donor.anatomy.model_type}: only models of one architecture merge"
                    )
                if not self.stage.stacked and source.parts.layers != donor.layers:
                    raise RefusedError(
                        f"{source.parts.label} has {source.parts.layers} layers, {donor.label} {donor.layers}",
                        "`slices:` with `layer_range:` say which of them merge",
                    )
            found = config_differences(donor.plan.config, source.parts.plan.config, stacked=self.stage.stacked)
            if found:
                self._warn(
                    source.line, f"config.json of {source.parts.label} disagrees, {donor.label}'s counts: {found}"
                )
            if self.stage.tokenizer is None and tokenizers_differ(donor.plan.checkpoint, source.parts.plan.checkpoint):
                self._warn(
                    source.line,
                    f"{source.parts.label} has another tokenizer than {donor.label}, whose is kept: the same row of the"
                    " embedding may stand for another token",
                )

    def _warn(self, line: int, text: str) -> None:
        self.warnings.append(f"{self.origin}:{line}: {text}")

    # Where things go

    def _placed(self) -> Iterator[tuple[str, Holder, _Place]]:
        """Yield the tensors of the output in order: name, the tensor whose form they take, and their place."""
        donor = self.donor
        if not self.stage.stacked:
            (sources,) = self.sources
            for source in sources:
                for layer in donor.paths.keys() | source.parts.paths.keys():
                    self._same(layer, donor.paths.get(layer, frozenset()), source, layer)
            for name, holder in donor.tensors.items():
                yield name, holder, self._place(holder)
            return
        outside = donor.by_layer.get(None, [])
        for found in self.sources:
            for source in found:
                self._same(None, donor.paths.get(None, frozenset()), source, None)
        first = next((i for i, name in enumerate(donor.tensors) if donor.tensors[name].layer is not None), 0)
        before = set(list(donor.tensors)[:first])
        for holder in outside:
            if holder.name in before:
                yield holder.name, holder, self._place(holder)
        forms = {donor.paths[layer]: held for layer, held in reversed(donor.by_layer.items())}
        for number, (index, offset, t) in enumerate(self._stack):
            sources = self.sources[index]
            lead = self._lead(sources)
            layer = lead.first + offset
            wanted = lead.parts.paths[layer]
            for source in sources:
                self._same(number, wanted, source, source.first + offset)
            held = donor.by_layer[layer] if lead.parts is donor else forms.get(wanted, lead.parts.by_layer[layer])
            for holder in held:
                yield donor.name_of(number, holder.rest), holder, _Place(index, offset, number, t)
        for holder in outside:
            if holder.name not in before:
                yield holder.name, holder, self._place(holder)
        extra = [layer for layer in donor.by_layer if layer is not None and layer >= donor.layers]
        if extra:
            self.warnings.append(
                f"{self.origin}: the layers for multi-token prediction ({', '.join(map(str, extra))} of {donor.label})"
                " are left out: they belong to the old stack"
            )

    @cached_property
    def _stack(self) -> list[tuple[int, int, float]]:
        """The layers of a stacked output: slice, layer within it, and how far along it that is."""
        found = []
        for index, part in enumerate(self.stage.slices):
            first, last = part.inputs[0].layers or (0, 0)
            count = last - first
            found += [(index, i, i / (count - 1) if count > 1 else 1.0) for i in range(count)]
        return found

    def _place(self, holder: Holder) -> _Place:
        """Return the place of a tensor that keeps it: what comes before the layers counts with the first slice."""
        if holder.layer is None:
            after = self.donor.anatomy.component[holder.name] in ("norm", "head")
            return _Place(len(self.sources) - 1 if after else 0, None, None, 0.0)
        count = self.donor.layers
        t = min(holder.layer / (count - 1), 1.0) if count > 1 else 1.0
        return _Place(0, holder.layer, holder.layer, t)

    def _same(self, layer: int | None, wanted: frozenset[str], source: _Source, theirs: int | None) -> None:
        """Refuse where a source lacks a part of the output, or has one that the output would not."""
        have = source.parts.paths.get(theirs, frozenset())
        if have == wanted:
            return
        missing, extra = sorted(wanted - have), sorted(have - wanted)
        where = f"layer {theirs}: " if theirs is not None else ""
        if layer is None and missing == ["lm_head.weight"] and not extra:
            hint = "its output is tied to the embedding; `dense` models of both kinds do not merge"
        else:
            hint = "only models with the same parts merge: the same number of experts, biases, shared experts"
        message = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which would be dropped"
        rest = len(missing or extra) - 1
        with self._at(source.line):
            raise RefusedError(
                f"{source.parts.label}: {where}{message}" + (f" (and {rest} more)" if rest else ""), hint
            )

    # What goes there

    def _tensor(self, holder: Holder, place: _Place) -> Expr:
        return holder.assemble([self._part(path, place) for path in holder.paths])

    def _part(self, path: str, place: _Place) -> Expr:
        """Return the merged values of a part, or those of all experts at once where the recipe wants that."""
        sources = self.sources[place.slice]
        at_once = self.stage.granularity == "tensor" and self.method.kind != "elementwise"
        if not (at_once and "experts." in path):
            return self._merged(path, place, [self._input(s, path, place) for s in sources])
        together = _together(path, sources[0].parts.paths[sources[0].key(path, place).layer])
        group = self._groups.get((place, together))
        if group is None:
            inputs = [concat([self._input(s, one, place) for one in together]) for s in sources]
            group = self._groups[place, together] = self._merged(together[0], place, inputs)
        length = group.shape[0] // len(together)
        index = together.index(path)
        return Rows(group, index * length, (index + 1) * length)

    def _input(self, source: _Source, path: str, place: _Place) -> Expr:
        """Return a part of one model, in the order of the base's experts and neurons where the recipe wants that."""
        key, lead = source.key(path, place), self._lead(self.sources[place.slice])
        if not (self.stage.align and path.startswith(("experts.", "router."))) or source.parts is lead.parts:
            return source.parts.part(key)
        pair = (id(lead.parts), id(source.parts))
        if pair not in self._aligners:
            self._aligners[pair] = Aligner(lead.parts, source.parts, self.stage.align)
        with self._at(source.line):
            return self._aligners[pair].part(lead.key(path, place), key)

    def _merged(self, path: str, place: _Place, inputs: list[Expr]) -> Expr:
        """Return the method's result for one part, given its values in all sources."""
        sources = self.sources[place.slice]
        lead = self._lead(sources)
        kept = inputs[sources.index(lead)]
        if kept.dtype not in PLAIN_FLOATS:
            return self._unmerged(path, place, kept)
        if self._tokenizer is not None and place.layer is None and self._tokenizer.is_vocabulary(path, kept.shape):
            inputs = self._resized(sources, inputs)
            kept = inputs[sources.index(lead)]
        for source, expr in zip(sources, inputs, strict=True):
            if expr.shape != kept.shape:
                with self._at(source.line):
                    raise _unlike(source.parts.home[source.key(path, place)][0].name, source, expr, lead, kept)
        dtype = self._dtype(path, kept, inputs, sources)
        base = self._base(place.slice)
        apart = self.method.base in ("required", "optional") and base is not None
        chosen = [i for i, s in enumerate(sources) if not (apart and s is base)]
        values = self._values(path, place, [sources[i] for i in chosen])
        if self.method.name == "passthrough":
            return scale(cast(inputs[0], dtype), values["scale"][0])
        key = random_key(self.stage.seed, f"{place.layer}.{path}") if self.method.random else 0
        return Merged(
            self.method.name,
            tuple(inputs[i] for i in chosen),
            inputs[sources.index(base)] if apart and base is not None else None,
            tuple(values.items()),
            dtype,
            kept.shape,
            lead.parts.names(lead.key(path, place), place.layer)[0],
            key,
            self.method.origin,
            self.device,
        )

    @cached_property
    def _tokenizer(self) -> MergedTokenizer | None:
        if self.stage.tokenizer is None:
            return None
        models = {name: self._opened(name) for name in self.stage.models}
        with self._at(self.stage.line_of("tokenizer" if "tokenizer" in self.stage.lines else "tokenizer_source")):
            return MergedTokenizer(self.stage.tokenizer, models)

    def _resized(self, sources: list[_Source], inputs: list[Expr]) -> list[Expr]:
        """Return an embedding of each source with the rows of the merged tokenizer."""
        assert self._tokenizer is not None
        named = {s.reference: expr for s, expr in zip(sources, inputs, strict=True)}
        found = self._tokenizer.resized(named)
        return [found[s.reference] for s in sources]

    def _files(self) -> dict[str, bytes | None]:
        """Return the side files that differ from the base's: another tokenizer or chat template, and its card."""
        files: dict[str, bytes | None] = {CARD: None} if CARD in self.donor.plan.checkpoint.side_files else {}
        if self._tokenizer is not None:
            files.update(self._tokenizer.files())
        if self.stage.chat_template is not None:
            models = {name: self._opened(name) for name in self.stage.models}
            template = chat_template(self.stage.chat_template, models)
            if template is None:
                self._warn(self.stage.line_of("chat_template"), "no model has a chat template: none is written")
            else:
                files[TEMPLATE] = template.encode()
        return files

    def _lead(self, sources: list[_Source]) -> _Source:
        return next((s for s in sources if s.parts is self.donor), sources[0])

    def _base(self, index: int) -> _Source | None:
        reference = self.stage.slices[index].base or self.stage.base
        return next((s for s in self.sources[index] if s.reference == reference), None)

    def _unmerged(self, path: str, place: _Place, kept: Expr) -> Expr:
        """Return values that are no plain floats: copied where that is meant, else refused."""
        lead = self._lead(self.sources[place.slice])
        holder, _ = lead.parts.home[lead.key(path, place)]
        weights = lead.parts.anatomy.parameters[holder.name]
        values = self._values(path, place, [lead]) if self.method.name == "passthrough" else None
        if weights and (values is None or values["scale"][0] != 1):
            with self._at(lead.line):
                raise RefusedError(
                    f"{holder.name} of {lead.parts.label} is stored as {kept.dtype} and cannot be scaled so",
                    "give `dtype: bfloat16`: quantised weights are then read as the numbers that they stand for",
                )
        return kept

    def _dtype(self, path: str, kept: Expr, inputs: list[Expr], sources: list[_Source]) -> str:
        """Return what a part is stored as. Selection biases stay as they are: a bf16 one routes differently."""
        if path == "router.correction_bias":
            return kept.dtype
        if self.stage.dtype is not None:
            return self.stage.dtype
        kinds = {source.parts.plain_dtype or expr.dtype for source, expr in zip(sources, inputs, strict=True)}
        return "F32" if kinds == {"BF16", "F16"} else max(kinds, key=_RANK.index)

    def _values(self, path: str, place: _Place, chosen: list[_Source]) -> dict[str, Any]:
        """Return the method's parameters for one part. Raises RecipeError where one is missing or wrong."""
        lead, part = self._lead(self.sources[place.slice]), self.stage.slices[place.slice]
        outer = (part.settings, self.stage.settings)
        key = lead.key(path, place)
        matches = self.filters.matcher(lead.parts, key, place.layer)
        found: dict[str, Any] = {}
        for name, parameter in self.method.parameters.items():
            if per_model(parameter):
                found[name] = tuple(self._value_of(name, scalar(parameter), path, place, s, outer) for s in chosen)
                continue
            value = resolve(name, outer, matches, place.t)
            if value is MISSING:
                if parameter.required:
                    raise self._lacking(name, lead.parts.names(key, place.layer)[0], part.line)
                value = parameter.default
            found[name] = round(value) if parameter.annotation is int else value
        wrong = self.method.refuse(found) if self.method.refuse else None
        if wrong:
            where = lead.parts.names(key, place.layer)[0]
            raise RecipeError(f"{self.origin}:{part.line}: {self.method.name} at {where}: {wrong}")
        return found

    def _value_of(
        self, name: str, parameter: Parameter, path: str, place: _Place, source: _Source, outer: tuple[Settings, ...]
    ) -> Any:
        key = source.key(path, place)
        matches = self.filters.matcher(source.parts, key, key.layer)
        value = resolve(name, (source.settings, *outer), matches, place.t)
        if value is not MISSING:
            return value
        if parameter.required:
            raise self._lacking(f"{name} of {source.parts.label}", source.parts.names(key, key.layer)[0], source.line)
        return parameter.default

    def _lacking(self, what: str, tensor: str, line: int) -> RecipeError:
        return RecipeError(
            f"{self.origin}:{line}: {self.method.name} needs {what}, and no filter gives it for {tensor}",
            "add a last choice without filter: - value: …",
        )

    # What is said about it

    def _config(self, placed: list[tuple[str, Holder, _Place]], tensors: Mapping[str, Expr]) -> Mapping[str, Any]:
        donor = self.donor
        config = donor.plan.config
        if self.stage.stacked:
            leads = [self._lead(self.sources[index]) for index, _, _ in self._stack]
            origins = [lead.first + offset for lead, (_, offset, _) in zip(leads, self._stack, strict=True)]
            blocks = {id(lead.parts): {b.layer for b in lead.parts.anatomy.main_blocks} for lead in leads}
            moe = [layer in blocks[id(lead.parts)] for lead, layer in zip(leads, origins, strict=True)]
            if donor.anatomy.settings.layers is not None:
                with self._at(self.stage.line_of("slices")):
                    config = restacked(donor.anatomy.settings, origins, moe)
        if self._tokenizer is not None:
            config = with_value(
                ConfigSettings(donor.anatomy.settings.family, config),
                ("vocab_size",),
                self._tokenizer.rows,
                "vocab_size",
            )
        return _with_dtype(config, {expr.dtype for name, expr in tensors.items() if expr.dtype in PLAIN_FLOATS})

    def _shard_size(self) -> int | None:
        return max(
            (sum(info.nbytes for info in header.tensors) for header in self.donor.plan.checkpoint.headers), default=None
        )

    def _step(self, count: int) -> Step:
        stage = self.stage
        inputs = list(dict.fromkeys(s.parts.label for found in self.sources for s in found))
        apart = stage.method.base in ("required", "optional")
        base = f" on {label(stage.base)}" if stage.base is not None and apart else ""
        others = [name for name in inputs if not (base and stage.base is not None and name == label(stage.base))]
        return Step(
            "merge",
            {"recipe": relabelled(stage.value)},
            f"{stage.method.name} of {', '.join(others)}{base}: {count} tensors",
            report={"method": stage.method.name, "models": inputs, "base": self.donor.label, "layers": len(self._stack)}
            if stage.stacked
            else {"method": stage.method.name, "models": inputs, "base": self.donor.label},
            warnings=tuple(self.warnings),
        )


class _Line:
    """Adds the recipe's line to what is raised within."""

    def __init__(self, origin: str, line: int) -> None:
        self.origin, self.line = origin, line

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SurgeryError):
            error.message = f"{self.origin}:{self.line}: {error.message}"


def _together(path: str, paths: frozenset[str]) -> tuple[str, ...]:
    """Return the parts of all experts that mergekit holds in one tensor with `path`: [E, 2I, H] or [E, H, I]."""
    experts, _, role, suffix = path.split(".", 3)
    roles = ("gate", "up") if role in ("gate", "up") else (role,)
    count = 1 + max(int(p.split(".")[1]) for p in paths if p.startswith(experts + "."))
    wanted = [f"{experts}.{e}.{r}.{suffix}" for e in range(count) for r in roles]
    return tuple(p for p in wanted if p in paths)


def _unlike(name: str, source: _Source, theirs: Expr, lead: _Source, ours: Expr) -> SurgeryError:
    hint = (
        "give `tokenizer_source:` to merge models of different vocabularies"
        if "embed" in name or "lm_head" in name
        else None
    )
    return RefusedError(
        f"{name} is {list(theirs.shape)} in {source.parts.label} and {list(ours.shape)} in {lead.parts.label}", hint
    )


def _with_dtype(config: Mapping[str, Any], kinds: set[str]) -> Mapping[str, Any]:
    """Return the config with the dtype that the tensors have, where it names another."""
    if len(kinds) != 1:
        return config
    name = _NAMES[next(iter(kinds))]
    found: dict[str, Any] = copy.deepcopy(dict(config))
    for part in (found, *(p for p in found.values() if isinstance(p, dict))):
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str):
                part[key] = name
    return found


def relabelled(value: Any, key: str | None = None) -> Any:
    """Return a recipe's data with models named as in cards: no local path leaves the machine."""
    if isinstance(value, dict):
        return {k: relabelled(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [relabelled(v, key) for v in value]
    return (
        label(value)
        if key in ("model", "base_model", "source", "tokenizer_source", "path") and isinstance(value, str)
        else value
    )
