"""Every key under which config.json files say something of single layers: the one place that lists them.

Names and meanings from the configuration classes of transformers 5.23 and from the config.json files that the models
are published with. `layer_config` reads and rewrites them. A key that is missing here, and that has the length of the
stack or is keyed by its numbers, is refused by name when the stack changes.
"""

from __future__ import annotations

import re

# A list, or a string, with an entry for each layer; the entries of prediction (MTP) layers may follow.
LISTS = frozenset(
    (
        # kinds of layers
        *("layer_types", "mlp_layer_types", "layers_block_type", "attn_type_list", "no_rope_layers", "moe_layer_freq"),
        *("hybrid_override_pattern", "hybrid_layer_pattern", "attention_layers", "attn_layers", "use_rope_layers"),
        *("sparse_attention_freq", "indexer_types", "index_topk_pattern", "zaya_layers", "block_configs"),
        # rotary embeddings and windows
        *("layer_rope_theta", "rope_theta", "partial_rotary_factors", "sliding_window_list", "sliding_windows"),
        *("attention_window", "compress_ratios"),
        # sizes and limits
        *("num_experts", "moe_topk", "num_shared_expert", "moe_intermediate_size", "intermediate_size"),
        *("num_key_value_heads", "num_attention_heads", "num_attention_heads_per_layer", "num_query_heads"),
        *("num_key_value_heads_per_layer", "num_kv_heads", "num_query_groups_list", "ffn_hidden_size_list"),
        *("ffn_multipliers", "swiglu_limits", "swiglu_limits_shared", "activation_sparsity_pattern"),
    )
)
# By the length of which a model says how deep it is where it has no number of layers (nemotron_h, zamba).
DEPTH_LISTS = ("layers_block_type", "hybrid_override_pattern", "layer_types")
# Numbers of layers, also as text ("3,4,5"). In the second table the first layer is number 1.
NUMBERS = frozenset(
    (
        *("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "dense_layers", "moe_layers_enum"),
        *("cross_attention_layers", "local_layer_ids", "hybrid_layer_ids", "rope_scaling_layers"),
    )
)
NUMBERS_FROM_ONE = frozenset(("kda_layers", "full_attn_layers", "ple_layer_ids"))
# An object whose keys are numbers of layers. Layers that it leaves out have nothing of their own.
KEYED = frozenset(("per_layer_config",))
# The first so many layers, or the first that is not; the last that is.
FIRST = frozenset(
    (
        *("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "dense_mlp_idx", "num_hash_layers"),
        "moe_layer_num_skipped",
    )
)
LAST = frozenset(("moe_layer_end_index",))
# By period; never rewritten, only checked. `CYCLES` are lists of kinds that begin anew when they end.
PERIODS = (
    *("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "moe_layer_interval"),
    *("sliding_window_pattern", "attn_layer_period", "expert_layer_period", "no_rope_layer_interval"),
    *("full_attention_interval", "moe_layer_frequency", "layer_group_size", "global_attn_every_n_layers"),
    "dense_attention_every_n_layers",
)
OFFSETS = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
CYCLES = ("block_types",)
# What a list of the same fact, if there is one, leaves without meaning.
OVERRULED = {
    "sliding_window_pattern": "layer_types",
    "max_window_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "layer_group_size": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "full_attention_interval": "layer_types",
}
# What says which attention a layer has.
ATTENTION_KEYS = frozenset(
    (
        *("layer_types", "layers_block_type", "attn_type_list", "no_rope_layers", "full_attn_idxs"),
        *("attn_layer_period", "attn_layer_indices", "hybrid_override_pattern", "hybrid_layer_pattern"),
        *("sliding_window_list", "sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval"),
        *("local_layer_ids", "compress_ratios", "use_rope_layers", "layer_group_size", "attention_layers"),
        *("linear_attn_config.full_attn_layers", "linear_attn_config.kda_layers"),
        "sparse_attention_config.sparse_attention_freq",
    )
)
# Model types of transformers 5.24 whose layers differ in attention by number where config.json has none of these.
ALTERNATING = frozenset(
    (
        *("afmoe", "bailing_hybrid", "beam", "cohere2", "cohere2_moe", "cwm", "deepseek_v4", "dots3_note_text"),
        *("exaone4", "exaone_moe", "flint", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm5_next_text"),
        *("gemma4_unified_text", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "inkling2_text", "inkling_text"),
        *("hy_v4_vl_text", "inkling2_loop_text", "lara_mini"),
        *("kimi_linear", "kolibri1", "lfm3", "llama4_text", "mimo_v2_flash", "minimax", "mistral_large4_text"),
        *("modernbert-decoder", "muse_glimmer_text", "muse_spark_text", "olmo3", "olmo_hybrid", "qwen3_5_moe_text"),
        *("qwen3_5_text", "qwen3_next", "qwen4_exp_text", "smollm3", "vaultgemma", "zamba"),
    )
)
# Behaviour that depends on the number of a layer, in code or by reaching into other layers.
BY_NUMBER = {
    "num_kv_shared_layers": "the last layers use the keys and values of earlier ones",
    "use_cla": "layers use the keys and values of earlier ones",
    "scale_attn_by_inverse_layer_idx": "attention is scaled by the number of the layer",
    "hidden_size_per_layer_input": "the embeddings of all layers stand in one tensor, side by side",
    "attention_types": "kinds of layers are counted off from the first",
    "num_mem_blocks": "layers take turns in using shared blocks",
}
# The same for model types that say nothing of it in config.json.
BY_NUMBER_IN_CODE = {
    "minimax": "the decay of its linear attention goes by the number of the layer and the depth of the stack",
    "diffllama": "its attention subtracts a share that goes by the number of the layer",
}
# Factors that the code divides by the depth of the stack.
BY_DEPTH = {"scale_depth": "what a layer adds is divided by the root of the number of layers"}

# Lists that may be as long as the model is deep by chance, and objects that are keyed by other numbers.
NOT_BY_LAYER = frozenset(
    (
        *("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "layer_tie_map", "layer_tie_exclude"),
        *("id2label", "label2id", "mrope_section", "long_factor", "short_factor", "time_step_limit"),
        *("mlp_multipliers", "ssm_multipliers", "suppress_tokens", "begin_suppress_tokens", "special_token_ids"),
    )
)
# Objects that describe no layers: another model beside the language model, quantisation, the card.
APART = re.compile(
    r"vision|visual|audio|speech|image|video|vit_config|encoder_config|quantization|compression|projector|auto_map"
    r"|task_specific_params|talker|code2wav|mtp_per_layer_config|generation_config"
)
# What a key is called that holds numbers of layers.
NAMES_LAYERS = re.compile(r"layer|block")
