"""Where the rows and columns of a weight go in the file: one index array for each axis does all that GGUF asks for.

llama.cpp knows one head size, so value heads are filled up with zeros; its blocks hold 32 columns, so an MLP width is
rounded up to them; and for `llama` and its kin the two partners of a rotary pair stand side by side. All three are a
choice of source rows and columns, with ``ABSENT`` for zeros. Because a row's codes and scales move with the row, the
same two arrays place quantized weights, dense ones and biases alike.

Axes: o written rows, i written columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flatq.export import FloatArray, IntArray, LayerDims, pairs_from_halves

ABSENT = -1
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Source index of each written row and column, int64 [o] and [i]; ``ABSENT`` is a zero."""

    rows: IntArray
    columns: IntArray

    @classmethod
    def whole(cls, rows: int, columns: int) -> Placement:
        """Nothing moves."""
        return cls(np.arange(rows), np.arange(columns))

    @classmethod
    def of(cls, linear: str, source: LayerDims, written: LayerDims, d_model: int, *, paired: bool) -> Placement:
        """Placement of one of the seven linears.

        Args:
            source: widths in the artifact.
            written: widths in the file, none of them smaller.
            paired: rotary partners side by side.
        """
        stream = np.arange(d_model)
        values = _widened(source.kv_heads, source.d_v, written.d_v)
        mixed = _widened(source.heads, source.d_v, written.d_v)
        channels = _widened(1, source.d_ff, written.d_ff)
        rows, columns = {
            "q": (_rotary(source.heads, source.d_qk, paired), stream),
            "k": (_rotary(source.kv_heads, source.d_qk, paired), stream),
            "v": (values, stream),
            "o": (stream, mixed),
            "gate": (channels, stream),
            "up": (channels, stream),
            "down": (stream, channels),
        }[linear]
        return cls(rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """As written."""
        return len(self.rows), len(self.columns)

    def matrix(self, weight: FloatArray) -> FloatArray:
        """A dense weight in its new place, float32 [o, i]."""
        return taken(taken(weight, self.rows, 0), self.columns, 1)

    def inputs(self, energy: FloatArray) -> FloatArray:
        """A number per input column in its new place, float32 [i]."""
        return taken(energy, self.columns, 0)

    def vector(self, bias: FloatArray) -> FloatArray:
        """A bias in its new place, float32 [o]."""
        return taken(bias, self.rows, 0)


def taken(array: NDArray[Number], index: IntArray, axis: int) -> NDArray[Number]:
    """``array.take(index, axis)`` with zeros where the index is ``ABSENT``."""
    if array.shape[axis] == len(index) and bool((index == np.arange(len(index))).all()):
        return array
    found = array.take(index, axis)  # ABSENT reads the last entry, which is overwritten now
    found[(slice(None),) * axis + (index == ABSENT,)] = 0
    return found


def _widened(heads: int, width: int, written: int) -> IntArray:
    placed = np.full((heads, written), ABSENT, np.int64)
    placed[:, :width] = np.arange(heads * width).reshape(heads, width)
    return placed.ravel()


def _rotary(heads: int, width: int, paired: bool) -> IntArray:
    order = torch.arange(heads * width)
    return np.asarray((pairs_from_halves(order, heads) if paired else order).numpy(), np.int64)
