"""Model families as rows of one table: their tensor names and configuration settings.

To add a family, add a row here and a case to ``tests/parity``; no model code is copied. All other settings are read
from the model's ``config.json``. A setting that flatq's decoder does not support is an error that names it, because a
wrong default would only show as slightly worse text.

Left out: mixtures of experts with dense layers or shared experts, and attention that is not a softmax over keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from flatq.errors import UnsupportedModel
from flatq.model.family import ACTIVATIONS, LONG_NORM_NAMES, POST_NORMED, Family, Names, fused, with_experts
from flatq.model.folds import (
    EMBEDDING_SCALE,
    MULTIPLIERS,
    ONE_PLUS,
    QUERY_NORM_SCALE,
    QUERY_SCALE,
    with_unit_stream,
)
from flatq.model.lacking import NEEDS

BIASES: Mapping[str, str | bool] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
GEMMA: Mapping[str, str | bool] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
SANDWICHED: Mapping[str, str | bool] = {
    **GEMMA,
    "post_norms": True,
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}
OLMO: Mapping[str, str | bool] = {
    **GEMMA,
    "qk_norm": True,
    "wide_qk_norm": True,
    "pre_norms": False,
    "post_norms": True,
}

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family(
            "llama",
            "LlamaForCausalLM",
            BIASES,
            window="never",
            gguf="llama",
            gguf_permuted=True,
        ),
        # llama.cpp's converter writes Mistral as architecture `llama`, without its window.
        Family(
            "mistral",
            "MistralForCausalLM",
            {},
            window="always",
            gguf="llama",
            gguf_permuted=True,
            required=("num_key_value_heads", "sliding_window"),
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {"qkv_bias": True},
            window="by_layer",
            gguf="qwen2",
            required=("num_key_value_heads",),
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True},
            window="by_layer",
            gguf="qwen3",
            required=("num_key_value_heads", "head_dim"),
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            BIASES,
            window="by_layer",
            skips_rope=True,
            gguf="smollm3",
            gguf_permuted=True,
            defaults={"rope_theta": 2e6, "tie_word_embeddings": True},
            required=("num_key_value_heads",),
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            GEMMA,
            window="never",
            activations={**ACTIVATIONS, "gelu": "gelu_tanh"},  # what "gelu" means in published configurations
            gguf="gemma",
            defaults={"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"},
            required=("num_key_value_heads", "head_dim"),
            folds=(ONE_PLUS, *EMBEDDING_SCALE),
            gguf_folds=EMBEDDING_SCALE,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            SANDWICHED,
            window="alternating",
            full_every=2,
            gguf="gemma2",
            names=Names(inside=POST_NORMED),
            defaults={
                "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh",
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            required=("num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window"),
            folds=(ONE_PLUS, *EMBEDDING_SCALE, QUERY_SCALE),
            gguf_folds=(*EMBEDDING_SCALE, QUERY_SCALE),
        ),
        # The caps of scores are in its configuration, but not in its attention.
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            {**GEMMA, "post_norms": True, "qk_norm": True, "logit_cap": "final_logit_softcapping"},
            window="alternating",
            full_every=6,
            local_theta="rope_local_base_freq",
            gguf="gemma3",
            names=Names(inside=POST_NORMED),
            defaults={
                "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh",
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "query_pre_attn_scalar": 256,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 262_208,
                "max_position_embeddings": 131_072,
                "rms_norm_eps": 1e-6,
                "sliding_window": 4096,
            },
            folds=(ONE_PLUS, *EMBEDDING_SCALE, QUERY_NORM_SCALE),
            knows=("attn_logit_softcapping",),
            gguf_folds=(*EMBEDDING_SCALE, QUERY_NORM_SCALE),
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            OLMO,
            window="never",
            gguf="olmo2",
            names=Names(inside=POST_NORMED),
            required=("num_key_value_heads",),
        ),
        Family(
            "olmo3",
            "Olmo3ForCausalLM",
            OLMO,
            window="alternating",
            full_every=4,
            local_theta="rope_theta",
            gguf="olmo2",
            names=Names(inside=POST_NORMED),
            defaults={"rope_theta": 5e5},
            required=("num_key_value_heads", "sliding_window"),
        ),
        Family(
            "ministral",
            "MinistralForCausalLM",
            {},
            window="always",
            gguf="llama",
            gguf_permuted=True,
            required=("num_key_value_heads", "sliding_window"),
        ),
        # Phi-3, 3.5, 4 and 4-mini.
        Family(
            "phi3",
            "Phi3ForCausalLM",
            {},
            window="always",
            names=Names(inside=fused("q", "k", "v", "gate", "up")),
            partial=True,
            plain=True,
            knows=("auto_map",),
        ),
        # Granite 3 and the dense models of Granite 4.
        Family(
            "granite",
            "GraniteForCausalLM",
            BIASES,
            folds=MULTIPLIERS,
            adjust=with_unit_stream,
            plain=True,
            defaults={"attention_multiplier": 1.0},
            knows=("embedding_multiplier", "residual_multiplier", "logits_scaling"),
        ),
        # GLM-4 9B of 2024; those of 2025 are glm4.
        Family(
            "glm",
            "GlmForCausalLM",
            {"qkv_bias": "attention_bias"},
            names=Names(inside=fused("gate", "up")),
            interleaved=True,
            partial=True,
            plain=True,
            defaults={"partial_rotary_factor": 0.5, "attention_bias": True},
            required=("num_key_value_heads", "head_dim"),
            knows=("auto_map",),
        ),
        Family(
            "glm4",
            "Glm4ForCausalLM",
            {"qkv_bias": "attention_bias", "post_norms": True},
            names=Names(inside=fused("gate", "up")),
            interleaved=True,
            partial=True,
            defaults={"partial_rotary_factor": 0.5, "attention_bias": True},
            required=("num_key_value_heads", "head_dim"),
        ),
        Family(
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            {"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias"},
            interleaved=True,
            plain=True,
            defaults={"rope_theta": 5e5, "tie_word_embeddings": True, "head_dim": 128},
            required=("num_key_value_heads",),
            knows=("auto_map",),
        ),
        Family(
            "helium",
            "HeliumForCausalLM",
            {"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
            interleaved=True,
            plain=True,
            defaults={"rope_theta": 1e5, "head_dim": 128},
            required=("num_key_value_heads",),
        ),
        Family(
            "seed_oss",
            "SeedOssForCausalLM",
            {"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
            plain=True,
            defaults={"attention_bias": True, "head_dim": 128},
            required=("num_key_value_heads",),
        ),
        Family(
            "internlm3",
            "InternLM3ForCausalLM",
            BIASES,
            plain=True,
            defaults={"head_dim": 128},
            required=("num_key_value_heads",),
            knows=("auto_map",),
        ),
        Family(
            "hunyuan_v1_dense",
            "HunYuanDenseV1ForCausalLM",
            {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True, "norm_after_rope": True},
            gguf="hunyuan-dense",
            names=Names(inside=LONG_NORM_NAMES),
            ntk_alpha=True,
            required=("num_key_value_heads", "head_dim"),
            knows=("use_qk_norm",),
        ),
        # Every layer has experts: dense layers between them are refused.
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {
                "qkv_bias": "attention_bias",
                "o_bias": "attention_bias",
                "qk_norm": True,
                "experts": "num_experts",
                "experts_per_token": "num_experts_per_tok",
                "normed_routing": "norm_topk_prob",
            },
            window="by_layer",
            names=Names(inside=with_experts("mlp", "gate_proj", "up_proj", "down_proj")),
            expert_width="moe_intermediate_size",
            required=("num_key_value_heads", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob"),
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            {"experts": "num_local_experts", "experts_per_token": "num_experts_per_tok", "normed_routing": True},
            window="always",
            names=Names(inside=with_experts("block_sparse_moe", "w1", "w3", "w2")),
            expert_width="intermediate_size",
            defaults={"rope_theta": 1e6},
            required=("num_key_value_heads", "num_experts_per_tok"),
        ),
        # Its queries grow with the position from the original context on, which is therefore the longest.
        Family(
            "ministral3",
            "Ministral3ForCausalLM",
            {},
            window="always",
            plain=True,
            defaults={"head_dim": 128},
            required=("num_key_value_heads", "rope_parameters"),
        ),
    )
}


def family_named(model_type: object, where: str = "config.json") -> Family:
    """The row of a ``model_type``.

    Raises:
        UnsupportedModel: says what flatq has not got for it, if that is known, and lists the supported families.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    lacking = NEEDS.get(str(model_type))
    reason = f": it needs {lacking}, which flatq does not have" if lacking else ""
    raise UnsupportedModel(
        f"{where}: model_type {model_type!r} is not supported{reason}; supported: {', '.join(FAMILIES)}. "
        "A new family is a row of flatq/model/families.py"
    )
