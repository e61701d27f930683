"""C03, C11 and C14: the tensors against transformers' own model class, built on the meta device. No weight is read.

transformers loads a checkpoint of which every tensor is a shape without values; what it then misses, does not
expect or cannot convert is exactly what it would with the values. Its own renamings and fusions apply. Remote
code never runs: the class comes from the installed library, and keys that make it fetch something are removed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moesurgery.checkpoint.dtypes import PLAIN_FLOATS
from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.finding import Finding
from moesurgery.families.anatomy import model_type_of
from moesurgery.families.quantised import method, packed_bits, split_name
from moesurgery.families.tensor_names import name_template
from moesurgery.forward.model_config import load_config, too_many
from moesurgery.validate.check import NotChecked, Outcome, check, finding
from moesurgery.validate.context import Context
from moesurgery.validate.prediction_layers import language_and_prediction_layers


@check("C03", "C11", "C14")
def check_architecture(subject: Context) -> Outcome:
    """Load the shapes with transformers and report what it says."""
    reason = too_many(subject.config)
    if reason is None and not isinstance(subject.config.get("model_type"), str):
        reason = "config.json names no model_type"
    predicting = language_and_prediction_layers(subject)
    if not predicting.plain and (predicting.numbers or predicting.own_module):
        reason = "it holds prediction layers and no others, as a draft does, for which transformers has no model class"
    if reason is not None:
        yield NotChecked(("C03", "C14"), reason)
        return
    if method(subject.config) == "mlx" or any(".switch_mlp." in name for name in subject.tensors):
        yield NotChecked(("C03", "C14"), "its weights are in mlx-lm's form, which transformers does not read")
        yield from _by_table(subject)
        return
    model_class, config = _model_class(subject)
    if isinstance(config, (NotChecked, Finding)):
        yield config
        if isinstance(config, NotChecked):
            yield from _by_table(subject)
        return
    yield from _names(subject, model_class)
    yield from _load(subject, model_class, config)


def _by_table(subject: Context) -> Outcome:
    """Without a model class, the family table is the only one to say what belongs to the architecture."""
    if subject.anatomy.family is not None:
        predicting = language_and_prediction_layers(subject)
        for name in subject.anatomy.unrecognised:
            if predicting.holds(name):
                continue  # C07 and C11 of the layers judge them
            yield finding("C11", "is not known to the family table", tensor=name)


def _model_class(subject: Context) -> tuple[Any, Any]:
    """Return transformers' class and config object for the checkpoint, or what stands in the way."""
    import transformers

    model_type = model_type_of(subject.config)
    library = f"transformers {transformers.__version__}"
    mapping: Any = transformers.CONFIG_MAPPING
    if model_type not in mapping:
        return None, NotChecked(("C03", "C14"), f"{library} has no model_type {model_type!r}")
    try:
        config = load_config(subject.config)
    except Exception as error:
        return None, finding("C03", f"{library} refuses it: {_first_line(error)}", CONFIG)
    for name in _architectures(subject):
        named_class: Any = getattr(transformers, name, None)
        known = isinstance(named_class, type) and issubclass(named_class, transformers.PreTrainedModel)
        if known and named_class.config_class is type(config):
            return named_class, config
    causal: Any = transformers.AutoModelForCausalLM
    if type(config) in causal._model_mapping:
        return causal._model_mapping[type(config)], config
    return None, NotChecked(("C03", "C14"), f"{library} has no language model class for {model_type!r}")


def _architectures(subject: Context) -> list[str]:
    stated = subject.config.get("architectures")
    return [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []


def _names(subject: Context, model_class: Any) -> Iterator[Finding]:
    """`architectures` names the class that other engines look up: it must belong to the model_type."""
    import transformers

    for name in _architectures(subject):
        named_class = getattr(transformers, name, None)
        stated = getattr(getattr(named_class, "config_class", None), "model_type", None)
        if stated is not None and stated != model_type_of(subject.config) and named_class is not model_class:
            message = f"architectures names {name}, of model_type {stated!r}; model_type is"
            yield finding("C14", f"{message} {model_type_of(subject.config)!r}", CONFIG)


def _load(subject: Context, model_class: Any, config: Any) -> Outcome:
    import torch
    import transformers

    library = f"transformers {transformers.__version__}"
    shapes, unknown = logical_shapes(subject)
    if unknown:
        reason = f"{len(unknown)} packed tensors whose shape the header does not tell, such as {unknown[0]}"
        yield NotChecked(("C03",), reason)
        return
    with _quiet() as logged:
        state = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
        try:
            _, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            detail = next((line for line in logged if "CONVERSION" in line), "")
            message = f"{library} cannot load the shapes: {_first_line(error)}"
            yield finding("C03", message, hint=f"its report: {' '.join(detail.split())[:300]}" if detail else None)
            return
    seen = set(shapes)
    for names in _grouped(map(str, report["missing_keys"])):
        yield finding("C03", f"{library} finds no weights for it and makes them up{_others(names)}", tensor=names[0])
    wrong = {str(name): (tuple(mine), tuple(theirs)) for name, mine, theirs in report["mismatched_keys"]}
    for names in _grouped(wrong):
        mine, theirs = wrong[names[0]]
        yield finding(
            "C03", f"has shape {list(mine)}, {library} expects {list(theirs)}{_others(names)}", tensor=names[0]
        )
    # No model class has them: `generate(use_mtp=True)` loads those of some families apart. Their own check judges them.
    predicting = language_and_prediction_layers(subject)
    unexpected = sorted(map(str, report["unexpected_keys"]))
    predicted = [name for name in unexpected if predicting.holds(name)]
    if predicted and predicting.declared > 0:
        reason = f"{model_class.__name__} of {library} builds no layers for multi-token prediction: {len(predicted)}"
        yield NotChecked(("C03",), f"{reason} tensors of those that config.json names were compared with no class")
    for names in _grouped(set(unexpected).difference(predicted)):
        known = "" if names[0] in seen else " (as transformers renames it)"
        yield finding("C11", f"{library} has no place for it{known}{_others(names)}", tensor=names[0])


def _grouped(names: Any) -> list[list[str]]:
    """Group names that differ in numbers only: one finding for each kind."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name_template(name)[0], []).append(name)
    return list(groups.values())


def _others(names: list[str]) -> str:
    return f"; so with {len(names) - 1} more like it" if len(names) > 1 else ""


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep what transformers logs to itself; yield it as a list of lines."""
    import transformers

    logged: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.extend(record.getMessage().splitlines())

    logger = logging.getLogger("transformers")
    library: Any = transformers.utils.logging
    handlers, bars, listener = logger.handlers[:], library.is_progress_bar_enabled(), Listener()
    logger.handlers[:] = [listener]
    library.disable_progress_bar()
    try:
        yield logged
    finally:
        logger.handlers[:] = handlers
        if bars:
            library.enable_progress_bar()


def logical_shapes(subject: Context) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return names and shapes as they would be without quantisation, and the tensors whose shape cannot be told."""
    tensors, config = subject.tensors, subject.config
    shapes: dict[str, tuple[int, ...]] = {}
    unknown: list[str] = []
    bits = packed_bits(config)
    blockwise = method(config) == "bitsandbytes"
    for name, info in tensors.items():
        if info.dtype in PLAIN_FLOATS:
            stem = split_name(name, tensors.__contains__, lambda n: tensors[n].dtype)
            if stem.companion is None:
                shapes[name] = info.shape
            continue
        stem = split_name(name, tensors.__contains__, lambda n: tensors[n].dtype)
        if stem.companion is not None:
            continue
        shape = info.shape
        if stem.suffix == "_blocks":
            # MXFP4 [E, out, in/32, 16] stands for [E, in, out].
            shapes[stem.base] = (*shape[:-3], shape[-2] * shape[-1] * 2, shape[-3])
        elif stem.suffix == ".weight_packed":
            per = 32 // bits if info.dtype in ("I32", "U32") else 2
            shapes[f"{stem.base}.weight"] = (*shape[:-1], shape[-1] * per)
        elif stem.suffix == ".qweight":
            per = 32 // bits
            awq = method(config) == "awq"
            rows, columns = (shape[0], shape[1] * per) if awq else (shape[0] * per, shape[1])
            shapes[f"{stem.base}.weight"] = (columns, rows)
        elif info.dtype == "U8" and (blockwise or f"{stem.base}.weight_scale_2" in tensors):
            if blockwise:
                unknown.append(name)
            else:
                shapes[name] = (*shape[:-1], shape[-1] * 2)
        elif info.dtype == "I8" and f"{stem.base}.scale" in tensors:
            shapes[name] = (*shape[:-1], shape[-1] * 2)
        else:
            shapes[name] = shape
    return shapes, unknown
