"""Rotary position embedding: the angle per position of each pair of channels.

A decoder needs only a vector of frequencies. The rules by which models state theirs are here and nowhere else, and
exporters take the vector. A pair with frequency zero stands still, so a head that rotates only in part is a head of
which some pairs have frequency zero. The factor by which some rules scale cosines and sines is not here: it is folded
into the queries while the weights are read (``folds``).

Left out: rules that change the frequencies with the length of the text (``dynamic``, and the second set of factors of
``longrope``): the reader takes those of one context length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: none, or the rule ``linear``, ``llama3``, ``yarn`` or ``longrope``.
        factor, low_freq_factor, high_freq_factor, original_max_positions: parameters of these rules.
        rotated: share of a head's channels that rotates; the pairs of the others have frequency zero.
        beta_fast, beta_slow, truncate: parameters of ``yarn``.
        divisors: of the frequencies, one for each rotated pair; the parameters of ``longrope``.
    """

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    rotated: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()

    def width(self, d_qk: int) -> int:
        """Number of channels of a head that rotate."""
        return int(d_qk * self.rotated)

    def inverse_frequencies(self, d_qk: int) -> Tensor:
        """Inverse frequencies (angle per position), float32 [d_qk / 2]; zero for pairs that stand still."""
        width = self.width(d_qk)
        inv = 1.0 / self.theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        match self.scaling:
            case None:
                turning = inv
            case "linear":
                turning = inv / self.factor
            case "llama3":
                turning = self._llama3(inv)
            case "yarn":
                turning = self._yarn(inv, width)
            case "longrope":
                turning = inv / torch.tensor(self.divisors, dtype=torch.float32)
            case rule:
                raise ValueError(f"rope scaling {rule!r} is not supported")
        return torch.cat([turning, torch.zeros((d_qk - width) // 2)])

    def _llama3(self, inv: Tensor) -> Tensor:
        """Source: Llama 3.1 model card; long wavelengths are interpolated by ``factor``."""
        turns = self.original_max_positions / (2 * math.pi / inv)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - smooth) * inv / self.factor + smooth * inv
        scaled = torch.where(turns < self.low_freq_factor, inv / self.factor, blended)
        return torch.where(turns > self.high_freq_factor, inv, scaled)

    def _yarn(self, inv: Tensor, width: int) -> Tensor:
        """Source: YaRN (arXiv 2309.00071), section 3.2; a ramp over the pairs between two numbers of turns."""

        def pair_with(turns: float) -> float:
            return width * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high if low != high else high + 0.001
        ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return inv / self.factor * ramp + inv * (1 - ramp)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rope:
        """Inverse of ``dataclasses.asdict``, also after JSON has made lists of tuples."""
        return cls(**{**data, "divisors": tuple(data.get("divisors", ()))})
