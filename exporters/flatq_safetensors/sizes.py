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
    layout = Layout.of(config, grids, options, torch.float32 if itemsize == 4 else torch.bfloat16)
    return sum(plan.bytes for name in layout.names() for plan in layout.planned(name).values())
