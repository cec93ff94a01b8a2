"""Ranges of keys and values, for runtimes with an int8 KV cache.

An int8 cache has one fixed scale per channel and head. The magnitude of a key's channel depends on the position,
because the rotary embedding rotates it together with its partner channel. The norm of the pair does not depend on the
position and bounds both channels at every position; so it is the range of both. Values are not rotated.

The ranges are measured on the finished model, half a layer in memory at a time, on a part of the calibration text.

Axes: n rows, s positions, m d_model, kv kv_heads, d d_qk, r d_v.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.artifact import RANGES, Artifact
from flatq.calibration.block import REMEDY
from flatq.calibration.half_layers import send_through
from flatq.calibration.states import embedded
from flatq.calibration.tokens import Tokens
from flatq.errors import NumericsError
from flatq.machine.precision import blocks_in, forward_precision
from flatq.machine.progress import progress
from flatq.model.decoder import DecoderLayer
from flatq.model.weights import HALVES, Weights

TOKENS = 8192  # half as many damage single tokens, twice as many are no better (docs/decisions/0023)
ROWS = 4  # rows per batch


def note_cache_ranges(artifact: Artifact, tokens: Tokens, *, precision: str = "auto", device: str = "cpu") -> None:
    """Measure the ranges on the first rows of the calibration text and write them to the artifact's folder."""
    found = cache_ranges(artifact, ranged(tokens.calibration), precision=precision, device=device)
    artifact.add(RANGES, found)


def ranged(calibration: Tensor) -> Tensor:
    """The rows [n, s] of the calibration tokens that ranges are measured on."""
    return calibration[: max(1, TOKENS // calibration.shape[1])]


def cache_ranges(
    weights: Weights, tokens: Tensor, *, precision: str = "auto", device: str = "cpu"
) -> dict[str, Tensor]:
    """Largest magnitudes of keys and values, valid at every position.

    Args:
        weights: the model that will be deployed.
        tokens: int64 [n, s].
        precision: of the products, see ``precision.forward_precision``.
        device: where half a layer and a few rows are computed.

    Returns:
        ``layers.N.key`` float32 [kv, d], for both channels of a pair the length of the longest pair;
        ``layers.N.value`` float32 [kv, r].

    Raises:
        NumericsError: a key or value is not finite.
    """
    config, found = weights.config, dict[str, Tensor]()
    rows = torch.split(embedded(tokens.cpu(), weights.tensor("embed.weight")), ROWS)  # views, written in place

    def measure(layer: DecoderLayer, half: str, x: Tensor) -> None:
        for part, largest in _largest(layer, x).items() if half == "attention" else ():
            name = f"layers.{layer.index}.{part}"
            found[name] = torch.maximum(found[name], largest) if name in found else largest

    shown = progress("cache ranges", len(config.layers) * len(HALVES))
    with shown as advance, forward_precision(precision, device), blocks_in(precision, device):
        send_through(weights, rows, device=device, seen=measure, on_half=advance)
    for name, largest in found.items():
        if not bool(largest.isfinite().all()):
            raise NumericsError(f"{name}: is not finite on the calibration text; {REMEDY}")
    return found


def _largest(layer: DecoderLayer, x: Tensor) -> dict[str, Tensor]:
    """Ranges of one layer's keys and values for residual streams [n, s, m]."""
    _, key, value = layer.heads(layer.enter("attention", x))
    gains = torch.ones(())
    if layer.config.norm_after_rope:  # the rotation changes no root mean square, so only the gains follow it
        key, gains = F.rms_norm(key, key.shape[-1:], eps=layer.config.norm_eps), layer.k_norm.weight.abs().float().cpu()
    pair = torch.hypot(*key.float().chunk(2, -1)).flatten(0, -3).amax(0)
    values = value.float().abs().flatten(0, -3).amax(0)
    return {"key": torch.cat([pair, pair], -1).cpu() * gains, "value": values.cpu()}
