"""GPTQ: round one input column after another, and let the columns still to come make up for each rounding.

Choices, with their numbers in docs/decisions/0008 and 0009:

- The scale of a group matters more than the order of its columns, so the clip factor of every group is searched by
  squared error weighted with the column's activation energy.
- Groups are static: scales are fixed before the first column is rounded. Columns can then be visited by descending
  activation energy (``act_order``) and still be stored in their own order, which every export format needs.
- All linears that read the same activation (q, k, v; gate, up) are solved in one call, their rows stacked.
- Columns pass on their errors by the factors of the Gram itself, ``H = (I + U) D (I + U)^T``: column i is rounded with
  ``sum over j before i of (w_j - q_j) U_ji`` added, which is what GPTQ's updates by the inverse's factor amount to.
  There is nothing to invert, so float32 is enough, and what is lost is known at the end: ``sum of D_i r_i^2`` over
  the roundings r.

Axes: o out_features, i in_features, G groups.
Source: GPTQ (arXiv 2210.17323), Algorithm 1, sections 3.2 and 3.3 (lazy batches, Cholesky);
QuIP (arXiv 2307.13304), section 3 (LDLQ, and that it is the same).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatq.calibration.grams import finite
from flatq.errors import NumericsError
from flatq.linalg import has_factor_, submatrix
from flatq.model.grid import Grid, QuantizedWeight

WEIGHTS_AT_ONCE = 1 << 24  # weights in the working set of a solve: 64 MiB each of rest, scales, zeros, codes
DAMPING_LADDER = (1.0, 10.0, 100.0)  # multiples of the asked damping, tried in turn when the solve breaks down


@dataclass(frozen=True, slots=True, eq=False)
class GptqResult:
    """What came out.

    Attributes:
        weight: codes, scales and zeros.
        lost, total: energy of the output's change and of the output itself on the calibration tokens, float64 [o].
        dead: input columns that never carried anything; they keep their nearest codes.
        damping: relative damping that the solve needed; None if every step of the ladder failed and the weight was
            rounded to nearest instead, which the caller must report.
    """

    weight: QuantizedWeight
    lost: Tensor
    total: Tensor
    dead: int
    damping: float | None

    def error_of(self, rows: slice = slice(None)) -> float:
        """Share of the output's energy that is lost in some of the rows."""
        total = float(self.total[rows].sum())
        return max(0.0, float(self.lost[rows].sum())) / total if total > 0 else 0.0


def gptq(
    w: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    clip_search: bool = True,
    block_size: int = 64,
    at_once: int = WEIGHTS_AT_ONCE,
) -> GptqResult:
    """Quantize a weight so that its outputs on the calibration tokens change least.

    Args:
        w: [o, i].
        gram: second moment of the inputs, [i, i].
        damping: added to the diagonal, relative to its mean over live columns.
        act_order: visit columns by descending energy.
        clip_search: search the scale of each group; else it covers the group's largest weight.
        block_size: columns whose corrections are applied one by one; the rest follows in one product.
        at_once: weights in the working set: so many are solved together, whole rows and at least one.

    Raises:
        NumericsError: the weight or the Gram is not finite.
    """
    if not (finite(w) and finite(gram)):
        raise NumericsError("GPTQ: the weight or the second moment of its inputs is not finite")
    energy = gram.diagonal().clamp(min=0).float()
    feedback = _feedback(gram, energy == 0, _order(energy, act_order), damping)
    # A row's codes depend on no other row: a large weight is solved a few rows at a time.
    parts = []
    for some in w.split(max(1, at_once // w.shape[1])):
        rows = some.float().T.contiguous().T  # [o, i], a column contiguous: everything below goes column by column
        scale, zero = grid.fit(rows, importance=energy, search=clip_search)
        weight, lost = _rounded(rows, gram, feedback, scale, zero, grid, block_size)
        parts.append((weight.codes, weight.scale, weight.zero, lost, _energy(rows, gram)))
    codes, scale, zero, lost, total = (torch.cat(part) for part in zip(*parts, strict=True))
    used = None if feedback is None else feedback.damping
    return GptqResult(QuantizedWeight(codes, scale, zero, grid), lost, total, int((energy == 0).sum()), used)


def _rounded(
    w: Tensor,
    gram: Tensor,
    feedback: Feedback | None,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    block_size: int,
) -> tuple[QuantizedWeight, Tensor]:
    """Some rows in codes, and the energy that each loses, float64 [o]; to nearest where there are no factors."""
    lost = None
    if feedback is None:
        codes = grid.encode(w, *(grid.spread(part, w.shape[1]) for part in (scale, zero)))
    else:
        codes, lost = _sweep(w, feedback, scale, zero, grid, block_size)
    weight = QuantizedWeight(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), grid)
    return weight, _energy(w - weight.dequantize(), gram) if lost is None else lost


def _energy(w: Tensor, h: Tensor) -> Tensor:
    """Mean square of each output row, [o, i] on [i, i] -> float64 [o]."""
    return ((h @ w.T.to(h.dtype)) * w.T).sum(0, dtype=torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """How columns make up for each other: ``H = (I + U) D (I + U)^T`` in visiting order, U strictly upper.

    Attributes:
        order: the column that is visited i-th, int64 [i].
        share: U, what column i takes over of the error of column j, float32 [j, i]; anything on and below the diagonal.
        price: D, what a square of the error that is left costs, float32 [i].
        added: to the diagonal of the Gram, float32 [i].
        damping: relative damping that it took.
    """

    order: Tensor
    share: Tensor
    price: Tensor
    added: Tensor
    damping: float


def _order(energy: Tensor, act_order: bool) -> Tensor:
    """In which order columns are visited, int64 [i]."""
    if not act_order:
        return torch.arange(len(energy), device=energy.device)
    return torch.argsort(energy, descending=True, stable=True)


def _feedback(gram: Tensor, dead: Tensor, order: Tensor, damping: float) -> Feedback | None:
    """The factors of the damped Gram, or None if no damping of the ladder makes it positive."""
    if bool(dead.all()):
        return None
    # Back to front, H = L L^T; read from the back, L is the upper factor.
    backwards = order.flip(0)
    permuted = submatrix(gram, backwards)
    added = torch.where(dead, 1.0, 0.0)[backwards]  # a dead one correlates with nothing: any positive number will do
    mean = float(gram.diagonal()[~dead].double().mean())
    for rung in DAMPING_LADDER:
        for dtype in (torch.float32, torch.float64):
            work = permuted.to(dtype, copy=True).mT  # its columns are contiguous: factored in place
            shift = ((added + damping * rung) * mean).to(dtype)
            work.diagonal().add_(shift)
            if has_factor_(work, must=False) and finite(work):
                diagonal = work.diagonal().clone()
                share = work.div_(diagonal).float().flip(0, 1)
                return Feedback(order, share, diagonal.float().square().flip(0), shift.float().flip(0), damping * rung)
    return None


@torch.inference_mode()  # half of the time of a narrow weight's sweep was spent on bookkeeping for gradients
def _sweep(
    w: Tensor, feedback: Feedback, scale: Tensor, zero: Tensor, grid: Grid, block_size: int
) -> tuple[Tensor, Tensor]:
    """Codes of every column in stored order, uint8 [o, i], and the energy that is lost, float64 [o].

    When its turn comes, a column takes over its share of the errors of all columns before it (their sum is a product
    of a matrix and a vector within a block, of two matrices for earlier blocks), is rounded, and its own whole error,
    that of the rounding and what it took over, takes its place.
    """
    order, share = feedback.order, feedback.share
    rest = w.T[order]  # [i, o]: a column of the weight is a row here
    group = grid.group_index(w.shape[1], w.device)[order]
    parts = [part.T.clone(memory_format=torch.contiguous_format) for part in (scale, -zero, grid.levels - zero)]
    scales, lowest, highest = (part.unbind() for part in parts)
    codes = torch.empty_like(rest)
    lost = torch.zeros(w.shape[0], dtype=torch.float64, device=w.device)
    for start in range(0, len(rest), block_size):
        block = slice(start, min(start + block_size, len(rest)))
        whole, earlier = rest[block], slice(start)
        value, errors = torch.addmm(whole, share[earlier, block].T, rest[earlier]), torch.zeros_like(whole)
        shares, before = share[block, block].T.contiguous(), errors.T  # those to come are still 0
        columns = zip(*(x.unbind() for x in (whole, value, errors, codes[block], shares)), strict=True)
        for g, (column, here, error, code, taken) in zip(group[block].tolist(), columns, strict=True):
            here.addmv_(before, taken)
            torch.div(here, scales[g], out=code).round_().clamp_(lowest[g], highest[g])
            torch.addcmul(column, code, scales[g], value=-1, out=error)
        value += errors
        value -= whole  # what its own rounding has done to each column
        rest[block] = errors
        lost += (value.square_() * feedback.price[block, None]).sum(0, dtype=torch.float64)
        lost -= (errors.square_() * feedback.added[block, None]).sum(0, dtype=torch.float64)
    codes -= parts[1][group]
    stored = torch.empty_like(codes, dtype=torch.uint8)
    stored[order] = codes.to(torch.uint8)
    return stored.T, lost
