"""The words in which the family table is written. Data only; `anatomy` gives them effect.

Paths are relative to a layer: `model.layers.7.mlp.experts.3.w1.weight` is `mlp.experts.#.w1` with the
suffix `.weight`. A `#` stands for an expert number. E is the number of experts, H the hidden size, I the
width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Where a model that wraps a language model keeps the settings of the latter.
TEXT: tuple[tuple[str, ...], ...] = (("text_config",), ("llm_config",), ("language_config",), ())

ExpertRole = Literal["gate", "up", "down", "gate_up"]
RouterRole = Literal["router", "router_bias", "correction_bias", "expert_scale", "expert_table"]


@dataclass(frozen=True)
class Projection:
    """One projection of the experts as a layout stores it.

    `order` says what the last two axes mean: "oi" is [out, in] as in `nn.Linear`, "io" is [in, out].
    `interleaved`: gate and up alternate (even = gate) instead of standing one after the other.
    `rows`: the experts are E consecutive blocks of rows of one matrix (DBRX).
    """

    path: str
    role: ExpertRole
    order: Literal["oi", "io"] = "oi"
    interleaved: bool = False
    rows: bool = False


@dataclass(frozen=True)
class Layout:
    """One way in which a family's experts are stored: `per-expert` (a number in the name) or `fused`.

    `moved` says how the other tensors of the MoE module are called beside this layout: pairs of beginnings of
    paths, as the family's first layout has them and as this one does. The first that fits counts.
    """

    kind: Literal["per-expert", "fused"]
    parts: tuple[Projection, ...]
    moved: tuple[tuple[str, str], ...] = ()

    @property
    def gated(self) -> bool:
        return any(part.role in ("gate", "gate_up") for part in self.parts)


@dataclass(frozen=True)
class ExpertAxisTensor:
    """A tensor besides the expert weights that has an expert axis, and so follows the experts.

    `parameter` is False for what transformers registers as a buffer: not counted as a parameter.
    `extra`: it may have more entries than experts (identity experts, shared experts), always after them.
    """

    path: str
    role: RouterRole
    axis: int = 0
    parameter: bool = True
    extra: bool = False


@dataclass(frozen=True)
class Flag:
    """A boolean (or number) that config.json holds under one of `keys`; `default` where it is absent.

    null counts as absent, unless `null_means_off`: then it is False.
    """

    keys: tuple[str, ...]
    default: Any
    null_means_off: bool = False


@dataclass(frozen=True)
class RouterRule:
    """How router logits become weights.

    `score`: "softmax" over all experts; "top-softmax" over the chosen ones (the same weights as a
    renormalised softmax); "sigmoid"; "sqrt-softplus"; "other" where no estimate is offered.
    `renormalised`: the chosen weights are divided by their sum.
    `groups`: how a group of experts is scored before the top groups are kept ("max" or "top2" sum).
    `score_names`: what the values of `score_flag` mean, where they are not the names above.
    `softcap`: the config number c of logits c * tanh(logits / c); 0 or absent for none.
    `routed_scale_key`: the config number that multiplies exactly the routed sum, with its default.
    `after`: what normalises the result: "routed" (a factor has no effect), "joint" (routed and shared
    together: a factor only moves their ratio).
    `on_input`: the weight multiplies what an expert reads instead of what it says.
    `fixed_top_k`: the model code ignores the config's top-k and uses this one.
    `special`: class E, and why the even-gates rule does not apply.
    `no_estimate`: why the gates cannot be estimated from embeddings and routers, where the rule does apply.
    """

    score: Literal["softmax", "top-softmax", "sigmoid", "sqrt-softplus", "other"] = "softmax"
    renormalised: bool | Flag = True
    groups: Literal["max", "top2"] | None = None
    groups_if: tuple[str, str] | None = None  # groups apply only where config[key] == value
    bias_on: Literal["score", "logit"] = "score"
    score_flag: Flag | None = None  # config key that names the scoring function
    score_names: Mapping[str, str] = field(default_factory=dict)
    softcap: str | None = None
    routed_scale_key: str | None = None
    routed_scale_default: float | None = None
    after: Literal["routed", "joint"] | None = None
    on_input: bool = False
    fixed_top_k: int | None = None
    special: str | None = None
    no_estimate: str | None = None


@dataclass(frozen=True)
class InputNorm:
    """The norm whose output the router reads: `x / rms(x) * w` ("rms"), `* (1 + w)` ("rms1"), or LayerNorm.

    `path` names its weight; `others` are the names that it has beside other layouts.
    """

    path: str = "post_attention_layernorm.weight"
    kind: Literal["rms", "rms1", "layer"] = "rms"
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertSet:
    """A further set of experts in the same layers, with a router of its own and the same config numbers.

    `text`: text tokens go through it too (attention experts); else it is for other tokens (images).
    `follows`: in per-expert layouts it continues the numbers of the main set, under the same names.
    """

    name: str
    layouts: tuple[Layout, ...]
    along: tuple[ExpertAxisTensor, ...]
    norm: InputNorm
    text: bool
    follows: bool = False


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    `nested` lists the places in config.json where the language model's settings may stand, most specific
    first. `refuses` maps an operation to the reason why it has no meaning here. `architectures` is
    needed only where one `model_type` names two layouts, or with no `model_types` where it names dense models too.

    The first of `layouts` is the published one. `along` and `shared` list the names beside all layouts.
    `width_keys`: the names of the config number for the width I of an expert. `shared_width` is that for the shared
    expert: "" where it is so many times I, None where it is some other size. `dense_width` is that for FFNs of layers
    without experts: with a name of `width_keys` they are as wide as an expert.
    `router_parts`: what belongs to the router but has no expert axis (beginnings of paths).
    `times_top_k`: config numbers that are the top-k times another (JetMoE's attention heads).
    `zero_experts`: the config key that counts identity experts, which have router rows and no weights.
    `also_layers`: other names of the list of layers. `sparse`: which config keys may say what layers are MoE
    (`families.moe_layers` knows them), in order of precedence; none means all layers.
    """

    name: str
    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]
    along: tuple[ExpertAxisTensor, ...]
    routing: RouterRule = RouterRule()
    shared: tuple[str, ...] = ()
    sets: tuple[ExpertSet, ...] = ()
    router_parts: tuple[str, ...] = ()
    zero_experts: str | None = None
    nested: tuple[tuple[str, ...], ...] = TEXT
    layers: str = "layers"
    also_layers: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    top_k_key: str = "num_experts_per_tok"
    experts_key: str = "num_experts"
    width_keys: tuple[str, ...] = ("moe_intermediate_size",)
    shared_width: str | None = ""
    dense_width: str = "intermediate_size"
    times_top_k: Mapping[str, str] = field(default_factory=dict)
    norm: InputNorm = InputNorm()
    architectures: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    refuses: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def read_layouts(self) -> tuple[Layout, ...]:
        """All layouts that are recognised: those of `layouts`, and MLX's."""
        mlx = self.mlx_layout
        return self.layouts if mlx is None else (*self.layouts, mlx)

    @property
    def mlx_layout(self) -> Layout | None:
        """The layout in which mlx-lm saves the experts: stacked in `switch_mlp`, named alike in all families."""
        parts = []
        for part in next((layout.parts for layout in self.layouts if layout.kind == "per-expert"), ()):
            module, found, _ = part.path.partition(".experts.#.")
            if not found or part.role == "gate_up":
                return None
            parts.append(Projection(f"{module}.switch_mlp.{part.role}_proj", part.role))
        return Layout("fused", tuple(parts)) if parts else None


def per_expert_layout(
    experts: str = "mlp.experts.#",
    *,
    gate: str | None = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> Layout:
    """Return the layout with one tensor per expert and projection."""
    names: list[tuple[str | None, ExpertRole]] = [(gate, "gate"), (up, "up"), (down, "down")]
    return Layout("per-expert", tuple(Projection(f"{experts}.{name}", role) for name, role in names if name))


def fused_layout(
    module: str = "mlp.experts",
    *,
    gate_up: str = "gate_up_proj",
    down: str = "down_proj",
    order: Literal["oi", "io"] = "oi",
    interleaved: bool = False,
    moved: tuple[tuple[str, str], ...] = (),
) -> Layout:
    """Return the layout with all experts of a layer stacked: gate_up [E, 2I, H] and down [E, H, I]."""
    parts = (
        Projection(f"{module}.{gate_up}", "gate_up", order, interleaved),
        Projection(f"{module}.{down}", "down", order),
    )
    return Layout("fused", parts, moved)


def stacked(gate: str | None, up: str, down: str, *, order: Literal["oi", "io"] = "oi") -> Layout:
    """Return the layout with one tensor per projection: gate and up [E, I, H], down [E, H, I]."""
    names: list[tuple[str | None, ExpertRole]] = [(gate, "gate"), (up, "up"), (down, "down")]
    return Layout("fused", tuple(Projection(name, role, order) for name, role in names if name))


def router_tensor(*modules: str, bias: bool = True) -> tuple[ExpertAxisTensor, ...]:
    """Return the router weight [E, H] under each of `modules`, and its bias [E]."""
    routers = tuple(ExpertAxisTensor(f"{module}.weight", "router") for module in modules)
    return routers + tuple(ExpertAxisTensor(f"{module}.bias", "router_bias") for module in modules) if bias else routers


def correction(*paths: str, parameter: bool = False) -> tuple[ExpertAxisTensor, ...]:
    """Return the selection bias [E] under each of `paths`; a buffer in most families."""
    return tuple(ExpertAxisTensor(path, "correction_bias", parameter=parameter) for path in paths)
