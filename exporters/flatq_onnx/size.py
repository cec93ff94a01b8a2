"""Size of an export from shapes alone, so that a plan can name it before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from flatq.decoder import LINEARS, DecoderConfig
from flatq.quantize.grid import Grid
from flatq_onnx.blocks import Blocks
from flatq_onnx.options import OnnxOptions

FLOAT_BYTES = 4
LAYER_GRAPH_BYTES = 5300  # nodes, names and shapes of a layer in the protobuf file, as measured
ENDS_GRAPH_BYTES = 8000


def estimated_bytes(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> int:
    """Bytes of all files that an export with these options has."""
    used = grids if options.precision == "int4" else {}
    layers = sum(_layer_bytes(config, index, used, options) for index in range(len(config.layers)))
    return layers + _ends_bytes(config, used, options) + ENDS_GRAPH_BYTES


def _layer_bytes(config: DecoderConfig, index: int, grids: Mapping[str, Grid], options: OnnxOptions) -> int:
    dims = config.layers[index]
    total = LAYER_GRAPH_BYTES + 2 * config.d_model * FLOAT_BYTES
    total += 2 * dims.d_qk * FLOAT_BYTES if config.qk_norm else 0
    for linear in LINEARS:
        rows, columns = dims.shape(linear, config.d_model)
        if linear == "v" and options.attention == "gqa":
            rows = dims.kv_heads * dims.d_qk
        total += matrix_bytes(rows, columns, grids.get(f"layers.{index}.{linear}"))
        total += rows * FLOAT_BYTES if config.has_bias(linear) else 0
    return total


def _ends_bytes(config: DecoderConfig, grids: Mapping[str, Grid], options: OnnxOptions) -> int:
    """Embedding, head, final norm and rotary tables."""
    table = config.vocab, config.d_model
    total = config.d_model * FLOAT_BYTES + matrix_bytes(*table, grids.get("embed"), lookup=True)
    if not config.tied_head:
        total += matrix_bytes(*table, grids.get("head"))
    if options.fused_rope:
        total += (options.context_length or config.max_positions) * config.layers[0].d_qk * FLOAT_BYTES
    return total


def matrix_bytes(rows: int, columns: int, grid: Grid | None, *, lookup: bool = False) -> int:
    """Bytes of one matrix in the file."""
    if grid is None:
        return prod((rows, columns, FLOAT_BYTES))
    return Blocks.of(grid, rows, columns, lookup=lookup).nbytes
