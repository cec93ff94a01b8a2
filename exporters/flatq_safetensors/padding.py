"""Padding of value heads to the width of the key heads, for programs that support only one head size.

The padded rows of v are zero, so the values and the logits do not change, and nothing is saved on v and o. Quantized
weights are padded with codes equal to the zero point, which decode to exactly 0. In ``o`` the padded columns are inside
each head, so groups must end at the ends of heads; ``grouping`` ensures this.

Axes: h query heads, kv key/value heads, r d_v, d d_qk, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.export import DecoderConfig, LayerDims, QuantizedWeight


def padded_config(config: DecoderConfig) -> DecoderConfig:
    """The same decoder with values as wide as keys in every layer."""
    return config.with_layers([replace(dims, d_v=dims.d_qk) for dims in config.layers])


def pad_dense(tensor: Tensor, name: str, dims: LayerDims) -> Tensor:
    """``v.weight``, ``v.bias`` or ``o.weight`` padded with zeros; other tensors unchanged."""
    missing = dims.d_qk - dims.d_v
    linear, kind = name.rsplit(".", 2)[-2:]
    if linear == "v":
        heads = tensor.reshape(dims.kv_heads, dims.d_v, -1)  # [kv, r, m] or [kv, r, 1]
        rows = F.pad(heads, (0, 0, 0, missing)).flatten(0, 1)
        return rows[:, 0] if kind == "bias" else rows
    if linear == "o" and kind == "weight":
        return _pad_columns(tensor, dims.heads, missing)
    return tensor


def pad_quantized(weight: QuantizedWeight, linear: str, dims: LayerDims) -> QuantizedWeight:
    """``v`` or ``o`` padded with codes that decode to 0; other linears unchanged."""
    grid, missing = weight.grid, dims.d_qk - dims.d_v
    if missing == 0 or linear not in ("v", "o"):
        return weight
    if linear == "v":
        return QuantizedWeight(
            _pad_rows(weight.codes, dims.kv_heads, missing, grid.middle),
            _pad_rows(weight.scale, dims.kv_heads, missing, 1),
            _pad_rows(weight.zero, dims.kv_heads, missing, grid.middle),
            grid,
        )
    if weight.scale.shape[1] == 1:
        rows, heads = weight.codes.shape[0], dims.heads
        silent = weight.zero[:, None].expand(rows, heads, missing)
        codes = torch.cat([weight.codes.view(rows, heads, -1), silent], 2).flatten(1)
        return QuantizedWeight(codes, weight.scale, weight.zero, replace(grid, group_size=-1))
    groups = missing // grid.group_size
    return QuantizedWeight(
        _pad_columns(weight.codes, dims.heads, missing, grid.middle),
        _pad_columns(weight.scale, dims.heads, groups, 1),
        _pad_columns(weight.zero, dims.heads, groups, grid.middle),
        grid,
    )


def _pad_rows(tensor: Tensor, heads: int, missing: int, value: float) -> Tensor:
    """[heads * r, n] -> [heads * d, n]."""
    return F.pad(tensor.view(heads, -1, tensor.shape[1]), (0, 0, 0, missing), value=value).flatten(0, 1)


def _pad_columns(tensor: Tensor, heads: int, missing: int, value: float = 0) -> Tensor:
    """[n, heads * r] -> [n, heads * d]."""
    return F.pad(tensor.view(tensor.shape[0], heads, -1), (0, missing), value=value).flatten(1)
