"""Activation statistics of the calibration as llama.cpp's importance matrix (imatrix).

llama.cpp's quantizer weights rounding errors with the mean square of each input column. The program llama-imatrix
measures it by running the model on a text; flatq already has it, as the diagonals of the Grams that GPTQ used, measured
on the narrowed model. Here they are converted to the order and widths of the written tensors and to llama.cpp's file
format: two tensors per matrix, ``NAME.in_sum2`` (sum of squares) and ``NAME.counts`` (number of tokens).

Embedding and head have no entry, as with the defaults of llama-imatrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from flatq.export import Artifact
from flatq_gguf.k_quants import Importance
from flatq_gguf.tensors import Contents


def importance(artifact: Artifact, contents: Contents) -> Importance:
    """Mean squares of the input columns as written, float32 [i], by the file's name of the matrix.

    Raises:
        ArtifactError: the artifact has no energies.
    """
    found = {}
    for stem, energy in artifact.energies().items():
        place = contents.placement(stem)
        assert place is not None  # only linears of layers have energies
        found[contents.name(f"{stem}.weight")] = place.inputs(energy.numpy())
    return found


def write_importance(path: Path, matrix: Importance, text: Mapping[str, Any]) -> None:
    """Write llama.cpp's file.

    Args:
        matrix: from ``importance``.
        text: the calibration text in the manifest: ``dataset``, ``sequences``, ``seq_len``.
    """
    import gguf

    tokens = text["sequences"] * text["seq_len"]
    with closing(gguf.GGUFWriter(path, "imatrix")) as writer:
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", [text["dataset"]])
        writer.add_uint32("imatrix.chunk_count", text["sequences"])
        writer.add_uint32("imatrix.chunk_size", text["seq_len"])
        for name, squares in sorted(matrix.items()):
            writer.add_tensor(f"{name}.in_sum2", (squares * np.float32(tokens))[None])
            writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
