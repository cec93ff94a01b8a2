"""K-quants, made by llama.cpp itself: two levels of scales that no GPTQ code fits, found by its own search.

The file is first written in float16 and then goes through ``llama_model_quantize`` of llama-cpp-python, which is what
the program llama-quantize calls. It decides tensor by tensor: a row that is no multiple of 256 falls back to a simpler
type, and some tensors get more bits than the rest. Importance matrices were left out: artifacts keep no Grams.
"""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec
from pathlib import Path

from flatq.errors import ExportError

SUPER_BLOCK = 256


# ``llama_ftype``; bits per weight of most tensors; of tensors whose rows are no whole super-blocks; the KL divergence
# in nats that is allowed, several times what the type cost on SmolLM2-135M (0.23, 0.07, -, 0.009).
K_QUANTS: dict[str, tuple[int, float, float, float]] = {
    "q3_k_m": (12, 3.9, 4.5, 1.0),
    "q4_k_m": (15, 4.85, 5.5, 0.5),
    "q5_k_m": (17, 5.7, 6.0, 0.2),
    "q6_k": (18, 6.57, 8.5, 0.1),
}
TABLE_BITS = 8.5  # embedding and head get Q6_K or Q8_0


def objections(precision: str) -> list[str]:
    """Why this cannot be done here."""
    if precision not in K_QUANTS or find_spec("llama_cpp") is not None:
        return []
    return [
        f"precision: {precision} is made by llama.cpp, and llama-cpp-python is not installed; run `make llamacpp`, or "
        f"use precision: f16 and then the program: llama-quantize FILE-F16.gguf FILE.gguf {precision.upper()}"
    ]


def bits_per_weight(precision: str, columns: int, *, table: bool) -> float:
    """About how much room a weight takes."""
    _, whole, broken, _ = K_QUANTS[precision]
    return TABLE_BITS if table else broken if columns % SUPER_BLOCK else whole


def allowed_kl(precision: str) -> float:
    """See ``Exported.rounding_kl``."""
    return K_QUANTS[precision][3]


def quantize(source: Path, target: Path, precision: str) -> None:
    """Quantize a float16 file.

    Raises:
        ExportError: llama.cpp failed.
    """
    import llama_cpp

    from flatq_gguf.runner import keep_log, last_lines

    mark = keep_log()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = K_QUANTS[precision][0]
    parameters.nthread = os.cpu_count() or 1
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code:
        raise ExportError(
            f"gguf: llama.cpp could not quantize to {precision} (code {code}: {last_lines(mark)}); use precision: f16"
        )
    with target.open("rb+") as file:
        os.fsync(file.fileno())
