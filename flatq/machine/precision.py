"""Precision of the matrix products in the forward passes of calibration.

Weights, the residual stream and all sums over tokens are float32. Where the hardware multiplies bfloat16 matrices, a
block (projections, attention, gate) runs under bfloat16 autocast: 1.5 times as fast as float32 activations whose
products are rounded to bfloat16, and as close to float32 (docs/decisions/0005).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def resolved(precision: str, device: str = "cpu") -> str:
    """``float32`` or ``bfloat16``; ``auto`` is bfloat16 where the device multiplies it in hardware.

    Those are CPUs with AVX512-BF16 or AMX, and NVIDIA GPUs since Ampere.
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
    """Set torch's float32 matmul precision for the enclosed work: ``medium`` for bfloat16, else ``highest``.

    It applies to products of float32 matrices, such as Grams. ``medium`` means, with AMX, products of bfloat16-rounded
    values summed in float32; with AVX512-BF16 alone it is twice as fast and as exact as float32 (docs/decisions/0005).
    Run linear solves outside of it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if resolved(precision, device) == "bfloat16" else "highest")
    try:
        with torch.inference_mode(not gradients):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def blocks_in(precision: str, device: str) -> torch.autocast:
    """Autocast context for running a block in this precision. Compute sums over tokens outside of it."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=resolved(precision, device) == "bfloat16")


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
