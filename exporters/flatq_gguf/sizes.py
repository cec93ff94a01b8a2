"""Size of an export from shapes alone, for ``flatq plan``."""

from __future__ import annotations

from flatq_gguf.k_quants import K_QUANTS, bits_per_weight
from flatq_gguf.tensors import ALIGNMENT, Contents

METADATA_BYTES = 1500  # names, widths and the table's fixed part, as measured
TENSOR_ENTRY_BYTES = 60  # name, shape, type and offset of a tensor
PIECE_BYTES = 36  # a piece of the vocabulary with its type and its merge, as measured on 49,152 pieces


def estimated_bytes(contents: Contents) -> int:
    """Size of the files from shapes alone; for K-quants accurate to some percent."""
    precision = contents.options.precision
    total = METADATA_BYTES + contents.config.vocab * PIECE_BYTES
    for tensor in contents.planned():
        size = tensor.bytes
        if precision in K_QUANTS and len(tensor.shape) == 2:
            table = not tensor.source.startswith("layers.")
            size = int(size / 16 * bits_per_weight(precision, tensor.shape[1], table=table))
        total += TENSOR_ENTRY_BYTES + -(-size // ALIGNMENT) * ALIGNMENT
    return total
