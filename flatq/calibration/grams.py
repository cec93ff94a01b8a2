"""Statistics of calibration tokens: second moments (Grams) and angles.

Both are sums over tokens, so the result does not depend on how the tokens are split over batches or processes. Grams
are float32 sums of float32 matrix products: measured on SmolLM2 the relative error against float64 is 2e-7, four orders
of magnitude below the damping that every solve adds (docs/decisions/0005).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatq.linalg import submatrix
from flatq.machine import distributed
from flatq.machine.device import exact

LARGEST = 1e15  # magnitude of a weight; no trained model has one near it, a flipped bit of an exponent does
PANEL = 512  # columns of a Gram that are computed together


def finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; checking minimum and maximum is ten times as fast."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def unusable(weight: Tensor) -> str:
    """What makes a stored weight unusable, in words; empty for numbers whose sums of squares stay within float32."""
    if not finite(weight):
        return f"{int((~torch.isfinite(weight)).sum())} values that are NaN or infinite"
    largest = float(torch.stack(torch.aminmax(weight)).abs().max()) if weight.numel() else 0.0
    return f"{largest:.3g}, and squares of numbers beyond {LARGEST:.0e} overflow float32" if largest > LARGEST else ""


class Gram:
    """Uncentred second moment ``E[x^T x]`` of row vectors, in one or several diagonal blocks.

    A Gram is symmetric, so only the panels on and above the diagonal are computed: half of the multiplications of a
    large one. The rest is mirrored when the sum is first read.

    Axes: n blocks (1, or one per key/value head), d features of a block.
    """

    def __init__(self, features: int, blocks: int = 1, device: torch.device | str = "cpu") -> None:
        self._total = torch.zeros(blocks, features, features, device=device)
        self._half = False  # whether what is below the diagonal panels is out of date
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Add tokens, [..., blocks * features]."""
        blocks, features, _ = self._total.shape
        rows = x.reshape(-1, blocks, features).float()  # [tokens, n, d]
        if blocks > 1:
            rows = rows.transpose(0, 1)
            self._total += rows.mT @ rows
        else:
            rows = rows[:, 0]
            for start in range(0, features, PANEL):
                panel = slice(start, start + PANEL)
                self._total[0, panel, start:].addmm_(rows[:, panel].T, rows[:, start:])
            self._half = features > PANEL
        self.count += len(rows) if blocks == 1 else rows.shape[1]

    @property
    def total(self) -> Tensor:
        """The sum over tokens, float32 [n, d, d]."""
        if self._half:
            for start in range(PANEL, self._total.shape[1], PANEL):
                panel = slice(start, start + PANEL)
                self._total[0, panel, :start] = self._total[0, :start, panel].T
            self._half = False
        return self._total

    @property
    def finite(self) -> bool:
        """Whether it holds neither NaN nor infinity; the diagonal is sufficient to check."""
        return bool(torch.isfinite(self._total.diagonal(dim1=1, dim2=2)).all())

    def to(self, device: str) -> None:
        """Move the sum to another device, in place."""
        self._total = self._total.to(device)

    def gather(self) -> None:
        """Sum over all processes, in place."""
        distributed.all_reduce(self.total)
        self.count = int(distributed.all_reduce(torch.tensor(self.count)))

    def merge(self, other: Gram) -> Gram:
        """Gram of the union of both token sets."""
        merged = self._with(self.total + other.total)
        merged.count += other.count
        return merged

    def mean(self) -> Tensor:
        """``E[x^T x]``, float32 [n, d, d] for several blocks, [d, d] for one."""
        mean = self.total / max(self.count, 1)
        return mean[0] if len(mean) == 1 else mean

    def energy(self) -> Tensor:
        """Mean square of every feature, float32 [n * d]."""
        return self._total.diagonal(dim1=1, dim2=2).reshape(-1) / max(self.count, 1)

    def congruence(self, decode: Tensor) -> Gram:
        """Gram of ``x R`` for a linear map R, [d, d'] (or [n, d, d'] per block): ``R^T C R``.

        It updates the Gram after narrowing, without a second pass over the tokens.
        """
        return self._with(decode.mT.float() @ self.total @ decode.float())

    def select(self, index: Tensor) -> Gram:
        """Gram of the features in ``index``, int64 [d']."""
        return self._with(submatrix(self.total, index))

    def _with(self, total: Tensor) -> Gram:
        other = Gram(0)
        other._total, other.count = total, self.count
        return other


class Angle:
    """Mean angle between input and output of a layer, divided by pi.

    Source: FLAT-LLM (arXiv 2505.23966), importance of a decoder layer.
    Differs from the authors' code: the cosine is taken row by row instead of as the diagonal of a tokens x tokens
    matrix; the number is the same.
    """

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add tokens, both [..., d_model]."""
        cosine = torch.nn.functional.cosine_similarity(exact(before), exact(after), dim=-1)
        self.total += float(torch.arccos(cosine.clamp(-1, 1)).sum()) / math.pi
        self.count += cosine.numel()

    def gather(self) -> None:
        """Sum over all processes, in place."""
        self.total, count = distributed.all_reduce(torch.tensor([self.total, self.count], dtype=torch.float64)).tolist()
        self.count = int(count)

    def mean(self) -> float:
        """The mean, in [0, 1]; 0 for a layer that does not change the direction of any token."""
        return self.total / max(self.count, 1)
