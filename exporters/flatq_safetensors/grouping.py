"""Groups cut finer where a format asks for whole groups: same weights, a few more scales.

flatq lets the last group of a row be shorter. The readers of these formats do not: the group size must divide the
inputs. Cutting every group of 32 into two of 16 that share its scale changes no weight, and 432 inputs, which are
13.5 groups of 32, are 27 of 16. The same makes groups end where value heads end, so that heads can be padded, and
gives all linears one group size, because transformers reads GPTQ folders with no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from flatq.export import DecoderConfig, Grid, QuantizedWeight

ENDS = ("embed", "head")
LEAST = 8  # below, scales take more room than is gained, and no reader is known to accept it


def written_grids(
    config: DecoderConfig, grids: Mapping[str, Grid], *, pad_values: bool, one_size: bool
) -> dict[str, Grid]:
    """Grids of the linears as they will stand in the files: -1 for one group per row, else a size that divides the row.

    Args:
        config: widths before padding.
        grids: as quantized, by stem.
        pad_values: whether value heads will be padded to the width of the key heads.
        one_size: cut all linears to one group size if they differ in nothing else.
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
    """The same for embedding and head, as far as they are quantized."""
    written = {}
    for stem in ENDS:
        if stem in grids:
            alone = grids[stem].groups(config.d_model) == 1
            size = -1 if alone else math.gcd(grids[stem].group_size, config.d_model)
            written[stem] = replace(grids[stem], group_size=size)
    return written


def _pieces(config: DecoderConfig, stem: str, pad_values: bool) -> tuple[int, tuple[int, ...]]:
    """Inputs of a linear, and the lengths that its groups must divide."""
    _, index, linear = stem.split(".")
    dims = config.layers[int(index)]
    columns = dims.shape(linear, config.d_model)[1]
    padded = pad_values and linear == "o" and dims.d_v != dims.d_qk
    return columns, (dims.d_v, dims.d_qk) if padded else (columns,)


def split_groups(weight: QuantizedWeight, grid: Grid) -> QuantizedWeight:
    """The same weight in groups whose size divides the old one; a whole row stays one group."""
    if grid.group_size == -1:
        return QuantizedWeight(weight.codes, weight.scale, weight.zero, grid)
    columns = weight.shape[1]
    old = torch.arange(grid.groups(columns)) * grid.group_size // weight.grid.width(columns)
    return QuantizedWeight(weight.codes, weight.scale[:, old], weight.zero[:, old], grid)
