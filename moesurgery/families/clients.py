"""What the programs that run checkpoints want of one: the layouts, config keys and heads that each of them reads.

The facts are of each program's own source (the version stands with it), and `make clients` runs what it can of them;
its table is in docs/clients.md. transformers 5 is the reference: it reads every layout and spelling here.

What another form of the same checkpoint mends is a `Want`; `surgery.convert` writes that form. What no form mends,
because the program has no code for the type or computes something else, is a `Fault`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moesurgery.families import client_types
from moesurgery.families.anatomy import model_type_of
from moesurgery.families.client_types import types
from moesurgery.families.config_keys import EXPERTS_KEYS, TOP_K_KEYS
from moesurgery.families.rope_keys import Config, spelled_both_ways, stated_rules
from moesurgery.families.table import by_model_type


@dataclass(frozen=True)
class Fault:
    """What a client does otherwise than transformers 5, for those models of some types of which `wrong` is true."""

    types: frozenset[str]
    wrong: Callable[[Config], bool]
    words: str


@dataclass(frozen=True)
class Key:
    """A config key without which clients stop, or take something else than the type's own code does.

    `value` is what that code takes; it may be a function of the config. `instead_of`: a value that they misread.
    """

    types: frozenset[str]
    name: str
    value: Any
    instead_of: Any = None

    def of(self, config: Config) -> dict[str, Any]:
        """Return the key as the clients want it, empty where the config has it."""
        if self.name in config and (self.instead_of is None or config[self.name] != self.instead_of):
            return {}
        return {self.name: self.value(config) if callable(self.value) else self.value}


@dataclass(frozen=True)
class Client:
    """One program. `types` are those of our tables that it has code for; None for all.

    `other_layouts`: types of which it reads more than the published layout (None: all). `nested_rope`: it reads
    `rope_parameters`. `heads`: types of which it does not make the head of the embedding. `published_counts`: it reads
    the numbers of experts under the type's published keys alone. `tokens` and `tokenizer_files`: what its converter
    asks of a tokenizer, by type.
    """

    name: str
    version: str
    types: frozenset[str] | None
    other_layouts: frozenset[str] | None
    nested_rope: bool
    heads: frozenset[str]
    published_counts: bool
    keys: tuple[Key, ...] = ()
    faults: tuple[Fault, ...] = ()
    tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokenizer_files: Mapping[str, str] = field(default_factory=dict)

    def has_code(self, model_type: str) -> bool:
        return self.types is None or model_type in self.types

    def faults_of(self, config: Config) -> list[str]:
        """Return what this client cannot do for a model, in whatever form: empty where it reads some form rightly."""
        kind = model_type_of(config)
        if not self.has_code(kind):
            return [f"it has no code for {kind}"]
        flat = language_part(config)
        return [f.words for f in self.faults if kind in f.types and f.wrong(flat)]

    def keys_of(self, config: Config) -> dict[str, Any]:
        """Return the config keys that this client lacks, RoPE's aside."""
        kind, flat = model_type_of(config), language_part(config)
        missing: dict[str, Any] = dict(published_counts(config)) if self.published_counts else {}
        for key in self.keys:
            if kind in key.types:
                missing.update(key.of(flat))
        return missing

    def rope_of(self, config: Config) -> dict[str, Any]:
        """Return the RoPE keys that this client does not find: it would take its type's default, and say nothing."""
        flat = language_part(config)
        wanted = spelled_both_ways(flat)
        own = ("rope_parameters",) if self.nested_rope else ("rope_theta", "rope_scaling", "partial_rotary_factor")
        if self.nested_rope and (flat.get("rope_theta") is not None or flat.get("rope_scaling")):
            return {}  # it reads the older spelling too
        lacking = [key for key in own if wanted.get(key) is not None and flat.get(key) is None]
        return {key: wanted[key] for key in wanted} if lacking else {}

    def wants_head(self, config: Config) -> bool:
        """Whether the head is tied, and this client would have none."""
        kind, flat = model_type_of(config), language_part(config)
        return kind in self.heads and tied(flat)


def language_part(config: Config) -> Config:
    """Return the settings of the language model: those of the config itself, or of the part that has its layers."""
    for key in ("text_config", "llm_config", "language_config"):
        part = config.get(key)
        if isinstance(part, Mapping):
            return part
    return config


def tied(config: Config) -> bool:
    """Whether a config ties the head; only types whose default is untied are asked about."""
    return config.get("tie_word_embeddings") is True


def published_counts(config: Config) -> dict[str, int]:
    """Return the numbers of experts and of those per token under the published keys, where other keys give them."""
    flat = language_part(config)
    families = by_model_type(model_type_of(config))
    if not families:
        return {}
    counts = {}
    for wanted, aliases in ((families[0].experts_key, EXPERTS_KEYS), (families[0].top_k_key, TOP_K_KEYS)):
        given = next((flat[key] for key in aliases if type(flat.get(key)) is int), None)
        if given is not None and flat.get(wanted) is None:
            counts[wanted] = given
    return counts


# Facts about single types


def _dense_first(config: Config) -> int:
    """Return how many layers come before the first of experts."""
    kinds = config.get("mlp_layer_types")
    return next((i for i, kind in enumerate(kinds) if kind == "sparse"), len(kinds)) if kinds else 0


def _last_layer(config: Config) -> int:
    return int(config["num_hidden_layers"]) - 1


def _rope_type(config: Config) -> str:
    rules = stated_rules(config) or {}
    return str(rules.get("rope_type") or rules.get("type") or "default")


def _scaled_rope(config: Config) -> bool:
    return _rope_type(config) != "default"


def _windowed(config: Config) -> bool:
    """Whether some layer's window is shorter than the longest context."""
    if config.get("use_sliding_window") is False:
        return False
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    kinds = config.get("layer_types")
    return bool(window) and (not longest or window < longest) and (kinds is None or "sliding_attention" in kinds)


def _renormalised(config: Config) -> bool:
    return config.get("norm_topk_prob") is True and _chooses(config)


def _raw(config: Config) -> bool:
    return config.get("norm_topk_prob") is not True and _chooses(config)


def _chooses(config: Config) -> bool:
    return config.get("num_experts_per_tok") != config.get("num_experts")


def _own_width(config: Config) -> bool:
    """Whether heads are not as wide as the hidden size gives them."""
    heads, width = config.get("num_attention_heads"), config.get("head_dim")
    return width is not None and heads is not None and width * heads != config.get("hidden_size")


def _grouped_heads(config: Config) -> bool:
    heads = config.get("num_attention_heads")
    return config.get("num_key_value_heads", heads) not in (None, heads)


def _not_silu(config: Config) -> bool:
    return config.get("hidden_act", "silu") not in ("silu", "swish")


_DEEPSEEK = types("deepseek_v3 kimi_k2 glm4_moe_lite")
_SILU = types(
    "mixtral qwen2_moe qwen3_moe glm4_moe dots1 granitemoe granitemoeshared granitemoehybrid solar_open deepseek_v3"
    " glm4_moe_lite ernie4_5_moe hunyuan_v1_moe olmoe llama4_text"
)
_ONE_ATTENTION = types("mixtral qwen2_moe qwen3_moe dots1 olmoe mistral qwen2 qwen3")
_SILU_ONLY = Fault(_SILU, _not_silu, "its experts always use SiLU, and hidden_act is another")
_WINDOWS_IGNORED = Fault(_ONE_ATTENTION, _windowed, "it ignores the sliding window of this type")
# By the type's own code the scores are sigmoids, and a bias corrects the choice.
_SCORES = (
    Key(_DEEPSEEK, "scoring_func", "sigmoid"),
    Key(types("glm4_moe_lite"), "first_k_dense_replace", _dense_first),
)
_GLM_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>", "[gMASK]")
_CHOICE = Key(_DEEPSEEK, "topk_method", "noaux_tc")

_TRANSFORMERS_4 = Client(
    "transformers4",
    "transformers 4.57",
    client_types.TRANSFORMERS_4_TYPES,
    frozenset(),
    nested_rope=False,
    heads=frozenset(),
    published_counts=True,
)
_TRANSFORMERS_5 = Client(
    "transformers5", "transformers 5.24", None, None, nested_rope=True, heads=frozenset(), published_counts=False
)
_VLLM = Client(
    "vllm",
    "vLLM 0.32",
    client_types.VLLM_TYPES,
    types("qwen3_moe"),
    nested_rope=True,
    heads=types("glm4_moe glm4_moe_lite deepseek_v2 deepseek_v3 olmoe llama4_text"),
    published_counts=False,
    keys=(*_SCORES, _CHOICE),
    faults=(
        _SILU_ONLY,
        Fault(
            types("llama4_text llama4"),
            lambda c: c.get("num_experts_per_tok", 1) != 1,
            "it runs this type with one expert per token alone",
        ),
    ),
)
_SGLANG = Client(
    "sglang",
    "SGLang 0.5.23",
    client_types.SGLANG_TYPES,
    frozenset(),
    nested_rope=True,
    heads=types("mixtral qwen2_moe qwen3_moe glm4_moe glm4_moe_lite olmoe llama4_text"),
    published_counts=False,
    keys=(*_SCORES, _CHOICE),
    faults=(_SILU_ONLY,),
)
_LLAMA_CPP = Client(
    "llama.cpp",
    "llama.cpp of node-llama-cpp 3.22",
    client_types.LLAMA_CPP_TYPES,
    types("qwen2_moe qwen3_moe"),
    nested_rope=True,
    heads=types("qwen2_moe dots1 olmoe"),
    published_counts=False,
    keys=(*_SCORES, Key(types("dots1"), "scoring_func", "sigmoid")),
    faults=(
        _SILU_ONLY,
        _WINDOWS_IGNORED,
        Fault(types("qwen2_moe olmoe"), _renormalised, "it never renormalises the gates of this type"),
        Fault(types("qwen3_moe"), _raw, "it always renormalises the gates of this type"),
        Fault(
            types("llama4_text llama4"),
            lambda c: not c.get("attn_temperature_tuning", True),
            "it stops where attn_temperature_tuning is off",
        ),
        Fault(
            types("granitemoe granitemoeshared"),
            lambda c: _rope_type(c) == "llama3",
            "its converter stops at RoPE scaled as Llama 3's in this type",
        ),
        Fault(
            types("glm4_moe solar_open qwen2_moe qwen3_moe dots1 ernie4_5_moe olmoe hunyuan_v1_moe qwen2 qwen3"),
            lambda c: _rope_type(c) == "llama3",
            "it ignores RoPE scaled as Llama 3's in this type",
        ),
        Fault(
            types("granitemoehybrid"),
            lambda c: "mamba" not in (c.get("layer_types") or c.get("layers_block_type") or ()),
            "its converter stops without a Mamba layer",
        ),
        Fault(types("granitemoe granitemoeshared"), _own_width, "it has no head_dim in this type"),
        Fault(types("dots1"), _grouped_heads, "it wants as many key and value heads as heads in this type"),
    ),
    tokens={
        "glm4_moe": _GLM_TOKENS,
        "glm4_moe_lite": _GLM_TOKENS,
        "solar_open": ("<|endoftext|>", "<unk>", "<|startoftext|>"),
    },
    tokenizer_files={"ernie4_5_moe": "tokenizer.model"},
)
_MLX = Client(
    "mlx",
    "mlx-lm 0.32",
    client_types.MLX_TYPES,
    frozenset(),
    nested_rope=False,
    heads=types("qwen2_moe glm4_moe glm4_moe_lite deepseek_v2 deepseek_v3 solar_open"),
    published_counts=True,
    keys=(
        Key(types("glm4_moe_lite solar_open glm4_moe"), "first_k_dense_replace", _dense_first),
        Key(types("solar_open"), "partial_rotary_factor", 1.0),
        Key(types("ernie4_5_moe"), "moe_layer_end_index", _last_layer, instead_of=-1),
    ),
    faults=(
        _SILU_ONLY,
        _WINDOWS_IGNORED,
        Fault(types("qwen2_moe"), _renormalised, "it never renormalises the gates of this type"),
        Fault(
            types("mixtral qwen2_moe qwen3_moe glm4_moe solar_open lfm2_moe ernie4_5_moe"),
            _scaled_rope,
            "it ignores or refuses scaled RoPE in this type",
        ),
        Fault(types("mixtral qwen2_moe granitemoe"), _own_width, "it has no head_dim in this type"),
    ),
)
CLIENTS: Mapping[str, Client] = {
    client.name: client for client in (_TRANSFORMERS_4, _TRANSFORMERS_5, _VLLM, _SGLANG, _LLAMA_CPP, _MLX)
}


@dataclass(frozen=True)
class Wants:
    """What clients want of one model: all of them by default, for a form that every one of them reads."""

    config: Config
    clients: tuple[Client, ...] = tuple(CLIENTS.values())

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Config keys to be written, into the part that holds the language model's settings."""
        wanted: dict[str, Any] = {}
        for client in self.clients:
            wanted.update(client.rope_of(self.config))
            wanted.update(client.keys_of(self.config))
        return wanted

    @property
    def head(self) -> bool:
        """Whether the head must be written apart from the embedding."""
        return any(client.wants_head(self.config) for client in self.clients)

    def layout(self, published: str) -> str | None:
        """Return the layout that all of them read, None where any will do."""
        kind = model_type_of(self.config)
        any_will_do = all(c.other_layouts is None or kind in c.other_layouts for c in self.clients)
        return None if any_will_do else published


def with_keys(config: Config, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with `keys` in the part that holds the language model's settings."""
    for part in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(part), Mapping):
            return {**config, part: {**config[part], **keys}}
    return {**config, **keys}


def adapter_readers(*, experts: bool) -> str:
    """Say which programs take an adapter, by whether experts are among what it adapts."""
    if experts:
        return (
            "the adapter is for transformers 5 with PEFT: it adapts experts, which llama.cpp's converter and others"
            " refuse. For them, merge it first, with `model: MODEL+ADAPTER` in a merge recipe"
        )
    return "the adapter is for transformers 5 with PEFT, and for other readers of PEFT's linear modules"
