"""Attention with an int8 KV cache: a quarter of the memory, and a quarter of the bytes read per decoded token.

onnxruntime's GroupQueryAttention quantizes keys and values to int8, with a scale per channel and head, when it writes
them, and computes with the quantized values. This is fast for decoding, but several times slower than float for a
prompt, because the cache is dequantized for every query. So a prompt without a past (of more than one token) uses
another branch: attention on the unquantized keys and values of the prompt, which are then quantized into the cache.
Both branches round in the same way, so the cache is the same.

There is a branch in every layer, which takes some microseconds per layer and token. A single branch around the whole
decoder was about 4 % faster but made onnxruntime load every weight twice (docs/decisions/0030).

In the cache, value heads are as wide as keys; padded columns are zeros, a byte each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flatq_onnx.attention import Grouped
from flatq_onnx.builder import BOOL, INT8, INT64, Dims, ints
from flatq_onnx.positions import length

LARGEST = 127
HEADROOM = 1.1  # factor on the calibrated range, for larger values in other texts (docs/decisions/0023)


class QuantizedGrouped(Grouped):
    """GroupQueryAttention over int8 caches [b, kv, t, d].

    Args:
        parts: positional arguments of ``Grouped``.
        ranges: see ``flatq.calibration.cache_ranges``.
        settings: keyword arguments of ``Grouped``.
    """

    kept = INT8

    def __init__(self, *parts: Any, ranges: Mapping[str, Tensor], **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self._ranges = ranges
        self._new = length(self.builder, self._tokens, 1)
        new = self.builder.op("Squeeze", [self._new, self.builder.constant("const.0", ints(0))], [], dtype=INT64)
        several = self.builder.op("Greater", [new, self.builder.constant("scalar.1", np.array(1))], [], dtype=BOOL)
        whole = self.builder.op("Equal", [new, self._end], [], dtype=BOOL)
        self._prompt = self.builder.op("And", [several, whole], [], dtype=BOOL)

    def _attended(self, new: Sequence[Any], index: int, past: Sequence[Any]) -> Sequence[Any]:
        """See ``Grouped``."""
        dims = self.config.layers[index]
        scales = [self._scale(f"layers.{index}.{part}", dims.kv_heads, dims.d_qk) for part in ("key", "value")]

        def prompt() -> Sequence[Any]:
            mixed, *written = self._node(new, index, [None, None])
            return [mixed, *(self._rounded(*each) for each in zip(written, scales, past, strict=True))]

        def token() -> Sequence[Any]:
            return self._node(new, index, past, scales)

        outputs: Sequence[Any] = self.builder.either(self._prompt, prompt, token)
        return outputs

    def _scale(self, name: str, heads: int, width: int) -> Any:
        """Quantization scale per channel, float32 [1, kv, 1, d]; 1 for channels that are always zero."""

        def scale() -> NDArray[Any]:
            known = self._ranges[name].numpy()
            scales = np.ones((heads, width), np.float32)
            scales[:, : known.shape[1]] = np.where(known > 0, known * HEADROOM / LARGEST, 1)
            return scales[None, :, None]

        return self.builder.weight(f"{name}.scale", (1, heads, 1, width), scale)

    def _rounded(self, written: Any, scale: Any, past: Any) -> Any:
        """Codes of a prompt's keys or values [b, kv, s, d], followed by the rest of the past buffer.

        The past is empty if the caller wants a new cache; it is a preallocated buffer if past and present share one.
        """
        build, shape = self.builder, list(written.shape)
        steps = build.op("Div", [written, scale], shape)
        unit = build.constant("cache.unit", np.array(1, np.float32)), build.constant("cache.zero", np.array(0, np.int8))
        codes = build.op("QuantizeLinear", [steps, *unit], shape, dtype=INT8)
        behind: Dims = [*shape[:2], "behind", shape[3]]
        ends = [self._new, build.constant("const.end", ints(2**62)), build.constant("const.2", ints(2))]
        rest = build.op("Slice", [past, *ends], behind, dtype=INT8)
        return build.op("Concat", [codes, rest], [*shape[:2], "present", shape[3]], dtype=INT8, axis=2)
