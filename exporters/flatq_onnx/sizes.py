"""Size of an export from shapes alone, for ``flatq plan``."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from flatq.export import LINEARS, DecoderConfig, Grid, LayerDims
from flatq_onnx.options import OnnxOptions
from flatq_onnx.tensors import Blocks

LAYER_GRAPH_BYTES = 6700  # nodes, names, shapes of a layer, metadata: at most, measured with two-digit layer numbers
ZEROS_GRAPH_BYTES = 60  # name and shape of the zero points of a linear
ROUTING_GRAPH_BYTES = 2500  # nodes and names of the routing of a layer
BRANCH_GRAPH_BYTES = 2200  # additional bytes for the branches of a layer with an int8 cache
ENDS_GRAPH_BYTES = 8000


def estimated_bytes(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> int:
    """Bytes of all files of an export."""
    used = grids if options.precision == "int4" else {}
    layers = sum(_layer_bytes(config, index, used, options) for index in range(len(config.layers)))
    return layers + _ends_bytes(config, used, options) + ENDS_GRAPH_BYTES


def _layer_bytes(config: DecoderConfig, index: int, grids: Mapping[str, Grid], options: OnnxOptions) -> int:
    dims, number = config.layers[index], _number_bytes(options)
    norms = 2 * config.d_model * (config.pre_norms + config.post_norms) + sum(config.qk_norm_widths(dims))
    total = LAYER_GRAPH_BYTES + norms * number + 4 * config.experts * config.d_model
    total += ROUTING_GRAPH_BYTES + 8 * dims.d_ff if config.experts else 0
    if options.cache_type == "int8":
        total += BRANCH_GRAPH_BYTES + 2 * dims.kv_heads * dims.d_qk * 4
    for linear in LINEARS:
        rows, columns = _shape(dims, linear, config.d_model, options)
        grid = grids.get(f"layers.{index}.{linear}")
        total += matrix_bytes(rows, columns, grid, number)
        total += 0 if grid is None or grid.symmetric else ZEROS_GRAPH_BYTES
        total += rows * number if config.has_bias(linear) else 0
    return total


def _shape(dims: LayerDims, linear: str, d_model: int, options: OnnxOptions) -> tuple[int, int]:
    """Shape of a linear in the file: GroupQueryAttention has value heads as wide as keys."""
    rows, columns = dims.shape(linear, d_model)
    return (dims.kv_heads * dims.d_qk if linear == "v" and options.attention == "gqa" else rows), columns


def stored_bytes(config: DecoderConfig, stem: str, grid: Grid | None, options: OnnxOptions) -> int:
    """Bytes of one matrix of an export; of the embedding those of its lookup."""
    used, number = (grid if options.precision == "int4" else None), _number_bytes(options)
    if stem in ("embed", "head"):
        return matrix_bytes(config.vocab, config.d_model, used, number, lookup=stem == "embed")
    _, index, linear = stem.split(".")
    return matrix_bytes(*_shape(config.layers[int(index)], linear, config.d_model, options), used, number)


def cached_bytes(config: DecoderConfig, index: int, context: int, options: OnnxOptions) -> int:
    """Bytes of the KV cache of a layer in the export's type; GroupQueryAttention caches values as wide as keys."""
    dims, window = config.layers[index], config.kind(index).window
    width = dims.d_qk + (dims.d_qk if options.attention == "gqa" else dims.d_v)
    number = 1 if options.cache_type == "int8" else _number_bytes(options)
    return (context if window is None else min(context, window)) * dims.kv_heads * width * number


def _ends_bytes(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> int:
    """Embedding, head, final norm and rotary tables."""
    table, number = (config.vocab, config.d_model), _number_bytes(options)
    total = config.d_model * number + matrix_bytes(*table, grids.get("embed"), number, lookup=True)
    if not config.tied_head:
        total += matrix_bytes(*table, grids.get("head"), number)
    if options.fused_rope:
        tables = len({kind.rope for kind in config.kinds} - {None})
        total += tables * options.positions(config) * config.layers[0].d_qk * number
    return total


def matrix_bytes(rows: int, columns: int, grid: Grid | None, number: int, *, lookup: bool = False) -> int:
    """Bytes of one matrix; ``number`` bytes per unquantized weight and per scale that is not stored as float16."""
    if grid is None:
        return prod((rows, columns, number))
    blocks = Blocks.of(grid, rows, columns, lookup=lookup)
    return blocks.nbytes(2 if blocks.folds else number)


def _number_bytes(options: OnnxOptions) -> int:
    return 2 if options.activations == "fp16" else 4
