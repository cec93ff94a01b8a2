"""The same model with every block decoded to float32: what llama.cpp computes without its approximation.

llama.cpp multiplies quantized weights with activations rounded to int8 and has no switch against it. To tell a wrong
file from that approximation, the file itself is read back with gguf's own decoder and written once more in float32,
metadata untouched: names, orders, padding, codes and scales are then compared with the artifact to the last digits.
It takes up to eight times the room of the file, for as long as it is open.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PLAIN = (gguf.GGMLQuantizationType.F32,)
OF_ITS_OWN = ("GGUF.", "split.", "general.architecture")  # keys that the writer makes itself


def is_float32(files: list[Path]) -> bool:
    """Whether nothing in the files needs decoding."""
    return all(tensor.tensor_type in PLAIN for file in files for tensor in gguf.GGUFReader(file).tensors)


def write_float32(files: list[Path], out: Path) -> None:
    """One file ``out`` with all tensors of ``files`` in float32."""
    readers = [gguf.GGUFReader(file) for file in files]
    architecture = readers[0].get_field("general.architecture").contents()
    with closing(gguf.GGUFWriter(out, architecture)) as writer:
        for key, field in readers[0].fields.items():
            if not key.startswith(OF_ITS_OWN):
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
