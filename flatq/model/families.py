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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from flatq.errors import UnsupportedModel
from flatq.model.decoder import DecoderConfig, LayerDims, Rope

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
    ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
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
        switches: fields of ``DecoderConfig``; a string is the key of config.json that sets it (False if absent).
        window: ``never``; ``always`` = ``sliding_window`` applies to every layer; ``by_layer`` = it applies from layer
            ``max_window_layers`` on, if ``use_sliding_window``.
        required: keys that have no safe default in this family; null is allowed.
        gguf: the architecture's name in GGUF files.
        gguf_permuted: GGUF stores rows of q and k with rotary pairs interleaved instead of in halves.
    """

    model_type: str
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
            {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
            window="never",
            gguf="llama",
            gguf_permuted=True,
        ),
        # llama.cpp's converter writes Mistral as architecture `llama`, without its window.
        Family(
            "mistral",
            {},
            window="always",
            gguf="llama",
            gguf_permuted=True,
            required=("num_key_value_heads", "sliding_window"),
        ),
        Family("qwen2", {"qkv_bias": True}, window="by_layer", gguf="qwen2", required=("num_key_value_heads",)),
        Family(
            "qwen3",
            {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "qk_norm": True},
            window="by_layer",
            gguf="qwen3",
            required=("num_key_value_heads", "head_dim"),
        ),
    )
}


class _HfKeys(BaseModel):
    """The keys of config.json that affect the computation; all others are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: Literal["silu"] = "silu"
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    quantization_config: None = None


class _LinearRope(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    factor: PositiveFloat


class _Llama3Rope(_LinearRope):
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


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


def config_from_hf(data: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Read a Hugging Face configuration, of transformers 4 or 5.

    Args:
        data: the parsed ``config.json``.
        where: name of the file in messages.

    Raises:
        UnsupportedModel: unsupported values or missing keys; lists all of them.
    """
    family = family_named(data.get("model_type"), where)
    problems = [
        f"{where}: {key} is missing; {family.model_type} needs it" for key in family.required if key not in data
    ]
    try:
        keys = _HfKeys.model_validate(dict(data))
    except ValidationError as invalid:
        raise UnsupportedModel("\n".join(problems + _explain(invalid, where))) from invalid
    rope = _rope(keys, where, problems)
    dims = _dims(keys, where, problems)
    window = _window(family, keys, where, problems)
    if problems or rope is None or dims is None:
        raise UnsupportedModel("\n".join(problems))
    switches = {
        name: decides if isinstance(decides, bool) else bool(getattr(keys, decides))
        for name, decides in family.switches.items()
    }
    return DecoderConfig(
        family=family.model_type,
        d_model=keys.hidden_size,
        vocab=keys.vocab_size,
        layers=(dims,) * keys.num_hidden_layers,
        rope=rope,
        norm_eps=keys.rms_norm_eps,
        tied_head=keys.tie_word_embeddings,
        max_positions=keys.max_position_embeddings,
        sliding_window=window,
        **switches,
    )


def _explain(invalid: ValidationError, where: str, prefix: str = "") -> list[str]:
    lines = []
    for error in invalid.errors():
        key = prefix + str(error["loc"][0])
        if error["type"] == "missing":
            lines.append(f"{where}: {key} is missing, and it has no default; download config.json again")
        elif key == "quantization_config":
            lines.append(f"{where}: the checkpoint is already quantized ({key}); give the model in full precision")
        else:
            lines.append(f"{where}: {key}: {error['input']!r} is not supported; {error['msg'].lower()}")
    return lines


def _rope(keys: _HfKeys, where: str, problems: list[str]) -> Rope | None:
    # transformers 4 has rope_theta beside rope_scaling, transformers 5 puts both into rope_parameters.
    section = "rope_scaling" if keys.rope_scaling else "rope_parameters"
    values = keys.rope_scaling or keys.rope_parameters or {}
    theta = values.get("rope_theta", keys.rope_theta)
    scaling = values.get("rope_type", values.get("type", "default"))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        problems.append(f"{where}: {section}.rope_theta: {theta!r} is not supported; a positive number is")
        return None
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"{where}: {section}.partial_rotary_factor: only 1.0 is supported (the whole head rotates)")
    try:
        if scaling == "default" and not any(isinstance(value, dict) for value in values.values()):
            return Rope(theta=float(theta))
        if scaling == "linear":
            return Rope(theta=float(theta), scaling="linear", factor=_LinearRope.model_validate(values).factor)
        if scaling == "llama3":
            llama3 = _Llama3Rope.model_validate(values)
            return Rope(
                theta=float(theta),
                scaling="llama3",
                factor=llama3.factor,
                low_freq_factor=llama3.low_freq_factor,
                high_freq_factor=llama3.high_freq_factor,
                original_max_positions=llama3.original_max_position_embeddings,
            )
    except ValidationError as invalid:
        problems.extend(_explain(invalid, where, f"{section}."))
        return None
    shown = repr(scaling) if scaling != "default" else "one rope per kind of layer"
    problems.append(f"{where}: {section}: {shown} is not supported; supported: default, linear, llama3")
    return None


def _dims(keys: _HfKeys, where: str, problems: list[str]) -> LayerDims | None:
    heads = keys.num_attention_heads
    kv_heads = keys.num_key_value_heads or heads
    head_dim = keys.head_dim or keys.hidden_size // heads
    before = len(problems)
    if heads % kv_heads:
        problems.append(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if keys.head_dim is None and keys.hidden_size % heads:
        problems.append(f"{where}: hidden_size {keys.hidden_size} is not a multiple of num_attention_heads {heads}")
    if head_dim % 2:
        problems.append(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even number")
    if len(problems) > before:
        return None
    return LayerDims(heads=heads, kv_heads=kv_heads, d_qk=head_dim, d_v=head_dim, d_ff=keys.intermediate_size)


def _window(family: Family, keys: _HfKeys, where: str, problems: list[str]) -> int | None:
    if family.window == "never":
        return None
    if family.window == "always":
        return keys.sliding_window
    if not keys.use_sliding_window or keys.sliding_window is None:
        return None
    if keys.layer_types is not None:
        windowed = {kind == "sliding_attention" for kind in keys.layer_types}
    elif keys.max_window_layers is None:
        problems.append(f"{where}: max_window_layers is missing; use_sliding_window needs it")
        return None
    else:
        windowed = {layer >= keys.max_window_layers for layer in range(keys.num_hidden_layers)}
    if len(windowed) > 1:
        problems.append(
            f"{where}: some layers have a sliding window and some do not (max_window_layers, layer_types); "
            "supported: all of them, or none (use_sliding_window: false)"
        )
    return keys.sliding_window if windowed == {True} else None
