"""Rotary angles and attention mask from token positions, computed once per kind of layer.

The angles are computed in the graph: there are no tables and no limit of positions. Both count the valid tokens of a
row, so padding may be on either side.

Axes: b batch, s new positions, t positions of the mask, d d_qk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flatq.export import DecoderConfig, Rope
from flatq_onnx.builder import BOOL, FLOAT, INT64, Builder, Dims, ints
from flatq_onnx.linears import TOKENS


@dataclass(frozen=True, slots=True)
class Placement:
    """Values of the graph for one kind of layer."""

    cos: Any  # float [b, s, d / 2]; None = no rotation
    sin: Any
    mask: Any  # float [b, 1, s, t], 0 or the lowest finite number, so that a fully masked row does not become NaN


def place(
    builder: Builder, config: DecoderConfig, valid: Any, slots: Any, axis_name: str, *, scale: float = 1.0
) -> list[Placement]:
    """Compute angles and mask for each of the kinds of layers.

    Args:
        valid: int64 [b, t], 1 for a token, 0 for padding.
        slots: position of each new token along t, int64 [b, s].
        axis_name: name of the axis t.
        scale: factor of the angles' cosines and sines.
    """
    index = _index(builder, valid, slots, axis_name)
    waves = {rope: _waves(builder, config, rope, index, scale) for rope in _distinct(config, "rope")}
    masks = {window: _mask(builder, window, valid, slots, axis_name) for window in _distinct(config, "window")}
    return [Placement(*waves[kind.rope], masks[kind.window]) for kind in config.kinds]


def _distinct(config: DecoderConfig, what: str) -> list[Any]:
    return list(dict.fromkeys(getattr(kind, what) for kind in config.kinds))


def numbered(name: str, config: DecoderConfig, what: str, value: Any) -> str:
    """Name of a tensor that the kinds of layers with one ``rope`` or ``window`` share."""
    number = _distinct(config, what).index(value)
    return f"{name}.{number}" if number else name


def _index(builder: Builder, valid: Any, slots: Any, axis_name: str) -> Any:
    """Number of valid tokens before each new token, float [b, s, 1]."""
    axis = builder.constant("const.1", ints(1))
    count = builder.op("CumSum", [valid, axis], ["batch_size", axis_name], dtype=INT64)
    index = builder.op("GatherElements", [count, slots], TOKENS, dtype=INT64, axis=1)
    index = builder.op("Sub", [index, axis], TOKENS, dtype=INT64)
    index = builder.op("Max", [index, builder.constant("const.0", ints(0))], TOKENS, dtype=INT64)
    index = builder.op("Cast", [index], TOKENS, dtype=FLOAT, to=FLOAT)
    return builder.op("Unsqueeze", [index, builder.constant("const.2", ints(2))], [*TOKENS, 1], dtype=FLOAT)


def _waves(builder: Builder, config: DecoderConfig, rope: Rope | None, index: Any, scale: float) -> tuple[Any, Any]:
    """Cosines and sines of the angles, float [b, s, d / 2]."""
    if rope is None:
        return None, None
    half: Dims = [*TOKENS, config.layers[0].d_qk // 2]
    inverse = rope.inverse_frequencies(config.layers[0].d_qk).numpy()
    name = numbered("rope.inverse_frequencies", config, "rope", rope)
    angles = builder.op("Mul", [index, builder.constant(name, inverse)], half, dtype=FLOAT)
    waves = [builder.op(kind, [angles], half, dtype=FLOAT) for kind in ("Cos", "Sin")]
    if scale != 1:
        factor = builder.constant("rope.scale", np.array(scale, np.float32))
        waves = [builder.op("Mul", [wave, factor], half, dtype=FLOAT) for wave in waves]
    if builder.float_type != FLOAT:
        waves = [builder.op("Cast", [wave], half, to=builder.float_type) for wave in waves]
    return waves[0], waves[1]


def _mask(builder: Builder, window: int | None, valid: Any, slots: Any, axis_name: str) -> Any:
    """A token attends to valid positions up to its own, and always to itself, so that padded rows stay finite."""
    one, two = builder.constant("const.1", ints(1)), builder.constant("const.2", ints(2))
    query = builder.op("Unsqueeze", [slots, two], [*TOKENS, 1], dtype=INT64)
    end = builder.op("Squeeze", [length(builder, valid, 1), builder.constant("const.0", ints(0))], [], dtype=INT64)
    key = span(builder, end, axis_name)
    full: Dims = [*TOKENS, axis_name]
    seen = builder.op("LessOrEqual", [key, query], full, dtype=BOOL)
    if window is not None:
        width = builder.constant(f"const.{window}", ints(window))
        oldest = builder.op("Sub", [query, width], [*TOKENS, 1], dtype=INT64)
        near = builder.op("Greater", [key, oldest], full, dtype=BOOL)
        seen = builder.op("And", [seen, near], full, dtype=BOOL)
    real = builder.op("Cast", [valid], ["batch_size", axis_name], dtype=BOOL, to=BOOL)
    real = builder.op("Unsqueeze", [real, one], ["batch_size", 1, axis_name], dtype=BOOL)
    seen = builder.op("And", [seen, real], full, dtype=BOOL)
    itself = builder.op("Equal", [key, query], full, dtype=BOOL)
    seen = builder.op("Or", [seen, itself], full, dtype=BOOL)
    number = builder.float_type.numpy()
    look = builder.constant("mask.seen", np.array(0, number))
    blocked = builder.constant("mask.blocked", np.array(np.finfo(number).min, number))
    mask = builder.op("Where", [seen, look, blocked], full)
    return builder.op("Unsqueeze", [mask, one], ["batch_size", 1, "sequence", axis_name])


def length(builder: Builder, value: Any, axis: int) -> Any:
    """Size of an axis, int64 [1]."""
    return builder.op("Shape", [value], [1], dtype=INT64, start=axis, end=axis + 1)


def span(builder: Builder, end: Any, axis: str, start: Any = None) -> Any:
    """``start`` (0) up to ``end``, int64 [end - start]."""
    zero, one = (builder.constant(f"scalar.{value}", np.array(value, np.int64)) for value in (0, 1))
    return builder.op("Range", [zero if start is None else start, end, one], [axis], dtype=INT64)
