"""Split groups into smaller ones where a format needs it: the same weights with more scales.

In flatq the last group of a row may be shorter. These formats require that the group size divides the inputs. Splitting
every group of 32 into two of 16 with the same scale changes no weight, and 432 inputs (13.5 groups of 32) become 27
groups of 16. The same method makes groups end at the ends of value heads, so that heads can be padded, and gives all
linears the same group size, which transformers requires for GPTQ folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from flatq.export import DecoderConfig, Grid, QuantizedWeight

ENDS = ("embed", "head")
LEAST = 8  # with smaller groups the scales need more space than is saved, and no known reader supports them


def written_grids(
    config: DecoderConfig, grids: Mapping[str, Grid], *, pad_values: bool, one_size: bool
) -> dict[str, Grid]:
    """Grids of the linears as written: group size -1 for one group per row, else a divisor of the row length.

    Args:
        config: widths before padding.
        grids: as quantized, by stem.
        pad_values: whether value heads will be padded to the width of the key heads.
        one_size: use the same group size for all linears if their grids are otherwise equal.
    """
    pieces = {stem: _pieces(config, stem, pad_values) for stem in sorted(grids) if stem.startswith("layers.")}
    written = {}
    for stem, (columns, parts) in pieces.items():
        alone = grids[stem].groups(columns) == 1
        size = -1 if alone else math.gcd(grids[stem].group_size, *parts)
        written[stem] = replace(grids[stem], group_size=size)
    if one_size and len(set(written.values())) > 1 and len({replace(g, group_size=-1) for g in written.values()}) == 1:
        sizes = (grid.group_size for grid in written.values() if grid.group_size != -1)
        common = math.gcd(*sizes, *(part for _, parts in pieces.values() for part in parts))
        if common >= LEAST:
            written = {stem: replace(grid, group_size=common) for stem, grid in written.items()}
    return written


def written_ends(config: DecoderConfig, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The same for embedding and head, if they are quantized."""
    written = {}
    for stem in ENDS:
        if stem in grids:
            alone = grids[stem].groups(config.d_model) == 1
            size = -1 if alone else math.gcd(grids[stem].group_size, config.d_model)
            written[stem] = replace(grids[stem], group_size=size)
    return written


def _pieces(config: DecoderConfig, stem: str, pad_values: bool) -> tuple[int, tuple[int, ...]]:
    """Number of inputs of a linear, and the lengths that its group size must divide."""
    _, index, linear = stem.split(".")
    dims = config.layers[int(index)]
    columns = dims.shape(linear, config.d_model)[1]
    padded = pad_values and linear == "o" and dims.d_v != dims.d_qk
    return columns, (dims.d_v, dims.d_qk) if padded else (columns,)


def split_groups(weight: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    """The same weight with a group size that divides the old one; a group of a whole row is not split."""
    if grid.group_size == -1:
        return QuantizedWeight(weight.codes, weight.scale, weight.zero, grid)
    columns = weight.shape[1]
    old = torch.arange(grid.groups(columns)) * grid.group_size // weight.grid.width(columns)
    return QuantizedWeight(weight.codes, weight.scale[:, old], weight.zero[:, old], grid)
