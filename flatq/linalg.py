"""Factors and inverses of symmetric positive matrices, in the memory of one.

The second moment of a 70B model's MLP is 28672 x 28672: 6.6 GB in float64, and the usual way (copy, identity, factor,
inverse) holds four of them. LAPACK works in place on columns; torch hands it a tensor as it is if its columns are
contiguous, and a symmetric matrix is its own transpose. So every function here works on, and returns, such a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRIFT_SHRINKAGE = 0.3  # the drift is mostly noise: measured to be better than 0.03 and 0.1
RUNGS = 6  # powers of ten that a ridge may be raised by


def damped(c: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """``C + shift I`` as a copy to work in, and the shift: ``ridge`` times the mean diagonal (1 if that is 0).

    Args:
        c: symmetric, [d, d].
    """
    work = c.to(dtype, copy=True).mT
    shift = ridge * float(work.diagonal().mean()) or 1.0
    work.diagonal().add_(shift)
    return work, shift


def factor_(work: Tensor) -> Tensor:
    """Lower Cholesky factor, in place (above the diagonal: zeros).

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive.
    """
    has_factor_(work, must=True)
    return work


def has_factor_(work: Tensor, *, must: bool) -> bool:
    """Put the lower Cholesky factor in place if there is one, and say so; an error if there must be."""
    failed = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work, check_errors=must, out=(work, failed))
    return not failed


def ridged_factor(c: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """Lower factor of ``C + shift I`` and the shift, with the least ridge of ``ridge`` times 1, 10, ... that has one.

    A float32 Gram of fewer tokens than features is positive only up to its rounding, which grows with its largest
    eigenvalue: on 2,048 tokens of 7,700 channels that was more than 1e-6 of the mean diagonal.

    Raises:
        torch.linalg.LinAlgError: C is far from positive.
    """
    for rung in range(RUNGS):
        work, shift = damped(c, ridge * 10**rung, dtype)
        if has_factor_(work, must=rung == RUNGS - 1):
            break
    return work, shift


def solved(lower: Tensor, right: Tensor) -> Tensor:
    """``(L L^T)^-1 B``; torch's own ``cholesky_solve`` copies the factor first.

    Args:
        lower: Cholesky factor, [d, d].
        right: [d, k].
    """
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def inverse(c: Tensor, ridge: float) -> tuple[Tensor, float]:
    """``(C + shift I)^-1`` and the shift, in the precision of C if its factor exists there, else in float64.

    In float32 it takes half the memory and half the time. On the Grams of a real model with a ridge of 0.01 (condition
    up to 10^4) the elimination chose the same channels as in float64.
    """
    for dtype in (c.dtype, torch.float64):
        work, shift = damped(c, ridge, dtype)
        if has_factor_(work, must=dtype == torch.float64):
            return torch.cholesky_inverse(work, out=work), shift
    raise AssertionError("the second turn raises by itself")


def submatrix(c: Tensor, index: Tensor) -> Tensor:
    """Rows and columns of some features, [..., d, d] -> [..., d', d']; a third of the time of indexing by brackets."""
    return c.index_select(-2, index).index_select(-1, index)


def shrunk(gram: Tensor, shrinkage: float) -> Tensor:
    """The Gram as if every feature also carried noise of its own, ``shrinkage`` of its energy, [i, i].

    A fit on few tokens believes in every coincidence between them. Noise that no feature shares with another makes it
    prefer what it was told before (plain selection) wherever the tokens give no clear answer.
    """
    if shrinkage == 0:
        return gram
    noisy = gram.clone()
    noisy.diagonal().mul_(1 + shrinkage)
    return noisy


def drift_correction(gram: Tensor, drift: Tensor, shrinkage: float = DRIFT_SHRINKAGE) -> Tensor:
    """What to add to a projection to undo what its input can foresee of its output's drift, [m, i].

    Noise on every feature bounds the condition, up to the features' own scales, by ``i / shrinkage`` (Cholesky does not
    mind scales), so that the precision of the Gram does.

    Args:
        gram: second moment of the input, [i, i].
        drift: ``E[input^T (y_dense - y)]``, [i, m].
        shrinkage: see ``shrunk``.
    """
    dtype = gram.dtype if shrinkage else torch.float64
    lower, _ = ridged_factor(shrunk(gram, shrinkage), 1e-8, dtype)
    return solved(lower, drift.to(dtype)).T


def relative_energy(difference: Tensor, w: Tensor, gram: Tensor) -> float:
    """``E||x D^T||^2 / E||x W^T||^2`` on a Gram of x."""
    total, lost = (float(((d @ gram) * d).sum(dtype=torch.float64)) for d in (w.to(gram.dtype), difference))
    return max(lost, 0.0) / total if total > 0 else 0.0
