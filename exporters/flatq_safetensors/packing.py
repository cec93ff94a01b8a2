"""Packing of codes into 32-bit words and unpacking, in the three layouts of checkpoint formats.

All layouts are a dense little-endian bit stream: code k starts at bit ``k * bits``, and with 3 bits a code may span two
words. They differ in the packed axis and in the additional tensors:

* ``gptq`` (v1): ``qweight`` packed along the inputs, ``qzeros`` along the outputs and stored as zero - 1;
* ``gptq_v2``: the same, but the zero is stored unchanged;
* compressed-tensors ``pack-quantized``: codes packed along the inputs within a row, zeros along the outputs. It stores
  signed codes plus ``2**(bits - 1)``, which equal flatq's unsigned codes.

v1 cannot store a zero of 0: zero - 1 would underflow into other bits of the word, and readers decode that differently.
Such zeros occur in asymmetric groups without negative weights, and raise an error.

Sources: AutoGPTQ 0.7.1 (``qlinear_cuda``), with whose packed bytes the tests compare; compressed-tensors 0.20
(``pack_quantized``).

Axes: o out_features, i in_features, G groups, w words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatq.export import ExportError, Grid, QuantizedWeight

WORD = 32


def words(count: int, bits: int) -> int:
    """Number of 32-bit words for ``count`` codes."""
    return -(-count * bits // WORD)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row into words, uint8 [n, k] -> int32 [n, w]; the last word is padded with zero bits."""
    values = codes.cpu().numpy()
    rows, count = values.shape
    stream = np.zeros((rows, words(count, bits) * WORD), dtype=np.uint8)
    for bit in range(bits):
        stream[:, bit : count * bits : bits] = (values >> bit) & 1
    packed = np.packbits(stream, axis=1, bitorder="little").view("<u4")
    return torch.from_numpy(packed.view(np.int32).copy())


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of ``pack_rows``, int32 [n, w] -> uint8 [n, count].

    Raises:
        ValueError: w is wrong for so many codes.
    """
    if packed.shape[1] != words(count, bits):
        raise ValueError(f"{packed.shape[1]} words; {count} codes of {bits} bits need {words(count, bits)}")
    raw = np.ascontiguousarray(packed.cpu().numpy()).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : count * bits]
    codes = np.zeros((raw.shape[0], count), dtype=np.uint8)
    for bit in range(bits):
        codes |= stream[:, bit::bits] << bit
    return torch.from_numpy(codes)


@dataclass(frozen=True, slots=True, eq=False)
class GptqLinear:
    """A linear as GPTQ checkpoints store it.

    Attributes:
        qweight: int32 [i * bits / 32, o].
        qzeros: int32 [G, o * bits / 32].
        scales: float16 [G, o].
        g_idx: int32 [i], the group of each input.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, as in a file."""
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales, "g_idx": self.g_idx}


def pack_gptq(weight: QuantizedWeight, *, version: int, g_idx: Tensor | None = None, name: str = "") -> GptqLinear:
    """Pack for AutoGPTQ, GPTQModel and compatible readers.

    Args:
        weight: the codes; groups are consecutive columns.
        version: 1 stores zero - 1, 2 stores zero.
        g_idx: group of each input, int64 [i], if it is not ``columns // group_size``.
        name: name of the linear, for the error message.

    Raises:
        ExportError: version 1 and a zero is 0.
    """
    bits, zero = weight.grid.bits, weight.zero
    if version == 1:
        bad = int((zero == 0).sum())
        if bad:
            raise ExportError(
                f"{name}: {bad} groups have zero 0, which the format gptq (v1) cannot store (it stores zero - 1); "
                "write format gptq_v2 or compressed-tensors, or quantize with symmetric: true"
            )
        zero = zero - 1
    index = weight.grid.group_index(weight.shape[1]) if g_idx is None else g_idx
    return GptqLinear(
        qweight=pack_rows(weight.codes, bits).T.contiguous(),
        qzeros=pack_rows(zero.T, bits),
        scales=weight.scale.half().T.contiguous(),
        g_idx=index.to(torch.int32),
    )


def unpack_gptq(packed: GptqLinear, grid: Grid, *, version: int) -> QuantizedWeight:
    """Inverse of ``pack_gptq`` without ``g_idx``, which only ``dequantize_gptq`` uses."""
    columns, rows = packed.g_idx.shape[0], packed.scales.shape[1]
    codes = unpack_rows(packed.qweight.T, grid.bits, columns)
    zero = unpack_rows(packed.qzeros, grid.bits, rows).T
    if version == 1:
        zero = (zero + 1) & grid.levels
    return QuantizedWeight(codes, packed.scales.T.contiguous(), zero.contiguous(), grid)


def dequantize_gptq(packed: GptqLinear, grid: Grid, *, version: int) -> Tensor:
    """``scales[g_idx] * (code - zero)``, the weight that readers of the format use, float32 [o, i]."""
    weight, group = unpack_gptq(packed, grid, version=version), packed.g_idx.long()
    centred = weight.codes.float() - weight.zero.float()[:, group]
    return weight.scale.float()[:, group] * centred


def pack_compressed(weight: QuantizedWeight, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Pack for compressed-tensors: ``weight_packed`` int32 [o, w], ``weight_scale`` [o, G], ``weight_shape``.

    For an asymmetric grid also ``weight_zero_point`` int32 [w, G].

    Args:
        weight: the codes.
        dtype: of the scale; loaders dequantize to this type.
    """
    packed = {
        "weight_packed": pack_rows(weight.codes, weight.grid.bits),
        "weight_scale": weight.scale.to(dtype),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.grid.symmetric:
        packed["weight_zero_point"] = pack_rows(weight.zero.T, weight.grid.bits).T.contiguous()
    return packed


def unpack_compressed(tensors: dict[str, Tensor], grid: Grid) -> QuantizedWeight:
    """Inverse of ``pack_compressed``."""
    rows, columns = (int(size) for size in tensors["weight_shape"])
    codes = unpack_rows(tensors["weight_packed"], grid.bits, columns)
    scale = tensors["weight_scale"].half()
    if grid.symmetric:
        zero = torch.full_like(scale, grid.middle, dtype=torch.uint8)
    else:
        zero = unpack_rows(tensors["weight_zero_point"].T, grid.bits, rows).T.contiguous()
    return QuantizedWeight(codes, scale, zero, grid)
