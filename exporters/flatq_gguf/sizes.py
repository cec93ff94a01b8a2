"""Size of an export from shapes alone, for ``flatq plan``."""

from __future__ import annotations

from flatq_gguf.k_quants import K_QUANTS, bits_per_weight
from flatq_gguf.tensors import ALIGNMENT, Contents, Planned

METADATA_BYTES = 1500  # names, widths and the table's fixed part, as measured
TENSOR_ENTRY_BYTES = 60  # name, shape, type and offset of a tensor
PIECE_BYTES = 36  # a piece of the vocabulary with its type and its merge, as measured on 49,152 pieces


def estimated_bytes(contents: Contents) -> int:
    """Size of the files from shapes alone; for K-quants accurate to some percent."""
    precision = contents.options.precision
    total = METADATA_BYTES + contents.config.vocab * PIECE_BYTES
    return total + sum(TENSOR_ENTRY_BYTES + _data_bytes(tensor, precision) for tensor in contents.planned())


def matrix_bytes(contents: Contents, stem: str) -> int:
    """Size of the data of one matrix; ``contents`` may have the grid of no other."""
    return _data_bytes(contents.matrix(stem), contents.options.precision)


def _data_bytes(tensor: Planned, precision: str) -> int:
    """Size of a tensor's data with its padding."""
    size = tensor.bytes
    if precision in K_QUANTS and len(tensor.shape) == 2:
        table = not tensor.source.startswith("layers.")
        size = int(size / 16 * bits_per_weight(precision, tensor.shape[1], table=table))
    return -(-size // ALIGNMENT) * ALIGNMENT
