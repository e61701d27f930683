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
DENSE_FFN = "dense_ffn"
NORM = "norm"
RESIDUAL = "residual"  # what joins layers to the residual stream: its scales, gates, hyper-connections
HEAD = "head"
OTHER = "other"
MAIN_COMPONENTS = (EMBEDDING, ATTENTION, ROUTER, ROUTED, SHARED, DENSE_FFN, NORM, RESIDUAL, HEAD, OTHER)

# Lines of their own in a count: not part of the language model proper.
VISION = "vision"
MTP = "mtp"

_VISION_NAMES = frozenset(
    (
        *("visual", "vision", "vision_tower", "vision_model", "vision_encoder", "vision_embedder", "vision_embedding"),
        *("vision_proj", "vision_projection", "vision_adapter", "vision_language_adapter", "multi_modal_projector"),
        *("multimodal_projector", "mm_projector", "embed_vision", "patch_merger", "image_newline", "view_seperator"),
        *("aligner", "sam_model", "audio", "audio_tower", "audio_encoder", "audio_projector", "embed_audio"),
        *("code2wav", "code_predictor", "talker", "token2wav", "projector", "vit_large_projector", "view_separator"),
        *("patch_merge_mlp", "resampler_model", "qwen2_model", "vit"),  # MiniMax-M3, ERNIE-VL, DeepSeek-OCR-2, HY-V4
    )
)
_EMBEDDING_NAMES = frozenset(
    (
        *("embed_tokens", "word_embeddings", "wte", "tok_embeddings", "embeddings", "embed", "embed_in"),
        *("token_embedding", "shared", "ngram_embedding", "embed_positions", "wpe", "embed_tokens_per_layer"),
        *("token_embd", "position_embd", "token_types", "per_layer_token_embd"),  # GGUF
    )
)
_HEAD_NAMES = frozenset(("lm_head", "output", "embed_out", "output_layer", "head", "unembed", "score"))
_NORM = re.compile(r"(^|_)(norm|layernorm|ln|rmsnorm)(_|\d|$)|norm$|layernorm$")
_RESIDUAL = re.compile(
    r"(^|_)hc(_|$)|hyper_connection|residual(?!_mlp)|layer_scalar|attn_res$"
    r"|hidden_states_(scale|bias)|(attention|mlp|final|message)_input$|message_gate$|^controllers$|cross_pass"
)
_ATTENTION = re.compile(r"attn|attention|mamba|mixer|conv|ssm|kda|lightning|recurrent|indexer|delta|rnn|rope|rotary")
_FFN = re.compile(r"mlp|feed_forward|ffn|moe|linear_[12]|fc[12]|experts|share|dense|per_layer|self_conditioning")


def is_mtp(name: str) -> bool:
    """Whether a tensor stands in a multi-token-prediction module of its own (others are extra layers)."""
    return any(part == "mtp" or part.startswith("mtp_") for part in name.split("."))


def is_vision(components: list[str]) -> bool:
    """Whether one of the parts of a name belongs to a vision or audio tower."""
    return not _VISION_NAMES.isdisjoint(components)


def component_of(components: list[str], in_layer: bool) -> str:
    """Classify a tensor by the components of its (layer-relative) name."""
    named = [c.lower() for c in components if c not in ("#", "weight", "bias")] or components
    if _NORM.search(named[-1]) or any(c.endswith("layernorm") for c in named):
        return NORM
    if any(_RESIDUAL.search(c) for c in named):
        return RESIDUAL
    if not in_layer:
        if not _EMBEDDING_NAMES.isdisjoint(components):
            return EMBEDDING
        if not _HEAD_NAMES.isdisjoint(components):
            return HEAD
    if any(_ATTENTION.search(c) for c in named):
        return ATTENTION
    return DENSE_FFN if any(_FFN.search(c) for c in named) else OTHER
