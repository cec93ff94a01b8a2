"""The common loop over a model: all half layers in order, and all text through each of them.

A model may not fit into memory, so it is read half a layer (attention or MLP) at a time. The loop runs over half layers
outside and over texts inside, so that each weight is read once.

Axes: b rows, s positions, m d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flatq.model.decoder import DecoderLayer, locate
from flatq.model.weights import Weights, halves, load_half

Seen = Callable[[DecoderLayer, str, Tensor], object]


def half_layers(
    weights: Weights,
    *,
    device: str = "cpu",
    start: int = 0,
    backwards: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, int, str, DecoderLayer]]:
    """Read every half layer in order and yield (number, layer index, ``attention`` or ``mlp``, half layer).

    Args:
        weights: a source or an artifact.
        device: where the half layers are loaded.
        start: number of the first half layer; those before it are not read.
        backwards: in reverse order, from the last one to ``start``.
        dtype: of the weights in memory.
    """
    order = list(enumerate(halves(weights.config)))[start:]
    for number, (index, half) in reversed(order) if backwards else order:
        yield number, index, half, load_half(weights, index, half, dtype=dtype, device=device)


def send_through(
    weights: Weights,
    chunks: Sequence[Tensor],
    *,
    device: str = "cpu",
    seen: Seen | None = None,
    on_half: Callable[[], object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Run embeddings through all layers, in place.

    Args:
        weights: a source or an artifact.
        chunks: batches, each float32 [b, s, m] in main memory; overwritten with the residual stream after the last
            layer.
        device: where half a layer and one chunk are computed.
        seen: called with each half layer and its input [b, s, m], before it is computed.
        on_half: called after each half layer, ``2 * layers`` times, for a progress bar.
        dtype: of the chunks and of the arithmetic, float32 or float64.
    """
    for _, _, half, layer in half_layers(weights, device=device, dtype=dtype):
        for chunk in chunks:
            x = chunk.to(device)
            if seen is not None:
                seen(layer, half, x)
            chunk.copy_(
                layer.run(half, x, locate(weights.config, x.shape[0], x.shape[1], device=x.device, dtype=dtype))
            )
        if on_half is not None:
            on_half()
