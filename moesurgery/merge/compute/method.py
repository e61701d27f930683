"""Merge methods: pure functions of arrays, and their registry.

A method's keyword-only signature is its recipe parameters and their documentation. A parameter of type
`tuple[X, ...]` has a value for each model. There are four kinds, by how much a method must see at a time:

    @merge_method("mean", kind="elementwise")           # any part of the tensors: runs in chunks
    def mean(models, *, weight: Annotated[tuple[float, ...], Param("share of the model")]):
        return sum(w * m for w, m in zip(weight, models)) / sum(weight)

    @merge_method("closest", kind="combination")        # lengths and angles: gets all inner products of the inputs
    def closest(gram, *, ...): return coefficients      # and returns the factors of a weighted sum

    @merge_method("trimmed", kind="streamed")           # looks over the whole tensor in chunks, then acts on each
    def trimmed(inputs, *, ...): return lambda chunk: ...

    @merge_method("mine")                               # "whole": torch tensors in their shapes
    def mine(models, *, ...): return tensor

`models` are float32 arrays, numpy's or torch's (see `namespace`), without the base; a function with a parameter
`base` gets that too. The result is rounded once. A third party adds a method in a module named under the entry point
group `moesurgery.merge_methods`, or in a Python file given on the command line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from moesurgery.errors import RecipeError, RefusedError, SurgeryError
from moesurgery.recipe.parameters import MISSING, Parameter, check_value, parameters_of
from moesurgery.recipe.registry import did_you_mean

# The modules of this package that define methods, in the order in which the documentation lists them.
_BUILT_IN = (
    *("linear", "slerp", "multislerp", "karcher", "ties", "sce"),
    *("model_stock", "nearswap", "arcee_fusion", "ram"),
)

MethodKind = Literal["elementwise", "combination", "streamed", "whole"]
BaseUse = Literal["none", "first", "optional", "required"]
Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Method:
    """A named method and what its decorator and signature say of it.

    `models` are the fewest and most models, without the base where there is one; with none, the result is the base,
    and the function is not called. `base` "none": a base model is one
    of the models; "first": it is the first of them; else it stands apart, and combinations are of differences to it.
    `rows`: chunks are whole rows, shaped [rows, width]. `axis`: for combinations, whether the inner products are taken
    over the whole tensor (None), or over each row or column. `refuse` names what is wrong with a set of parameters.
    `torch`: the function wants torch tensors. `origin`: the file that defines it and the digest of its text.
    """

    name: str
    function: Callable[..., Any]
    kind: MethodKind = "whole"
    models: tuple[int, int | None] = (1, None)
    base: BaseUse = "none"
    rows: bool = False
    axis: Callable[[Mapping[str, Any]], Axis | None] | None = None
    refuse: Callable[[Mapping[str, Any]], str | None] | None = None
    random: bool = False
    torch: bool = False
    origin: tuple[str, str] | None = field(default=None)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters under the names that recipes use: `lambda` for `lambda_`."""
        return {name.rstrip("_"): parameter for name, parameter in parameters_of(self.function).items()}

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @cached_property
    def wants_base(self) -> bool:
        return "base" in inspect.signature(self.function).parameters

    @property
    def built_in(self) -> bool:
        return _is_own(self.function)

    def call(self, *arguments: Any, values: Mapping[str, Any]) -> Any:
        """Call the function with parameters under their recipe names.

        Raises RefusedError for whatever goes wrong in somebody's own.
        """
        named = {self.parameters[name].name: value for name, value in values.items()}
        try:
            return self.function(*arguments, **named)
        except Exception as error:
            if self.built_in or isinstance(error, SurgeryError):
                raise
            place = self.origin[0] if self.origin is not None else self.function.__module__
            raise RefusedError(
                f"the merge method {self.name} of {place} failed: {type(error).__name__}: {error}",
                "MOESURGERY_DEBUG=1 shows where",
            ) from error


def per_model(parameter: Parameter) -> bool:
    """Whether a parameter has a value for each model."""
    return get_origin(parameter.annotation) is tuple


def scalar(parameter: Parameter) -> Parameter:
    """Return the parameter of one model's value of a per-model parameter; other parameters as they are."""
    if not per_model(parameter):
        return parameter
    default = parameter.default if parameter.default is MISSING else parameter.default[0]
    return Parameter(parameter.name.rstrip("_"), get_args(parameter.annotation)[0], default, parameter.param)


def problem(parameter: Parameter, value: Any) -> str | None:
    """Return what is wrong with one value (of one model) of a parameter."""
    misfit = check_value(scalar(parameter), value)
    return misfit.message if misfit else None


def merge_method(
    name: str,
    *,
    kind: MethodKind = "whole",
    models: tuple[int, int | None] = (1, None),
    base: BaseUse = "none",
    rows: bool = False,
    axis: Callable[[Mapping[str, Any]], Axis | None] | None = None,
    refuse: Callable[[Mapping[str, Any]], str | None] | None = None,
    random: bool = False,
    torch: bool | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the merge method `name`: see `Method`. Functions of third parties get torch tensors."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if "base" in inspect.signature(function).parameters and base in ("none", "first"):
            raise TypeError(f'{name} takes a base: say base="required" in @merge_method, or "optional"')
        wants_torch = torch if torch is not None else not _is_own(function)
        _registered[name] = Method(
            name, function, kind, models, base, rows, axis, refuse, random, wants_torch, _origin_of(function)
        )
        return function

    return register


def _is_own(function: Callable[..., Any]) -> bool:
    return function.__module__.startswith("moesurgery.merge.methods.")


_registered: dict[str, Method] = {}
_loaded = False
_files: dict[str, str] = {}  # module name -> path, of methods from Python files


def methods() -> Mapping[str, Method]:
    """Return all methods by name, built-in ones first."""
    global _loaded
    if not _loaded:
        _loaded = True
        for module in _BUILT_IN:
            import_module(f"moesurgery.merge.methods.{module}")
        for entry in entry_points(group="moesurgery.merge_methods"):
            entry.load()
    return _registered


def find_method(name: str, origin: tuple[str, str] | None = None) -> Method:
    """Return the method `name`, loading its file where another process registered it. Raises RecipeError."""
    known = methods()
    if name not in known and origin is not None:
        load_methods(origin[0])
    if name not in known:
        hint = did_you_mean(name, known) or f"known: {', '.join(known)}"
        raise RecipeError(f"there is no merge method {name!r}", hint)
    return known[name]


def load_methods(path: str | Path) -> list[str]:
    """Run a Python file that the user named and return the names of the methods it registered.

    Raises RecipeError where it cannot be run or registers nothing.
    """
    before = dict(methods())
    file = Path(path).resolve()
    module_name = f"moesurgery_methods_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if not file.is_file():
        raise RecipeError(f"{path}: no such file", "name a Python file with functions under @merge_method")
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file")
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    _files[module_name] = str(file)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f"{path} cannot be run: {type(error).__name__}: {error}") from None
    registered = [name for name, method in _registered.items() if before.get(name) is not method]
    if not registered:
        raise RecipeError(
            f"{path} registers no merge method", 'write @moesurgery.merge_method("name") above a function'
        )
    return registered


def _origin_of(function: Callable[..., Any]) -> tuple[str, str] | None:
    path = _files.get(function.__module__)
    return (path, hashlib.sha256(Path(path).read_bytes()).hexdigest()) if path else None
