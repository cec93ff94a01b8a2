"""Groups cut finer where a format asks for whole groups: same weights, a few more scales.

flatq lets the last group of a row be shorter. The readers of these formats do not: the group size must divide the
inputs. Cutting every group of 32 into two of 16 that share its scale changes no weight, and 432 inputs, which are
13.5 groups of 32, are 27 of 16. The same makes groups end where value heads end, so that heads can be padded.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from flatq.decoder import LayerDims
from flatq.quantize.grid import Grid, QuantizedWeight

LEAST = 8  # below, scales take more room than is gained, and no reader is known to accept it


def written_grid(grid: Grid, linear: str, dims: LayerDims, d_model: int, *, pad_values: bool) -> Grid:
    """The grid as it will stand in the files: -1 for one group per row, else a size that divides the row.

    Args:
        grid: as quantized.
        linear: which of the seven.
        dims: widths of its layer, before padding.
        d_model: inputs of the linears that read the residual stream.
        pad_values: whether value heads will be padded to the width of the key heads.
    """
    columns = dims.shape(linear, d_model)[1]
    if grid.groups(columns) == 1:
        return replace(grid, group_size=-1)
    pieces = (dims.d_v, dims.d_qk) if pad_values and linear == "o" and dims.d_v != dims.d_qk else (columns,)
    return replace(grid, group_size=math.gcd(grid.group_size, *pieces))


def split_groups(weight: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    """The same weight in groups whose size divides the old one; a whole row stays one group."""
    if grid.group_size == -1:
        return QuantizedWeight(weight.codes, weight.scale, weight.zero, grid)
    columns = weight.shape[1]
    old = torch.arange(grid.groups(columns)) * grid.group_size // weight.grid.width(columns)
    return QuantizedWeight(weight.codes, weight.scale[:, old], weight.zero[:, old], grid)
