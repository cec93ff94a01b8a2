"""K-quants, quantized by llama.cpp: types with two levels of scales, to which GPTQ codes cannot be converted.

The file is first written in float16 and then quantized with llama.cpp's code: by ``llama_model_quantize`` of
llama-cpp-python, or by the program llama-quantize if it is on the PATH. llama.cpp chooses the type per tensor: a tensor
whose rows are no multiple of 256 gets a simpler type, and some tensors get more bits. With ``imatrix`` it weights
rounding errors with the activation statistics of the calibration.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatq.export import ExportError

SUPER_BLOCK = 256
LIBRARY, PROGRAM = "llama-cpp-python", "llama-quantize"

# ``llama_ftype``; bits per weight of most tensors; bits of tensors whose rows are no multiple of a super-block; allowed
# KL divergence in nats, several times the value measured on SmolLM2-135M (0.23, 0.07, -, 0.009).
K_QUANTS: dict[str, tuple[int, float, float, float]] = {
    "q3_k_m": (12, 3.9, 4.5, 1.0),
    "q4_k_m": (15, 4.85, 5.5, 0.5),
    "q5_k_m": (17, 5.7, 6.0, 0.2),
    "q6_k": (18, 6.57, 8.5, 0.1),
}
TABLE_BITS = 8.5  # embedding and head get Q6_K or Q8_0
Importance = Mapping[str, NDArray[np.float32]]


def objections(precision: str, wanted: str) -> list[str]:
    """A message if no tool for quantization is available, with the command to run it elsewhere.

    Args:
        precision: a type.
        wanted: the option ``quantize_with``.
    """
    if precision not in K_QUANTS or tool(wanted) is not None:
        return []
    missing = (
        f"{LIBRARY} is not installed and {PROGRAM} is not on the PATH"
        if wanted == "auto"
        else (f"{LIBRARY} is not installed" if wanted == LIBRARY else f"{PROGRAM} is not on the PATH")
    )
    return [
        f"precision: {precision} needs llama.cpp, and {missing}; run `make llamacpp`, or use precision: f16 and "
        f"then, on a machine with llama.cpp: {' '.join(command(PROGRAM, 'FILE-F16.gguf', 'FILE.gguf', precision))}"
    ]


def tool(wanted: str) -> str | None:
    """``llama-cpp-python``, or the path of llama-quantize; None if the wanted tool is not available."""
    if wanted in ("auto", LIBRARY) and find_spec("llama_cpp") is not None:
        return LIBRARY
    return shutil.which(PROGRAM) if wanted in ("auto", PROGRAM) else None


def command(
    program: str, source: Path | str, target: Path | str, precision: str, *, imatrix: Path | str | None = None
) -> list[str]:
    """The command line that quantizes a file."""
    weighed = ["--imatrix", str(imatrix)] if imatrix is not None else []
    return [program, *weighed, str(source), str(target), precision.upper()]


def bits_per_weight(precision: str, columns: int, *, table: bool) -> float:
    """Approximate bits per weight."""
    _, whole, broken, _ = K_QUANTS[precision]
    return TABLE_BITS if table else broken if columns % SUPER_BLOCK else whole


def allowed_kl(precision: str) -> float:
    """See ``Exported.rounding_kl``."""
    return K_QUANTS[precision][3]


def quantize(
    source: Path, target: Path, precision: str, *, by: str, split: bool, matrix: Importance, imatrix: Path | None
) -> None:
    """Quantize a float16 file.

    Args:
        source: the file, or the first of its parts.
        target: the file, or the name that its parts begin with.
        by: from ``tool``.
        split: whether the file has parts; the result then also has parts.
        matrix: importance of the input columns, by the matrix's name in the file; for the library.
        imatrix: the same as a file, or None; for the program.

    Raises:
        ExportError: llama.cpp failed.
    """
    if by == LIBRARY:
        _by_library(source, target, precision, matrix, split=split)
    else:
        _by_program(command(by, source, target, precision, imatrix=imatrix), split=split)
    for file in target.parent.glob(f"{target.name}*"):
        with file.open("rb+") as written:
            os.fsync(written.fileno())


def _by_library(source: Path, target: Path, precision: str, matrix: Importance, *, split: bool) -> None:
    import llama_cpp

    from flatq_gguf.runner import keep_log, last_lines

    mark = keep_log()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = K_QUANTS[precision][0]
    parameters.nthread = os.cpu_count() or 1
    parameters.keep_split = split
    entries = _entries(llama_cpp, matrix)  # must live as long as the call
    if matrix:
        parameters.imatrix = entries
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code:
        raise ExportError(
            f"gguf: llama.cpp could not quantize to {precision} (code {code}: {last_lines(mark)}); use precision: f16"
        )


def _entries(llama_cpp: Any, matrix: Importance) -> Any:
    """A C array of ``llama_model_imatrix_data`` terminated by an empty name; it holds references to the numbers."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
    kept = []
    for entry, (name, squares) in zip(entries, matrix.items(), strict=False):
        numbers = np.ascontiguousarray(squares, np.float32)
        kept.append(numbers)
        entry.name, entry.size = name.encode(), numbers.size
        entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entries.kept = kept
    return entries


def _by_program(arguments: list[str], *, split: bool) -> None:
    if split:
        arguments = [arguments[0], "--keep-split", *arguments[1:]]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if ended.returncode:
        message = (ended.stderr or ended.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ExportError(
            f"gguf: `{' '.join(arguments)}` failed with exit code {ended.returncode}: {message[0]}; use precision: f16"
        )
