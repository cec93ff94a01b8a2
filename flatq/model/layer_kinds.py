"""Window and rotary embedding of every layer, from the keys of a config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from flatq.model.config import Kind
from flatq.model.family import Family
from flatq.model.rope import Rope

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]  # beyond that no tensor library counts
Count = Annotated[int, Field(gt=0, le=10_000)]
FULL, WINDOWED = "full_attention", "sliding_attention"


class KindKeys(BaseModel):
    """The keys of config.json that are read here."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    num_hidden_layers: Count
    sliding_window: PositiveInt | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    sliding_window_pattern: PositiveInt | None = None
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: PositiveInt | None = None


def windows_of(family: Family, keys: KindKeys, where: str, problems: list[str]) -> list[int | None]:
    """The window of each layer; None sees everything."""
    layers, window = range(keys.num_hidden_layers), keys.sliding_window
    everywhere: list[int | None] = [None for _ in layers]
    if family.window == "never" or window is None or (family.window == "by_layer" and not keys.use_sliding_window):
        return everywhere
    if keys.layer_types is not None:
        if len(keys.layer_types) != len(layers) or not {FULL, WINDOWED} >= set(keys.layer_types):
            problems.append(
                f"{where}: layer_types must name {FULL} or {WINDOWED} for each of the {len(layers)} layers; it has "
                f"{len(keys.layer_types)}: {', '.join(sorted(set(keys.layer_types)))}"
            )
            return everywhere
        return [window if kind == WINDOWED else None for kind in keys.layer_types]
    if family.window == "by_layer":
        if keys.max_window_layers is None:
            problems.append(f"{where}: max_window_layers is missing; use_sliding_window needs it")
            return everywhere
        return [window if index >= keys.max_window_layers else None for index in layers]
    period = keys.sliding_window_pattern or family.full_every
    return [None if family.window == "alternating" and (index + 1) % period == 0 else window for index in layers]


def rotated_layers(family: Family, keys: KindKeys, where: str, problems: list[str]) -> list[bool]:
    """Whether each layer has a rotary embedding."""
    layers = range(keys.num_hidden_layers)
    if not family.skips_rope:
        return [True for _ in layers]
    if keys.no_rope_layers is None:
        every = keys.no_rope_layer_interval or 4
        return [(index + 1) % every != 0 for index in layers]
    if len(keys.no_rope_layers) < len(layers) or not any(keys.no_rope_layers):
        problems.append(
            f"{where}: no_rope_layers must be 1 (with rope) or 0 for each of the {len(layers)} layers, and not 0 for "
            f"all; it is {keys.no_rope_layers}"
        )
        return [True for _ in layers]
    return [bool(flag) for flag in keys.no_rope_layers[: len(layers)]]


def distinct(kinds: Sequence[Kind]) -> dict[str, Any]:
    """Fields of ``DecoderConfig`` for one kind per layer: the first kind is rotated and, if there is one, full."""
    order = sorted(dict.fromkeys(kinds), key=lambda kind: (kind.rope is None, kind.window is not None))
    first = order[0]
    assert isinstance(first.rope, Rope), "some layer is rotated"
    fields: dict[str, Any] = {"rope": first.rope, "sliding_window": first.window}
    if len(order) > 1:
        fields |= {"other_kinds": tuple(order[1:]), "kind_of": tuple(order.index(kind) for kind in kinds)}
    return fields
