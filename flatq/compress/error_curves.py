"""Error curves: estimated loss increase for every rank and width of every layer, from one walk over the dense model.

The cost of a value rank is the output energy of the dropped directions. The cost of an MLP width is the accumulated
error of channel elimination. Both are weighted with the Fisher information of the loss at that point of the residual
stream, so that costs of different layers, and of attention and MLP, can be compared.

Refits are least squares in hundreds of dimensions on a few thousand tokens, so on the tokens that they are fitted on
their error is up to half of that on others. That matters little between widths, and much beside the errors of bits:
with ``held_out`` both halves are judged on rows that the fit did not see, as bits are (docs/decisions/0042).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatq.calibration.block import Block
from flatq.calibration.grams import Gram
from flatq.calibration.sensitivity import LENGTH, Sensitivity, weighted
from flatq.calibration.states import AUTO, Execution, pieces
from flatq.calibration.walk import dense_blocks
from flatq.compress.allocate import Curves
from flatq.compress.heads import output_basis, refit_output, spread_over_queries
from flatq.compress.mlp import Elimination, eliminate, nystroem
from flatq.linalg import shrunk
from flatq.machine.precision import forward_precision
from flatq.model.weights import Weights

TOKENS = 8192  # calibration tokens used, in rows of LENGTH; a curve needs fewer tokens than a least-squares fit
MOMENTS = frozenset(("inner",))  # the only Gram that curves need
DEEPEST = 0.9  # largest fraction of a layer's channels that may be removed
PARTS = 4  # of the rows; the last part is held out
SHRINKAGE = 0.1  # of the Gram that is fitted on with ``held_out``: the flat stage's default
TINY = 1e-30  # least cost that an error is compared with
JUDGED = (1 / 16, 1 / 4, 1 / 2, 1.0)  # fractions of the deepest cut that are judged on held-out rows


def error_curves(
    weights: Weights,
    tokens: Tensor,
    fisher: Sensitivity | Tensor | None,
    work: Path,
    *,
    ridge: float,
    held_out: bool = False,
    execution: Execution = AUTO,
) -> list[Curves]:
    """Cost of every rank and width of every layer.

    Args:
        tokens: calibration tokens, int64 [n, s]; the first ``TOKENS`` are used.
        fisher: [2 * layers, m, m] from ``output_sensitivity``; None uses unweighted output errors.
        ridge: relative to the mean diagonal of the MLP's Gram.
        held_out: fit on the first three quarters of the rows, and judge on the last.
    """
    length = min(LENGTH, max(1, tokens.shape[1] // PARTS)) if held_out and len(tokens) < PARTS else LENGTH
    some = pieces(tokens, length, TOKENS)
    blocks = dense_blocks(weights, some, work, name="curves", execution=execution, moments=MOMENTS)
    curve = partial(_held_out_curve if held_out else _curve, ridge=ridge)
    found = [curve(block, None if fisher is None else fisher[n]) for n, block in enumerate(blocks)]
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


def _held_out_curve(block: Block, fisher: Tensor | None, ridge: float) -> tuple[float, ...]:
    """The same, fitted and judged on different rows."""
    fitted, judged = _split(block)
    gram = shrunk(fitted, SHRINKAGE)
    if block.half == "attention":
        return _held_out_values(block, gram, judged, weighted(block.layer.o.weight, fisher))
    return _held_out_mlp(block, gram, judged, weighted(block.layer.down.weight, fisher), ridge)


def _held_out_values(block: Block, gram: Tensor, judged: Tensor, o: Tensor) -> tuple[float, ...]:
    dims = block.dims
    encode, carried = output_basis(gram, o, dims.kv_heads, dims.group)

    def error(removed: int) -> float:
        kept = encode[..., : dims.d_v - removed]
        if removed == dims.d_v:
            return _energy(o, judged)
        spread = spread_over_queries(kept, dims.group).to(o.dtype)
        return _energy(o - refit_output(o, gram, kept, dims.group) @ spread.T, judged)

    return _grown(carried.sum(0).flip(0).cumsum(0), error)


def _held_out_mlp(block: Block, gram: Tensor, judged: Tensor, down: Tensor, ridge: float) -> tuple[float, ...]:
    found = eliminate(down, gram, int((1 - DEEPEST) * block.dims.d_ff), ridge)

    def error(removed: int) -> float:
        keep = Elimination(found.order[:removed], found.cost[:removed]).kept(len(gram))
        change = down.clone()
        change[:, keep] -= nystroem(down, gram, keep)
        return _energy(change, judged)

    return _grown(found.cost, error)


def _grown(cost: Tensor, error: Callable[[int], float]) -> tuple[float, ...]:
    """A curve times the ratio of the error on held-out rows to it, which is measured at ``JUDGED`` and interpolated.

    Args:
        cost: on the fitted rows, by the number that is removed, from 1.
        error: on the held-out rows.
    """
    cuts = sorted({max(1, round(part * len(cost))) for part in JUDGED})
    ratios = [error(cut) / max(float(cost[cut - 1]), TINY) for cut in cuts]
    return _from_zero(cost * torch.from_numpy(np.interp(range(1, len(cost) + 1), cuts, ratios)).to(cost))


def _energy(change: Tensor, gram: Tensor) -> float:
    """Mean square of the output ``x D^T`` for a matrix D, [m, i], and the second moment of x, [i, i]."""
    return float(((change @ gram.to(change)) * change).sum(dtype=torch.float64))


def _split(block: Block) -> tuple[Tensor, Tensor]:
    """Second moments of the inner activation, [i, i]: of the rows that are fitted on, and of those that are judged."""
    whole, rows = block.observe()["inner"], block.inputs()
    held = rows[len(rows) - max(1, len(rows) // PARTS) :]
    judged = Gram(len(whole.total[0]), device=block.device)
    with forward_precision(block.precision, block.device):
        for batch in held.split(max(1, block.feed.batch_tokens // rows.shape[1])):
            judged.update(block.activations(batch.to(block.device, torch.float32))["inner"])
    block.feed.forget()
    fitted = (whole.total[0] - judged.total[0].to(whole.total)) / (whole.count - judged.count)
    return fitted, judged.mean().to(fitted)


def _from_zero(cost: Tensor) -> tuple[float, ...]:
    return (0.0, *torch.cummax(cost, 0).values.tolist())
