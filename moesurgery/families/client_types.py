"""The model types that each client has code for, of those that our tables know. Data of `families.clients`.

A type that a client reaches through transformers (vLLM does, for types of which it has no code) counts.
"""

from __future__ import annotations


def types(names: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(names.split())


TRANSFORMERS_4_TYPES = types(
    """
    mixtral minimax phimoe olmoe flex_olmo jamba granitemoe granitemoeshared granitemoehybrid jetmoe dbrx qwen2_moe
    qwen3_moe qwen3_next qwen3_vl_moe qwen3_vl_moe_text qwen3_omni_moe deepseek_v2 deepseek_v3 glm4_moe glm4v_moe
    glm4v_moe_text dots1 gpt_oss llama4 llama4_text aria aria_text hunyuan_v1_moe ernie4_5_moe longcat_flash doge
    switch_transformers nllb-moe llama mistral ministral qwen2 qwen3 granite olmo2 olmo3 phi3 gemma glm ernie4_5
    helium hunyuan_v1_dense cohere cohere2 seed_oss smollm3 lfm2 gemma2 gemma3_text
    """
)
VLLM_TYPES = types(
    """
    mixtral minimax minimax_text_01 minimax_m2 minimax_m3_vl olmoe flex_olmo jamba granitemoe granitemoeshared
    granitemoehybrid granitemoe_swa dbrx arctic grok-1 qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text
    qwen3_vl_moe qwen4_exp qwen4_exp_text mellum laguna deepseek deepseek_v2 deepseek_v3 kimi_k2 kimi_k25
    deepseek_v32 deepseek_v4 glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe glm5_next dots1 dots3_note dots3_note_text
    mimo_v2_flash axk1 exaone_moe kimi_linear hy_v3 hy_v4 lfm2_moe afmoe nemotron_h step3p7 step3p5 inkling_mm_model
    inkling_text gpt_oss llama4 llama4_text aria gemma4 gemma4_text diffusion_gemma hunyuan_v1_moe hunyuan
    ernie4_5_moe ernie4_5_vl_moe cohere2_moe longcat_flash bailing_moe bailing_moe_v2 solar_open phimoe llama
    mistral ministral ministral3 qwen2 qwen3 qwen3_5_text granite granite_swa olmo2 olmo3 phi3 gemma glm ernie4_5
    helium hunyuan_v1_dense cohere cohere2 seed_oss internlm3 iquestcoder smollm3 lfm2 cwm gemma2 gemma3_text
    """
)
SGLANG_TYPES = types(
    """
    mixtral minimax_m2 minimax_m3_vl olmoe granitemoe granitemoeshared granitemoehybrid granitemoe_swa dbrx grok-1
    qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text qwen3_vl_moe qwen4_exp mellum laguna deepseek
    deepseek_v2 deepseek_v3 kimi_k2 kimi_k25 deepseek_v32 deepseek_v4 glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe
    glm5_next dots3_note dots3_note_text mimo_v2_flash exaone_moe kimi_linear hy_v3 hy_v4 lfm2_moe afmoe beam
    nemotron_h step3p7 step3p5 muse_spark inkling_mm_model gpt_oss llama4 llama4_text gemma4 gemma4_text
    diffusion_gemma hunyuan_v1_moe hunyuan ernie4_5_moe ernie4_5_vl_moe cohere2_moe longcat_flash zaya bailing_moe
    bailing_moe_v2 llama mistral ministral3 qwen2 qwen3 qwen3_5_text granite granite_swa olmo2 phi3 gemma
    hunyuan_v1_dense cohere cohere2 internlm3 iquestcoder lfm2 gemma2 gemma3_text
    """
)
LLAMA_CPP_TYPES = types(
    """
    mixtral minimax_text_01 minimax_m2 minimax_m3_vl olmoe jamba granitemoe granitemoeshared granitemoehybrid
    granitemoe_swa dbrx arctic grok-1 qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text qwen3_vl_moe
    qwen4_exp qwen4_exp_text mellum laguna deepseek deepseek_v2 deepseek_v3 kimi_k2 kimi_k25 deepseek_v32
    deepseek_v4 glm4_moe glm4_moe_lite glm_moe_dsa glm4v_moe dots1 dots3_note dots3_note_text solar_open
    mimo_v2_flash exaone_moe kimi_linear hy_v3 hy_v4 lfm2_moe afmoe nemotron_h step3p7 step3p5 gpt_oss llama4
    llama4_text gemma4 gemma4_text hunyuan_v1_moe hunyuan ernie4_5_moe cohere2_moe bailing_moe bailing_moe_v2 llama
    mistral ministral3 qwen2 qwen3 qwen3_5_text granite granite_swa olmo2 olmo3 phi3 gemma glm ernie4_5
    hunyuan_v1_dense cohere cohere2 seed_oss internlm3 iquestcoder smollm3 lfm2 youtu gemma2 gemma3_text
    """
)
MLX_TYPES = types(
    """
    mixtral minimax minimax_m3_vl phimoe olmoe jamba granitemoe granitemoehybrid dbrx qwen2_moe qwen3_moe qwen3_next
    qwen3_5_moe qwen3_vl_moe mellum laguna deepseek deepseek_v2 deepseek_v3 kimi_k2 kimi_k25 deepseek_v32 glm4_moe
    glm4_moe_lite glm_moe_dsa dots1 solar_open mimo_v2_flash mistral4 exaone_moe bailing_hybrid kimi_linear lfm2_moe
    afmoe nemotron_h step3p5 muse_spark gpt_oss llama4 gemma4 gemma4_text hunyuan ernie4_5_moe
    longcat_flash bailing_moe llama mistral ministral3 qwen2 qwen3 granite olmo2 olmo3 phi3 gemma glm ernie4_5
    helium hunyuan_v1_dense cohere cohere2 seed_oss internlm3 iquestcoder smollm3 lfm2 gemma2 gemma3_text
    """
)
