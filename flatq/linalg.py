"""In-place Cholesky factors and inverses of symmetric positive definite matrices.

The second moment of a 70B model's MLP is 28672 x 28672: 6.6 GB in float64, and the usual way (copy, identity, factor,
inverse) holds four of them. LAPACK works in place on column-major matrices; torch passes a tensor without a copy if its
columns are contiguous, and a symmetric matrix equals its transpose. So every function here takes and returns a
column-major view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatq.errors import NumericsError

DRIFT_SHRINKAGE = 0.3  # relative ridge; the drift is mostly noise: measured to be better than 0.03 and 0.1
RUNGS = 6  # number of ridges to try, each ten times the one before


def damped(c: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """``C + shift I`` as a new matrix [d, d], and the shift: ``ridge`` times the mean diagonal (1 if that is 0).

    Args:
        c: symmetric, [d, d].
        ridge: relative to the mean diagonal.
        dtype: of the result.
    """
    work = c.to(dtype, copy=True).mT
    shift = ridge * float(work.diagonal().mean()) or 1.0
    work.diagonal().add_(shift)
    return work, shift


def factor_(work: Tensor) -> Tensor:
    """Lower Cholesky factor of ``work`` [d, d], in place (zeros above the diagonal).

    Raises:
        NumericsError: the matrix is not positive definite.
    """
    has_factor_(work, must=True)
    return work


def has_factor_(work: Tensor, *, must: bool) -> bool:
    """Compute the lower Cholesky factor of ``work`` [d, d] in place, and return whether it exists.

    Raises:
        NumericsError: it does not exist, and ``must`` is set.
    """
    failed = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work, out=(work, failed))
    if failed and must:
        raise NumericsError(
            f"a second moment of {len(work)} features is not positive definite (from row {int(failed)}); the weights "
            "are damaged or too large for float32: check the source checkpoint, or choose other calibration text"
        )
    return not failed


def ridged_factor(c: Tensor, ridge: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, float]:
    """Lower Cholesky factor of ``C + shift I`` [d, d], and the shift, for the smallest of ``ridge * 1, 10, ...``.

    A float32 Gram of fewer tokens than features is positive definite only up to rounding, which grows with its largest
    eigenvalue: on 2,048 tokens of 7,700 channels that was more than 1e-6 of the mean diagonal.

    Raises:
        NumericsError: there is no factor even with the largest ridge.
    """
    for rung in range(RUNGS):
        work, shift = damped(c, ridge * 10**rung, dtype)
        if has_factor_(work, must=rung == RUNGS - 1):
            break
    return work, shift


def solved(lower: Tensor, right: Tensor) -> Tensor:
    """``(L L^T)^-1 B``, [d, k]; unlike ``torch.cholesky_solve`` it does not copy the factor.

    Args:
        lower: Cholesky factor, [d, d].
        right: [d, k].
    """
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def inverse(c: Tensor, ridge: float) -> tuple[Tensor, float]:
    """``(C + shift I)^-1`` [d, d] and the shift, in the dtype of C if it has a Cholesky factor there, else in float64.

    float32 takes half the memory and half the time. On the Grams of a real model with a ridge of 0.01 (condition number
    up to 10^4) the elimination chose the same channels as in float64.
    """
    for dtype in (c.dtype, torch.float64):
        work, shift = damped(c, ridge, dtype)
        if has_factor_(work, must=dtype == torch.float64):
            return torch.cholesky_inverse(work, out=work), shift
    raise AssertionError("has_factor_ raises in the last iteration")


def submatrix(c: Tensor, index: Tensor) -> Tensor:
    """Rows and columns of some features, [..., d, d] -> [..., d', d']; three times as fast as bracket indexing."""
    return c.index_select(-2, index).index_select(-1, index)


def shrunk(gram: Tensor, shrinkage: float) -> Tensor:
    """The Gram with a relative ridge on its diagonal, ``C_ii * (1 + shrinkage)``, [i, i] or [n, i, i].

    This shrinks the correlations between features by ``1 / (1 + shrinkage)``. It keeps a least-squares fit on few
    tokens from fitting chance correlations, and pulls it towards plain selection of features.
    """
    if shrinkage == 0:
        return gram
    noisy = gram.clone()
    noisy.diagonal(dim1=-2, dim2=-1).mul_(1 + shrinkage)
    return noisy


def drift_correction(gram: Tensor, drift: Tensor, shrinkage: float = DRIFT_SHRINKAGE) -> Tensor:
    """Weight update [m, i]: ridge regression of the output's error with respect to the dense model on the input.

    The relative ridge bounds the condition number, after scaling the features to unit diagonal, by ``i / shrinkage``.
    Cholesky is invariant to that scaling, so the precision of the Gram is sufficient.

    Args:
        gram: second moment of the input, [i, i]; of experts [n, i / n, i / n], each of which is fitted alone.
        drift: ``E[input^T (y_dense - y)]``, [i, m].
        shrinkage: relative ridge, see ``shrunk``.
    """
    if gram.dim() == 3:
        parts = zip(gram, drift.chunk(len(gram)), strict=True)
        return torch.cat([drift_correction(own, part, shrinkage) for own, part in parts], 1)
    dtype = gram.dtype if shrinkage else torch.float64
    lower, _ = ridged_factor(shrunk(gram, shrinkage), 1e-8, dtype)
    return solved(lower, drift.to(dtype)).T


def relative_energy(difference: Tensor, w: Tensor, gram: Tensor) -> float:
    """``E||x D^T||^2 / E||x W^T||^2`` for a difference D and a weight W, both [m, i], and the Gram of x, [i, i].

    With a Gram of experts, [n, i / n, i / n], energies are summed over experts.
    """
    blocks = gram.view(-1, *gram.shape[-2:])
    parts = (torch.stack(d.to(gram.dtype).chunk(len(blocks), 1)) for d in (w, difference))  # [n, m, i / n]
    total, lost = (float(((d @ blocks) * d).sum(dtype=torch.float64)) for d in parts)
    return max(lost, 0.0) / total if total > 0 else 0.0
