"""The rotary embedding in a Hugging Face config.json: read into a ``Rope`` and a factor, and written from a ``Rope``.

transformers 4 has ``rope_theta`` beside ``rope_scaling``, transformers 5 puts both into ``rope_parameters``.

Rules that change with the length of the text are read for one context length. ``longrope`` has two sets of factors, one
up to the original context and one beyond; ``dynamic`` is the plain rule up to the original context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from flatq.model.rope import Rope

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
SCALED_QUERIES = "llama_4_scaling_beta"  # queries grow with the position, from the original context on


class _Keys(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class _Linear(_Keys):
    factor: PositiveFloat


class _NtkAlpha(_Keys):
    alpha: PositiveFloat | None = None


class _Llama3(_Linear):
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt


class _Yarn(_Keys):
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt
    attention_factor: PositiveFloat | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    truncate: bool = True


class _LongRope(_Keys):
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveInt
    attention_factor: PositiveFloat | None = None
    short_factor: list[PositiveFloat]
    long_factor: list[PositiveFloat]


@dataclass(frozen=True, slots=True)
class Stated:
    """What a configuration states beside its rope section.

    Attributes:
        section: name of the rope section, for messages.
        values: the section.
        theta: ``rope_theta`` beside it.
        rotated: ``partial_rotary_factor`` beside it; 1 for families that rotate the whole head.
        d_qk: channels of a head.
        max_positions: ``max_position_embeddings``.
        original: ``original_max_position_embeddings`` beside the section.
        context: the context length that is asked for; None is the longest for which nothing changes.
        ntk_alpha: see ``Family``.
    """

    section: str
    values: Mapping[str, Any]
    theta: float
    rotated: float
    d_qk: int
    max_positions: int
    original: int | None = None
    context: int | None = None
    ntk_alpha: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """A rope, and what goes with it.

    Attributes:
        factor: of queries times keys, beyond the rotation; folded into the weights.
        limit: the longest context for which ``rope`` and ``factor`` hold; None is all that the model has.
    """

    rope: Rope
    factor: float = 1.0
    limit: int | None = None


@dataclass(slots=True)
class _Failed(Exception):
    messages: list[str] = field(default_factory=list)


def read_rope(stated: Stated, problems: list[str], where: str) -> Read | None:
    """The rope of a section; None after adding to ``problems``."""
    section, values = stated.section, stated.values
    theta = values.get("rope_theta", stated.theta)
    scaling = values.get("rope_type", values.get("type", "default"))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        problems.append(f"{where}: {section}.rope_theta: {theta!r} is not supported; a positive number is")
        return None
    if any(isinstance(value, dict) for value in values.values()):
        problems.append(f"{where}: {section}: one rope per kind of layer is not supported for this family")
        return None
    if not isinstance(scaling, str) or scaling not in RULES:
        allowed = ", ".join(rule for rule in RULES if rule != "su")
        problems.append(f"{where}: {section}: {scaling!r} is not supported; supported: {allowed}")
        return None
    plain = Rope(theta=float(theta), rotated=stated.rotated)
    if plain.width(stated.d_qk) % 2 or not plain.width(stated.d_qk):
        problems.append(f"{where}: partial_rotary_factor {stated.rotated} of {stated.d_qk} channels is no even number")
        return None
    try:
        found: Read = RULES[scaling](plain, _completed(stated), stated)
    except ValidationError as invalid:
        problems.extend(
            f"{where}: {section}.{error['loc'][0]} is missing; without it the model is not defined"
            if error["type"] == "missing"
            else f"{where}: {section}.{error['loc'][0]}: {error['input']!r} is not supported; {error['msg'].lower()}"
            for error in invalid.errors()
        )
        return None
    except _Failed as failed:
        problems.extend(f"{where}: {section}: {message}" for message in failed.messages)
        return None
    return _with_scaled_queries(found, stated)


def _completed(stated: Stated) -> dict[str, Any]:
    """The section with the original context where transformers looks for it."""
    values = dict(stated.values)
    if stated.original is not None:
        values["original_max_position_embeddings"] = stated.original
    elif values.get("rope_type", values.get("type")) in ("yarn", "longrope", "su"):
        values.setdefault("original_max_position_embeddings", stated.max_positions)
    return values


def _default(rope: Rope, values: Mapping[str, Any], stated: Stated) -> Read:
    return Read(rope)


def _dynamic(rope: Rope, values: Mapping[str, Any], stated: Stated) -> Read:
    alpha = _NtkAlpha.model_validate(values).alpha if stated.ntk_alpha else None
    if alpha is not None:
        return Read(replace(rope, theta=rope.theta * alpha ** (stated.d_qk / (stated.d_qk - 2))))
    _Linear.model_validate(values)
    return Read(rope, limit=stated.max_positions)


def _linear(rope: Rope, values: Mapping[str, Any], stated: Stated) -> Read:
    return Read(replace(rope, scaling="linear", factor=_Linear.model_validate(values).factor))


def _llama3(rope: Rope, values: Mapping[str, Any], stated: Stated) -> Read:
    keys = _Llama3.model_validate(values)
    return Read(
        replace(
            rope,
            scaling="llama3",
            factor=keys.factor,
            low_freq_factor=keys.low_freq_factor,
            high_freq_factor=keys.high_freq_factor,
            original_max_positions=keys.original_max_position_embeddings,
        )
    )


def _yarn(rope: Rope, values: Mapping[str, Any], stated: Stated) -> Read:
    keys = _Yarn.model_validate(values)
    factor = keys.factor or stated.max_positions / keys.original_max_position_embeddings
    scale = keys.attention_factor
    if scale is None and keys.mscale and keys.mscale_all_dim:
        scale = _mscale(factor, keys.mscale) / _mscale(factor, keys.mscale_all_dim)
    if scale is None:
        scale = _mscale(factor)
    scaled = replace(
        rope,
        scaling="yarn",
        factor=factor,
        original_max_positions=keys.original_max_position_embeddings,
        beta_fast=keys.beta_fast or 32.0,
        beta_slow=keys.beta_slow or 1.0,
        truncate=keys.truncate,
    )
    return Read(scaled, scale**2)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(rope: Rope, values: Mapping[str, Any], stated: Stated) -> Read:
    keys = _LongRope.model_validate(values)
    original = keys.original_max_position_embeddings
    factor = keys.factor or stated.max_positions / original
    scale = keys.attention_factor
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    pairs = rope.width(stated.d_qk) // 2
    lengths = {len(keys.short_factor), len(keys.long_factor)}
    if lengths != {pairs}:
        raise _Failed([f"short_factor and long_factor have {sorted(lengths)} numbers, the head has {pairs} pairs"])
    longer = stated.context is not None and stated.context > original
    context = (stated.context or stated.max_positions) if longer else original
    divisors = tuple(keys.long_factor if longer else keys.short_factor)
    scaled = replace(rope, scaling="longrope", divisors=divisors, original_max_positions=context)
    return Read(scaled, scale**2, limit=None if longer else original)


def _with_scaled_queries(found: Read, stated: Stated) -> Read:
    original = _completed(stated).get("original_max_position_embeddings")
    if not stated.values.get(SCALED_QUERIES) or original is None:
        return found
    return Read(found.rope, found.factor, min(found.limit or original, original))


RULES = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its older name
    "dynamic": _dynamic,
}


def written_rope(rope: Rope) -> dict[str, Any]:
    """The keys of a config.json, in the spelling of transformers 4, which version 5 and every other reader understand.

    ``attention_factor`` is 1, because the factor is part of the weights.
    """
    if rope.scaling is None:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    original = {"original_max_position_embeddings": rope.original_max_positions}
    scaling: dict[str, Any] = {"rope_type": rope.scaling}
    if rope.scaling == "longrope":
        factors = list(rope.divisors)
        scaling |= {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0, **original}
        return {"rope_theta": rope.theta, "rope_scaling": scaling}
    scaling["factor"] = rope.factor
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor, **original}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        scaling |= {"attention_factor": 1.0, **original}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
