"""Rotary position embedding: the angle per position of each pair of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding; ``scaling`` is none, ``linear`` or ``llama3``."""

    theta: float = 10000.0
    scaling: str | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def inverse_frequencies(self, d_qk: int) -> Tensor:
        """Inverse frequencies (angle per position), float32 [d_qk / 2].

        Source: Llama 3.1 model card (the ``llama3`` rule interpolates long wavelengths by ``factor``).
        """
        inv = 1.0 / self.theta ** (torch.arange(0, d_qk, 2, dtype=torch.float32) / d_qk)
        if self.scaling is None:
            return inv
        if self.scaling == "linear":
            return inv / self.factor
        wavelength = 2 * math.pi / inv
        turns = self.original_max_positions / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - smooth) * inv / self.factor + smooth * inv
        scaled = torch.where(turns < self.low_freq_factor, inv / self.factor, blended)
        return torch.where(turns > self.high_freq_factor, inv, scaled)
