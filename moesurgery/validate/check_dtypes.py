"""C10, C13 and C15: element types, quantised weights with what belongs to them, and files that describe them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moesurgery.checkpoint.dtypes import BY_CONFIG_NAME, INTEGERS, PLAIN_FLOATS
from moesurgery.checkpoint.filenames import CONFIG
from moesurgery.checkpoint.finding import Finding
from moesurgery.families.config_keys import DTYPE_KEYS
from moesurgery.families.quantisation_settings import (
    QUANTISATION_FILES,
    bits_named,
    excluded_modules,
    quantisation_method,
)
from moesurgery.families.quantised import holds_quantised, method, quantisation_config, split_name
from moesurgery.families.tensor_names import name_template
from moesurgery.validate.check import Outcome, and_more, check, finding
from moesurgery.validate.context import Context

# Methods whose checkpoints may hold plain weights: they are quantised when they are loaded.
_ON_LOADING = ("bitsandbytes", "hqq", "torchao", "quanto", "eetq", "fbgemm_fp8", "higgs", "bitnet")
# Names that only a companion of a quantised weight has. (`.scale` and `_scale` may be parameters of their own.)
_SCALES = (".weight_scale_inv", ".weight_scale", ".weight_scale_2", ".weight_global_scale", "_scale_inv", ".qzeros")


@check("C10")
def dtypes(subject: Context) -> Outcome:
    """One element type for one role, and packed weights only where the config says how they are quantised."""
    quantised = method(subject.config)
    yield from _mixed(subject, quantised is not None)
    if quantised is not None:
        return
    packed = [n for n, w in subject.anatomy.parameters.items() if w and subject.tensors[n].dtype not in PLAIN_FLOATS]
    if packed:
        dtype = subject.tensors[packed[0]].dtype
        kind = "integers" if dtype in INTEGERS else "floats of 8 bits or fewer"
        message = f"is {dtype}, {kind}, but config.json has no quantization_config" + and_more(packed)
        yield finding("C10", message, tensor=packed[0], hint="copy the quantization_config of the model it came from")
    else:
        yield from _stated(subject)


def _mixed(subject: Context, quantised: bool) -> Iterator[Finding]:
    """Tensors of one role, or the experts of one layer, in several types.

    A quantised model may leave whole layers as they were; but never single experts of one.
    """
    roles: dict[str, dict[str, list[str]]] = {}
    for block in subject.anatomy.blocks:
        for member in block.members:
            if member.part is not None and member.stem.main:
                kind = f"{subject.tensors[member.name].dtype}{member.stem.suffix.removesuffix('.weight')}"
                roles.setdefault(f"{block.where} {member.part.path}", {}).setdefault(kind, []).append(member.name)
    for name, weights in subject.anatomy.parameters.items():
        if weights and not quantised:
            roles.setdefault(name_template(name)[0], {}).setdefault(subject.tensors[name].dtype, []).append(name)
    reported: set[str] = set()
    for by_dtype in roles.values():
        common = max(by_dtype, key=lambda kind: len(by_dtype[kind]))
        odd = [name for kind, names in by_dtype.items() if kind != common for name in names]
        if reported.isdisjoint(odd) and odd:
            reported.update(odd)
            message = f"is {subject.tensors[odd[0]].dtype}, the others of its kind are {common}" + and_more(odd)
            yield finding("C10", message, tensor=odd[0])


def _stated(subject: Context) -> Iterator[Finding]:
    stated = subject.anatomy.settings.first(DTYPE_KEYS)
    wanted = BY_CONFIG_NAME.get(stated.removeprefix("torch.")) if isinstance(stated, str) else None
    held: Counter[str] = Counter()
    for name, weights in subject.anatomy.parameters.items():
        held[subject.tensors[name].dtype] += weights
    if wanted and held and held.most_common(1)[0][0] != wanted:
        most = held.most_common(1)[0][0]
        message = f"says {stated}; most of the weights are {most}: loaders that obey it cast them"
        yield finding("C10", message, CONFIG, severity="warning")


@check("C13")
def companions(subject: Context) -> Outcome:
    """Every quantised weight has its scales, every scale its weight, and the config says that it is so."""
    tensors = subject.tensors
    scaled: set[str] = set()
    mains: list[str] = []
    orphans: list[str] = []
    held: dict[str, set[str]] = {}
    for name, info in tensors.items():
        stem = split_name(name, tensors.__contains__, lambda n: tensors[n].dtype)
        if stem.companion is not None:
            main = stem.base + stem.companion.of
            held.setdefault(main, set()).add(stem.suffix)
            if stem.companion.kind in ("scale", "divisor"):
                scaled.add(main)
                yield from _scale_shape(subject, name, main, stem.suffix)
        elif name.endswith(_SCALES):
            orphans.append(name)
        elif subject.anatomy.parameters[name] and info.dtype not in PLAIN_FLOATS:
            mains.append(name)
    if bare := [name for name in mains if name not in scaled]:
        message = f"is {tensors[bare[0]].dtype} and has no scales" + and_more(bare)
        yield finding("C13", message, tensor=bare[0])
    yield from _incomplete(subject, held, bare)
    if orphans:
        yield finding(
            "C13", "scales a weight that is not quantised or not there" + and_more(orphans), tensor=orphans[0]
        )
    named = method(subject.config)
    if named is not None and not mains and named not in _ON_LOADING:
        message = f"quantization_config names {named!r}, but no weight is quantised"
        yield finding("C13", message, CONFIG, hint="remove it, or copy the scales and weights that it is about")


def _incomplete(subject: Context, held: Mapping[str, set[str]], bare: Collection[str]) -> Iterator[Finding]:
    """A weight that lacks what most of its kind have: zero points, the order of its columns, a second scale."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for main in held:  # layers may be quantised in different ways: FP8 has no second scale, NVFP4 has
        kinds.setdefault((name_template(main)[0], subject.tensors[main].dtype), []).append(main)
    for mains in kinds.values():
        count = Counter(suffix for main in mains for suffix in held[main])
        usual = {suffix for suffix, n in count.items() if 2 * n > len(mains)}
        poor = [main for main in mains if usual - held[main] and main not in bare]
        if poor:
            lacks = ", ".join(sorted(usual - held[poor[0]]))
            yield finding("C13", f"has no {lacks}, unlike others of its kind" + and_more(poor), tensor=poor[0])


def _scale_shape(subject: Context, name: str, main: str, suffix: str) -> Iterator[Finding]:
    """The scales of FP8 in blocks, and of MXFP4, have one entry for each block."""
    shape, weight = subject.tensors[name].shape, subject.tensors[main].shape
    if suffix == "_scales" and main.endswith("_blocks"):
        wanted = weight[:-1]
    else:
        stated = quantisation_config(subject.config).get("weight_block_size")
        block = [b for b in stated if type(b) is int and b > 0] if isinstance(stated, list) else []
        if not suffix.endswith("_scale_inv") or len(block) != 2 or len(weight) < 2 or len(shape) < 2:
            return
        wanted = (*weight[:-2], *(-(-n // b) for n, b in zip(weight[-2:], block, strict=True)))
    if shape != wanted:
        message = f"has shape {list(shape)}; {list(weight)} in blocks needs {list(wanted)}"
        yield finding("C13", message, tensor=name)


@check("C15")
def check_quantisation_files(subject: Context) -> Outcome:
    """Files that describe quantisation say what the weights and config.json say: engines read either."""
    tensors = subject.tensors
    quantised = holds_quantised(tensors)
    for file in QUANTISATION_FILES:
        try:
            content = subject.object(file)
        except ValueError as error:
            yield finding("C15", str(error), file)
            continue
        if content is None:
            continue
        form = quantisation_method(content)
        if form is not None and not quantised:
            message = f"says {form}, but no weight is quantised: vLLM and SGLang obey it"
            yield finding("C15", message, file, hint="remove it, or copy the weights that it is about")
            continue
        here, there = (bits_named(place) for place in (content, quantisation_config(subject.config)))
        if here is not None and there is not None and here != there:
            yield finding("C15", f"says {here} bits, config.json {there}", file)
        yield from _named_modules(subject, content, file)
    yield from _named_modules(subject, quantisation_config(subject.config), CONFIG)


def _named_modules(subject: Context, settings: Mapping[str, Any], file: str) -> Iterator[Finding]:
    """Modules that are left as they were hold no quantised weight; experts that are named are there."""
    tensors = subject.tensors
    named = [name for name in excluded_modules(settings) if re.fullmatch(r"[\w.]+", name)]
    packed = {
        stem.base
        for name, info in tensors.items()
        if info.dtype not in PLAIN_FLOATS
        for stem in (split_name(name, tensors.__contains__, lambda n: tensors[n].dtype),)
    }
    wrong = [name for name in named if name in packed]
    if wrong:
        yield finding("C15", f"leaves {wrong[0]} as it was, and its weight is quantised{and_more(wrong)}", file)
    if not subject.anatomy.blocks:
        return
    count = max(block.experts for block in subject.anatomy.blocks)
    gone = [name for name in named if (e := re.search(r"\bexperts\.(\d+)\b", name)) and int(e[1]) >= count]
    if gone:
        message = f"names {gone[0]}, and there are {count} experts{and_more(gone)}"
        yield finding("C15", message, file, severity="warning")
