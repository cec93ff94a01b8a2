"""``config.json`` of Hugging Face: read into a ``DecoderConfig``, and written from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, ValidationError

from flatq.errors import UnsupportedModel
from flatq.model.config import DecoderConfig, Kind
from flatq.model.dims import LayerDims
from flatq.model.families import family_named
from flatq.model.family import Family
from flatq.model.folds import Fold, rope_folds
from flatq.model.hf_rope import Read, Stated, read_rope, written_rope
from flatq.model.lacking import WRAPPERS
from flatq.model.layer_kinds import FULL, WINDOWED, KindKeys, PositiveInt, distinct, rotated_layers, windows_of
from flatq.model.rope import Rope
from flatq.model.unexpected import EXPERT_COUNTS, unexpected_keys

Multiplier = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # in the order in which they are tried


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
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    original_max_position_embeddings: PositiveInt | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    use_bias: bool = False
    hidden_act: str = "silu"
    hidden_activation: str | None = None
    attn_logit_softcapping: PositiveFloat | None = None
    final_logit_softcapping: PositiveFloat | None = None
    query_pre_attn_scalar: PositiveFloat | None = None
    use_bidirectional_attention: Literal[False] | None = None
    rope_local_base_freq: PositiveFloat | None = None
    embedding_multiplier: Multiplier = 1.0
    residual_multiplier: Multiplier = 1.0
    attention_multiplier: Multiplier = 1.0
    logits_scaling: Multiplier = 1.0
    quantization_config: None = None
    num_experts: Annotated[int, Field(ge=0, le=10_000)] | None = None
    num_local_experts: Annotated[int, Field(ge=0, le=10_000)] | None = None
    num_experts_per_tok: PositiveInt | None = None
    moe_intermediate_size: PositiveInt | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: Literal[1] | None = None
    mlp_only_layers: Annotated[list[int], Field(max_length=0)] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A model's configuration, and how its weights are read.

    Attributes:
        config: of the decoder that the weights are, once read.
        family: row of the checkpoint's own family, which ``config.family`` may differ from.
        folds: changes of the weights.
        keys: the ``config.json`` with the family's defaults.
    """

    config: DecoderConfig
    family: Family
    folds: tuple[Fold, ...]
    keys: Mapping[str, Any]


def config_from_hf(data: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """``read_hf(data, where).config``."""
    return read_hf(data, where).config


def read_hf(data: Mapping[str, Any], where: str = "config.json", context: int | None = None) -> Reading:
    """Read a Hugging Face configuration, of transformers 4 or 5.

    Args:
        data: the parsed ``config.json``.
        where: how to call it in messages.
        context: number of positions that the model shall be made for; None is the most, or the most for which a rope
            that changes with the length does not change.

    Raises:
        UnsupportedModel: a value that flatq's decoder cannot express, or a missing key; all of them at once.
    """
    data = text_part(data)
    family = family_named(data.get("model_type"), where)
    data = {**family.defaults, **(_with_both_counts(data) if family.expert_width else data)}
    problems = [
        f"{where}: {key} is missing; {family.model_type} needs it" for key in family.required if key not in data
    ]
    problems += unexpected_keys(family, data, where)
    try:
        keys = _HfKeys.model_validate(dict(data))
    except ValidationError as invalid:
        raise UnsupportedModel("\n".join(problems + _explain(invalid, where))) from invalid
    dims = _read_dims(family, keys, where, problems)
    seen = None if dims is None else _read_kinds(family, keys, dims.d_qk, context, where, problems)
    activation = _read_activation(family, keys, where, problems)
    if problems or dims is None or seen is None:
        raise UnsupportedModel("\n".join(problems))
    switches: dict[str, Any] = {
        name: getattr(keys, decides) if isinstance(decides, str) else decides
        for name, decides in family.switches.items()
    }
    config = DecoderConfig(
        family=family.model_type,
        d_model=keys.hidden_size,
        vocab=keys.vocab_size,
        layers=(dims,) * keys.num_hidden_layers,
        norm_eps=keys.rms_norm_eps,
        tied_head=keys.tie_word_embeddings,
        max_positions=seen.context,
        activation=activation,
        **distinct(seen.kinds),
        **switches,
    )
    config = config if family.adjust is None else family.adjust(config, data)
    folds = (*rope_folds(config, seen.factors, interleaved=family.interleaved), *family.folds)
    return Reading(replace(config, family=_plain(config)) if family.plain else config, family, folds, data)


def text_part(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model in a model with other parts; of others, all."""
    inside = data.get(WRAPPERS.get(str(data.get("model_type")), ""))
    if not isinstance(inside, Mapping):
        return data
    outside = ("tie_word_embeddings", "quantization_config")
    return {**inside, **{key: data[key] for key in outside if key in data}}


def _plain(config: DecoderConfig) -> str:
    """The first of the plain families whose config.json can state the folded model, but for its rope."""
    for name in PLAIN:
        with suppress(UnsupportedModel):
            config_to_hf(replace(config, family=name, rope=Rope()))
            return name
    return PLAIN[0]


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


def _with_both_counts(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The number of experts under both of its names, of which a file has one."""
    stated = [data[key] for key in EXPERT_COUNTS if data.get(key) is not None]
    return {**data, **dict.fromkeys(EXPERT_COUNTS, stated[0])} if len(stated) == 1 else data


def _read_dims(family: Family, keys: _HfKeys, where: str, problems: list[str]) -> LayerDims | None:
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
    width = keys.intermediate_size
    if family.expert_width:
        width = _read_experts(family, keys, where, problems)
    if len(problems) > before:
        return None
    return LayerDims(heads=heads, kv_heads=kv_heads, d_qk=head_dim, d_v=head_dim, d_ff=width)


def _read_experts(family: Family, keys: _HfKeys, where: str, problems: list[str]) -> int:
    """MLP width of all experts together."""
    counts, active = {keys.num_experts, keys.num_local_experts} - {None}, keys.num_experts_per_tok
    experts = max((count for count in counts if count is not None), default=0)
    width = getattr(keys, family.expert_width)
    if len(counts) != 1 or experts < 2:
        problems.append(
            f"{where}: num_experts {keys.num_experts}, num_local_experts {keys.num_local_experts}: expected one number "
            "of experts, 2 or more"
        )
    elif active is None or active > experts:
        problems.append(f"{where}: num_experts_per_tok {active}: expected 1 to {experts}, the number of experts")
    if width is None:
        problems.append(f"{where}: {family.expert_width} is null; expected the MLP width of an expert")
    return experts * (width or 0)


def _read_activation(family: Family, keys: _HfKeys, where: str, problems: list[str]) -> str:
    key = "hidden_activation" if keys.hidden_activation else "hidden_act"
    stated = keys.hidden_activation or keys.hidden_act
    if stated not in family.activations:
        problems.append(f"{where}: {key}: {stated!r} is not supported; supported: {', '.join(family.activations)}")
        return "silu"
    return family.activations[stated]


@dataclass(frozen=True, slots=True)
class _Seen:
    """Kind and factor of the scores of each layer, and the context for which they hold."""

    kinds: list[Kind]
    factors: list[float]
    context: int


def _read_kinds(
    family: Family, keys: _HfKeys, d_qk: int, context: int | None, where: str, problems: list[str]
) -> _Seen | None:
    """None if a rope is not supported."""
    windows = windows_of(family, keys, where, problems)
    rotated = rotated_layers(family, keys, where, problems)
    ropes: dict[bool, Read] = {}
    for windowed in dict.fromkeys(window is not None for window in windows):
        stated = _stated_rope(family, keys, d_qk, context, where, problems, windowed=windowed)
        if (read := read_rope(stated, problems, where)) is None:
            return None
        ropes[windowed] = read
    layers = list(zip(windows, rotated, strict=True))
    return _Seen(
        [Kind(ropes[window is not None].rope if turns else None, window) for window, turns in layers],
        [ropes[window is not None].factor if turns else 1.0 for window, turns in layers],
        _context(keys, context, [read.limit for read in ropes.values()], where, problems),
    )


def _context(keys: _HfKeys, context: int | None, limits: Sequence[int | None], where: str, problems: list[str]) -> int:
    most = keys.max_position_embeddings
    limit = min([most, *(limit for limit in limits if limit is not None)])
    if context is not None and context > limit:
        problems.append(
            f"{where}: model.context_length: {context} is beyond the {limit} positions for which flatq can read this "
            f"model (it has {most}); lower it"
        )
    return context or limit


def _stated_rope(
    family: Family, keys: _HfKeys, d_qk: int, context: int | None, where: str, problems: list[str], *, windowed: bool
) -> Stated:
    """What the configuration states about the rope of one kind of layer."""
    section = "rope_scaling" if keys.rope_scaling else "rope_parameters"
    values, theta = keys.rope_scaling or keys.rope_parameters or {}, keys.rope_theta
    if family.local_theta is not None:
        if any(isinstance(value, dict) for value in values.values()):  # as transformers 5 writes it
            values = values.get(WINDOWED if windowed else FULL) or {}
        elif windowed:
            values, theta = {}, getattr(keys, family.local_theta)
    rotated = values.get("partial_rotary_factor", keys.partial_rotary_factor) or 1.0
    if rotated != 1.0 and not family.partial:
        problems.append(f"{where}: partial_rotary_factor {rotated}: {family.model_type} rotates the whole head")
    return Stated(
        section,
        values,
        theta,
        float(rotated),
        d_qk,
        keys.max_position_embeddings,
        keys.original_max_position_embeddings,
        context,
        family.ntk_alpha,
    )


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
        "intermediate_size": (each := stated.d_ff // config.mlp_parts),
        **({family.expert_width: each} if family.expert_width else {}),
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": stated.heads,
        "num_key_value_heads": stated.kv_heads,
        "head_dim": stated.d_qk,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": next((name for name, ours in family.activations.items() if ours == config.activation), ""),
        "tie_word_embeddings": config.tied_head,
        **written_rope(config.rope),
        **_written_kinds(family, config),
    }
    settings |= {key: getattr(config, name) for name, key in family.switches.items() if isinstance(key, str)}
    if family.folds or family.interleaved or not settings["hidden_act"] or config_from_hf(settings) != same:
        raise UnsupportedModel(f"{config.family}: its config.json cannot describe this model")
    return settings


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
