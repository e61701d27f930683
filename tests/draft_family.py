"""Draft a table entry for a model type that the installed transformers knows.

    python -m tests.draft_family MODEL_TYPE

for types whose default configuration transformers can build.

Builds the model on torch's meta device and reads names, axes and config keys: how experts, router, selection bias and
shared experts are called, how transformers renames what is published, which config numbers are theirs. What it cannot
see from names (how scores become weights, which layers are MoE, in which norm's output the router reads) is printed as
a remark: read the model's code.
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from moesurgery.families.config_keys import EXPERTS_KEYS, TOP_K_KEYS
from moesurgery.families.family import (
    ExpertAxisTensor,
    Family,
    Layout,
    correction,
    fused_layout,
    per_expert_layout,
    router_tensor,
)

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.(.+)")
_DEPTH = 8  # layers of the model that is built: the first may be dense


def layer_shapes(model_type: str) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Return the language model's config, and the shapes of its last MoE layer by names within the layer."""
    config = AutoConfig.for_model(model_type)
    text = config.get_text_config()
    for key in ("num_hidden_layers", "layer_types", "mlp_layer_types", "layers_block_type"):
        value = getattr(text, key, None)
        if isinstance(value, (int, list)):
            setattr(text, key, min(value, _DEPTH) if isinstance(value, int) else value[:_DEPTH])
    with torch.device("meta"):
        try:
            model: Any = AutoModelForCausalLM.from_config(config)
        except ValueError:
            model = AutoModel.from_config(config)
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if match := _LAYER.search(name):
            layers.setdefault(int(match[1]), {})[match[2]] = tuple(tensor.shape)
    sparse = [shapes for _, shapes in sorted(layers.items()) if any(".experts." in n for n in shapes)]
    if not sparse:
        raise SystemExit(f"{model_type}: no layer of the first {_DEPTH} has a module called experts")
    return text, sparse[-1]


def published(model_type: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return what is joined to gate_up and down, by role, as it is published; and the renamings of modules."""
    parts: dict[str, str] = {}
    moved: list[tuple[str, str]] = []
    for step in get_checkpoint_conversion_mapping(model_type) or ():
        sources, targets = ([p.replace("\\", "").lstrip("^.") for p in given] for given in _patterns(step))
        if isinstance(step, WeightConverter):
            paths = [p.replace("*", "#").removesuffix(".weight") for p in sources]
            if ".#." in paths[0] and targets[0].endswith("experts.gate_up_proj") and len(paths) == 2:
                parts["gate"], parts["up"] = paths
            elif ".#." in paths[0] and targets[0].endswith("experts.down_proj"):
                parts["down"] = paths[0]
        elif len(sources) == len(targets) == 1:
            moved.append((sources[0], targets[0]))
    return parts, moved


def _patterns(step: Any) -> tuple[list[str], list[str]]:
    return list(step.source_patterns), list(step.target_patterns)


def draft(model_type: str) -> Family:
    """Return the entry as far as names tell it."""
    text, shapes = layer_shapes(model_type)
    stated = text.to_dict()
    own = [key for key in (*EXPERTS_KEYS, *TOP_K_KEYS) if hasattr(text, key) and key not in text.attribute_map]
    experts_key, top_k_key = (next(key for key in own if key in known) for known in (EXPERTS_KEYS, TOP_K_KEYS))
    count, hidden = int(getattr(text, experts_key)), int(text.hidden_size)
    stacked = {name: shape for name, shape in shapes.items() if ".experts." in name and len(shape) == 3}
    down = next(name for name in stacked if name.endswith("down_proj"))
    module = down.rpartition(".")[0]
    order: Any = "oi" if stacked[down][1] == hidden else "io"
    fused = fused_layout(module, order=order)
    parts, moved = published(model_type)
    layouts: tuple[Layout, ...] = (fused,)
    if parts.keys() == {"gate", "up", "down"}:
        path, names = parts["down"].rpartition(".")[0], {role: p.rpartition(".")[2] for role, p in parts.items()}
        short = module.rpartition(".")[0]
        old = next((s.strip(".") for s, t in moved if t.strip(".") == short), short)
        if not path.startswith(old):
            path = f"{old}.{path}"
        if old != short:
            fused = fused_layout(module, order=order, moved=((f"{old}.", f"{short}."),))
        layouts = (per_expert_layout(path, **names), fused)
    before = layouts[0].parts[0].path.partition(".experts")[0]
    after = module.rpartition(".")[0]

    def as_published(name: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys((name.replace(f"{after}.", f"{before}.", 1), name)))

    along: list[ExpertAxisTensor] = []
    for name, shape in shapes.items():
        if ".experts." in name or count not in shape:
            continue
        if shape == (count, hidden):
            along += router_tensor(*(n.removesuffix(".weight") for n in as_published(name)))
        elif shape == (count,) and "correction" in name:
            along += correction(*as_published(name))
    shared = {match[0] for name in shapes if (match := re.match(r".*?shared_(?:experts?|mlp)(?=\.)", name))}
    width = next((k for k in ("moe_intermediate_size", "intermediate_size") if k in stated), "moe_intermediate_size")
    return Family(
        model_type,
        (model_type,),
        layouts=layouts,
        along=tuple(along),
        shared=tuple(path for name in sorted(shared) for path in as_published(name)),
        experts_key=experts_key,
        top_k_key=top_k_key,
        width_keys=(width,),
    )


def remarks(model_type: str) -> list[str]:
    """Say what is to be read in the model's code, with the config numbers that may be about it."""
    text, shapes = layer_shapes(model_type)
    keys = [k for k in text.to_dict() if re.search("rout|score|scoring|group|norm_topk|sparse|dense|moe_layer", k)]
    square = [n for n, s in shapes.items() if ".experts." in n and len(s) == 3 and s[1] == s[2]]
    aliases = [f"{new} for {old}" for new, old in text.attribute_map.items() if new in (*EXPERTS_KEYS, *TOP_K_KEYS)]
    norms = [name for name, shape in shapes.items() if "norm" in name and len(shape) == 1]
    return [
        "routing: how router logits become weights (families.family.RouterRule)",
        f"sparse: which config keys say what layers are MoE; keys that may be about either: {', '.join(keys)}",
        *(f"config keys: transformers also takes {alias}: which do published files have?" for alias in aliases),
        *(f"order: {name} is as wide as high: are its axes [out, in] or [in, out]?" for name in square),
        f"norm: the norm whose output the router reads, one of {', '.join(norms)}",
    ]


def main() -> None:
    (model_type,) = sys.argv[1:] or [""]
    if not model_type:
        raise SystemExit(__doc__)
    entry = draft(model_type)
    default = Family("", (), layouts=(), along=())
    print("    Family(")
    for field in fields(Family):
        value = getattr(entry, field.name)
        if value != getattr(default, field.name):
            print(f"        {field.name}={value!r},")
    print("    ),")
    print("\n".join(f"# {line}" for line in remarks(model_type)))


if __name__ == "__main__":
    main()
