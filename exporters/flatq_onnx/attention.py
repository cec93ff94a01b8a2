"""Two ways to draw attention, for two kinds of program that will run it.

``Reduced`` is opset 23's Attention: its value heads may be narrower than its key heads, so a rank-reduced model
has a rank-reduced cache and the fewest operations, which tells in prompts. But every call copies the cache into a
new tensor, which tells in long contexts, and who runs it must make the cache's shapes from the graph's.

``Grouped`` is onnxruntime's GroupQueryAttention, with one head size for keys and values and a cache that is
updated in place. Value heads are filled up to the key's width with zero rows in the packed projection (a product
with a few more rows costs less than a Pad node and its copies), and a Slice drops the empty columns from the
output. Laying out o's columns to skip that Slice was left out: it would read (d - r) / r more of o for every
token, and the zero columns would break o's groups.

Left padding: ``Reduced``, and ``Grouped`` without its own rotary embedding, take the mask and the angles of
``Placement``, which count valid tokens. GroupQueryAttention with its own rotary embedding places a token by the
number of valid tokens in its row, which is right only if padding stands on the right.

Axes: b batch, s new positions, p past, t all positions, h query heads, kv key/value heads, d d_qk, r d_v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from flatq.decoder import DecoderConfig, LayerDims
from flatq_onnx.builder import BOOL, FLOAT, INT32, INT64, MICROSOFT, Builder, Dims, ints
from flatq_onnx.matmul import TOKENS, Linears, Part

BLOCKED = np.finfo(np.float32).min  # finite: a row that sees nothing must not become NaN


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the new tokens stand; drawn once, shared by all layers."""

    cos: Any  # float [b, s, d / 2]
    sin: Any
    mask: Any  # float [b, 1, s, t], 0 or BLOCKED


def place(builder: Builder, config: DecoderConfig, tokens: Any, valid: Any) -> Placement:
    """Rotary angles and mask from the attention mask.

    The angles are computed, not looked up: no tables, and no limit to the positions.
    """
    total = _length(builder, valid, "total")
    past = builder.op("Sub", [total, _length(builder, tokens, "sequence")], [1], dtype=INT64)
    axis = builder.constant("const.1", ints(1))
    count = builder.op("CumSum", [valid, axis], ["batch", "total"], dtype=INT64)
    index = builder.op("Sub", [count, axis], ["batch", "total"], dtype=INT64)
    index = builder.op("Max", [index, builder.constant("const.0", ints(0))], ["batch", "total"], dtype=INT64)
    index = builder.op("Slice", [index, past, total, axis], TOKENS, dtype=INT64)
    index = builder.op("Cast", [index], TOKENS, to=FLOAT)
    index = builder.op("Unsqueeze", [index, builder.constant("const.2", ints(2))], [*TOKENS, 1])
    half = config.layers[0].d_qk // 2
    inverse = config.rope.inverse_frequencies(config.layers[0].d_qk).numpy()
    angles = builder.op("Mul", [index, builder.constant("rope.inverse_frequencies", inverse)], [*TOKENS, half])
    cos, sin = (builder.op(kind, [angles], [*TOKENS, half]) for kind in ("Cos", "Sin"))
    return Placement(cos, sin, _mask(builder, config, past, total, valid))


def _mask(builder: Builder, config: DecoderConfig, past: Any, total: Any, valid: Any) -> Any:
    zero, one = builder.constant("const.0", ints(0)), builder.constant("const.1", ints(1))
    scalar_one = builder.constant("scalar.1", np.array(1, np.int64))
    start, end = (builder.op("Squeeze", [value, zero], [], dtype=INT64) for value in (past, total))
    query = builder.op("Range", [start, end, scalar_one], ["sequence"], dtype=INT64)
    query = builder.op("Unsqueeze", [query, one], ["sequence", 1], dtype=INT64)
    first = builder.constant("scalar.0", np.array(0, np.int64))
    key = builder.op("Range", [first, end, scalar_one], ["total"], dtype=INT64)
    grid: Dims = ["sequence", "total"]
    full: Dims = ["batch", 1, "sequence", "total"]
    seen = builder.op("LessOrEqual", [key, query], grid, dtype=BOOL)
    if config.sliding_window is not None:
        window = builder.constant("sliding_window", ints(config.sliding_window))
        oldest = builder.op("Sub", [query, window], ["sequence", 1], dtype=INT64)
        near = builder.op("Greater", [key, oldest], grid, dtype=BOOL)
        seen = builder.op("And", [seen, near], grid, dtype=BOOL)
    real = builder.op("Cast", [valid], ["batch", "total"], dtype=BOOL, to=BOOL)
    axes = builder.constant("const.1_2", ints(1, 2))
    real = builder.op("Unsqueeze", [real, axes], ["batch", 1, 1, "total"], dtype=BOOL)
    seen = builder.op("And", [seen, real], full, dtype=BOOL)
    itself = builder.op("Equal", [key, query], grid, dtype=BOOL)  # a padded row looks at itself
    seen = builder.op("Or", [seen, itself], full, dtype=BOOL)
    look = builder.constant("mask.seen", np.array(0, np.float32))
    blocked = builder.constant("mask.blocked", np.array(BLOCKED, np.float32))
    return builder.op("Where", [seen, look, blocked], full)


def _length(builder: Builder, value: Any, name: str) -> Any:
    """Size of the second axis, int64 [1]."""
    return builder.op("Shape", [value], [1], dtype=INT64, start=1, end=2)


class Attention(Protocol):
    """Draws the attention of a layer and knows the shape of its cache."""

    def value_width(self, dims: LayerDims) -> int:
        """Width of a value head in the cache."""
        ...

    def mix(self, x: Any, index: int, past: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Normed stream [b, s, m] -> (heads' output [b, s, h * r], present keys, present values)."""
        ...


class _Drawing:
    """What both layouts need."""

    def __init__(self, builder: Builder, linears: Linears, config: DecoderConfig) -> None:
        self.builder, self.linears, self.config = builder, linears, config

    def norm_heads(self, x: Any, name: str, heads: int, width: int) -> Any:
        """Norm of each head by itself, [b, s, heads * width] -> the same (Qwen3)."""
        build, epsilon = self.builder, self.config.norm_eps
        shape: Dims = [*TOKENS, heads, width]
        split = build.op("Reshape", [x, build.constant(f"shape.{heads}_{width}", ints(0, 0, heads, width))], shape)
        weight = self.linears.vector(f"{name}.weight", width)
        normed = build.op("RMSNormalization", [split, weight], shape, axis=-1, epsilon=epsilon, stash_type=1)
        joined = build.constant(f"shape.{heads * width}", ints(0, 0, heads * width))
        return build.op("Reshape", [normed, joined], [*TOKENS, heads * width])

    def normed_pair(self, query: Any, key: Any, index: int) -> tuple[Any, Any]:
        """Query and key behind the head norms, where the family has them."""
        if not self.config.qk_norm:
            return query, key
        dims = self.config.layers[index]
        return (
            self.norm_heads(query, f"layers.{index}.q_norm", dims.heads, dims.d_qk),
            self.norm_heads(key, f"layers.{index}.k_norm", dims.kv_heads, dims.d_qk),
        )

    def rotate(self, x: Any, heads: int, width: int, at: Placement) -> Any:
        """Rotary embedding, [b, s, heads * width] -> the same."""
        return self.builder.op(
            "RotaryEmbedding", [x, at.cos, at.sin], [*TOKENS, heads * width], interleaved=0, num_heads=heads
        )


class Reduced(_Drawing):
    """Opset 23's Attention; the value cache is [b, kv, t, r]."""

    def __init__(self, builder: Builder, linears: Linears, config: DecoderConfig, tokens: Any, valid: Any) -> None:
        super().__init__(builder, linears, config)
        self._at = place(builder, config, tokens, valid)

    def value_width(self, dims: LayerDims) -> int:
        """See ``Attention.value_width``."""
        return dims.d_v

    def mix(self, x: Any, index: int, past: Sequence[Any]) -> tuple[Any, Any, Any]:
        """See ``Attention.mix``."""
        dims = self.config.layers[index]
        parts = [Part.of(self.config, index, linear) for linear in "qkv"]
        query, key, value = self.linears.project(x, parts)
        query, key = self.normed_pair(query, key, index)
        query = self.rotate(query, dims.heads, dims.d_qk, self._at)
        key = self.rotate(key, dims.kv_heads, dims.d_qk, self._at)
        mixed, keys, values = self.builder.ops(
            "Attention",
            [query, key, value, self._at.mask, *past],
            [
                [*TOKENS, dims.heads * dims.d_v],
                ["batch", dims.kv_heads, "total", dims.d_qk],
                ["batch", dims.kv_heads, "total", dims.d_v],
            ],
            q_num_heads=dims.heads,
            kv_num_heads=dims.kv_heads,
            scale=dims.d_qk**-0.5,
        )
        return mixed, keys, values


class Grouped(_Drawing):
    """onnxruntime's GroupQueryAttention; the value cache is [b, kv, t, d].

    Args:
        positions: rows of the rotary tables; None leaves rotary embedding and mask outside of the node.
    """

    def __init__(
        self,
        builder: Builder,
        linears: Linears,
        config: DecoderConfig,
        tokens: Any,
        valid: Any,
        positions: int | None,
    ) -> None:
        super().__init__(builder, linears, config)
        self._at = place(builder, config, tokens, valid) if positions is None else None
        total = _length(builder, valid, "total")
        squeezed = builder.op("Squeeze", [total, builder.constant("const.0", ints(0))], [], dtype=INT64)
        self._total = builder.op("Cast", [squeezed], [], dtype=INT32, to=INT32)
        one = builder.constant("const.1", ints(1))
        if positions is None:  # the mask decides what is seen, so every row ends at the last position
            rows = builder.op("Shape", [valid], [1], dtype=INT64, start=0, end=1)
            count = builder.op("Expand", [total, rows], ["batch"], dtype=INT64)
        else:
            count = builder.op("ReduceSum", [valid, one], ["batch"], dtype=INT64, keepdims=0)
        last = builder.op("Sub", [count, one], ["batch"], dtype=INT64)
        self._last = builder.op("Cast", [last], ["batch"], dtype=INT32, to=INT32)
        self._tables = [] if positions is None else self._rotary_tables(positions)

    def _rotary_tables(self, positions: int) -> list[Any]:
        d_qk = self.config.layers[0].d_qk
        inverse = self.config.rope.inverse_frequencies(d_qk).numpy()
        shape = (positions, d_qk // 2)

        def table(name: str, wave: Any) -> Any:
            return self.builder.weight(
                name, shape, FLOAT, lambda: wave(np.arange(positions, dtype=np.float32)[:, None] * inverse)
            )

        return [table("rope.cos", np.cos), table("rope.sin", np.sin)]

    def value_width(self, dims: LayerDims) -> int:
        """See ``Attention.value_width``."""
        return dims.d_qk

    def mix(self, x: Any, index: int, past: Sequence[Any]) -> tuple[Any, Any, Any]:
        """See ``Attention.mix``."""
        dims = self.config.layers[index]
        query, key, value = self._projections(x, index)
        cache: Dims = ["batch", dims.kv_heads, "present", dims.d_qk]
        fused = self._at is None
        window = self.config.sliding_window if fused and self.config.sliding_window is not None else -1
        outside = [] if self._at is None else [None, None, None, self._at.mask]
        wide, keys, values = self.builder.ops(
            "GroupQueryAttention",
            [query, key, value, *past, self._last, self._total, *self._tables, *outside],
            [[*TOKENS, dims.heads * dims.d_qk], cache, cache],
            domain=MICROSOFT,
            num_heads=dims.heads,
            kv_num_heads=dims.kv_heads,
            scale=dims.d_qk**-0.5,
            do_rotary=int(fused),
            rotary_interleaved=0,
            local_window_size=window,
        )
        return self._narrow(wide, dims), keys, values

    def _projections(self, x: Any, index: int) -> tuple[Any, Any, Any]:
        """Query, key, value; all three in the first place where they come from one node as they are."""
        dims = self.config.layers[index]
        query_part, key_part, value_part = (Part.of(self.config, index, linear) for linear in "qkv")
        if dims.d_v < dims.d_qk:
            value_part = replace(value_part, rows=dims.kv_heads * dims.d_qk, heads=dims.kv_heads)
        parts = [query_part, key_part, value_part]
        if self._at is None and not self.config.qk_norm and self.linears.can_stack(parts):
            return self.linears.stacked(x, parts), None, None
        query, key, value = self.linears.project(x, parts)
        query, key = self.normed_pair(query, key, index)
        if self._at is not None:
            query = self.rotate(query, dims.heads, dims.d_qk, self._at)
            key = self.rotate(key, dims.kv_heads, dims.d_qk, self._at)
        return query, key, value

    def _narrow(self, wide: Any, dims: LayerDims) -> Any:
        """Drop the empty columns of each head, [b, s, h * d] -> [b, s, h * r]."""
        if dims.d_v == dims.d_qk:
            return wide
        build, heads = self.builder, dims.heads
        shape = build.constant(f"shape.{heads}_{dims.d_qk}", ints(0, 0, heads, dims.d_qk))
        split = build.op("Reshape", [wide, shape], [*TOKENS, heads, dims.d_qk])
        limits = [build.constant(f"const.{value}", ints(value)) for value in (0, dims.d_v, 3)]
        kept = build.op("Slice", [split, *limits], [*TOKENS, heads, dims.d_v])
        shape = build.constant(f"shape.{heads * dims.d_v}", ints(0, 0, heads * dims.d_v))
        return build.op("Reshape", [kept, shape], [*TOKENS, heads * dims.d_v])
