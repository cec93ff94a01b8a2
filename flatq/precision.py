"""In which precision forward passes multiply.

Everything is float32 in memory, but where the processor multiplies bfloat16 matrices in hardware the operands of the
forward pass are rounded to bfloat16 on the way in (products are summed in float32): 2.4 times faster on the CPU that
this was measured on, see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

SHORT = 640  # tokens of a row, see _SmallTiles


@contextmanager
def forward_precision(precision: str = "auto", *, gradients: bool = False) -> Iterator[None]:
    """Matrix products of the enclosed forward passes in ``float32`` or with ``bfloat16`` operands.

    ``auto`` takes bfloat16 where the CPU has instructions for it (AVX512-BF16, AMX). Solves belong outside.
    """
    if precision == "auto":
        precision = "bfloat16" if torch.backends.mkldnn.is_available() and _has_bfloat16() else "float32"
    with (
        _products("medium" if precision == "bfloat16" else "highest"),
        _SmallTiles(),
        torch.inference_mode(not gradients),
    ):
        yield


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _SmallTiles(TorchFunctionMode):
    """Attention over short rows stays in float32: turning its small tiles to bfloat16 costs more than it saves.

    3 to 5 times the time at 64 to 166 tokens, as much at 640, less from there on (docs/decisions.md).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.scaled_dot_product_attention and args[0].shape[-2] < SHORT:
            with _products("highest"):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _has_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
