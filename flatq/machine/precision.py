"""In which precision the calibration's forward passes multiply.

Weights, the residual stream and all sums over tokens are float32. Where the processor multiplies bfloat16 matrices in
hardware, what happens inside a block (its projections, attention, the gate) is done in bfloat16, as autocast does it:
1.5 times as fast as float32 activations whose products are rounded on the way in, and as close to float32
(docs/decisions/0005).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def resolved(precision: str, device: str = "cpu") -> str:
    """``float32`` or ``bfloat16``; ``auto`` takes bfloat16 where the device multiplies it in hardware.

    Those are CPUs with AVX512-BF16 or AMX, and NVIDIA GPUs from Ampere on.
    """
    if precision != "auto":
        return precision
    kind = torch.device(device).type
    if kind == "cuda":
        able = torch.cuda.is_bf16_supported()
    else:
        able = kind == "cpu" and torch.backends.mkldnn.is_available() and _has_bfloat16()
    return "bfloat16" if able else "float32"


@contextmanager
def forward_precision(precision: str = "auto", device: str = "cpu", *, gradients: bool = False) -> Iterator[None]:
    """Products of float32 matrices (Grams, say) in float32, or in what the CPU's kernels put in its place.

    With AMX those are products of bfloat16 roundings summed in float32, with AVX512-BF16 alone twice as fast and as
    exact as float32 (docs/decisions/0005). Solves belong outside.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if resolved(precision, device) == "bfloat16" else "highest")
    try:
        with torch.inference_mode(not gradients):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def blocks_in(precision: str, device: str) -> torch.autocast:
    """What runs a block: activations inside it are of this precision. Sums over tokens belong outside."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=resolved(precision, device) == "bfloat16")


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
