"""mergekit-moe recipes, read as they are: what they name becomes one `upcycle` step.

    base_model: ./mistral
    gate_mode: hidden            # hidden (= hidden_last), hidden_avg, cheap_embed, random, uniform_random
    dtype: bfloat16
    experts_per_token: 2
    experts:
      - source_model: ./math
        positive_prompts: ["solve for x"]
        negative_prompts: ["once upon a time"]
        residual_scale: 1.0
        noise_scale: 0.0
    shared_experts: [{source_model: ./mistral}]
    architecture: qwen

Syntax and meaning: mergekit 0.1.5. Where mergekit does what nobody would ask for, we do not, and say so in the step's
notes: `with_difference_notes`. Keys that mergekit-moe does not know are errors here; it ignores them silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moesurgery.checkpoint.dtypes import COMMON_DTYPES
from moesurgery.plan.plan import Plan
from moesurgery.recipe.registry import did_you_mean
from moesurgery.recipe.yaml_strict import Document

_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts", "architecture")
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "residual_scale", "noise_scale")
GATE_MODES = {
    "hidden": "hidden",
    "hidden_last": "hidden",
    "hidden_avg": "hidden_avg",
    "cheap_embed": "cheap_embed",
    "random": "random",
    "uniform_random": "uniform",
}
# What mergekit calls the types that it writes; `architecture` is the beginning of a name.
ARCHITECTURES = {"mixtral": "mixtral", "qwen moe": "qwen2_moe", "qwen3 moe": "qwen3_moe"}
_DEEPSEEK = "deepseek moe"
_STD = "a deviation of 0.02"


@dataclass(frozen=True)
class MergekitRecipe:
    """The base model and the parameters of `upcycle`."""

    model: str
    parameters: dict[str, Any]


def is_mergekit_moe(value: Any) -> bool:
    """Whether a YAML document is a mergekit-moe recipe rather than one of ours."""
    return isinstance(value, Mapping) and "steps" not in value and "base_model" in value and "experts" in value


def read(document: Document, wrong: list[tuple[int, str]]) -> MergekitRecipe | None:
    """Return what a mergekit-moe document asks for; add every mistake in it to `wrong`, with its line."""
    value = document.value
    before = len(wrong)
    for key in value:
        if key not in _KEYS:
            hint = did_you_mean(str(key), _KEYS) or f"a mergekit-moe recipe has {', '.join(_KEYS)}"
            wrong.append((document.line((key,)), f"unknown key {key!r} (mergekit-moe ignores it): {hint}"))
    base = _text(document, ("base_model",), wrong)
    mode = value.get("gate_mode", "hidden")
    if mode not in GATE_MODES:
        hint = did_you_mean(str(mode), GATE_MODES) or f"known: {', '.join(GATE_MODES)}"
        wrong.append((document.line(("gate_mode",)), f"gate_mode is {mode!r}: {hint}"))
    dtype = value.get("dtype")
    if dtype is not None and dtype not in COMMON_DTYPES:
        wrong.append((document.line(("dtype",)), f"dtype is {dtype!r}: expected {', '.join(COMMON_DTYPES)}"))
    top_k = value.get("experts_per_token", 2)
    if type(top_k) is not int or top_k < 1:
        wrong.append((document.line(("experts_per_token",)), f"experts_per_token is {top_k!r}: expected 1 or more"))
    experts = _experts(document, "experts", wrong)
    shared = _experts(document, "shared_experts", wrong) if value.get("shared_experts") is not None else []
    if len(shared) > 1:
        wrong.append((document.line(("shared_experts",)), "one shared expert is all that any of the types has"))
    _check_prompts(document, str(mode), experts, wrong)
    architecture = value.get("architecture")
    if architecture is not None:
        _check_architecture(document, architecture, wrong)
    if len(wrong) > before or base is None:
        return None
    parameters: dict[str, Any] = {"sources": experts, "top_k": top_k, "router": GATE_MODES[mode]}
    if mode == "random":
        parameters["router_std"] = 1.0
    if dtype is not None:
        parameters["dtype"] = dtype
    if shared:
        entry = {k: v for k, v in shared[0].items() if k not in ("prompts", "negative_prompts")}
        parameters.update(shared_expert=0.5, shared_source=entry)
    if architecture is not None:
        parameters["to"] = _types(architecture)
    return MergekitRecipe(reference(base), parameters)


def reference(model: str) -> str:
    """Return a model as we name it: mergekit takes `org/name` from the Hub where no such folder exists."""
    if "://" in model or os.path.exists(model) or model.startswith((".", "/", "~")) or model.count("/") != 1:
        return model
    return f"hf://{model}"


def _text(document: Document, path: tuple[Any, ...], wrong: list[tuple[int, str]]) -> str | None:
    value: Any = document.value
    for key in path:
        value = value.get(key) if isinstance(value, dict) else value[key]
    name = path[-1]
    if isinstance(value, Mapping):
        wrong.append((document.line(path), f"{name}: write the model's path or org/name alone"))
    elif not isinstance(value, str):
        wrong.append((document.line(path), f"{name} is {value!r}: expected a model's path or org/name"))
    elif "+" in value and not os.path.exists(value):
        wrong.append((document.line(path), f"{name}: merge the LoRA of {value!r} into its model first"))
    else:
        return value
    return None


def _experts(document: Document, key: str, wrong: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Return the entries of a list of experts, as `upcycle` names their fields."""
    entries = document.value.get(key)
    if not isinstance(entries, list) or not entries:
        wrong.append((document.line((key,)), f"{key} is not a list of experts: `- source_model: PATH`"))
        return []
    sources = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or "source_model" not in entry:
            wrong.append((document.line((key, i)), f"{key}[{i}] needs source_model"))
            continue
        for name in entry:
            if name not in EXPERT_KEYS:
                hint = did_you_mean(str(name), EXPERT_KEYS) or f"an expert has {', '.join(EXPERT_KEYS)}"
                wrong.append((document.line((key, i, name)), f"unknown key {name!r} (mergekit-moe ignores it): {hint}"))
        made: dict[str, Any] = {}
        if (model := _text(document, (key, i, "source_model"), wrong)) is not None:
            made["model"] = reference(model)
        for theirs, ours in (("positive_prompts", "prompts"), ("negative_prompts", "negative_prompts")):
            texts = entry.get(theirs)
            if texts is None:
                continue
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                wrong.append((document.line((key, i, theirs)), f"{theirs} is not a list of texts"))
            elif texts:
                made[ours] = texts
        for name in ("residual_scale", "noise_scale"):
            number = entry.get(name)
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                wrong.append((document.line((key, i, name)), f"{name} is {number!r}: expected a number"))
            else:
                made[name] = number
        sources.append(made)
    return sources


def _check_prompts(document: Document, mode: str, experts: list[dict[str, Any]], wrong: list[tuple[int, str]]) -> None:
    if mode in ("random", "uniform_random"):
        return
    for i, expert in enumerate(experts):
        if not expert.get("prompts"):
            wrong.append((document.line(("experts", i)), f"gate_mode {mode} needs positive_prompts for every expert"))


def _types(architecture: Any) -> list[str]:
    given = str(architecture).lower()
    return [model_type for name, model_type in ARCHITECTURES.items() if given and name.startswith(given)]


def _check_architecture(document: Document, given: Any, wrong: list[tuple[int, str]]) -> None:
    if _types(given):
        return
    if str(given) and _DEEPSEEK.startswith(str(given).lower()):
        message = (
            "architecture deepseek is code from a repository, which no stock loader runs; solar_open routes the same"
            " way: `moesurgery upcycle --to solar_open` with this recipe"
        )
    else:
        hint = did_you_mean(str(given), ARCHITECTURES) or f"known: {', '.join(ARCHITECTURES)}"
        message = f"architecture is {given!r}: {hint}"
    wrong.append((document.line(("architecture",)), message))


# What options of `moesurgery upcycle` are called in a mergekit-moe recipe.
_KEYS_OF_OPTIONS = {
    "--top-k": "`experts_per_token:`",
    "--router": "`gate_mode:`",
    "--dtype": "`dtype:`",
    "--shared-expert": "`shared_experts:`",
    "--experts": "as many entries under `experts:` as",
}
_OPTION = re.compile(r"--[a-z][a-z-]*(?: ([a-z0-9_]+))?")


def in_its_words(text: str) -> str:
    """Return a message of `upcycle` with what a mergekit-moe recipe calls its options.

    What the recipe has no key for is for `moesurgery upcycle`, which takes the recipe in the model's place.
    """

    def key(match: re.Match[str]) -> str:
        option, value = match[0].split()[0], match[1]
        if option == "--to" and value in ARCHITECTURES.values():
            name = next(name for name, model_type in ARCHITECTURES.items() if model_type == value)
            return f"`architecture: {name}`"
        if option == "--to":
            return f"{value or 'another type'}, which the --to of `moesurgery upcycle` with this recipe writes"
        if option in _KEYS_OF_OPTIONS:
            return _KEYS_OF_OPTIONS[option] + (f" {value}" if value else "")
        return f"{match[0]} of `moesurgery upcycle` with this recipe"

    return _OPTION.sub(key, text)


def with_difference_notes(plan: Plan) -> Plan:
    """Return an upcycled plan with a note for each point in which mergekit-moe would have written something else."""
    before, step = plan.checkpoint.config, plan.steps[-1]
    given = step.parameters
    notes = []
    if given.get("shared_expert"):
        notes += [
            "the shared expert and the routed ones carry half of the FFN each (mergekit gives both all of it)",
            "the shared expert's gate is zero, one half for every token (mergekit: prompts or chance)",
        ]
    if plan.config.get("sliding_window") and before.get("model_type") in ("mistral", "phi3"):
        notes.append(f"the sliding window of {plan.config['sliding_window']} is kept (mergekit sets it to null)")
    if before.get("attention_bias"):
        notes.append("biases are kept (mergekit drops them)")
    if given.get("router") == "random":
        notes.append(f"the router is N(0, 1) as in mergekit, so nearly one-hot; these types begin with {_STD}")
    if given.get("router") in ("hidden", "hidden_avg"):
        notes.append("router rows follow the state that the router reads, after its norm (mergekit: before attention)")
    notes.append("tensors have the names that are published on the Hub (mergekit 0.1.5: those in transformers' memory)")
    return replace(plan, steps=(*plan.steps[:-1], replace(step, notes=(*step.notes, *notes))))
