"""Scales of a layer's weights: pairs that multiply each other are brought to one scale, linears of zeros are named.

``up`` times 10^7 with ``down`` times 10^-7 is the same function, but not in float16: group scales, exported float16
matrices and a runtime's activations overflow or vanish. Such a pair is rescaled by a power of two, which changes only
exponents, so the function stays the same to the last bit (unless a number leaves float32).

Pairs: a norm and the linears that read it; ``v`` and ``o``; ``up`` and ``down``; ``q`` and ``k`` unless a norm follows
them. Nothing is done to a pair whose largest weights are both within ``USUAL``, as in every model seen so far.

A factor may also have moved in one channel of a pair: a row of ``up`` is too small for the scale of its group, and the
column of ``down`` hides the other columns of its group. A channel whose two sides are further apart than the median
channel's by ``MOVED`` is brought back first. In Qwen2.5-Coder-0.5B the furthest channel is at 2^4.6, in SmolLM2-135M at
2^1.4.

Axes: c channels, h query heads, kv key/value heads, g = h / kv, r value width, d query width, m model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flatq.model.decoder import PRE_NORM, DecoderLayer

USUAL = (2.0**-12, 2.0**12)  # largest magnitude of a tensor; smaller ones have groups below float16's smallest scale

MOVED = 8  # powers of two that a factor must have to be taken out of a channel


def balance(layer: DecoderLayer, half: str) -> list[str]:
    """Rescale the pairs of a dense half layer, with new parameters in place of the old ones.

    Args:
        layer: with the tensors of this half.
        half: ``attention`` or ``mlp``.

    Returns:
        Sentences for the report: pairs that were rescaled, linears whose weights are all 0.
    """
    notes = _balance_channels(layer, half)
    for first, second in _pairs(layer, half):
        factor = _factor(*([layer.get_parameter(name) for name in names] for names in (first, second)))
        if factor == 1:
            continue
        for names, by in ((first, factor), (second, 1 / factor)):
            for name in names:
                _replace(layer, name, layer.get_parameter(name) * by)
        words = " and ".join("+".join(dict.fromkeys(name.split(".")[0] for name in names)) for names in (first, second))
        notes.append(
            f"{words}: rescaled by 2^{round(math.log2(factor))} and its inverse, to numbers that float16 can hold; "
            "their product is unchanged"
        )
    linears = [(name, module) for name, module in layer.named_children() if isinstance(module, nn.Linear)]
    dead = [name for name, linear in linears if not linear.weight.any()]
    return notes + [f"{name}: DEAD: all its weights are 0 in the source model" for name in dead]


def _replace(layer: DecoderLayer, name: str, value: Tensor) -> None:
    module, leaf = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _balance_channels(layer: DecoderLayer, half: str) -> list[str]:
    """Take factors out of channels; returns sentences for the report."""
    notes = []
    for first, second in _channels(layer, half):
        sides = [_largest(layer, names) for names in (first, second)]
        apart = (sides[1].log2() - sides[0].log2()) / 2  # [c]
        known = apart.isfinite()
        if not known.any():
            continue
        moved = torch.where(known, (apart - apart[known].median()).round(), 0.0)
        moved = torch.where(moved.abs() < MOVED, 0.0, moved)
        if not moved.any():
            continue
        for names, powers in ((first, moved), (second, -moved)):
            for name, shape in names.items():
                tensor = layer.get_parameter(name)
                factors = (2.0**powers).view([size if kept else 1 for size, kept in shape])
                scaled = tensor.float().view([size for size, _ in shape]) * factors
                _replace(layer, name, scaled.view_as(tensor).to(tensor.dtype))
        words = " and ".join(next(iter(names)).split(".")[0] for names in (first, second))
        notes.append(
            f"{words}: {int(moved.count_nonzero())} of {len(moved)} channels rescaled, by up to "
            f"2^{int(moved.abs().max())}, because groups of codes cannot hold them; the products are unchanged"
        )
    return notes


Shape = tuple[tuple[int, bool], ...]  # size of each axis, and whether it numbers the channels


def _channels(layer: DecoderLayer, half: str) -> list[tuple[dict[str, Shape], dict[str, Shape]]]:
    """Tensors of both sides of each pair, seen so that some of their axes number the channels."""
    config, names = layer.config, dict(layer.named_parameters())
    dims, width = config.layers[layer.index], config.d_model

    def rows(linear: str, *axes: tuple[int, bool]) -> dict[str, Shape]:
        found = {f"{linear}.weight": (*axes, (width, False)), f"{linear}.bias": axes}
        return {name: shape for name, shape in found.items() if name in names}

    if half == "mlp":
        return [(rows("up", (dims.d_ff, True)), {"down.weight": ((width, False), (dims.d_ff, True))})]
    heads, inside = (dims.kv_heads, True), (dims.d_v, True)
    o: dict[str, Shape] = {"o.weight": ((width, False), heads, (dims.group, False), inside)}
    found = [(rows("v", heads, inside), o)]
    if not config.qk_norm:  # the two rows of a rotary pair, half a head apart, have one factor
        pair = ((2, False), (dims.d_qk // 2, True))
        found.append((rows("q", heads, (dims.group, False), *pair), rows("k", heads, *pair)))
    return found


def _largest(layer: DecoderLayer, names: dict[str, Shape]) -> Tensor:
    """Largest magnitude of each channel, float32 [c]."""
    found = []
    for name, shape in names.items():
        seen = layer.get_parameter(name).detach().abs().float().view([size for size, _ in shape])
        others = [axis for axis, (_, kept) in enumerate(shape) if not kept]
        found.append((seen.amax(others) if others else seen).flatten())
    return torch.stack(found).amax(0)


def _pairs(layer: DecoderLayer, half: str) -> list[tuple[list[str], list[str]]]:
    """Names of the parameters whose product is the function; a linear's bias goes with the rows of its weight."""
    config, names = layer.config, dict(layer.named_parameters())

    def rows(linear: str) -> list[str]:
        return [name for name in (f"{linear}.weight", f"{linear}.bias") if name in names]

    readers = ("q", "k", "v") if half == "attention" else ("gate", "up", *(["router"] if config.experts else []))
    pairs = [(rows("up"), ["down.weight"])] if half == "mlp" else [(rows("v"), ["o.weight"])]
    if half == "attention" and not config.qk_norm:
        pairs.append((rows("q"), rows("k")))
    norm = f"{PRE_NORM[half]}.weight"
    if config.pre_norms and not _usual(names[norm]):  # else what is unusual lies between the linears
        pairs.insert(0, ([norm], [f"{name}.weight" for name in readers]))
    return pairs


def _usual(tensor: Tensor) -> bool:
    return USUAL[0] <= float(tensor.detach().abs().amax()) <= USUAL[1]


def _factor(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Power of two for ``one``, so that both have the same largest weight; 1 if there is nothing to be gained."""
    largest = [max(float(tensor.detach().abs().amax()) for tensor in part) for part in (one, other)]
    if min(largest) == 0 or not all(map(math.isfinite, largest)):  # the solver names what is not finite
        return 1.0
    if all(USUAL[0] <= size <= USUAL[1] for size in largest):
        return 1.0
    return float(2.0 ** round(math.log2(largest[1] / largest[0]) / 2))
