"""Low-rank value heads: a change of basis of each head, then truncation.

Attention forms weighted sums over the rows of the values, so any linear map of a value head commutes with it and can
be undone in the columns of the output projection that read the head. Each key/value head gets two maps,

    v' = v E   (``encode`` [d, r])        o' = o reads z' D^T   (``decode`` [d, r], applied to o's columns)

and every query head of its group shares them. With ``E = D = Q`` (leading eigenvectors of the values' Gram) this is
FLAT's head-wise PCA; an output-aware basis needs an oblique pair (E, D).

Axes: k kv_heads, h query heads, g = h / k, d d_v before, r d_v after, m d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadBasis:
    """``encode`` and ``decode``, both [k, d, r]; ``discarded`` is the lost fraction of the values' energy."""

    encode: Tensor
    decode: Tensor
    discarded: float


@dataclass(frozen=True, slots=True, eq=False)
class HeadWeights:
    """Narrowed projections: v [k * r, m], its bias [k * r] or None, o [m, h * r]."""

    v: Tensor
    v_bias: Tensor | None
    o: Tensor


def head_basis(gram: Tensor, rank: int) -> HeadBasis:
    """Leading principal directions of each value head.

    Args:
        gram: uncentred second moment of the values, [k, d, d].
        rank: directions kept per head, 1 <= rank <= d.

    Returns:
        Orthonormal ``encode == decode`` in float64, by descending eigenvalue.
    Source: FLAT-LLM (arXiv 2505.23966), section 4, Theorem 4.1: the squared error of the values is the sum of the
        discarded eigenvalues.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram.double())
    total = eigenvalues.sum()
    lost = eigenvalues[:, : gram.shape[-1] - rank].sum()
    basis = vectors.flip(-1)[..., :rank].contiguous()
    return HeadBasis(basis, basis, float(lost / total) if total > 0 else 0.0)


def orthonormal(encode: Tensor, gram: Tensor) -> HeadBasis:
    """``HeadBasis`` of given orthonormal columns [k, d, r]; ``discarded`` follows from the values' Gram [k, d, d]."""
    total = gram.diagonal(dim1=-2, dim2=-1).sum().double()
    kept = ((encode.mT @ gram.double()) * encode.mT).sum()
    return HeadBasis(encode, encode, max(0.0, float(1 - kept / total)) if total > 0 else 0.0)


def project_heads(w_v: Tensor, v_bias: Tensor | None, w_o: Tensor, basis: HeadBasis) -> HeadWeights:
    """Apply a basis to the value and output projections.

    Args:
        w_v: [k * d, m]. v_bias: [k * d] or None. w_o: [m, h * d].
    """
    k, d, r = basis.encode.shape
    m = w_v.shape[1]
    encode, decode = basis.encode.to(torch.float64), basis.decode.to(torch.float64)
    v = encode.mT @ w_v.double().view(k, d, m)  # [k, r, m]
    bias = None if v_bias is None else (encode.mT @ v_bias.double().view(k, d, 1)).reshape(k * r).to(v_bias.dtype)
    o = torch.einsum("mkgd,kdr->mkgr", w_o.double().view(m, k, -1, d), decode)
    return HeadWeights(v.reshape(k * r, m).to(w_v.dtype), bias, o.reshape(m, -1).to(w_o.dtype))


def spread_over_queries(basis: Tensor, group: int) -> Tensor:
    """Block-diagonal map of all query heads, [k, d, r] -> [h * d, h * r], that applies ``basis`` to ``z``."""
    return torch.block_diag(*basis.repeat_interleave(group, dim=0))


def output_basis(gram: Tensor, w_o: Tensor, kv_heads: int, group: int) -> tuple[Tensor, Tensor]:
    """Directions of each value head, ordered by their contribution to the layer's output.

    For one query head with Gram C and output columns W the best projection of rank r comes from the leading left
    singular vectors U of ``C^(1/2) W^T``: encode ``C^(-1/2) U``. The query heads of a group share their value head, so
    their Grams are averaged and their output columns are concatenated.

    Args:
        gram: second moment of the heads' outputs z, [h * d, h * d].
        w_o: [m, h * d]; rows may be weighted, see ``sensitivity``.

    Returns:
        Orthonormal encode, float64 [k, d, d], nested: its first r columns span the best subspace of rank r; and the
        mean square of the output due to each direction, [k, d], descending.
    """
    m, columns = w_o.shape
    k, g, d = kv_heads, group, columns // (kv_heads * group)
    heads = gram.double().view(k * g, d, k * g, d).diagonal(dim1=0, dim2=2)  # [d, d, h]
    root, back = _square_root(heads.permute(2, 0, 1).view(k, g, d, d).mean(1))  # [k, d, d]
    w = w_o.double().view(m, k, g, d)
    energy = root @ torch.einsum("mkgd,mkge->kde", w, w) @ root
    carried, vectors = torch.linalg.eigh(energy)
    encode = torch.linalg.qr(back @ vectors.flip(-1)).Q
    return encode, carried.flip(-1).clamp(min=0)


def refit_output(w_o: Tensor, gram: Tensor, encode: Tensor, group: int, *, ridge: float = 1e-4) -> Tensor:
    """Least-squares output projection for narrowed heads, on the Gram of all heads together, [m, h * r].

    ``W C R (R^T C R)^-1`` with R the encoders of all query heads: the smallest output error on the calibration tokens
    of all matrices of this shape, up to the ridge (relative to the mean diagonal), which regularizes towards ``W R``,
    the projection without a refit.
    """
    spread = spread_over_queries(encode.double(), group)
    half = gram.double() @ spread  # [h * d, h * r]
    narrow = spread.T @ half
    shift = ridge * float(narrow.diagonal().mean()) or 1.0
    narrow.diagonal().add_(shift)
    return torch.cholesky_solve((half + shift * spread).T @ w_o.double().T, torch.linalg.cholesky(narrow)).T.to(
        w_o.dtype
    )


def _square_root(c: Tensor, floor: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Square root of positive matrices [..., d, d] and its inverse; eigenvalues are at least ``floor`` * largest."""
    values, vectors = torch.linalg.eigh(c)
    values = values.clamp(min=(floor * values[..., -1:]).clamp(min=torch.finfo(c.dtype).tiny))
    root = values.sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
