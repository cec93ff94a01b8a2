"""Model families as rows of one table: their tensor names and configuration settings.

To add a family, add a row here and a case to ``tests/parity``; no model code is copied. All other settings are read
from the model's ``config.json``. A setting that flatq's decoder does not support is an error that names it, because a
wrong default would only show as slightly worse text.

Left out: mixture of experts, partial rotary embeddings, and rope scalings beyond ``linear`` and ``llama3``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from flatq.errors import UnsupportedModel
from flatq.model.family import ACTIVATIONS, POST_NORMED, Family, Names
from flatq.model.folds import EMBEDDING_SCALE, ONE_PLUS, QUERY_NORM_SCALE, QUERY_SCALE

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
            {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
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
            {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
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
            {
                **GEMMA,
                "post_norms": True,
                "attention_cap": "attn_logit_softcapping",
                "logit_cap": "final_logit_softcapping",
            },
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
    )
}


def family_named(model_type: object, where: str = "config.json") -> Family:
    """The row of a ``model_type``.

    Raises:
        UnsupportedModel: lists the supported families and the closest name.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise UnsupportedModel(
        f"{where}: model_type {model_type!r} is not supported{hint}; supported: {', '.join(FAMILIES)}. "
        "A new family is a row of flatq/model/families.py"
    )
