"""What known kinds of models need that the decoder does not have, and models of which only the text part is read."""

from __future__ import annotations

from collections.abc import Mapping

EXPERTS = "a mixture of experts of another kind than that of qwen3_moe and mixtral"
LINEAR = "layers of linear attention or a state space"
PARALLEL = "attention and MLP side by side, with LayerNorm"
LATENT = "keys and values from a latent vector (MLA)"
UNGATED = "an MLP without a gate"
ENCODER = "an encoder"

# model_type -> what it needs. It only makes messages better: any type that is no row of the table is refused.
NEEDS: Mapping[str, str] = {
    "apertus": f"{UNGATED} and the activation xIELU",
    "arcee": f"{UNGATED} and the activation relu2",
    "bert": ENCODER,
    "bitnet": "norms inside attention and MLP, and ternary weights",
    "bloom": "ALiBi, LayerNorm and an MLP without a gate",
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "deepseek_v2": f"{LATENT} and {EXPERTS}",
    "deepseek_v3": f"{LATENT} and {EXPERTS}",
    "exaone4": "norms after attention and MLP only, with norms of queries and keys per head",
    "falcon": PARALLEL,
    "falcon_h1": LINEAR,
    "gemma3n_text": "embeddings per layer, and sparse activations",
    "gemma4_text": "embeddings per layer, keys and values shared by layers, and norms of values",
    "glm4_moe": EXPERTS,
    "gpt2": "learned positions, LayerNorm and an MLP without a gate",
    "gpt_neox": PARALLEL,
    "gpt_oss": f"{EXPERTS} and attention sinks",
    "granitemoe": EXPERTS,
    "granitemoehybrid": f"{EXPERTS} and {LINEAR}",
    "lfm2": "convolutions instead of attention in most layers",
    "lfm3": "convolutions instead of attention in most layers",
    "llama4_text": EXPERTS,
    "mamba": LINEAR,
    "mamba2": LINEAR,
    "minicpm3": LATENT,
    "nanochat": f"{UNGATED} and norms without gains",
    "nemotron": f"LayerNorm and {UNGATED}",
    "nemotron_h": LINEAR,
    "olmo": "norms without gains",
    "olmoe": EXPERTS,
    "phi": PARALLEL,
    "phimoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_5_text": f"{LINEAR} in three of four layers, and gates of attention's output",
    "qwen3_next": f"{LINEAR} and {EXPERTS}",
    "stablelm": "LayerNorm",
    "starcoder2": f"LayerNorm and {UNGATED}",
    "t5": ENCODER,
    "whisper": ENCODER,
}
# Models with other parts, such as vision: the type of which the text part is a family, and the key of its settings.
WRAPPERS: Mapping[str, str] = {"mistral3": "text_config", "gemma3": "text_config"}
