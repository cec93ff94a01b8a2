"""Narrower MLPs: select channels, and refit the output projection to compensate for the removed ones.

The Gram of experts, [n, f / n, f / n], has a block per expert. Every expert is then narrowed alone, all to one width.

Axes: m d_model, f d_ff before, s d_ff after, n experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatq.linalg import inverse, relative_energy, ridged_factor, solved

STEPS = 32  # steps in which all channels would be eliminated; 96 steps choose no better (docs/decisions/0012)
ROWS = 256  # rows of a large matrix that are copied in one operation


def ridge_leverage(gram: Tensor, ridge: float) -> Tensor:
    """Ridge leverage score of each channel, float64 [f] or [n, f / n], in [0, 1].

    Args:
        gram: second moment of the inner activation, [f, f] or [n, f / n, f / n].
        ridge: relative to the mean diagonal of ``gram``.
    Source: FLAT-LLM (arXiv 2505.23966), MLP part: ``diag(C (C + ridge I)^-1)``.
    Differs from the authors' code, which adds 1 to the raw sum over tokens, independent of its scale.
    """
    if gram.dim() == 3:
        return torch.stack([ridge_leverage(own, ridge) for own in gram])
    inverted, shift = inverse(gram, ridge)
    return 1 - shift * inverted.diagonal().double()


def leading_channels(scores: Tensor, width: int) -> Tensor:
    """Indices of the ``width`` channels with the highest scores, [f] or [n, f / n], ascending, int64 [s]."""
    if scores.dim() == 2:
        return _of_all([leading_channels(own, width // len(scores)) for own in scores], scores.shape[1]).flatten()
    return torch.sort(torch.topk(scores, width).indices).values


def _of_all(indices: Sequence[Tensor], block: int) -> Tensor:
    """Channels of each expert as channels of all in a row, int64 [n, s / n]."""
    return torch.stack([own + number * block for number, own in enumerate(indices)])


def nystroem(w_down: Tensor, gram: Tensor, keep: Tensor, ridge: float = 1e-6) -> Tensor:
    """Output projection refitted to the kept channels S by least squares: ``W C[:, S] C[S, S]^-1``, [m, s].

    No other [m, s] matrix has a smaller output error on the calibration tokens (up to the ridge, which is relative to
    the mean diagonal and as small as the precision of the Gram allows). Experts are refitted each to its own output.
    """
    if gram.dim() == 3:
        parts = zip(w_down.chunk(len(gram), 1), gram, keep.chunk(len(gram)), strict=True)
        fitted = [nystroem(w, own, some % len(own), ridge) for w, own, some in parts]
        return torch.cat(fitted, 1)
    w, rows = w_down.to(gram.dtype), gram.index_select(0, keep)
    right, inside = (rows @ w.T).double(), rows.index_select(1, keep)  # [s, m], [s, s]
    del rows  # as large as the factor
    lower, shift = ridged_factor(inside, ridge)
    del inside
    right += shift * w.T[keep]  # regularized towards plain selection
    return solved(lower, right).T.to(w_down.dtype)


def output_error(w: Tensor, gram: Tensor, w_new: Tensor, keep: Tensor) -> float:
    """Relative output error (squared) of ``w_new`` on the channels ``keep`` against ``w`` on all; 0 is exact."""
    difference = w.to(gram.dtype, copy=True)
    difference[:, keep] -= w_new.to(gram.dtype)
    return relative_energy(difference, w, gram)


@dataclass(frozen=True, slots=True, eq=False)
class Elimination:
    """MLP channels in the order of their elimination.

    Attributes:
        order: int64 [removed], the least important first.
        cost: float64 [removed], mean square of the output's change after this and all earlier channels are removed
            and the remaining weights are refitted by least squares.
        block: number of channels of an expert; 1 without experts.
    """

    order: Tensor
    cost: Tensor
    block: int = 1

    def kept(self, channels: int) -> Tensor:
        """Indices of the remaining channels out of ``channels``, or of all channels of so many experts, ascending."""
        alive = torch.ones(channels * self.block, dtype=torch.bool, device=self.order.device)
        alive[self.order] = False
        return alive.nonzero()[:, 0]


def closed_up(matrix: Tensor, index: Tensor) -> Tensor:
    """Submatrix of a contiguous square matrix, compacted in place; the matrix is overwritten.

    Args:
        matrix: [n, n].
        index: ascending, int64 [k].

    Returns:
        A view of the first ``k * k`` numbers, [k, k].
    """
    left = len(index)
    found = matrix.view(-1)[: left * left].view(left, left)
    for start in range(0, left, ROWS):  # row i goes to i * k <= i * n, so no row is overwritten before it is read
        rows = slice(start, min(start + ROWS, left))
        found[rows] = matrix.index_select(0, index[rows]).index_select(1, index)
    return found


def eliminate(w_down: Tensor, gram: Tensor, width: int, ridge: float, *, step: int | None = None) -> Elimination:
    """Eliminate channels by Optimal Brain Surgeon, the ones with the smallest compensated output error first.

    The squared change of the output when channel j is removed is ``||W[:, j]||^2 / (C^-1)_jj``; then ``W`` and
    ``C^-1`` are updated exactly to those of the smaller problem (updates of ``C^-1``, the larger one, are accumulated
    over several steps). The only approximation: channels removed in the same step are chosen independently.

    Args:
        w_down: [m, f]; rows may be weighted, see ``sensitivity``.
        gram: second moment of the inner activation, [f, f] or [n, f / n, f / n].
        width: number of channels to keep.
        ridge: relative to the mean diagonal of ``gram``.
        step: channels per elimination; None is f / ``STEPS``.
    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993), with a layer's output in place of the loss.
    """
    if gram.dim() == 3:
        return _eliminate_evenly(w_down, gram, width, ridge, step)
    f = len(gram)
    step = step or max(1, f // STEPS)
    inverted = inverse(gram, ridge)[0].mT.to(gram.dtype)  # symmetric: rows may be columns
    rows = w_down.T.to(gram.dtype, copy=True, memory_format=torch.contiguous_format)
    index = torch.arange(f, device=gram.device)
    alive, late, diagonal = index >= 0, inverted[:0], inverted.diagonal().clone()  # C^-1 is ``inverted - late^T late``
    order, cost, total, left = [index[:0]], [diagonal[:0].double()], 0.0, f
    while left > width:
        price = (torch.linalg.vector_norm(rows, dim=1).square() / diagonal).masked_fill_(~alive, torch.inf)
        gone = torch.topk(price, min(step, left - width), largest=False).indices
        bridge = torch.addmm(inverted[gone], late[:, gone].T, late, alpha=-1)  # [gone, n]
        among = bridge[:, gone].double()
        among.diagonal().mul_(1 + torch.finfo(gram.dtype).eps)  # keeps it positive definite despite rounding
        root = torch.linalg.inv(torch.linalg.cholesky(among)).to(gram.dtype)
        share, lost, before = root @ bridge, root @ rows[gone], total  # [gone, n], [gone, m]
        total += float(lost.square().sum(dtype=torch.float64))
        order.append(index[gone])
        cost.append(torch.linspace(before, total, len(gone) + 1, dtype=torch.float64, device=gram.device)[1:])
        rows.addmm_(share.T, lost, alpha=-1)
        diagonal -= share.square().sum(0)
        late = torch.cat([late, share])
        alive[gone] = False
        left -= len(gone)
        if left < 0.85 * len(index):  # compact, and apply the accumulated updates of the inverse in one product
            rest = alive.nonzero()[:, 0]
            rows, inverted, late, index = rows[rest], closed_up(inverted, rest), late[:, rest], index[rest]
            inverted.addmm_(late.T, late, alpha=-1)
            alive, late, diagonal = index >= 0, inverted[:0], inverted.diagonal().clone()
    return Elimination(torch.cat(order), torch.cat(cost))


def _eliminate_evenly(w_down: Tensor, gram: Tensor, width: int, ridge: float, step: int | None) -> Elimination:
    """As many channels of every expert, in turn; the cost is that of a whole round.

    Experts are taken for uncorrelated: a token's errors in two of them add up as squares.
    """
    experts, each, _ = gram.shape
    parts = zip(w_down.chunk(experts, 1), gram, strict=True)
    found = [eliminate(w, own, -(-width // experts), ridge, step=step) for w, own in parts]
    order = _of_all([one.order for one in found], each).T.flatten()
    cost = torch.stack([one.cost for one in found]).sum(0)
    return Elimination(order, cost.repeat_interleave(experts), each)
