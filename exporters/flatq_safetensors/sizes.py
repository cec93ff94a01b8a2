"""Size of an export from shapes alone, for ``flatq plan``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flatq.export import DecoderConfig, Grid
from flatq_safetensors.options import SafetensorsOptions
from flatq_safetensors.tensors import Layout


def estimated_bytes(
    config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions, itemsize: int
) -> int:
    """Bytes of the weights; configuration, code and tokenizer are not counted."""
    layout = _layout(config, grids, options, itemsize)
    return sum(plan.bytes for name in layout.names() for plan in layout.planned(name).values())


def matrix_bytes(
    config: DecoderConfig, stem: str, grid: Grid | None, options: SafetensorsOptions, itemsize: int
) -> int:
    """Bytes of one matrix; with ``one_group_size`` other matrices can make it larger."""
    layout = _layout(config, {} if grid is None else {stem: grid}, options, itemsize)
    return sum(plan.bytes for plan in layout.planned(f"{stem}.weight").values())


def _layout(config: DecoderConfig, grids: Mapping[str, Grid], options: SafetensorsOptions, itemsize: int) -> Layout:
    return Layout.of(config, grids, options, torch.float32 if itemsize == 4 else torch.bfloat16)
