"""``config.json`` of Hugging Face: read into a ``DecoderConfig``, and written from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from flatq.errors import UnsupportedModel
from flatq.model.config import DecoderConfig, Kind
from flatq.model.dims import LayerDims
from flatq.model.families import family_named
from flatq.model.family import Family
from flatq.model.layer_kinds import FULL, WINDOWED, KindKeys, PositiveInt, distinct, rotated_layers, windows_of
from flatq.model.rope import Rope


class _HfKeys(KindKeys):
    """The keys of config.json that change what the model computes; all others are not looked at."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
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
    hidden_act: str = "silu"
    hidden_activation: str | None = None
    attn_logit_softcapping: PositiveFloat | None = None
    final_logit_softcapping: PositiveFloat | None = None
    query_pre_attn_scalar: PositiveFloat | None = None
    use_bidirectional_attention: Literal[False] | None = None
    rope_local_base_freq: PositiveFloat | None = None
    quantization_config: None = None


class _LinearRope(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    factor: PositiveFloat


class _Llama3Rope(_LinearRope):
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


def config_from_hf(data: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Read a Hugging Face configuration, of transformers 4 or 5.

    Args:
        data: the parsed ``config.json``.
        where: how to call it in messages.

    Raises:
        UnsupportedModel: a value that flatq's decoder cannot express, or a missing key; all of them at once.
    """
    family = family_named(data.get("model_type"), where)
    data = {**family.defaults, **data}
    problems = [
        f"{where}: {key} is missing; {family.model_type} needs it" for key in family.required if key not in data
    ]
    try:
        keys = _HfKeys.model_validate(dict(data))
    except ValidationError as invalid:
        raise UnsupportedModel("\n".join(problems + _explain(invalid, where))) from invalid
    kinds = _read_kinds(family, keys, where, problems)
    dims = _read_dims(keys, where, problems)
    activation = _read_activation(family, keys, where, problems)
    if problems or dims is None:
        raise UnsupportedModel("\n".join(problems))
    switches: dict[str, Any] = {
        name: getattr(keys, decides) if isinstance(decides, str) else decides
        for name, decides in family.switches.items()
    }
    return DecoderConfig(
        family=family.model_type,
        d_model=keys.hidden_size,
        vocab=keys.vocab_size,
        layers=(dims,) * keys.num_hidden_layers,
        norm_eps=keys.rms_norm_eps,
        tied_head=keys.tie_word_embeddings,
        max_positions=keys.max_position_embeddings,
        activation=activation,
        **distinct(kinds),
        **switches,
    )


def _explain(invalid: ValidationError, where: str, prefix: str = "") -> list[str]:
    lines = []
    for error in invalid.errors():
        key = prefix + str(error["loc"][0])
        if error["type"] == "missing":
            lines.append(f"{where}: {key} is missing; without it the model is not defined")
        elif key == "quantization_config":
            lines.append(f"{where}: the checkpoint is already quantized ({key}); give the model in full precision")
        else:
            lines.append(f"{where}: {key}: {error['input']!r} is not supported; {error['msg'].lower()}")
    return lines


def _read_rope(keys: _HfKeys, where: str, problems: list[str]) -> Rope | None:
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


def _read_dims(keys: _HfKeys, where: str, problems: list[str]) -> LayerDims | None:
    heads = keys.num_attention_heads
    kv_heads = keys.num_key_value_heads or heads
    head_dim = keys.head_dim or keys.hidden_size // heads
    before = len(problems)
    if heads % kv_heads:
        problems.append(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if keys.head_dim is None and keys.hidden_size % heads:
        problems.append(f"{where}: hidden_size {keys.hidden_size} is not a multiple of num_attention_heads {heads}")
    if head_dim % 2:
        problems.append(f"{where}: head_dim {head_dim} is odd; rotary embeddings turn pairs")
    if len(problems) > before:
        return None
    return LayerDims(heads=heads, kv_heads=kv_heads, d_qk=head_dim, d_v=head_dim, d_ff=keys.intermediate_size)


def _read_activation(family: Family, keys: _HfKeys, where: str, problems: list[str]) -> str:
    key = "hidden_activation" if keys.hidden_activation else "hidden_act"
    stated = keys.hidden_activation or keys.hidden_act
    if stated not in family.activations:
        problems.append(f"{where}: {key}: {stated!r} is not supported; supported: {', '.join(family.activations)}")
        return "silu"
    return family.activations[stated]


def _read_kinds(family: Family, keys: _HfKeys, where: str, problems: list[str]) -> list[Kind]:
    """One kind per layer; empty if a rope is not supported."""
    windows = windows_of(family, keys, where, problems)
    rotated = rotated_layers(family, keys, where, problems)
    ropes: dict[bool, Rope | None] = {}
    for windowed in dict.fromkeys(window is not None for window in windows):
        ropes[windowed] = _read_rope(_rope_keys(family, keys, windowed=windowed), where, problems)
    if None in ropes.values():
        return []
    return [
        Kind(ropes[window is not None] if turns else None, window)
        for window, turns in zip(windows, rotated, strict=True)
    ]


def _rope_keys(family: Family, keys: _HfKeys, *, windowed: bool) -> _HfKeys:
    """The keys with the rope of one kind of layer as if it were that of all."""
    given = keys.rope_parameters or {}
    if any(isinstance(value, dict) for value in given.values()):  # as transformers 5 writes it
        if family.local_theta is None:
            return keys  # refused by the reader
        return keys.model_copy(
            update={"rope_scaling": None, "rope_parameters": given.get(WINDOWED if windowed else FULL)}
        )
    if windowed and family.local_theta is not None:
        theta = getattr(keys, family.local_theta)
        return keys.model_copy(update={"rope_scaling": None, "rope_parameters": None, "rope_theta": theta})
    return keys


def config_to_hf(config: DecoderConfig, dims: LayerDims | None = None) -> dict[str, Any]:
    """``config.json`` of a plain checkpoint of the model's family, in the spelling of transformers 4 and 5.

    Args:
        config: of the model.
        dims: the widths that the file states for all layers. None takes the model's own, which must then be the same
            in all layers.

    Returns:
        Settings that ``config_from_hf`` reads back as the same model (with ``dims`` in every layer).

    Raises:
        UnsupportedModel: the family's configuration cannot express all of it.
    """
    stated = dims or config.layers[0]
    same = config.with_layers((stated,) * len(config.layers))
    family = family_named(config.family, "config_to_hf")
    if dims is None and same != config:
        raise UnsupportedModel(f"{config.family}: its config.json has one set of widths, this model's layers differ")
    if stated.d_v != stated.d_qk:
        raise UnsupportedModel(
            f"{config.family}: its config.json has one head size, this model d_qk {stated.d_qk} and d_v {stated.d_v}"
        )
    settings: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "hidden_size": config.d_model,
        "intermediate_size": stated.d_ff,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": stated.heads,
        "num_key_value_heads": stated.kv_heads,
        "head_dim": stated.d_qk,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": next(name for name, ours in family.activations.items() if ours == config.activation),
        "tie_word_embeddings": config.tied_head,
        **_written_rope(config.rope),
        **_written_kinds(family, config),
    }
    settings |= {key: getattr(config, name) for name, key in family.switches.items() if isinstance(key, str)}
    if family.folds or config_from_hf(settings) != same:
        raise UnsupportedModel(f"{config.family}: its config.json cannot describe this model")
    return settings


def _written_rope(rope: Rope) -> dict[str, Any]:
    # The spelling of transformers 4, which version 5 and every other reader understand.
    if rope.scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _written_kinds(family: Family, config: DecoderConfig) -> dict[str, Any]:
    windows = config.windows()
    window = next((window for window in windows if window is not None), None)
    written: dict[str, Any] = {}
    if family.window == "by_layer":
        written = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    elif family.window != "never":
        written = {"sliding_window": window}
    if len(set(windows)) > 1:
        written["layer_types"] = [FULL if window is None else WINDOWED for window in windows]
    if family.skips_rope:
        written["no_rope_layers"] = [int(config.kind(index).rope is not None) for index in range(len(windows))]
    return written
