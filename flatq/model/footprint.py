"""Size of a model: bytes stored, and bytes read from memory per decoded token.

Decoding one token at batch size 1 reads every weight and the whole KV cache once. On current hardware this is bound by
memory bandwidth, not by arithmetic. So a byte of cache costs as much as a byte of weights, and a narrower value head
saves both.

Counted: the artifact's tensors as they are deployed (codes at their bits, float16 scales, packed zeros). Not counted:
activations, and the single row that is read from an untied embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flatq.model.decoder import LINEARS, DecoderConfig
from flatq.model.dims import LayerDims
from flatq.model.grid import Grid
from flatq.model.names import Stem

CACHE_ITEM = 2  # bytes of a cached number: float16, as in llama.cpp and all GPU servers
Grids = Mapping[str, Grid]


def matrix_bytes(shape: tuple[int, int], grid: Grid | None, itemsize: int) -> int:
    """Bytes of an [out, in] matrix, quantized if it has a grid, else ``itemsize`` bytes per number."""
    return grid.stored_bytes(*shape) if grid else math.prod(shape) * itemsize


def layer_bytes(config: DecoderConfig, grids: Grids, itemsize: int, index: int, dims: LayerDims) -> int:
    """Bytes of the linears of layer ``index`` at the widths ``dims``, biases and the router of experts included."""
    shapes = {name: dims.shape(name, config.d_model) for name in LINEARS}
    biases = sum(shapes[name][0] for name in LINEARS if config.has_bias(name))
    router = config.experts * config.d_model
    return (biases + router) * itemsize + sum(
        matrix_bytes(shape, grids.get(str(Stem(index, name))), itemsize) for name, shape in shapes.items()
    )


def table_bytes(config: DecoderConfig, grids: Grids, itemsize: int, name: str) -> int:
    """Bytes of the table ``embed`` or ``head``; a tied head is the embedding."""
    return matrix_bytes((config.vocab, config.d_model), grids.get("embed" if config.tied_head else name), itemsize)


def norm_bytes(config: DecoderConfig, itemsize: int) -> int:
    """Bytes of all norms."""
    return itemsize * config.norm_parameters()


def ends_bytes(config: DecoderConfig, grids: Grids, itemsize: int) -> int:
    """Bytes that do not depend on the widths of layers: embedding, head and norms."""
    tables = ("embed",) if config.tied_head else ("embed", "head")
    return norm_bytes(config, itemsize) + sum(table_bytes(config, grids, itemsize, name) for name in tables)


def weight_bytes(config: DecoderConfig, grids: Grids, itemsize: int) -> int:
    """Bytes of all tensors, equal to ``Artifact.bytes`` of the finished artifact.

    Args:
        config: widths of the model.
        grids: of quantized weights, by stem (``layers.0.q``, ``embed``).
        itemsize: bytes of an unquantized number.
    """
    layers = sum(layer_bytes(config, grids, itemsize, i, dims) for i, dims in enumerate(config.layers))
    return layers + ends_bytes(config, grids, itemsize)


def cache_bytes(config: DecoderConfig, index: int, dims: LayerDims, context: int, itemsize: int = CACHE_ITEM) -> int:
    """KV cache bytes of layer ``index`` for ``context`` tokens, or for its sliding window if that is smaller."""
    window = config.kind(index).window
    seen = context if window is None else min(context, window)
    return seen * dims.kv_heads * (dims.d_qk + dims.d_v) * itemsize


def decode_ends_bytes(config: DecoderConfig, grids: Grids, itemsize: int) -> int:
    """Bytes read per decoded token outside the layers: head and norms."""
    return norm_bytes(config, itemsize) + table_bytes(config, grids, itemsize, "head")


def decode_bytes(config: DecoderConfig, grids: Grids, itemsize: int, context: int) -> int:
    """Bytes read to decode one token with ``context`` tokens in the cache."""
    layers = sum(
        layer_bytes(config, grids, itemsize, i, dims) + cache_bytes(config, i, dims, context)
        for i, dims in enumerate(config.layers)
    )
    return layers + decode_ends_bytes(config, grids, itemsize)
