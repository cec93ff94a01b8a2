"""Attention over a cache of int8: a quarter of the memory, and of what a long context makes each token read.

onnxruntime's GroupQueryAttention rounds keys and values to int8, with a scale for each channel of each head, as it
writes them, and computes with what it has written. For a token that is fast. For a prompt it is slow, several times
as slow as with floats, because it decodes the cache anew for every query. So a prompt without a past (of more than one
token) takes another branch: attention among its own tokens as they are, unrounded, whose keys and values are then
rounded into the cache. Both branches round alike, so the cache is the same.

The branch is in every layer, which costs a token some microseconds each. One branch around the whole decoder was
about 4 % faster and made onnxruntime hold every weight twice (docs/decisions/0030).

Value heads are as wide as the keys' in the cache; their empty columns are zeros, a byte each.
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
HEADROOM = 1.1  # over what calibration saw: costs nothing on average, and other texts go further (docs/decisions/0023)


class QuantizedGrouped(Grouped):
    """GroupQueryAttention over int8 caches [b, kv, t, d].

    Args:
        parts: what ``Grouped`` takes.
        ranges: see ``flatq.calibration.cache_ranges``.
        settings: what ``Grouped`` takes.
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
        """What a code of 1 stands for, float32 [1, kv, 1, d]; 1 for channels that are always zero."""

        def scale() -> NDArray[Any]:
            known = self._ranges[name].numpy()
            scales = np.ones((heads, width), np.float32)
            scales[:, : known.shape[1]] = np.where(known > 0, known * HEADROOM / LARGEST, 1)
            return scales[None, :, None]

        return self.builder.weight(f"{name}.scale", (1, heads, 1, width), scale)

    def _rounded(self, written: Any, scale: Any, past: Any) -> Any:
        """Codes of a prompt's keys or values [b, kv, s, d], followed by what of the past lies behind them.

        The past is empty if the program wants a new cache, and has room for more if past and present share a buffer.
        """
        build, shape = self.builder, list(written.shape)
        steps = build.op("Div", [written, scale], shape)
        unit = build.constant("cache.unit", np.array(1, np.float32)), build.constant("cache.zero", np.array(0, np.int8))
        codes = build.op("QuantizeLinear", [steps, *unit], shape, dtype=INT8)
        behind: Dims = [*shape[:2], "behind", shape[3]]
        ends = [self._new, build.constant("const.end", ints(2**62)), build.constant("const.2", ints(2))]
        rest = build.op("Slice", [past, *ends], behind, dtype=INT8)
        return build.op("Concat", [codes, rest], [*shape[:2], "present", shape[3]], dtype=INT8, axis=2)
