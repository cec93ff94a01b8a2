"""Lossless packing of codes for MatMulNBits.

MatMulNBits computes ``x @ W.T`` from blocks of consecutive input columns that share a scale. The block size must be a
power of two, at least 16; above 256 the CPU kernel returned zeros. Other group sizes are split into equal blocks with
the same scale, which is exact; the last block of a row may be incomplete and is padded.

Codes with 4 or 8 bits, and with 2 bits in linears, are stored unchanged, least significant bits first. There is no
3-bit kernel, and the embedding's lookup supports only 4 and 8 bits: such codes are converted to symmetric 4-bit codes
``code - zero + 8``, which are in 1 .. 15 and have the same value.

Axes: n out_features, k in_features, G groups of the grid, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatq.export import Grid, QuantizedWeight

LEAST_BLOCK = 16
LARGEST_BLOCK = 256
FOLDED_BYTES = 2**30  # onnxruntime folds no tensor that would be larger

Bytes = NDArray[np.uint8]


def block_of(grid: Grid, columns: int) -> int | None:
    """Block size that can represent this grid exactly for ``columns`` inputs; None if there is none."""
    if grid.group_size == -1:
        block = LEAST_BLOCK
        while block < min(columns, LARGEST_BLOCK):
            block *= 2
        return block
    block = min(grid.group_size & -grid.group_size, LARGEST_BLOCK)  # largest power of two that divides it
    return block if block >= LEAST_BLOCK else None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Layout of a quantized matrix [n, k] in the file."""

    rows: int
    columns: int
    bits: int
    block: int
    has_zeros: bool

    @classmethod
    def of(cls, grid: Grid, rows: int, columns: int, *, lookup: bool = False) -> Blocks:
        """Layout of a matrix with ``grid``; ``lookup`` if it is also used by the embedding's lookup."""
        block = block_of(grid, columns)
        assert block is not None, "rejected by OnnxExporter.check"
        recoded = grid.bits == 3 or (lookup and grid.bits == 2)
        return cls(rows, columns, 4 if recoded else grid.bits, block, not (recoded or grid.symmetric))

    @property
    def count(self) -> int:
        """Blocks in a row."""
        return -(-self.columns // self.block)

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """Shape of the packed codes, uint8 [n, B, bytes of a block]."""
        return self.rows, self.count, self.block * self.bits // 8

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape of the scales, [n, B]."""
        return self.rows, self.count

    @property
    def zeros_shape(self) -> tuple[int, int]:
        """Shape of the packed zero points, uint8 [n, bytes of a row's zeros]."""
        return self.rows, -(-self.count * self.bits // 8)

    @property
    def folds(self) -> bool:
        """Whether onnxruntime can make the codes on loading; otherwise they are stored as the node wants them."""
        return prod(self.codes_shape) <= FOLDED_BYTES

    def nbytes(self, scale: int = 2) -> int:
        """Size in the file with ``scale`` bytes per scale."""
        zeros = self.zeros_shape[1] if self.has_zeros else 0
        return self.rows * (self.count * (self.block * self.bits // 8 + scale) + zeros)


def pack_codes(weight: QuantizedWeight, blocks: Blocks) -> Bytes:
    """Codes [n, k] packed for MatMulNBits, uint8 [n, B, bytes of a block]."""
    codes = weight.codes
    if blocks.bits != weight.grid.bits:
        group = weight.grid.group_index(blocks.columns)
        codes = codes + 8 - weight.zero[:, group]  # uint8 arithmetic wraps, the result is in 1 .. 15
    filled = np.zeros((blocks.rows, blocks.count * blocks.block), np.uint8)
    filled[:, : blocks.columns] = codes.numpy()
    return _join(filled, blocks.bits).reshape(blocks.codes_shape)


def pack_scales(weight: QuantizedWeight, blocks: Blocks) -> NDArray[np.float16]:
    """Scale of each block, float16 [n, B]."""
    return np.ascontiguousarray(_per_block(weight.scale, weight.grid, blocks).numpy())


def pack_zeros(weight: QuantizedWeight, blocks: Blocks) -> Bytes:
    """Zero of each block, uint8 [n, bytes of a row's zeros]."""
    return _join(_per_block(weight.zero, weight.grid, blocks).numpy(), blocks.bits)


def _per_block(values: Tensor, grid: Grid, blocks: Blocks) -> Tensor:
    """[n, G] -> [n, B]: the value of each block's group."""
    firsts = torch.arange(blocks.count) * blocks.block
    return values[:, firsts // grid.width(blocks.columns)]


def _join(codes: Bytes, bits: int) -> Bytes:
    """Pack the last axis into bytes, the first code in the lowest bits; the last byte is padded with zeros."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // bits
    short = -codes.shape[1] % per_byte
    parts = np.pad(codes, ((0, 0), (0, short))).reshape(codes.shape[0], -1, per_byte)
    joined = np.zeros(parts.shape[:2], np.uint8)
    for place in range(per_byte):
        joined |= parts[..., place] << (place * bits)
    return joined


def stack_rows(parts: Sequence[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight:
    """Concatenate rows of matrices with the same grid, or of unquantized ones."""
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(quantized) < len(parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return QuantizedWeight(
        torch.cat([part.codes for part in quantized]),
        torch.cat([part.scale for part in quantized]),
        torch.cat([part.zero for part in quantized]),
        quantized[0].grid,
    )


def widen_heads(part: Tensor | QuantizedWeight, heads: int, width: int) -> Tensor | QuantizedWeight:
    """Rows [heads * r, ...] -> [heads * width, ...], each head padded with rows that decode to zero."""

    def widened(tensor: Tensor) -> Tensor:
        split = tensor.reshape(heads, -1, *tensor.shape[1:])
        filled = split.new_zeros(heads, width, *tensor.shape[1:])
        filled[:, : split.shape[1]] = split
        return filled.flatten(0, 1)

    if isinstance(part, Tensor):
        return widened(part)
    return QuantizedWeight(widened(part.codes), widened(part.scale), widened(part.zero), part.grid)
