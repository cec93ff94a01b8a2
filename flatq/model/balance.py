"""Scales of a layer's weights: pairs that multiply each other are brought to one scale, linears of zeros are named.

``up`` times 10^7 with ``down`` times 10^-7 is the same function, but not in float16: group scales, exported float16
matrices and a runtime's activations overflow or vanish. Such a pair is rescaled by a power of two, which changes only
exponents, so the function stays the same to the last bit (unless a number leaves float32).

Pairs: a norm and the linears that read it; ``v`` and ``o``; ``up`` and ``down``; ``q`` and ``k`` unless a norm follows
them. Nothing is done to a pair whose largest weights are both within ``USUAL``, as in every model seen so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from flatq.model.decoder import PRE_NORM, DecoderLayer

USUAL = (2.0**-12, 2.0**12)  # largest magnitude of a tensor; smaller ones have groups below float16's smallest scale


def balance(layer: DecoderLayer, half: str) -> list[str]:
    """Rescale the pairs of a dense half layer, with new parameters in place of the old ones.

    Args:
        layer: with the tensors of this half.
        half: ``attention`` or ``mlp``.

    Returns:
        Sentences for the report: pairs that were rescaled, linears whose weights are all 0.
    """
    notes = []
    for first, second in _pairs(layer, half):
        factor = _factor(*([layer.get_parameter(name) for name in names] for names in (first, second)))
        if factor == 1:
            continue
        for names, by in ((first, factor), (second, 1 / factor)):
            for name in names:
                module, leaf = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                module.register_parameter(leaf, nn.Parameter(layer.get_parameter(name) * by, requires_grad=False))
        words = " and ".join("+".join(dict.fromkeys(name.split(".")[0] for name in names)) for names in (first, second))
        notes.append(
            f"{words}: rescaled by 2^{round(math.log2(factor))} and its inverse, to numbers that float16 can hold; "
            "their product is unchanged"
        )
    linears = [(name, module) for name, module in layer.named_children() if isinstance(module, nn.Linear)]
    dead = [name for name, linear in linears if not linear.weight.any()]
    return notes + [f"{name}: DEAD: all its weights are 0 in the source model" for name in dead]


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
