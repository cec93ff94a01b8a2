"""What narrowing each layer would cost, in closed form: one walk over the dense model.

The cost of a value rank is the output energy of the directions that it drops, that of an MLP width the running cost of
channel elimination; both weighted with the loss's sensitivity at that point of the residual stream, so that the numbers
of all layers and both halves can be compared.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatq import ranks
from flatq.compress.allocate import Curves
from flatq.compress.heads import output_basis
from flatq.compress.mlp import eliminate
from flatq.compress.sensitivity import Sensitivity, weighted
from flatq.feed import WORKING_SET
from flatq.progress import progress
from flatq.walk import Block, walk
from flatq.weights import HALVES, Weights

TOKENS = 8192  # of the calibration tokens: a curve needs fewer than a solve
DEEPEST = 0.9  # share of a layer's channels that may go


def error_curves(
    weights: Weights,
    tokens: Tensor,
    fisher: Sensitivity | Tensor | None,
    work: Path,
    *,
    ridge: float,
    precision: str = "auto",
    states: str = "auto",
    device: str = "cpu",
    working_set: int = WORKING_SET,
) -> list[Curves]:
    """Cost of every rank and width of every layer.

    Args:
        tokens: calibration tokens, int64 [n, s]; the first ``TOKENS`` are used.
        fisher: [2 * layers, m, m] of ``output_sensitivity``; None compares plain output errors.
        ridge: relative to the mean diagonal of the MLP's Gram.
    """
    some = tokens[: max(1, TOKENS // tokens.shape[1])]
    remove_once(work / "curves")  # a killed walk cannot be joined: its curves are gone
    value: list[tuple[float, ...]] = []
    mlp: list[tuple[float, ...]] = []
    settings: dict[str, Any] = {"precision": precision, "states": states, "device": device, "working_set": working_set}
    with progress("curves", len(weights.config.layers) * len(HALVES)) as advance:
        for number, block in enumerate(walk(weights, some, work / "curves", _nothing, **settings)):
            sensitivity = None if fisher is None else fisher[number]
            if block.half == "attention":
                value.append(_value_curve(block, sensitivity))
            else:
                mlp.append(_mlp_curve(block, sensitivity, ridge))
            advance()
    remove_once(work / "curves")
    return [Curves(v, m) for v, m in zip(value, mlp, strict=True)]


def remove_once(folder: Path) -> None:
    """Once, and nobody goes on before it is done."""
    if ranks.first():
        shutil.rmtree(folder, ignore_errors=True)
    ranks.wait()


def _value_curve(block: Block, fisher: Tensor | None) -> tuple[float, ...]:
    gram = block.observe()["inner"].mean()
    _, carried = output_basis(gram, weighted(block.layer.o.weight, fisher), block.dims.kv_heads, block.dims.group)
    return _from_zero(carried.sum(0).flip(0).cumsum(0))


def _mlp_curve(block: Block, fisher: Tensor | None, ridge: float) -> tuple[float, ...]:
    gram = block.observe()["inner"].mean()
    least = int((1 - DEEPEST) * block.dims.d_ff)
    return _from_zero(eliminate(weighted(block.layer.down.weight, fisher), gram, least, ridge).cost)


def _from_zero(cost: Tensor) -> tuple[float, ...]:
    return (0.0, *torch.cummax(cost, 0).values.tolist())


def _nothing(block: Block) -> None:
    """The dense walk keeps nothing."""
