"""GPTQ: round one input column after another, and let the columns still to come make up for each rounding.

Choices, with their numbers in docs/decisions.md:

- The scale of a group matters more than the order of its columns, so the clip factor of every group is searched by
  squared error weighted with the column's activation energy.
- Groups are static: scales are fixed before the first column is rounded. Columns can then be visited by descending
  activation energy (``act_order``) and still be stored in their own order, which every export format needs.
- All linears that read the same activation (q, k, v; gate, up) are solved in one call, their rows stacked.

Axes: o out_features, i in_features, G groups.
Source: GPTQ (arXiv 2210.17323), Algorithm 1, sections 3.2 and 3.3 (lazy batches, Cholesky).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatq.errors import NumericsError
from flatq.quantize.grid import Grid, QuantizedWeight
from flatq.quantize.refine import refine
from flatq.spd import has_factor_
from flatq.statistics import finite

WEIGHTS_AT_ONCE = 1 << 25  # weights in the working set of a solve: 128 MiB each of rest, scales, zeros, codes
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
    refinements: int = 0,
) -> GptqResult:
    """Quantize a weight so that its outputs on the calibration tokens change least.

    Args:
        w: [o, i].
        gram: second moment of the inputs, [i, i].
        damping: added to the diagonal, relative to its mean over live columns.
        block_size: columns whose corrections are applied one by one; the rest follows in one product.
        refinements: how often scales and codes are fitted to each other afterwards, see ``refine``.

    Raises:
        NumericsError: the weight or the Gram is not finite.
    """
    if not (finite(w) and finite(gram)):
        raise NumericsError("GPTQ: the weight or the second moment of its inputs is not finite")
    energy = gram.diagonal().clamp(min=0).float()
    dead = energy == 0
    order = (
        torch.argsort(energy, descending=True, stable=True) if act_order else torch.arange(len(gram), device=w.device)
    )
    factor, used = _inverse_factor(gram, dead, order, damping)
    # A row's codes depend on no other row: a large weight is solved a few rows at a time.
    parts = []
    for some in w.split(max(1, WEIGHTS_AT_ONCE // w.shape[1])):
        rows = some.float()
        scale, zero = grid.fit(rows, importance=energy, search=clip_search)
        codes = _codes(rows, factor, order, scale, zero, grid, block_size)
        if refinements and used is not None:
            codes, scale = refine(rows, _damped(gram, dead, used), codes, scale, zero, grid, refinements, block_size)
        parts.append(_measured(rows, gram, codes, scale, zero, grid))
    codes, scale, zero, lost, total = (torch.cat(part) for part in zip(*parts, strict=True))
    return GptqResult(QuantizedWeight(codes, scale, zero, grid), lost, total, int(dead.sum()), used)


def _codes(
    w: Tensor, factor: Tensor | None, order: Tensor, scale: Tensor, zero: Tensor, grid: Grid, block_size: int
) -> Tensor:
    """Codes of some rows, float32 [o, i]; the nearest ones where there is no factor."""
    if factor is None:
        return grid.encode(w, grid.spread(scale, w.shape[1]), grid.spread(zero, w.shape[1]))
    return _sweep(w, factor, order, scale, zero, grid, block_size)


def _measured(w: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """Codes, scale and zero of some rows as they are stored, and the energies lost and in all."""
    weight = QuantizedWeight(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), grid)
    lost, total = (_energy(some, gram) for some in (w - weight.dequantize(), w))
    return weight.codes, weight.scale, weight.zero, lost, total


def _damped(gram: Tensor, dead: Tensor, damping: float) -> Tensor:
    """The Gram that the factor was made of, float32 [i, i]."""
    damped = gram.to(torch.float32, copy=True)
    damped.diagonal().add_(damping * float(gram.diagonal()[~dead].double().mean()))
    return damped


def _energy(w: Tensor, h: Tensor) -> Tensor:
    """Mean square of each output row, [o, i] on [i, i] -> float64 [o]."""
    return ((w.to(h.dtype) @ h) * w).sum(1, dtype=torch.float64)


def _inverse_factor(h: Tensor, dead: Tensor, order: Tensor, damping: float) -> tuple[Tensor | None, float | None]:
    """Upper Cholesky factor of the damped inverse in visiting order, float32 [i, i], and the damping it took."""
    live = h.diagonal()[~dead]
    if not len(live):
        return None, None
    # Back to front, H = V V^T with V upper; then V^-1 is the upper factor of H^-1: one triangular inverse in place of
    # the inverse of H and a second factorisation.
    backwards = order.flip(0)
    for rung in DAMPING_LADDER:
        relative = damping * rung
        permuted = h.index_select(0, backwards).index_select(1, backwards)
        work = permuted.to(torch.float64).mT  # its columns are contiguous: factored in place
        diagonal = work.diagonal()
        diagonal[dead[backwards]] = live.double().mean()  # it correlates with nothing: any positive number will do
        diagonal.add_(relative * float(live.double().mean()))
        if not has_factor_(work, must=False):
            continue
        inverse = torch.zeros_like(work)
        _invert(work, inverse)
        if finite(inverse):
            return inverse.float().flip(0, 1), relative
    return None, None


def _invert(lower: Tensor, inverse: Tensor) -> None:
    """Inverse of a lower triangular matrix into zeros, by halves: two thirds of what solving for the identity takes."""
    n, half = len(lower), len(lower) // 2
    if n <= 128:
        inverse.copy_(
            torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype, device=lower.device), upper=False)
        )
        return
    first, last = slice(half), slice(half, n)
    _invert(lower[first, first], inverse[first, first])
    _invert(lower[last, last], inverse[last, last])
    inverse[last, first] = (inverse[last, last] @ lower[last, first]).neg_() @ inverse[first, first]


def _sweep(
    w: Tensor, factor: Tensor, order: Tensor, scale: Tensor, zero: Tensor, grid: Grid, block_size: int
) -> Tensor:
    """Codes of every column in stored order, float32 [o, i].

    A column is corrected by all errors before it at once, when its turn comes (their sum is a product of a matrix and
    a vector within a block, of two matrices for earlier blocks), and its own error then takes its place.
    """
    rest = w.T.contiguous()[order]  # [i, o]: a column of the weight is a contiguous row here
    share = factor / factor.diagonal()[:, None]  # of the error of column j that column i takes over, [j, i]
    group = grid.group_index(w.shape[1], w.device)[order]
    scales, lowest, highest = (part.T.contiguous().unbind() for part in (scale, -zero, grid.levels - zero))
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), block_size):
        block = slice(start, min(start + block_size, len(rest)))
        rest[block].addmm_(share[:start, block].T, rest[:start], alpha=-1)
        for column, g in zip(range(start, block.stop), group[block].tolist(), strict=True):
            value, code = rest[column], codes[column]
            value.addmv_(rest[start:column].T, share[start:column, column], alpha=-1)
            torch.div(value, scales[g], out=code).round_().clamp_(lowest[g], highest[g])
            value.addcmul_(code, scales[g], value=-1)
    stored = torch.empty_like(codes)
    stored[order] = codes.add_(zero.T.contiguous()[group])
    return stored.T
