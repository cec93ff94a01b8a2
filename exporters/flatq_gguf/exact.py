"""A float32 copy of a GGUF file, for exact verification.

llama.cpp multiplies quantized weights with activations rounded to int8, and this cannot be disabled. To distinguish an
error in the file from that approximation, the file is dequantized with the gguf package and written again in float32
with the same metadata. Names, orders, padding, codes and scales are thus verified with float32 accuracy. The copy
exists while the file is open and is up to eight times as large.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PLAIN = (gguf.GGMLQuantizationType.F32,)
GENERATED = ("GGUF.", "split.", "general.architecture")  # keys that the writer creates


def is_float32(files: list[Path]) -> bool:
    """Whether all tensors are float32 already."""
    return all(tensor.tensor_type in PLAIN for file in files for tensor in gguf.GGUFReader(file).tensors)


def write_float32(files: list[Path], out: Path) -> None:
    """One file ``out`` with all tensors of ``files`` in float32."""
    readers = [gguf.GGUFReader(file) for file in files]
    architecture = readers[0].get_field("general.architecture").contents()
    with closing(gguf.GGUFWriter(out, architecture)) as writer:
        for key, field in readers[0].fields.items():
            if not key.startswith(GENERATED):
                _copy(writer, key, field)
        tensors = [tensor for reader in readers for tensor in reader.tensors]
        for tensor in tensors:
            shape = [int(size) for size in reversed(tensor.shape)]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.write_tensor_data(np.ascontiguousarray(values, np.float32))


def _copy(writer: Any, key: str, field: Any) -> None:
    inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
