"""From a merge recipe to a plan: the expression of every tensor, the config, the files, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moesurgery.checkpoint.dtypes import CONFIG_NAMES, PLAIN_FLOATS
from moesurgery.checkpoint.filenames import CARD, CHAT_TEMPLATE
from moesurgery.errors import RefusedError, SurgeryError, at_line
from moesurgery.expr.elementwise import cast, scale
from moesurgery.expr.nodes import Expr, Slice, concat
from moesurgery.expr.random import random_key
from moesurgery.families.config_keys import Settings, with_dtype, with_value
from moesurgery.families.layer_config import LayerOrigin, restacked_config, without_prediction
from moesurgery.families.layer_stack import check_movable
from moesurgery.families.quantised import holds_quantised, without_quantisation
from moesurgery.merge.align import Aligner, not_aligned
from moesurgery.merge.arguments import Arguments
from moesurgery.merge.chat_templates import chat_template
from moesurgery.merge.compute.merge_expr import MergeExpr
from moesurgery.merge.filters import check_filters
from moesurgery.merge.placement import Placement
from moesurgery.merge.recipe.stage import Stage
from moesurgery.merge.references import Models, label
from moesurgery.merge.sources import MergeSource, MergeSources, OutputPosition
from moesurgery.merge.tokenizer_union import MergedTokenizer, is_kept
from moesurgery.moe.canonical_names import is_expert
from moesurgery.plan.matrix_origin import first_origin
from moesurgery.plan.plan import Plan, Step
from moesurgery.plan.requantise import Requantize, was_quantised, written_back
from moesurgery.plan.side_files import refuse_named_layers, without_quantisation_files

_RANK = ("BF16", "F16", "F32", "F64")


def plan_stages(
    stages: Sequence[Stage],
    origin: str,
    device: str = "",
    models: Models | None = None,
    requantize: Requantize = "as-source",
) -> Plan:
    """Return the plan of a recipe's last stage; earlier stages become part of its expressions.

    Opens headers only. `origin` is the recipe's name, for messages; `device` and `requantize` as in `MergeRecipe`.
    Raises SurgeryError, with the recipe's line where it has one.
    """
    models = models or Models()
    for stage in stages[:-1]:
        assert stage.name is not None
        models.stages[stage.name] = _Merger(stage, models, origin, device, requantize).plan()
    return _Merger(stages[-1], models, origin, device, requantize).plan()


class _Merger:
    """Plans one stage."""

    def __init__(self, stage: Stage, models: Models, origin: str, device: str, requantize: Requantize) -> None:
        self.stage, self.models, self.origin, self.device = stage, models, origin, device
        self.requantize = requantize
        self.method = stage.method
        self.sources = MergeSources(stage, models, origin)
        self.placement = Placement(stage, self.sources)
        self.arguments = Arguments(stage, self.sources)
        self.warnings = [f"{origin}:{line}: {text}" for line, text in (*stage.warnings, *self.sources.disagreements())]
        self._aligners: dict[tuple[int, int], Aligner] = {}
        self._groups: dict[tuple[OutputPosition, tuple[str, ...]], Expr] = {}

    def plan(self) -> Plan:
        donor, parts, tensors_in_order = self.sources.donor, self.sources.parts, self.placement.tensors
        check_filters(self.stage, (name for name, _, _ in tensors_in_order), parts, self.origin)
        if self.stage.align and self.sources.others:
            line = self.stage.line_of("align")
            with at_line(self.origin, line):
                kept = not_aligned(donor)
            if kept is not None:
                self.warnings.append(f"{self.origin}:{line}: align: {kept}")
        if self.stage.stacked and (extra := self.placement.left_out):
            self.warnings.append(
                f"{self.origin}:{self.stage.line_of('slices')}: the layers for multi-token prediction"
                f" ({', '.join(map(str, extra))} of {donor.label}) are left out: they belong to the old stack"
            )
        tensors: dict[str, Expr] = {}
        shard_of: dict[str, str] = {}
        last = next(iter(donor.plan.shard_of.values()))
        for name, holder, position in tensors_in_order:
            tensors[name] = holder.assemble([self._part(path, position) for path in holder.paths])
            last = shard_of[name] = donor.plan.shard_of.get(name, last)
        self.warnings += [f"{self.origin}:{line}: {text}" for line, text in self.arguments.idle()]
        files = self._files()
        if self._tokenizer is not None and self._tokenizer.rescored:
            self.warnings.append(
                f"{self.origin}:{self.stage.tokenizer_line}: a union of Unigram tokenizers: each model scores its"
                " pieces by itself, so text may be cut otherwise than by either; `tokenizer_source: base` keeps one"
            )
        named = [p.plan for p in self.sources.named().values()]  # one of them may give its tokenizer alone
        plan = Plan(
            tuple({id(c): c for p in named for c in p.sources}.values()),
            tensors,
            shard_of,
            donor.plan.config,
            steps=(*{id(step): step for p in named for step in p.steps}.values(), self._step(len(tensors))),
            max_shard_size=self._shard_size() if self.stage.stacked else None,
        )
        plan = written_back(plan, donor.plan) if self._written_back else plan
        if not holds_quantised(plan.tensors):
            files |= without_quantisation_files(donor.plan.checkpoint, donor.plan.files)
        return replace(plan, config=self._config(plan.tensors), files=files)

    @cached_property
    def _written_back(self) -> bool:
        """Whether weights are stored in the quantised form that they have in the donor."""
        as_source = self.requantize == "as-source" and self.stage.dtype is None
        return as_source and was_quantised(self.sources.donor.plan)

    # Expressions

    def _part(self, path: str, position: OutputPosition) -> Expr:
        """Return the merged values of a part, or those of all experts at once where the recipe wants that."""
        sources = self.sources.by_slice[position.slice]
        at_once = self.stage.granularity == "tensor" and self.method.kind != "elementwise"
        if not (at_once and is_expert(path)):
            return self._merge_of(path, position, [self._input(s, path, position) for s in sources])
        together = _together(path, sources[0].parts.paths[sources[0].key(path, position).layer])
        group = self._groups.get((position, together))
        if group is None:
            inputs = [concat([self._input(s, one, position) for one in together]) for s in sources]
            group = self._groups[position, together] = self._merge_of(together[0], position, inputs)
        length = group.shape[0] // len(together)
        index = together.index(path)
        return Slice(group, index * length, (index + 1) * length)

    def _input(self, source: MergeSource, path: str, position: OutputPosition) -> Expr:
        """Return a part of one model, in the order of the base's experts and neurons where the recipe wants that."""
        key, lead = source.key(path, position), self.sources.lead(position.slice)
        if not self.stage.align or source.parts is lead.parts or not source.parts.follows_experts(key):
            return source.parts.part(key)
        pair = (id(lead.parts), id(source.parts))
        if pair not in self._aligners:
            self._aligners[pair] = Aligner(lead.parts, source.parts, self.stage.align)
        with at_line(self.origin, source.line):
            return self._aligners[pair].part(lead.key(path, position), key)

    def _merge_of(self, path: str, position: OutputPosition, inputs: list[Expr]) -> Expr:
        """Return the method's result for one part, given its values in all sources."""
        sources = self.sources.by_slice[position.slice]
        lead = self.sources.lead(position.slice)
        kept = inputs[sources.index(lead)]
        if kept.dtype not in PLAIN_FLOATS:
            return self._unmerged(path, position, kept)
        if self._tokenizer is not None and position.layer is None and self._tokenizer.is_vocabulary(path, kept.shape):
            inputs = self._resized(sources, inputs)
            kept = inputs[sources.index(lead)]
        for source, expr in zip(sources, inputs, strict=True):
            if expr.shape != kept.shape:
                with at_line(self.origin, source.line):
                    raise _unlike(source.parts.stored_in[source.key(path, position)][0].name, source, expr, lead, kept)
        dtype = self._dtype(path, kept, inputs, sources)
        base = self.sources.base(position.slice)
        apart = self.method.base in ("required", "optional") and base is not None
        chosen = [i for i, s in enumerate(sources) if not (apart and s is base)]
        values = self.arguments.of(path, position, [sources[i] for i in chosen])
        if self.method.name == "passthrough":
            return _scaled(inputs[0], values["scale"][0], dtype)
        if not chosen:  # the base alone: a way to write a model with its adapter
            return cast(kept, dtype)
        key = random_key(self.stage.seed, f"{position.layer}.{path}") if self.method.random else 0
        return MergeExpr(
            self.method.name,
            tuple(inputs[i] for i in chosen),
            inputs[sources.index(base)] if apart and base is not None else None,
            tuple(values.items()),
            dtype,
            kept.shape,
            lead.parts.names(lead.key(path, position), position.layer)[0],
            key,
            self.method.origin,
            self.device,
        )

    def _unmerged(self, path: str, position: OutputPosition, kept: Expr) -> Expr:
        """Return values that are no plain floats: copied where that is meant, else refused."""
        lead = self.sources.lead(position.slice)
        holder, _ = lead.parts.stored_in[lead.key(path, position)]
        weights = lead.parts.anatomy.parameters[holder.name]
        values = self.arguments.of(path, position, [lead]) if self.method.name == "passthrough" else None
        if weights and (values is None or values["scale"][0] != 1):
            with at_line(self.origin, lead.line):
                raise RefusedError(
                    f"{holder.name} of {lead.parts.label} is stored as {kept.dtype} and cannot be scaled so",
                    "give `dtype: bfloat16`: quantised weights are then read as the numbers that they stand for",
                )
        return kept

    def _dtype(self, path: str, kept: Expr, inputs: list[Expr], sources: list[MergeSource]) -> str:
        """Return what a part is stored as. Selection biases stay as they are: a bf16 one routes differently."""
        if path == "router.correction_bias":
            return kept.dtype
        if self.stage.dtype is not None:
            return self.stage.dtype
        kinds = {expr.dtype for expr in inputs if first_origin(expr) is None}
        quantised = [s for s, expr in zip(sources, inputs, strict=True) if first_origin(expr) is not None]
        if self._written_back and any(source.parts is self.sources.donor for source in quantised):
            return "F32"  # to be quantised again
        kinds |= {source.parts.plain_dtype or "F32" for source in quantised}
        return "F32" if kinds == {"BF16", "F16"} else max(kinds, key=_RANK.index)

    # Tokenizer and side files

    @cached_property
    def _tokenizer(self) -> MergedTokenizer | None:
        if self.stage.tokenizer is None:
            return None
        models = self.sources.named()
        with at_line(self.origin, self.stage.tokenizer_line):
            return None if is_kept(self.stage.tokenizer, models) else MergedTokenizer(self.stage.tokenizer, models)

    def _resized(self, sources: list[MergeSource], inputs: list[Expr]) -> list[Expr]:
        """Return an embedding of each source with the rows of the merged tokenizer."""
        assert self._tokenizer is not None
        named = {s.reference: expr for s, expr in zip(sources, inputs, strict=True)}
        with at_line(self.origin, self.stage.tokenizer_line):
            resized = self._tokenizer.resized(named)
        return [resized[s.reference] for s in sources]

    def _files(self) -> dict[str, bytes | None]:
        """Return the side files that differ from the base's: another tokenizer or chat template, and its card."""
        files: dict[str, bytes | None] = {CARD: None} if CARD in self.sources.donor.plan.checkpoint.side_files else {}
        if self._tokenizer is not None:
            files.update(self._tokenizer.files())
        if self.stage.chat_template is not None:
            template = chat_template(self.stage.chat_template, self.sources.named())
            if template is None:
                line = self.stage.line_of("chat_template")
                self.warnings.append(f"{self.origin}:{line}: no model has a chat template: none is written")
            else:
                files[CHAT_TEMPLATE] = template.encode()
        return files

    # What is said about it

    def _config(self, tensors: Mapping[str, Expr]) -> Mapping[str, Any]:
        donor = self.sources.donor
        config = donor.plan.config
        if not holds_quantised(tensors):
            config = without_quantisation(config)
        if self.stage.stacked and donor.anatomy.settings.layers is not None:
            leads = [(self.sources.lead(index), offset) for index, offset, _ in self.placement.stack]
            origins = [LayerOrigin(lead.parts.anatomy.settings, lead.first + offset) for lead, offset in leads]
            with at_line(self.origin, self.stage.line_of("slices")):
                config = restacked_config(Settings(donor.anatomy.settings.family, config), origins)
                for parts in {id(lead.parts): lead.parts for lead, _ in leads}.values():
                    own = [lead.first + offset for lead, offset in leads if lead.parts is parts]
                    if own != list(range(parts.layers)):
                        check_movable(parts.anatomy, parts.plan.tensors, f"merge of {parts.label}")
                if any(origin.layer != new for new, origin in enumerate(origins)) and holds_quantised(tensors):
                    refuse_named_layers(donor.plan.checkpoint, donor.plan.files)
            if self.placement.left_out:
                config = without_prediction(Settings(donor.anatomy.settings.family, config))
        if self._tokenizer is not None:
            settings = Settings(donor.anatomy.settings.family, config)
            config = with_value(settings, ("vocab_size",), self._tokenizer.rows, "vocab_size")
        dtypes = {expr.dtype for expr in tensors.values() if expr.dtype in PLAIN_FLOATS}
        return with_dtype(config, CONFIG_NAMES[dtypes.pop()]) if len(dtypes) == 1 else config

    def _shard_size(self) -> int | None:
        headers = self.sources.donor.plan.checkpoint.headers
        return max((sum(info.nbytes for info in header.tensors) for header in headers), default=None)

    def _step(self, count: int) -> Step:
        stage, donor = self.stage, self.sources.donor
        inputs = list(dict.fromkeys(s.parts.label for of_slice in self.sources.by_slice for s in of_slice))
        apart = stage.method.base in ("required", "optional")
        base = f" on {label(stage.base)}" if stage.base is not None and apart else ""
        others = [name for name in inputs if not (base and stage.base is not None and name == label(stage.base))]
        parameters: dict[str, Any] = {"recipe": stage.value}
        if self.device:
            parameters["device"] = self.device
        if self.requantize != "as-source":
            parameters["requantize"] = self.requantize
        if self.method.origin is not None:
            file, digest = self.method.origin
            parameters["methods"] = {"file": Path(file).name, "sha256": digest}
        report: dict[str, Any] = {"method": stage.method.name, "models": inputs, "base": donor.label}
        padding = self._tokenizer.padding if self._tokenizer is not None else 0
        note = f"{padding} rows of the embedding that stand for no token are the mean of the base's rows"
        return Step(
            "merge",
            parameters,
            f"{stage.method.name} of {', '.join(others) or 'nothing'}{base}: {count} tensors",
            report={**report, "layers": len(self.placement.stack)} if stage.stacked else report,
            notes=(note,) if padding else (),
            warnings=tuple(self.warnings),
            parents={text: self.models.parents(text) for text in stage.references.values()},
            places={("recipe", *path): text for path, text in stage.references.items()},
            origin=self.origin,
        )


def _scaled(of: Expr, factor: float, dtype: str) -> Expr:
    """Return `of * factor` in `dtype`, rounded once."""
    if of.dtype == dtype or factor == 1:
        return scale(cast(of, dtype), factor)
    return cast(scale(cast(of, "F64" if of.dtype == "F64" else "F32"), factor), dtype)


def _together(path: str, paths: frozenset[str]) -> tuple[str, ...]:
    """Return the parts of all experts that mergekit holds in one tensor with `path`: [E, 2I, H] or [E, H, I]."""
    experts, _, role, suffix = path.split(".", 3)
    roles = ("gate", "up") if role in ("gate", "up") else (role,)
    count = 1 + max(int(p.split(".")[1]) for p in paths if p.startswith(experts + "."))
    wanted = [f"{experts}.{e}.{r}.{suffix}" for e in range(count) for r in roles]
    return tuple(p for p in wanted if p in paths)


def _unlike(name: str, source: MergeSource, theirs: Expr, lead: MergeSource, ours: Expr) -> SurgeryError:
    hint = (
        "give `tokenizer_source:` to merge models of different vocabularies"
        if "embed" in name or "lm_head" in name
        else None
    )
    return RefusedError(
        f"{name} is {list(theirs.shape)} in {source.parts.label} and {list(ours.shape)} in {lead.parts.label}", hint
    )
