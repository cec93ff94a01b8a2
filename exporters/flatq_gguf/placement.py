"""Order and padding of rows and columns of a weight in the file, as one index array per axis.

llama.cpp has one head size, so value heads are padded with zeros; its blocks have 32 columns, so MLP widths are rounded
up; and for `llama` and similar architectures rotary pairs are interleaved. All three are expressed by the source row
and column of each written row and column, with ``ABSENT`` for zeros. The same two arrays apply to quantized weights,
dense weights and biases.

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
    """Source index of each written row and column, int64 [o] and [i]; ``ABSENT`` means zeros."""

    rows: IntArray
    columns: IntArray

    @classmethod
    def whole(cls, rows: int, columns: int) -> Placement:
        """The identity."""
        return cls(np.arange(rows), np.arange(columns))

    @classmethod
    def of(
        cls, linear: str, source: LayerDims, written: LayerDims, d_model: int, *, paired: bool, experts: int = 1
    ) -> Placement:
        """Placement of one of the seven linears.

        Args:
            source: widths in the artifact.
            written: widths in the file, none of them smaller.
            paired: interleave rotary pairs.
            experts: number of parts of the MLP, each of which is padded.
        """
        stream = np.arange(d_model)
        values = _widened(source.kv_heads, source.d_v, written.d_v)
        mixed = _widened(source.heads, source.d_v, written.d_v)
        channels = _widened(experts, source.d_ff // experts, written.d_ff // experts)
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

    def by_columns(self, parts: int) -> list[Placement]:
        """The same rows with consecutive parts of the columns."""
        return [Placement(self.rows, columns) for columns in np.split(self.columns, parts)]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape in the file."""
        return len(self.rows), len(self.columns)

    def matrix(self, weight: FloatArray) -> FloatArray:
        """Apply it to a dense weight, float32 [o, i]."""
        return taken(taken(weight, self.rows, 0), self.columns, 1)

    def inputs(self, energy: FloatArray) -> FloatArray:
        """Apply it to one number per input column, float32 [i]."""
        return taken(energy, self.columns, 0)

    def vector(self, bias: FloatArray) -> FloatArray:
        """Apply it to a bias, float32 [o]."""
        return taken(bias, self.rows, 0)


def taken(array: NDArray[Number], index: IntArray, axis: int) -> NDArray[Number]:
    """``array.take(index, axis)`` with zeros where the index is ``ABSENT``."""
    if array.shape[axis] == len(index) and bool((index == np.arange(len(index))).all()):
        return array
    found = array.take(index, axis)  # ABSENT (-1) reads the last entry, which is overwritten below
    found[(slice(None),) * axis + (index == ABSENT,)] = 0
    return found


def _widened(heads: int, width: int, written: int) -> IntArray:
    placed = np.full((heads, written), ABSENT, np.int64)
    placed[:, :width] = np.arange(heads * width).reshape(heads, width)
    return placed.ravel()


def _rotary(heads: int, width: int, paired: bool) -> IntArray:
    order = torch.arange(heads * width)
    return np.asarray((pairs_from_halves(order, heads) if paired else order).numpy(), np.int64)
