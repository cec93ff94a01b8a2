"""Model families as rows of one table: their tensor names and configuration settings.

To add a family, add a row here and a case to ``tests/parity``; no model code is copied. All other settings are read
from the model's ``config.json``. A setting that flatq's decoder does not support is an error that names it, because a
wrong default would only show as slightly worse text.

Left out: mixture of experts, partial rotary embeddings, soft caps, windows that differ from layer to layer, and
rope scalings beyond ``linear`` and ``llama3``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from flatq.errors import UnsupportedModel

# (flatq, Hugging Face, GGUF)
ENDS = (
    ("embed", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
)
INSIDE = (
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("q", "self_attn.q_proj", "attn_q"),
    ("k", "self_attn.k_proj", "attn_k"),
    ("v", "self_attn.v_proj", "attn_v"),
    ("o", "self_attn.o_proj", "attn_output"),
    ("q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("attention_post_norm", "post_self_attn_layernorm", "post_attention_norm"),
    ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    ("mlp_post_norm", "post_mlp_layernorm", "post_ffw_norm"),
    ("gate", "mlp.gate_proj", "ffn_gate"),
    ("up", "mlp.up_proj", "ffn_up"),
    ("down", "mlp.down_proj", "ffn_down"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """Tensor names of a family; every row is (flatq, Hugging Face, GGUF)."""

    ends: tuple[tuple[str, str, str], ...] = ENDS
    inside: tuple[tuple[str, str, str], ...] = INSIDE

    def to_hf(self, name: str) -> str:
        """``layers.3.q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
        return self._translate(name, 0, 1)

    def from_hf(self, name: str) -> str | None:
        """Inverse of ``to_hf``; None for a tensor that flatq's decoder does not have."""
        return self._find(name, 1, 0)

    def to_gguf(self, name: str) -> str:
        """``layers.3.q.weight`` -> ``blk.3.attn_q.weight``."""
        return self._translate(name, 0, 2)

    def from_gguf(self, name: str) -> str | None:
        """Inverse of ``to_gguf``; None for a tensor that flatq's decoder does not have."""
        return self._find(name, 2, 0)

    def _translate(self, name: str, source: int, target: int) -> str:
        found = self._find(name, source, target)
        if found is None:
            raise KeyError(name)
        return found

    def _find(self, name: str, source: int, target: int) -> str | None:
        prefixes = ("layers.", "model.layers.", "blk.")
        stem, _, kind = name.rpartition(".")
        index = ""
        table = self.ends
        if stem.startswith(prefixes[source]):
            index, _, stem = stem.removeprefix(prefixes[source]).partition(".")
            table = self.inside
        row = next((row for row in table if row[source] == stem), None)
        if row is None or kind not in ("weight", "bias"):
            return None
        if table is self.ends:
            return f"{row[target]}.{kind}"
        return f"{prefixes[target]}{index}.{row[target]}.{kind}" if index.isdecimal() else None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    Attributes:
        architecture: name of the class in transformers.
        switches: fields of ``DecoderConfig``; a string is the key of config.json that sets it (False if absent).
        window: ``never``; ``always`` = ``sliding_window`` applies to every layer; ``by_layer`` = it applies from layer
            ``max_window_layers`` on, if ``use_sliding_window``.
        required: keys that have no safe default in this family; null is allowed.
        gguf: the architecture's name in GGUF files.
        gguf_permuted: GGUF stores rows of q and k with rotary pairs interleaved instead of in halves.
    """

    model_type: str
    architecture: str
    switches: Mapping[str, str | bool]
    window: Literal["never", "always", "by_layer"]
    gguf: str
    gguf_permuted: bool = False
    required: tuple[str, ...] = ()
    names: Names = field(default_factory=Names)


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
