"""Which part of a model a tensor belongs to, from its name alone: attention, norm, embedding, vision…

Experts, routers and shared experts are not decided here: they come from the family table.
"""

from __future__ import annotations

import re

EMBEDDING = "embedding"
ATTENTION = "attention"
ROUTER = "router"
ROUTED = "routed_experts"
SHARED = "shared_experts"
DENSE = "dense_ffn"
NORM = "norm"
HEAD = "head"
OTHER = "other"
MAIN_COMPONENTS = (EMBEDDING, ATTENTION, ROUTER, ROUTED, SHARED, DENSE, NORM, HEAD, OTHER)

# Lines of their own in a count: not part of the language model proper.
VISION = "vision"
MTP = "mtp"

_VISION_NAMES = frozenset(
    (
        *("visual", "vision", "vision_tower", "vision_model", "vision_encoder", "vision_embedder", "vision_embedding"),
        *("vision_proj", "vision_projection", "vision_adapter", "vision_language_adapter", "multi_modal_projector"),
        *("multimodal_projector", "mm_projector", "embed_vision", "patch_merger", "image_newline", "view_seperator"),
        *("aligner", "sam_model", "audio", "audio_tower", "audio_encoder", "audio_projector", "embed_audio"),
        *("code2wav", "code_predictor", "talker", "token2wav"),
    )
)
_EMBEDDING_NAMES = frozenset(
    (
        *("embed_tokens", "word_embeddings", "wte", "tok_embeddings", "embeddings", "embed", "embed_in"),
        *("token_embedding", "shared", "ngram_embedding", "embed_positions", "wpe"),
    )
)
_HEAD_NAMES = frozenset(("lm_head", "output", "embed_out", "output_layer", "head"))
_NORM = re.compile(r"(^|_)(norm|layernorm|ln|rmsnorm)(_|\d|$)|norm$|layernorm$")
_ATTENTION = re.compile(r"attn|attention|mamba|mixer|conv|ssm|kda|lightning|recurrent|indexer|delta|rnn")
_FFN = re.compile(r"mlp|feed_forward|ffn|moe|residual_mlp|linear_[12]|fc[12]|experts|share")


def is_mtp(name: str) -> bool:
    """Whether a tensor stands in a multi-token-prediction module of its own (others are extra layers)."""
    return "mtp" in name.split(".")


def is_vision(components: list[str]) -> bool:
    return not _VISION_NAMES.isdisjoint(components)


def component_of(components: list[str], in_layer: bool) -> str:
    """Classify a tensor by the components of its (layer-relative) name."""
    modules = components[:-1] or components
    if _NORM.search(modules[-1]) or _NORM.search(components[-1]):
        return NORM
    if not in_layer:
        if not _EMBEDDING_NAMES.isdisjoint(components):
            return EMBEDDING
        return HEAD if not _HEAD_NAMES.isdisjoint(components) else OTHER
    if any(_ATTENTION.search(c) for c in components):
        return ATTENTION
    return DENSE if any(_FFN.search(c) for c in components) else OTHER
