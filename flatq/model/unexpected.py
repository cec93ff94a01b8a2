"""Keys of a config.json that change what a model computes, but that only some families have.

transformers ignores a key that a model's class does not know, and so would flatq. But a checkpoint that states such a
key was made by somebody whose model needs it, so a row of the table has to name it, or the model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatq.model.family import Family

# Key -> values that change nothing.
CHANGING: Mapping[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "auto_map": (None, {}),
    "alibi": (None, False),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attention_sinks": (None, False),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1),
    "final_logit_softcapping": (None,),
    "kv_lora_rank": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "mup": (None, False),
    "no_rope_layer_interval": (None, 0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0, 1),
    "num_kv_shared_layers": (None, 0),
    "num_local_experts": (None, 0),
    "qk_layernorm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1),
    "rope_interleaved": (None, False),
    "shared_expert_intermediate_size": (None, 0),
    "use_qk_norm": (None, False),
    "use_sinks": (None, False),
}
NEVER = ("is_causal",)
EXPERT_COUNTS = ("num_experts", "num_local_experts")  # two names of one key


def unexpected_keys(family: Family, keys: Mapping[str, Any], where: str) -> list[str]:
    """One message for each key that changes the computation and that the family's row does not have."""
    known = {*family.knows, *family.required, *family.defaults}
    known |= {"no_rope_layers", "no_rope_layer_interval"} if family.skips_rope else set()
    known |= {decides for decides in family.switches.values() if isinstance(decides, str)}
    known |= set(EXPERT_COUNTS) if family.expert_width else set()
    found = []
    for key, harmless in CHANGING.items():
        value = keys.get(key)
        if value in harmless or (key in known and key not in NEVER):
            continue
        allowed = " or ".join(repr(one) for one in harmless if one is not None) or "leaving it out"
        found.append(
            f"{where}: {key}: {value!r} changes what the model computes, and flatq does not read it for "
            f"{family.model_type}; supported: {allowed}"
        )
    if family.window == "never" and set(keys.get("layer_types") or ()) - {"full_attention"}:
        found.append(
            f"{where}: layer_types names other layers than full_attention, and flatq reads no other for "
            f"{family.model_type}"
        )
    return found
