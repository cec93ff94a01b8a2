"""The loop that everything here shares: every half layer in order, and all text through each of them.

A model that does not fit into memory is read half a layer at a time, so the loop is turned inside out: not "for each
text, all layers" but "for each half layer, all texts". Each weight is read once.

Axes: b rows, s positions, m d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from flatq.model.decoder import DecoderLayer, locate
from flatq.model.weights import Weights, halves, load_half

Seen = Callable[[DecoderLayer, str, Tensor], object]


def half_layers(
    weights: Weights, *, device: str = "cpu", start: int = 0, backwards: bool = False
) -> Iterator[tuple[int, int, str, DecoderLayer]]:
    """Every half layer, read when its turn comes: its number, its layer's index, ``attention`` or ``mlp``, and itself.

    Args:
        weights: a source or an artifact.
        device: where the half layers go.
        start: number of the first one; those before it are not read.
        backwards: from the last one to ``start``.
    """
    order = list(enumerate(halves(weights.config)))[start:]
    for number, (index, half) in reversed(order) if backwards else order:
        yield number, index, half, load_half(weights, index, half, device=device)


def send_through(
    weights: Weights,
    chunks: Sequence[Tensor],
    *,
    device: str = "cpu",
    seen: Seen | None = None,
    on_half: Callable[[], object] | None = None,
) -> None:
    """Send embeddings through all layers, in place.

    Args:
        weights: a source or an artifact.
        chunks: rows that are computed together, each float32 [b, s, m] in main memory; become the residual stream
            after the last layer.
        device: where half a layer and one chunk are computed.
        seen: called with each half layer and what enters it, before it is computed.
        on_half: called after each half layer, ``2 * layers`` times, for a progress bar.
    """
    for _, _, half, layer in half_layers(weights, device=device):
        for chunk in chunks:
            x = chunk.to(device)
            if seen is not None:
                seen(layer, half, x)
            chunk.copy_(layer.run(half, x, locate(weights.config, x.shape[0], x.shape[1], device=x.device)))
        if on_half is not None:
            on_half()
