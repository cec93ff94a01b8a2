"""How far the logits of a runtime are from the reference, position by position.

Axes: b rows, n positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from flatq.export.protocols import FloatArray, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """Per position, each [b, n]: largest logit difference and its token, mean difference, KL, top-1 misses and ties."""

    largest: FloatArray
    token: IntArray
    mean: FloatArray
    kl: NDArray[np.float64]
    missed: NDArray[np.bool_]
    tied: NDArray[np.bool_]

    @classmethod
    def between(cls, got: FloatArray, reference: FloatArray, tie: float) -> Difference:
        """Compare [b, n, vocab] with [b, n, vocab]; NaN counts as an infinite difference."""
        rows = [cls._of_row(*pair, tie) for pair in zip(got, reference, strict=True)]  # float64 of one row at a time
        return cls(**{field.name: np.stack([getattr(row, field.name) for row in rows]) for field in fields(cls)})

    @classmethod
    def _of_row(cls, got: FloatArray, reference: FloatArray, tie: float) -> Difference:
        distance = np.nan_to_num(np.abs(got - reference), nan=np.inf, posinf=np.inf)
        here, there = torch.from_numpy(reference).double(), torch.from_numpy(got).double()
        log_p, log_q = here.log_softmax(-1), there.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
        other = got.argmax(-1)
        behind = reference.max(-1) - np.take_along_axis(reference, other[..., None], -1)[..., 0]
        differs = other != reference.argmax(-1)
        return cls(
            largest=distance.max(-1),
            token=distance.argmax(-1),
            mean=distance.mean(-1),
            kl=kl,
            missed=differs & (behind >= tie),
            tied=differs & (behind < tie),
        )
