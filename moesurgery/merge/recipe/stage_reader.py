"""One document of a merge recipe, read strictly: every mistake with its line, before a model is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

from moesurgery.checkpoint.dtypes import BY_CONFIG_NAME
from moesurgery.errors import RecipeError
from moesurgery.merge.compute.method import Method, find_method, methods, per_model, problem, scalar
from moesurgery.merge.recipe.parameter_values import ParameterValue, converted, read_parameter_value, scalars
from moesurgery.merge.recipe.stage import Input, LayerSlice, Stage
from moesurgery.merge.recipe.tokenizer_reader import TokenizerReader
from moesurgery.recipe.registry import did_you_mean
from moesurgery.recipe.yaml_strict import Document, Mistakes

# Keys of a document beyond mergekit's own: `granularity`, `align`, `seed`.
_KEYS = (
    *("name", "models", "slices", "modules", "merge_method", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer", "tokenizer_source", "chat_template", "granularity", "align", "seed", "random_seed"),
)
# Parameters of older mergekit and of mergekit-evolve. No method has them, but recipes that are around do.
_FORMER_PARAMETERS = ("embed_slerp", "smooth", "allow_negative_weights")
# Keys that recipes hold where they decide nothing, and how to say what they mean.
_BETTER = {
    "revision": "write it behind the name, `model: org/name@revision`",
    "lora": "write it behind the name, `model: org/name+adapter`",
    "merge_method": "all slices of a recipe have one method; stages (`name:`) may have others",
}


class StageReader:
    """Reads one document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.wrong = Mistakes()
        self.warnings: list[tuple[int, str]] = []
        self.method: Method | None = None
        self.references: dict[tuple[Any, ...], str] = {}
        self.anchors: set[tuple[Any, ...]] = set()  # keys that hold values for elsewhere

    def stage(self) -> Stage | None:
        value = self.document.value
        if not isinstance(value, dict):
            self.wrong.append((1, "a merge recipe is a mapping with `merge_method:` and `models:` or `slices:`"))
            return None
        line = self.document.line(())
        self.keys(value, (), _KEYS)
        self.method = self.find(value.get("merge_method"))
        base = self.reference(value["base_model"], ("base_model",)) if value.get("base_model") is not None else None
        body, path = self.body(value)
        if self.method is None or body is None:
            return None
        stacked = body.get("slices") is not None
        slices = (
            self.slices(body["slices"], (*path, "slices"))
            if stacked
            else self.models(body["models"], (*path, "models"))
        )
        outer = self.parameters(value, ())
        inner = self.parameters(body, path) if path else {}
        tokenizer = TokenizerReader(self)
        stage = Stage(
            name=self.one_of(value, "name", str, "text"),
            method=self.method,
            slices=tuple(slices),
            stacked=stacked,
            base=base,
            parameters={**outer, **inner},
            dtype=self.dtype(value),
            granularity=self.granularity(value),
            align=self.align(value),
            tokenizer=tokenizer.tokenizer(value),
            chat_template=tokenizer.chat_template(value),
            seed=self.seed(value),
            line=line,
            lines={str(key): self.document.line((key,)) for key in value},
            value=value,
            references=self.references,
        )
        self.counts(stage)
        self.idle(stage)
        repeated = self.document.repeated
        self.wrong.extend(
            self.document.twice(path, line) for path, line in repeated.items() if path not in self.anchors
        )
        return replace(stage, warnings=tuple(self.warnings))

    def add_mistake(self, path: tuple[Any, ...], message: str) -> None:
        """Enter what is wrong with the value at a path."""
        self.wrong.append((self.document.line(path), message))

    def warn(self, path: tuple[Any, ...], message: str) -> None:
        """Enter what is odd about the value at a path."""
        self.warnings.append((self.document.line(path), message))

    def find(self, name: Any) -> Method | None:
        line = self.document.line(("merge_method",))
        if not isinstance(name, str):
            self.wrong.append((line, f"merge_method is missing or no name: it is one of {', '.join(methods())}"))
            return None
        try:
            return find_method(name)
        except RecipeError as error:
            self.wrong.append((line, f"{error.message}: {error.hint}"))
            return None

    def body(self, value: dict[str, Any]) -> tuple[dict[str, Any] | None, tuple[Any, ...]]:
        """Return what holds `models` or `slices`, the document or its one module, and the path of that."""
        present = [key for key in ("models", "slices", "modules") if value.get(key) is not None]
        if len(present) != 1:
            what = " and ".join(present) or "none of them"
            self.add_mistake((), f"a recipe has `models:` or `slices:`; here is {what}")
            return None, ()
        if present != ["modules"]:
            return value, ()
        modules = value["modules"]
        line = self.document.line(("modules",))
        if not isinstance(modules, dict) or len(modules) != 1 or not isinstance(next(iter(modules.values())), dict):
            self.wrong.append((line, "`modules:` is a mapping with one module; several are not supported"))
            return None, ()
        ((name, body),) = modules.items()
        path = ("modules", name)
        self.keys(body, path, ("models", "slices", "parameters"))
        if (body.get("models") is None) == (body.get("slices") is None):
            self.add_mistake(path, "a module has either `models:` or `slices:`")
            return None, ()
        return body, path

    def models(self, value: Any, path: tuple[Any, ...]) -> Iterator[LayerSlice]:
        inputs = tuple(self.inputs(value, path, ("model", "parameters")))
        yield LayerSlice(inputs, None, {}, self.document.line(path))

    def slices(self, value: Any, path: tuple[Any, ...]) -> Iterator[LayerSlice]:
        if not isinstance(value, list) or not value:
            self.add_mistake(path, "slices is a list: - sources: [{model: …, layer_range: [0, 8]}]")
            return
        for i, entry in enumerate(value):
            here = (*path, i)
            line = self.document.line(here)
            if not isinstance(entry, dict):
                self.wrong.append((line, "a slice is a mapping with `sources:`"))
                continue
            self.keys(entry, here, ("sources", "base_model", "parameters", "residual_weight"))
            if "residual_weight" in entry:
                self.warn((*here, "residual_weight"), "residual_weight has no effect")
            inputs = tuple(
                self.inputs(entry.get("sources"), (*here, "sources"), ("model", "layer_range", "parameters"))
            )
            lengths = {entry.layers[1] - entry.layers[0] for entry in inputs if entry.layers}
            if len(lengths) > 1:
                self.wrong.append((line, f"the sources of a slice have different numbers of layers: {sorted(lengths)}"))
            base = entry.get("base_model")
            yield LayerSlice(
                inputs,
                self.reference(base, (*here, "base_model")) if base is not None else None,
                self.parameters(entry, here),
                line,
            )

    def inputs(self, value: Any, path: tuple[Any, ...], keys: tuple[str, ...]) -> Iterator[Input]:
        if not isinstance(value, list) or not value:
            self.add_mistake(path, f"{path[-1]} is a list: - model: …")
            return
        seen: set[tuple[str | None, Any]] = set()
        for i, entry in enumerate(value):
            here = (*path, i)
            line = self.document.line(here)
            alone = isinstance(entry, str)
            if alone:
                entry = {"model": entry}
            if not isinstance(entry, dict) or "model" not in entry:
                self.wrong.append((line, "an entry is a mapping with `model:`"))
                continue
            self.keys(entry, here, keys)
            layers = self.layers(entry, here) if "layer_range" in keys else None
            model = self.reference(entry["model"], here if alone else (*here, "model"))
            if model is None:
                continue
            if (model, layers) in seen:
                self.wrong.append((line, f"{model} is listed twice: its parameters could not be told apart"))
            seen.add((model, layers))
            yield Input(model, layers, self.parameters(entry, here, source=True), line)

    def layers(self, entry: dict[str, Any], path: tuple[Any, ...]) -> tuple[int, int] | None:
        value = entry.get("layer_range")
        good = isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value)
        if not good or not 0 <= value[0] < value[1]:  # type: ignore[index]
            line = self.document.line((*path, "layer_range"))
            self.wrong.append((line, f"layer_range is {value!r}, expected [first, one past the last]"))
            return None
        return value[0], value[1]  # type: ignore[index]

    def reference(self, value: Any, path: tuple[Any, ...]) -> str | None:
        """Return a model reference as text: `path[@revision][+adapter[@revision]]`."""
        if isinstance(value, str) and value.strip():
            self.references[path] = value.strip()
            return value.strip()
        if isinstance(value, dict) and value.get("model") is not None:
            self.keys(value, path, ("model", "lora", "override_architecture"))
            parts = [_path_of(value["model"]), _path_of(value["lora"]) if value.get("lora") is not None else ""]
            if all(part is not None for part in parts):
                self.references[path] = "+".join(part for part in parts if part)
                return self.references[path]
        self.add_mistake(path, f"{path[-1]} is {value!r}, expected a path or org/name")
        return None

    def parameters(
        self, holder: dict[str, Any], path: tuple[Any, ...], *, source: bool = False
    ) -> dict[str, ParameterValue]:
        """Read the `parameters` of a document, a slice or one of its models (`source`)."""
        value = holder.get("parameters")
        path = (*path, "parameters")
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.add_mistake(path, "parameters is a mapping: {weight: 0.5}")
            return {}
        parameters = {}
        for name, given in value.items():
            parameter_value = self.parameter_value(str(name), given, (*path, name), source)
            if parameter_value is not None:
                parameters[str(name)] = parameter_value
        return parameters

    def parameter_value(self, name: str, given: Any, path: tuple[Any, ...], source: bool) -> ParameterValue | None:
        method, line = self.method, self.document.line(path)
        if method is None:
            return None
        if name not in method.parameters:
            if name in _FORMER_PARAMETERS or any(name in other.parameters for other in methods().values()):
                self.warnings.append((line, f"{name} has no effect: it is no parameter of {method.name}"))
            else:
                known = ", ".join(method.parameters) or "none"
                hint = did_you_mean(name, method.parameters) or f"it has {known}"
                self.wrong.append((line, f"{method.name} has no parameter {name!r}: {hint}"))
            return None
        parameter = method.parameters[name]
        if source and not per_model(parameter):
            self.warnings.append(
                (line, f"{name} has no effect on one model: put it under the recipe's or the slice's own `parameters:`")
            )
            return None
        try:
            parameter_value = read_parameter_value(given, lambda *below: self.document.line((*path, *below)))
        except ValueError as error:
            where, message = error.args
            self.wrong.append((where, f"{name}: {message}"))
            return None
        if scalar(parameter).annotation in (int, float):  # mergekit reads numbers in quotes, too
            parameter_value = converted(parameter_value, _number)
        if parameter.annotation is bool:  # recipes that mergekit-evolve wrote have 1.0 for true
            parameter_value = converted(
                parameter_value, lambda v: bool(v) if type(v) in (int, float) and v in (0, 1) else v
            )
        for value, where in scalars(parameter_value):
            if wrong := problem(parameter, value):
                self.wrong.append((where, wrong))
        return parameter_value

    def counts(self, stage: Stage) -> None:
        """Check how many models the method gets in each slice, and that it has a base model where it needs one."""
        method = stage.method
        for part in stage.slices:
            base = part.base or stage.base
            if method.base in ("required", "first") and base is None:
                self.wrong.append((part.line, f"{method.name} needs a `base_model:`"))
                continue
            named = {entry.model for entry in part.inputs}
            if stage.stacked and base is not None and base not in named and method.base != "none":
                what = f"the base model {base} must be a source of the slice, with its layers"
                if method.base == "first" and len(named) == method.models[1]:
                    what = f"the base model of {method.name} is one of those that it merges, not {base}"
                self.wrong.append((part.line, what))
                continue
            count = len(named | ({base} if base is not None and not stage.stacked else set()))
            count -= method.base in ("required", "optional") and base is not None
            low, high = method.models
            if count < low or (high is not None and count > high):
                wanted = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
                beside = " beside the base model" if method.base in ("required", "optional") and base else ""
                self.wrong.append((part.line, f"{method.name} merges {wanted} models{beside}; here are {count}"))

    def idle(self, stage: Stage) -> None:
        """Warn of what a recipe says that decides nothing, here or for this method."""
        method = stage.method
        if stage.granularity == "tensor" and method.kind == "elementwise":
            what = f"granularity has no effect: {method.name} takes each element by itself"
            self.warnings.append((stage.line_of("granularity"), what))
        if stage.align and all(
            len({*(e.model for e in p.inputs), p.base or stage.base} - {None}) < 2 for p in stage.slices
        ):
            self.warnings.append((stage.line_of("align"), "align has no effect: no two models are merged"))
        if method.base not in ("required", "optional"):
            return
        for part in stage.slices:
            base = part.base or stage.base
            if base is not None and {entry.model for entry in part.inputs} == {base}:
                self.warnings.append((part.line, f"only the base model is merged here: the result is {base} itself"))
                continue
            for entry in part.inputs:
                for name, given in entry.parameters.items() if entry.model == base else ():
                    line = given.choices[0].line
                    self.warnings.append((line, f"{name} has no effect on the base model of {method.name}"))

    def keys(self, value: dict[str, Any], path: tuple[Any, ...], known: tuple[str, ...]) -> None:
        for key in value:
            if key in known:
                continue
            here = (*path, key)
            if here in self.document.holders:
                self.anchors.add(here)
                continue
            line = self.document.line(here)
            if any(key in method.parameters for method in methods().values()):
                self.warnings.append((line, f"{key} has no effect here: put it under `parameters:`"))
            elif key == "pad_to_multiple_of":
                self.warnings.append((line, f"{key} has no effect here: put it under `tokenizer:`"))
            elif key == "merge_method" and self.method is not None and value[key] == self.method.name:
                self.warnings.append((line, f"{key} has no effect here: the recipe's own says the same"))
            else:
                hint = _BETTER.get(key) or did_you_mean(str(key), known) or f"known here: {', '.join(known)}"
                self.wrong.append((line, f"unknown key {key!r}: {hint}"))

    def dtype(self, value: dict[str, Any]) -> str | None:
        dtype = None
        for key in ("dtype", "out_dtype"):  # the second counts where both are given
            given = value.get(key)
            if given is None:
                continue
            name = str(given).removeprefix("torch.")
            if name not in BY_CONFIG_NAME:
                hint = did_you_mean(name, BY_CONFIG_NAME) or f"one of {', '.join(BY_CONFIG_NAME)}"
                self.add_mistake((key,), f"{key} is {given!r}: {hint}")
            dtype = BY_CONFIG_NAME.get(name, dtype)
        return dtype

    def granularity(self, value: dict[str, Any]) -> Literal["expert", "tensor"]:
        given = value.get("granularity", "expert")
        if given not in ("expert", "tensor"):
            self.add_mistake(("granularity",), f"granularity is {given!r}: one of expert, tensor")
            return "expert"
        return given  # type: ignore[no-any-return]

    def align(self, value: dict[str, Any]) -> frozenset[str]:
        given = value.get("align")
        wanted = [] if given in (None, "none") else given if isinstance(given, list) else [given]
        for word in wanted:
            if word not in ("experts", "neurons"):
                self.add_mistake(("align",), f"align is {word!r}: experts, neurons, [experts, neurons] or none")
                return frozenset()
        return frozenset(wanted)

    def seed(self, value: dict[str, Any]) -> int:
        """Return the seed, which LazyMergekit's recipes call random_seed."""
        if value.get("seed") is not None and value.get("random_seed") is not None:
            self.add_mistake(("random_seed",), "give seed or random_seed, not both")
        seeds = [self.one_of(value, key, int, "a whole number") for key in ("seed", "random_seed")]
        return seeds[0] or seeds[1] or 0

    def one_of(self, value: dict[str, Any], key: str, kind: Callable[..., Any], what: str) -> Any:
        given = value.get(key)
        if given is None or type(given) is kind:
            return given
        self.add_mistake((key,), f"{key} is {given!r}, expected {what}")
        return None


def _number(value: Any) -> Any:
    """Return the number that a text is; anything else as it is."""
    if isinstance(value, str):
        try:
            return int(value) if value.strip().lstrip("-").isdecimal() else float(value)
        except ValueError:
            pass
    return value


def _path_of(value: Any) -> str | None:
    """Return one part of a model reference that is given as a mapping of `path` and `revision`, or as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value.keys() <= {"path", "revision"}:
        return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") is not None else "")
    return None
