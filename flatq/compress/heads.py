"""Narrower value heads: a change of basis that attention cannot see, then a cut.

Softmax mixes the rows of the values, so any linear map of a value head commutes with attention: it can be undone in
the columns of the output projection that read the head. Each key/value head gets two maps,

    v' = v E   (``encode`` [d, r])        o' = o reads z' D^T   (``decode`` [d, r], applied to o's columns)

and every query head of its group shares them. With ``E = D = Q`` (leading eigenvectors of the values' Gram) this is
FLAT's head-wise PCA; an oblique pair (E, D) is what an output-aware basis needs.

Axes: k kv_heads, h query heads, g = h / k, d d_v before, r d_v after, m d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HeadBasis:
    """``encode`` and ``decode``, both [k, d, r]; ``discarded`` is the share of the values' energy that is lost."""

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
    """Block-diagonal map of all query heads, [k, d, r] -> [h * d, h * r]: how ``z`` changes when ``v`` does."""
    return torch.block_diag(*basis.repeat_interleave(group, dim=0))
