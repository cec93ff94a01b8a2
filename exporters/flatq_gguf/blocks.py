"""Lossless conversion of the artifact's codes to GGML's blocks of 32 weights.

A block is a float16 scale and 32 small integers, ``value = scale * integer``. flatq's weights are
``scale * (code - zero)`` with float16 scales, so a block type stores them exactly if ``code - zero`` is in the range of
its integers and no block spans two groups. The smallest such type is used:

    Q4_0  -8 .. 7       4-bit symmetric; 3 and 2 bits, symmetric or not
    Q5_0  -16 .. 15     4-bit asymmetric (Q4_1 has a minimum instead of a zero; its rounding to float16 is not exact)
    Q8_0  -128 .. 127   8-bit symmetric

No type can store 8-bit asymmetric codes (-255 .. 255). Group sizes that are multiples of 32 columns are supported, by
repeating the scale. Layouts: ggml's ``block_q4_0``, ``block_q5_0`` and ``block_q8_0``.

Axes: o rows, i columns, n blocks in a row, 32 columns in a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flatq.export import Grid, IntArray, QuantizedWeight
from flatq_gguf.placement import ABSENT, Placement, taken

BLOCK = 32
ROWS_AT_ONCE = 8192  # limits the memory for large tables


@dataclass(frozen=True, slots=True)
class Carrier:
    """A block type with integers ``low .. high`` and a float16 scale."""

    name: str
    low: int
    high: int


CARRIERS = (Carrier("Q4_0", -8, 7), Carrier("Q5_0", -16, 15), Carrier("Q8_0", -128, 127))
# Bytes per 32 weights of the types that are written here.
BLOCK_BYTES = {"F32": 128, "F16": 64, "BF16": 64, "Q8_0": 34, "Q5_0": 22, "Q4_1": 20, "Q4_0": 18}
FLOATS = ("F32", "F16", "BF16")


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape)) * BLOCK_BYTES[kind] // BLOCK


def carrier(grid: Grid) -> Carrier | None:
    """The smallest type that can store a grid's codes; None if there is none."""
    low, high = (-grid.middle, grid.levels - grid.middle) if grid.symmetric else (-grid.levels, grid.levels)
    return next((kind for kind in CARRIERS if kind.low <= low and high <= kind.high), None)


def fits(grid: Grid, inputs: int, columns: IntArray) -> bool:
    """Whether every block of the written columns is within one group.

    Args:
        inputs: columns of the weight as quantized.
        columns: source of each written column, ``Placement.columns``.
    """
    if len(columns) % BLOCK:
        return False
    group = np.where(columns == ABSENT, ABSENT, columns // grid.width(inputs)).reshape(-1, BLOCK)
    last = group.max(1, keepdims=True)
    return bool(((group == last) | (group == ABSENT)).all())


def carried(weight: QuantizedWeight, place: Placement, kind: Carrier) -> NDArray[np.uint8]:
    """A quantized weight as blocks, uint8 [o, n * bytes]; requires ``fits``."""
    inputs = weight.shape[1]
    group = np.where(place.columns == ABSENT, 0, place.columns // weight.grid.width(inputs))
    of_block = group.reshape(-1, BLOCK).max(1)
    of_code = weight.grid.group_index(inputs).numpy()
    codes, zero, scale = weight.codes.numpy(), weight.zero.numpy(), weight.scale.numpy()
    parts = []
    for rows in np.split(place.rows, range(ROWS_AT_ONCE, len(place.rows), ROWS_AT_ONCE)):
        centred = taken(codes, rows, 0).astype(np.int16) - taken(zero, rows, 0).astype(np.int16)[:, of_code]
        integers = taken(centred, place.columns, 1).reshape(len(rows), -1, BLOCK)
        parts.append(packed(integers, taken(scale, rows, 0)[:, of_block], kind))
    return np.concatenate(parts)


def packed(integers: NDArray[np.int16], scale: NDArray[np.float16], kind: Carrier) -> NDArray[np.uint8]:
    """Integers [o, n, 32] and scales [o, n] as bytes [o, n * bytes]."""
    shape = integers.shape[:2]
    parts = [np.ascontiguousarray(scale, np.float16)[..., None].view(np.uint8)]
    if kind.name == "Q8_0":
        parts.append(integers.astype(np.int8).view(np.uint8))
    else:
        unsigned = (integers - kind.low).astype(np.uint8)
        if kind.name == "Q5_0":
            parts.append(np.packbits(unsigned >> 4, axis=-1, bitorder="little"))
        first, second = np.split(unsigned & np.uint8(15), 2, axis=-1)
        parts.append(first | second << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(shape[0], -1)
