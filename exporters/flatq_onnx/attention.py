"""Two implementations of attention in ONNX.

``Reduced`` uses standard operators: ScatterND writes new keys and values in place into a preallocated cache, and
Attention gets the whole cache as its keys and values, because Attention's own past would be copied for every token.
TensorScatter of opset 24 does the same, but warns for every token if the cache is not bound in place, and needs a newer
onnxruntime. Value heads, also in the cache, have the model's reduced width. When a token is decoded, each head is a
vector-matrix product; onnxruntime reads the cache without copies for a single row and a scale of 1 (so the scale is
applied in the rotary embedding), and otherwise copies it into panels. This makes it faster than GroupQueryAttention,
which copies once per query head. The caller allocates the caches and gives the positions of new tokens.

``Grouped`` is onnxruntime's GroupQueryAttention, with one head size for keys and values and the cache layout that other
programs expect. Value heads are padded to the key's width with zero rows in the packed projection (faster than a Pad
node), and a Slice removes the padding from the output. Padding the columns of o instead of using Slice was rejected: it
would read (d - r) / r more of o for every token, and the zero columns would break o's groups.

Left padding: ``Reduced``, and ``Grouped`` without fused rotary embedding, use the mask and the angles of ``Placement``,
which count valid tokens. GroupQueryAttention with fused rotary embedding computes a token's position from the number of
valid tokens in its row, which is correct only for right padding.

Axes: b batch, s new positions, t capacity of the cache (``Grouped``: all positions so far), h query heads, kv key/value
heads, g query heads per key head, d d_qk, r d_v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from flatq.export import DecoderConfig, LayerDims, Rope
from flatq_onnx.builder import INT8, INT32, INT64, MICROSOFT, Builder, Dims, ints
from flatq_onnx.linears import TOKENS, Linears, Part
from flatq_onnx.positions import Placement, length, numbered, place, span


class Attention(Protocol):
    """Builds the attention of a layer and defines the shape of its cache.

    Attributes:
        past: name of the position axis of the cache inputs.
        kept: data type of the cache; None is the graph's float type.
    """

    past: str
    kept: Any

    def cache(self, dims: LayerDims) -> tuple[Dims, Dims]:
        """Shapes of a layer's keys and values in the cache."""
        ...

    def mix(self, x: Any, index: int, past: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Normalized residual stream [b, s, m] -> (heads' output [b, s, h * r], present keys, present values)."""
        ...


class _Drawing:
    """Base class of both layouts."""

    kept: Any = None

    def __init__(self, builder: Builder, linears: Linears, config: DecoderConfig) -> None:
        self.builder, self.linears, self.config = builder, linears, config

    def reshaped(self, x: Any, name: str, sizes: Sequence[int], shape: Dims) -> Any:
        """Reshape of ``x``; 0 keeps a size, -1 is inferred."""
        return self.builder.op("Reshape", [x, self.builder.constant(f"shape.{name}", ints(*sizes))], shape)

    def split_heads(self, x: Any, heads: int, width: int) -> Any:
        """[b, s, heads * width] -> [b, s, heads, width]."""
        return self.reshaped(x, f"{heads}_{width}", (0, 0, heads, width), [*TOKENS, heads, width])

    def joined_heads(self, x: Any, heads: int, width: int) -> Any:
        """[b, s, heads, width] -> [b, s, heads * width]."""
        return self.reshaped(x, f"{heads * width}", (0, 0, heads * width), [*TOKENS, heads * width])

    def norm_heads(self, x: Any, name: str, heads: int, width: int) -> Any:
        """RMSNorm of each head, or of all together, [b, s, heads * width] -> the same."""
        whole: Dims = [*TOKENS, heads * width]
        if self.config.wide_qk_norm:
            return self.normed(x, name, heads * width, whole)
        split = self.normed(self.split_heads(x, heads, width), name, width, [*TOKENS, heads, width])
        return self.joined_heads(split, heads, width)

    def normed(self, x: Any, name: str, width: int, shape: Dims) -> Any:
        """RMSNorm over the last axis."""
        weight, epsilon = self.linears.vector(f"{name}.weight", width), self.config.norm_eps
        return self.builder.op("RMSNormalization", [x, weight], shape, axis=-1, epsilon=epsilon, stash_type=1)

    def normed_pair(self, query: Any, key: Any, index: int) -> tuple[Any, Any]:
        """Query and key after the head norms, if the family has them."""
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

    def rotated_pair(self, query: Any, key: Any, dims: LayerDims, at: Placement | None) -> tuple[Any, Any]:
        """Query and key after the rotary embedding, unless the layer has none or the attention node computes it."""
        if at is None or at.cos is None:
            return query, key
        return self.rotate(query, dims.heads, dims.d_qk, at), self.rotate(key, dims.kv_heads, dims.d_qk, at)

    @property
    def cap(self) -> dict[str, Any]:
        """The attribute of both attention nodes that caps scores, before the mask is added."""
        return {} if self.config.attention_cap is None else {"softcap": self.config.attention_cap}


class Reduced(_Drawing):
    """Attention over a cache that is written in place; the value cache is [b, kv, t, r]."""

    past = "capacity"

    def __init__(self, builder: Builder, linears: Linears, config: DecoderConfig, tokens: Any, valid: Any) -> None:
        super().__init__(builder, linears, config)
        self._first = builder.input("cache_position", ["batch_size"], INT64)
        sequence = builder.op(
            "Squeeze", [length(builder, tokens, 1), builder.constant("const.0", ints(0))], [], dtype=INT64
        )
        offsets = span(builder, sequence, "sequence")
        one = builder.constant("const.1", ints(1))
        first = builder.op("Unsqueeze", [self._first, one], ["batch_size", 1], dtype=INT64)
        self._slots = slots = builder.op("Add", [first, offsets], TOKENS, dtype=INT64)
        self._rows: dict[int, Any] = {}
        # Cosines and sines are scaled by d ** -0.25, so the product of queries and keys is scaled by d ** -0.5. Norms
        # that follow would undo that, see ``_rotated_first``.
        self._scale = 1.0 if config.norm_after_rope else config.layers[0].d_qk ** -0.25
        self._places = place(builder, config, valid, slots, self.past, scale=self._scale)

    def cache(self, dims: LayerDims) -> tuple[Dims, Dims]:
        """See ``Attention.cache``."""
        heads: Dims = ["batch_size", dims.kv_heads, self.past]
        return [*heads, dims.d_qk], [*heads, dims.d_v]

    def mix(self, x: Any, index: int, past: Sequence[Any]) -> tuple[Any, Any, Any]:
        """See ``Attention.mix``."""
        build, dims = self.builder, self.config.layers[index]
        pair, value = self._projected(x, index)
        counts = (dims.heads, dims.kv_heads)
        rows: list[Dims] = [["batch_size", count, "sequence", dims.d_qk] for count in counts]
        sizes = build.constant("split.{}_{}".format(*counts), ints(*counts))
        query, key = build.ops("Split", [self._turned(pair, sum(counts), dims.d_qk), sizes], rows, axis=1)
        keys, values = self._written(past, (key, self._turned(value, dims.kv_heads, dims.d_v)), dims)
        heads: Dims = ["batch_size", dims.heads, "sequence", dims.d_v]
        mask = self._places[self.config.number_of_kind(index)].mask
        mixed = build.op("Attention", [query, keys, values, mask], heads, scale=1.0, **self.cap)
        mixed = build.op("Transpose", [mixed], [*TOKENS, dims.heads, dims.d_v], perm=[0, 2, 1, 3])
        return self.joined_heads(mixed, dims.heads, dims.d_v), keys, values

    def _projected(self, x: Any, index: int) -> tuple[Any, Any]:
        """Rotated queries and keys [b, s, (h + kv) * d], values [b, s, kv * r]."""
        dims = self.config.layers[index]
        parts = [Part.of(self.config, index, linear) for linear in "qkv"]
        both = dims.heads + dims.kv_heads
        if self.linears.can_stack(parts) and not self.config.qk_norm:
            pair, value = self.linears.split(self.linears.stacked(x, parts), [both * dims.d_qk, parts[2].rows])
        else:
            query, key, value = self.linears.project(x, parts)
            if self.config.norm_after_rope:
                return self._rotated_first(query, key, index), value
            normed = self.normed_pair(query, key, index)
            pair = self.builder.op("Concat", [*normed], [*TOKENS, both * dims.d_qk], axis=-1)
        at = self._places[self.config.number_of_kind(index)]
        if at.cos is not None:
            return self.rotate(pair, both, dims.d_qk, at), value
        scale = self.builder.constant("rope.none", np.array(self._scale, self.builder.float_type.numpy()))
        return self.builder.op("Mul", [pair, scale], [*TOKENS, both * dims.d_qk]), value

    def _rotated_first(self, query: Any, key: Any, index: int) -> Any:
        """Rotated, then normed queries and keys, the queries scaled, [b, s, (h + kv) * d]."""
        dims, at = self.config.layers[index], self._places[self.config.number_of_kind(index)]
        query, key = self.normed_pair(*self.rotated_pair(query, key, dims, at), index)
        scale = self.builder.constant("queries.scale", np.array(dims.d_qk**-0.5, self.builder.float_type.numpy()))
        query = self.builder.op("Mul", [query, scale], [*TOKENS, dims.heads * dims.d_qk])
        both = dims.heads + dims.kv_heads
        return self.builder.op("Concat", [query, key], [*TOKENS, both * dims.d_qk], axis=-1)

    def _written(self, past: Sequence[Any], new: Sequence[Any], dims: LayerDims) -> list[Any]:
        """Caches with the new keys and values written to their positions."""
        rows = self._rows_of(dims.kv_heads)
        return [
            self.builder.op("ScatterND", [old, rows, part], shape)
            for old, part, shape in zip(past, new, self.cache(dims), strict=True)
        ]

    def _rows_of(self, heads: int) -> Any:
        """Row, head and position of each new key or value in the cache, int64 [b, heads, s, 3]; for all layers."""
        if heads in self._rows:
            return self._rows[heads]
        build, full = self.builder, ("batch_size", heads, "sequence")
        rows, new = (length(build, self._slots, axis) for axis in (0, 1))
        shape = build.op("Concat", [rows, build.constant(f"const.{heads}", ints(heads)), new], [3], dtype=INT64, axis=0)
        end = build.op("Squeeze", [rows, build.constant("const.0", ints(0))], [], dtype=INT64)
        column = build.constant("shape.column", ints(-1, 1, 1))
        row = build.op("Reshape", [span(build, end, "batch_size"), column], ["batch_size", 1, 1], dtype=INT64)
        head = build.constant(f"heads.{heads}", np.arange(heads, dtype=np.int64)[:, None])
        one, last = build.constant("const.1", ints(1)), build.constant("const.-1", ints(-1))
        slot = build.op("Unsqueeze", [self._slots, one], ["batch_size", 1, "sequence"], dtype=INT64)
        parts = []
        for part in (row, head, slot):
            wide = build.op("Expand", [part, shape], full, dtype=INT64)
            parts.append(build.op("Unsqueeze", [wide, last], [*full, 1], dtype=INT64))
        self._rows[heads] = build.op("Concat", parts, [*full, 3], dtype=INT64, axis=-1)
        return self._rows[heads]

    def _turned(self, x: Any, heads: int, width: int) -> Any:
        """[b, s, heads * width] -> [b, heads, s, width]."""
        split = self.split_heads(x, heads, width)
        return self.builder.op("Transpose", [split], ["batch_size", heads, "sequence", width], perm=[0, 2, 1, 3])


class Grouped(_Drawing):
    """onnxruntime's GroupQueryAttention; the value cache is [b, kv, t, d].

    Args:
        positions: rows of the rotary tables; None computes rotary embedding and mask outside of the node. A rotary
            embedding that norms follow is always outside.
    """

    past = "past"

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
        self._tokens = tokens
        total = length(builder, valid, 1)
        zero, one = (builder.constant(f"const.{value}", ints(value)) for value in (0, 1))
        end = builder.op("Squeeze", [total, zero], [], dtype=INT64)
        self._end, self._total = end, builder.op("Cast", [end], [], dtype=INT32, to=INT32)
        self._places: list[Placement] = []
        if positions is None or config.norm_after_rope:
            start = builder.op("Sub", [total, length(builder, tokens, 1)], [1], dtype=INT64)
            start = builder.op("Squeeze", [start, zero], [], dtype=INT64)
            shape = builder.op("Shape", [tokens], [2], dtype=INT64)
            slots = builder.op("Expand", [span(builder, end, "sequence", start), shape], TOKENS, dtype=INT64)
            self._places = place(builder, config, valid, slots, "total")
        if positions is None:  # the mask hides padding, so every row ends at the last position
            rows = length(builder, valid, 0)
            count = builder.op("Expand", [total, rows], ["batch_size"], dtype=INT64)
        else:
            count = builder.op("ReduceSum", [valid, one], ["batch_size"], dtype=INT64, keepdims=0)
        last = builder.op("Sub", [count, one], ["batch_size"], dtype=INT64)
        self._last = builder.op("Cast", [last], ["batch_size"], dtype=INT32, to=INT32)
        self._positions = positions

    def _tables(self, rope: Rope | None) -> list[Any]:
        """Cosines and sines for a node with fused rotary embedding, [positions, d / 2]."""
        positions, d_qk = self._positions, self.config.layers[0].d_qk
        if rope is None or positions is None or self._places:
            return [None, None]
        inverse = rope.inverse_frequencies(d_qk).numpy()

        def table(name: str, wave: Any) -> Any:
            return self.builder.weight(
                numbered(name, self.config, "rope", rope),
                (positions, d_qk // 2),
                lambda: wave(np.arange(positions, dtype=np.float32)[:, None] * inverse),
            )

        return [table("rope.cos", np.cos), table("rope.sin", np.sin)]

    def cache(self, dims: LayerDims) -> tuple[Dims, Dims]:
        """See ``Attention.cache``."""
        shape: Dims = ["batch_size", dims.kv_heads, self.past, dims.d_qk]
        return shape, shape

    def mix(self, x: Any, index: int, past: Sequence[Any]) -> tuple[Any, Any, Any]:
        """See ``Attention.mix``."""
        dims = self.config.layers[index]
        wide, keys, values = self._attended(self._projections(x, index), index, past)
        return self._narrow(wide, dims), keys, values

    def _attended(self, new: Sequence[Any], index: int, past: Sequence[Any]) -> Sequence[Any]:
        """Heads' output [b, s, h * d], present keys and values, from the node's inputs query, key and value."""
        return self._node(new, index, past)

    def _node(self, new: Sequence[Any], index: int, past: Sequence[Any], scales: Sequence[Any] = ()) -> Sequence[Any]:
        """One GroupQueryAttention; with ``scales`` of keys and values the cache is int8."""
        dims = self.config.layers[index]
        cache: Dims = ["batch_size", dims.kv_heads, "present", dims.d_qk]
        kind, at = self.config.kind(index), self._place(index)
        mask = at.mask if at is not None and self._positions is None else None
        tables = self._tables(kind.rope)
        # No position_ids, no head_sink.
        optional = [*tables, None, mask, None, *scales]
        kept, quantized = self.builder.float_type, dict[str, Any]()
        if scales:
            kept = INT8
            quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        outputs: Sequence[Any] = self.builder.ops(
            "GroupQueryAttention",
            [*new, *past, self._last, self._total, *optional],
            [[*TOKENS, dims.heads * dims.d_qk], cache, cache],
            dtype=[self.builder.float_type, kept, kept],
            domain=MICROSOFT,
            num_heads=dims.heads,
            kv_num_heads=dims.kv_heads,
            scale=dims.d_qk**-0.5,
            do_rotary=int(tables[0] is not None),
            rotary_interleaved=0,
            local_window_size=-1 if kind.window is None or mask is not None else kind.window,
            **self.cap,
            **quantized,
        )
        return outputs

    def _place(self, index: int) -> Placement | None:
        """Angles and mask of a layer; None if the node computes both."""
        return self._places[self.config.number_of_kind(index)] if self._places else None

    def _projections(self, x: Any, index: int) -> tuple[Any, Any, Any]:
        """Query, key, value; packed in the first one if they come from one node unchanged."""
        dims, at = self.config.layers[index], self._place(index)
        query_part, key_part, value_part = (Part.of(self.config, index, linear) for linear in "qkv")
        if dims.d_v < dims.d_qk:
            value_part = replace(value_part, rows=dims.kv_heads * dims.d_qk, heads=dims.kv_heads)
        parts = [query_part, key_part, value_part]
        turned = at is not None and at.cos is not None
        if not turned and not self.config.qk_norm and self.linears.can_stack(parts):
            return self.linears.stacked(x, parts), None, None
        query, key, value = self.linears.project(x, parts)
        if self.config.norm_after_rope:
            return *self.normed_pair(*self.rotated_pair(query, key, dims, at), index), value
        return *self.rotated_pair(*self.normed_pair(query, key, index), dims, at), value

    def _narrow(self, wide: Any, dims: LayerDims) -> Any:
        """Remove the padding of each head, [b, s, h * d] -> [b, s, h * r]."""
        if dims.d_v == dims.d_qk:
            return wide
        split = self.split_heads(wide, dims.heads, dims.d_qk)
        limits = [self.builder.constant(f"const.{value}", ints(value)) for value in (0, dims.d_v, 3)]
        kept = self.builder.op("Slice", [split, *limits], [*TOKENS, dims.heads, dims.d_v])
        return self.joined_heads(kept, dims.heads, dims.d_v)
