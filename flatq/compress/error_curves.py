"""Error curves: estimated loss increase for every rank and width of every layer, from one walk over the dense model.

The cost of a value rank is the output energy of the dropped directions. The cost of an MLP width is the accumulated
error of channel elimination. Both are weighted with the Fisher information of the loss at that point of the residual
stream, so that costs of different layers, and of attention and MLP, can be compared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flatq.calibration.block import Block
from flatq.calibration.sensitivity import LENGTH, Sensitivity, weighted
from flatq.calibration.states import AUTO, Execution, pieces
from flatq.calibration.walk import dense_blocks
from flatq.compress.allocate import Curves
from flatq.compress.heads import output_basis
from flatq.compress.mlp import eliminate
from flatq.model.weights import Weights

TOKENS = 8192  # calibration tokens used, in rows of LENGTH; a curve needs fewer tokens than a least-squares fit
MOMENTS = frozenset(("inner",))  # the only Gram that curves need
DEEPEST = 0.9  # largest fraction of a layer's channels that may be removed


def error_curves(
    weights: Weights,
    tokens: Tensor,
    fisher: Sensitivity | Tensor | None,
    work: Path,
    *,
    ridge: float,
    execution: Execution = AUTO,
) -> list[Curves]:
    """Cost of every rank and width of every layer.

    Args:
        tokens: calibration tokens, int64 [n, s]; the first ``TOKENS`` are used.
        fisher: [2 * layers, m, m] from ``output_sensitivity``; None uses unweighted output errors.
        ridge: relative to the mean diagonal of the MLP's Gram.
    """
    blocks = dense_blocks(
        weights, pieces(tokens, LENGTH, TOKENS), work, name="curves", execution=execution, moments=MOMENTS
    )
    found = [_curve(block, None if fisher is None else fisher[n], ridge) for n, block in enumerate(blocks)]
    return [Curves(value, mlp) for value, mlp in zip(found[::2], found[1::2], strict=True)]


def _curve(block: Block, fisher: Tensor | None, ridge: float) -> tuple[float, ...]:
    """Cost of every value rank (attention) or MLP width (MLP) of one block; see ``error_curves``."""
    return _value_curve(block, fisher) if block.half == "attention" else _mlp_curve(block, fisher, ridge)


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
