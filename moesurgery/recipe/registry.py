"""Operations: pure functions from plan to plan, and their registry.

An operation's keyword-only signature is its recipe step, its JSON schema, its command and its documentation:

    @operation("rescale")
    def rescale(plan: Plan, *, top_k: Annotated[int, Param("experts per token", minimum=1)]) -> Plan:
        '''Route each token to `top_k` experts.'''

`@operation(NAME, text=TextNeeds(…))` also declares what calibration text is used for (`text_needs`). A third party adds
one in a module of its own, named under the entry point group `moesurgery.operations`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from moesurgery.errors import RecipeError, RefusedError
from moesurgery.plan.plan import Plan
from moesurgery.recipe.parameters import Misfit, NamedFile, Parameter, check_value, named, parameters_of
from moesurgery.recipe.text_needs import USUAL_NEEDS, TextNeeds

# The operations of this package, each in the module of its name, in the order in which `--help` shows them.
BUILT_IN = (
    "rescale",
    "drop-experts",
    "merge-experts",
    "slim-experts",
    "add-expert",
    "upcycle",
    "to-dense",
    "tie-blocks",
    "convert",
    "refit",
    "mtp-drop",
    "mtp-extract",
    "mtp-graft",
)


MTP_VERBS = "mtp-"  # the beginning of the names of the operations that are commands under `mtp`
FOR_GGUF = ("rescale", "drop-experts", "merge-experts", "mtp-drop")
_INSTEAD = {  # of operations that are not for GGUF files: what to do
    "mtp-extract": "llama.cpp drafts with the layers in the whole file; a draft of the original makes"
    " `convert_hf_to_gguf.py --mtp`",
    "mtp-graft": "`mtp graft` onto the checkpoint that it was made from, and convert that: docs/gguf.md",
}
_PACKAGES = frozenset(("rescale", "upcycle", "tie-blocks"))  # those that are more than one file


@dataclass(frozen=True)
class Operation:
    """A named operation, what its signature says of it, and what it needs of text.

    `chooses`: parameters of which each is a choice that a plan file can hold; the parameter `plan_file` reads one.
    """

    name: str
    function: Callable[..., Plan]
    text: TextNeeds = USUAL_NEEDS
    chooses: tuple[str, ...] = ()

    def applied(self, plan: Plan, **values: Any) -> Plan:
        """Apply the operation to a plan. Raises RefusedError for a GGUF where it is not for those."""
        if plan.checkpoint.gguf is not None and self.name in BUILT_IN and self.name not in FOR_GGUF:
            raise RefusedError(
                f"{self.name}: not for GGUF files: {', '.join(FOR_GGUF)} are",
                _INSTEAD.get(self.name, "edit the checkpoint that it was made from, and convert that: docs/gguf.md"),
            )
        return self.function(plan, **values)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        return parameters_of(self.function)

    @property
    def takes_statistics(self) -> bool:
        """Whether the operation can be calibrated on text."""
        return "stats" in self.parameters

    def named(self, values: Mapping[str, Any]) -> Iterator[NamedFile]:
        """Yield where a step's parameters name models and files."""
        for name, value in values.items():
            if name in self.parameters:
                yield from named(self.parameters[name], value)

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def documentation(self) -> str:
        return inspect.getdoc(self.function) or ""


_registered: dict[str, Operation] = {}
_loaded = False


def operation(
    name: str, *, text: TextNeeds = USUAL_NEEDS, chooses: tuple[str, ...] = ()
) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Register a function as the operation `name`, with what it needs of calibration text and what chooses in it."""

    def register(function: Callable[..., Plan]) -> Callable[..., Plan]:
        _registered[name] = Operation(name, function, text, chooses)
        return function

    return register


def operations() -> Mapping[str, Operation]:
    """Return all operations by name, built-in ones first."""
    global _loaded
    if not _loaded:
        _loaded = True
        for name in BUILT_IN:
            _load(name)
        for entry in entry_points(group="moesurgery.operations"):
            entry.load()
    return {name: _registered[name] for name in dict.fromkeys((*BUILT_IN, *_registered))}


def _load(name: str) -> None:
    module = "mtp_layers" if name.startswith(MTP_VERBS) else name.replace("-", "_")
    import_module(f"moesurgery.surgery.{module}.{module}" if name in _PACKAGES else f"moesurgery.surgery.{module}")


def find_operation(name: str) -> Operation:
    """Return the operation `name`, importing no other if it is built in; raise RecipeError with the nearest name."""
    if name in BUILT_IN:
        _load(name)
        return _registered[name]
    known = operations()
    if name not in known:
        raise RecipeError(f"there is no operation {name!r}", did_you_mean(name, known) or f"known: {', '.join(known)}")
    return known[name]


def did_you_mean(word: str, known: Any) -> str | None:
    """Return a hint with the nearest of `known`, if one is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None


def problems(found: Operation, values: Mapping[str, Any]) -> list[Misfit]:
    """Return everything that is wrong with the parameters of a step, and at which key each of it stands."""
    wrong = []
    for name, value in values.items():
        if name not in found.parameters:
            hint = did_you_mean(name, found.parameters)
            known = ", ".join(found.parameters)
            wrong.append(Misfit((name,), f"{found.name} has no parameter {name!r}: " + (hint or f"it has {known}")))
        elif problem := check_value(found.parameters[name], value):
            wrong.append(Misfit(problem.path, f"{found.name}: {problem.message}"))
    for parameter in found.parameters.values():
        if parameter.required and parameter.name not in values:
            wrong.append(Misfit((), f"{found.name} needs {parameter.name}: {parameter.param.help}"))
    return wrong


def checked_operation(name: str, values: Mapping[str, Any]) -> Operation:
    """Return the operation `name`; raise RecipeError where it cannot take `values`."""
    checked = find_operation(name)
    wrong = [problem.message for problem in problems(checked, values)]
    if wrong:
        raise RecipeError(wrong[0], f"see `moesurgery {name} --help`" if len(wrong) == 1 else "; ".join(wrong[1:]))
    return checked


def apply(plan: Plan, name: str, **values: Any) -> Plan:
    """Apply one operation to a plan.

    Raises RecipeError for wrong parameters, RefusedError where the edit has no meaning for the model.
    """
    return checked_operation(name, values).applied(plan, **values)
