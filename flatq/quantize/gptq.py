"""GPTQ: round the input columns one by one; the columns not yet rounded compensate for each rounding error.

Choices, with their numbers in docs/decisions/0008 and 0009:

- The scale of a group matters more than the order of its columns, so the clip factor of every group is searched by
  squared error weighted with the column's activation energy.
- Groups are static: scales are fixed before the first column is rounded. Columns can then be visited by descending
  activation energy (``act_order``) and still be stored in their own order, which every export format needs.
- All linears that read the same activation (q, k, v; gate, up) are solved in one call, their rows stacked.
- Errors are propagated with the factors of the Gram itself, ``H = (I + U) D (I + U)^T``: column i is rounded after
  ``sum over j before i of (w_j - q_j) U_ji`` is added, which is equivalent to GPTQ's updates with the Cholesky factor
  of the inverse. No matrix is inverted, so float32 is enough, and the total output error follows directly:
  ``sum of D_i r_i^2`` over the rounding errors r.

Axes: o out_features, i in_features, G groups.
Source: GPTQ (arXiv 2210.17323), Algorithm 1, sections 3.2 and 3.3 (lazy batches, Cholesky);
QuIP (arXiv 2307.13304), section 3 (LDLQ, and its equivalence to GPTQ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatq.calibration.grams import finite
from flatq.errors import NumericsError
from flatq.linalg import has_factor_, submatrix
from flatq.model.grid import Grid, QuantizedWeight, unheld

WEIGHTS_AT_ONCE = 1 << 24  # weights that are quantized at once: 64 MiB each for residuals, scales, zeros, codes
PARTS = ("codes", "scale", "zero")
DAMPING_LADDER = (1.0, 10.0, 100.0)  # multiples of the requested damping, tried in turn if the factorization fails


@dataclass(frozen=True, slots=True, eq=False)
class GptqResult:
    """A quantized weight and its error.

    Attributes:
        weight: codes, scales and zeros.
        lost, total: mean square of the output error and of the output on the calibration tokens, float64 [o].
        dead: number of input columns that were always 0; they are rounded to nearest.
        damping: relative damping that was used; None if every step of the ladder failed and the weight was rounded to
            nearest instead, which the caller must report.
        unheld: what float16 scales cannot hold of the weight, in words; such a result must not be used.
    """

    weight: QuantizedWeight
    lost: Tensor
    total: Tensor
    dead: int
    damping: float | None
    unheld: str = ""

    def error_of(self, rows: slice = slice(None)) -> float:
        """Relative output error (squared) of some of the rows."""
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
    parts: int = 1,
) -> GptqResult:
    """Quantize a weight with the smallest output error on the calibration tokens.

    Args:
        w: [o, i].
        gram: second moment of the inputs, [i, i]. With experts [n, d, d]: each has its slice of the rows if d is i, or
            of the columns, and is solved alone.
        damping: added to the diagonal, relative to its mean over columns that are not dead.
        act_order: visit columns by descending energy.
        clip_search: search the scale of each group; otherwise it covers the group's largest weight (min-max).
        block_size: columns whose updates are applied one by one; the others follow in one product (lazy batch).
        at_once: upper limit of weights that are quantized at once; whole rows, at least one.
        parts: number of weights whose rows are concatenated, each of which has all experts.

    Raises:
        NumericsError: the weight or the Gram is not finite.
    """
    if not (finite(w) and finite(gram)):
        raise NumericsError("GPTQ: the weight or the second moment of its inputs is not finite")
    if gram.dim() == 3:
        by_rows = gram.shape[-1] == w.shape[1]
        slices = _rows_of(w, len(gram), parts) if by_rows else w.chunk(len(gram), 1)
        solved = [
            gptq(
                some,
                own,
                grid,
                damping=damping,
                act_order=act_order,
                clip_search=clip_search,
                block_size=block_size,
                at_once=at_once,
            )
            for some, own in zip(slices, gram, strict=True)
        ]
        return _rows_together(solved, parts) if by_rows else _columns_together(solved)
    energy = gram.diagonal().clamp(min=0).float()
    feedback = _feedback(gram, energy == 0, _order(energy, act_order), damping)
    # Rows are independent, so a large weight is quantized a few rows at a time.
    found, outside = [], ""
    for some in w.split(max(1, at_once // w.shape[1])):
        rows = some.float().T.contiguous().T  # [o, i], column-major: everything below works column by column
        scale, zero = grid.fit(rows, importance=energy, search=clip_search)
        outside = outside or unheld(grid, rows, scale, energy)
        weight, lost = _rounded(rows, gram, feedback, scale, zero, grid, block_size)
        found.append((weight.codes, weight.scale, weight.zero, lost, _energy(rows, gram)))
    codes, scale, zero, lost, total = (torch.cat(part) for part in zip(*found, strict=True))
    used = None if feedback is None else feedback.damping
    weight, dead = QuantizedWeight(codes, scale, zero, grid), int((energy == 0).sum())
    return GptqResult(weight, lost, total, dead, used, outside)


def _rows_of(w: Tensor, experts: int, parts: int) -> list[Tensor]:
    """Rows of each expert in all parts, [parts * experts * f, i] -> experts times [parts * f, i]."""
    return [own.flatten(0, 1) for own in w.unflatten(0, (parts, experts, -1)).unbind(1)]


def _rows_together(solved: Sequence[GptqResult], parts: int) -> GptqResult:
    """Inverse of ``_rows_of``; an input is dead if it is dead for all experts."""

    def back(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.unflatten(0, (parts, -1)) for tensor in tensors], 1).flatten(0, 2)

    codes, scale, zero = (back([getattr(one.weight, name) for one in solved]) for name in PARTS)
    weight = QuantizedWeight(codes, scale, zero, solved[0].weight.grid)
    lost, total = (back([getattr(one, name) for one in solved]) for name in ("lost", "total"))
    return GptqResult(weight, lost, total, min(one.dead for one in solved), *_worst(solved))


def _columns_together(solved: Sequence[GptqResult]) -> GptqResult:
    """One weight of the columns of all experts; their outputs are taken for uncorrelated.

    Raises:
        ValueError: the row of an expert is not made of whole groups.
    """
    grid, columns = solved[0].weight.grid, solved[0].weight.shape[1]
    if grid.group_size == -1 or columns % grid.group_size:
        raise ValueError(f"groups of {grid.group_size} columns span experts of {columns}")
    codes, scale, zero = (torch.cat([getattr(one.weight, name) for one in solved], 1) for name in PARTS)
    weight = QuantizedWeight(codes, scale, zero, grid)
    lost, total = (torch.stack([getattr(one, name) for one in solved]).sum(0) for name in ("lost", "total"))
    return GptqResult(weight, lost, total, sum(one.dead for one in solved), *_worst(solved))


def _worst(solved: Sequence[GptqResult]) -> tuple[float | None, str]:
    """The largest damping, None if every expert with inputs failed; and what float16 cannot hold of any expert."""
    used = [one.damping for one in solved if one.damping is not None]
    return max(used, default=None), next((one.unheld for one in solved if one.unheld), "")


def _rounded(
    w: Tensor,
    gram: Tensor,
    feedback: Feedback | None,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    block_size: int,
) -> tuple[QuantizedWeight, Tensor]:
    """Quantized rows and the error of each, float64 [o]; round-to-nearest if there is no ``feedback``."""
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
    """Error feedback between columns: ``H = (I + U) D (I + U)^T`` in visiting order, U strictly upper.

    Attributes:
        order: the column that is visited i-th, int64 [i].
        share: U, fraction of the error of column j that is added to column i, float32 [j, i]; entries on and below the
            diagonal are not used.
        price: D, weight of each column's squared rounding error, float32 [i].
        added: damping added to the diagonal of the Gram, float32 [i].
        damping: relative damping that was used.
    """

    order: Tensor
    share: Tensor
    price: Tensor
    added: Tensor
    damping: float


def _order(energy: Tensor, act_order: bool) -> Tensor:
    """Order in which columns are visited, int64 [i]."""
    if not act_order:
        return torch.arange(len(energy), device=energy.device)
    return torch.argsort(energy, descending=True, stable=True)


def _feedback(gram: Tensor, dead: Tensor, order: Tensor, damping: float) -> Feedback | None:
    """The factors of the damped Gram, or None if no step of the ladder makes it positive definite."""
    if bool(dead.all()):
        return None
    # With rows and columns reversed, H = L L^T; reversing L gives the upper factor.
    backwards = order.flip(0)
    permuted = submatrix(gram, backwards)
    added = torch.where(dead, 1.0, 0.0)[backwards]  # a dead column is uncorrelated: any positive number works
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


@torch.inference_mode()  # autograd took half of the time of a small weight
def _sweep(
    w: Tensor, feedback: Feedback, scale: Tensor, zero: Tensor, grid: Grid, block_size: int
) -> tuple[Tensor, Tensor]:
    """Codes of every column in stored order, uint8 [o, i], and the error of each row, float64 [o].

    Each column in turn: add the propagated errors of all earlier columns (a matrix-vector product within a block, one
    matrix product for all earlier blocks), round, and replace the column by its total error, original minus rounded.
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
        shares, before = share[block, block].T.contiguous(), errors.T  # later columns are still 0
        columns = zip(*(x.unbind() for x in (whole, value, errors, codes[block], shares)), strict=True)
        for g, (column, here, error, code, taken) in zip(group[block].tolist(), columns, strict=True):
            here.addmv_(before, taken)
            torch.div(here, scales[g], out=code).round_().clamp_(lowest[g], highest[g])
            torch.addcmul(column, code, scales[g], value=-1, out=error)
        value += errors
        value -= whole  # rounding error of each column alone
        rest[block] = errors
        lost += (value.square_() * feedback.price[block, None]).sum(0, dtype=torch.float64)
        lost -= (errors.square_() * feedback.added[block, None]).sum(0, dtype=torch.float64)
    codes -= parts[1][group]
    stored = torch.empty_like(codes, dtype=torch.uint8)
    stored[order] = codes.to(torch.uint8)
    return stored.T, lost
