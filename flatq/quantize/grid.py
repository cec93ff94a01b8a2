"""The grid that weights are rounded to: ``scale * (code - zero)``, one scale and zero per group of columns.

Codes are unsigned, ``0 .. 2**bits - 1``. A symmetric grid has its zero in the middle, ``2**(bits - 1)``, and
``scale = 2 * absmax / (2**bits - 1)`` for every group, groups of one sign included (peers mirror the range
only where a negative weight occurs and then clip half of an all-positive group).

Scales are rounded to float16 before anything is coded with them: all export formats can then carry them
exactly, and what was measured is what is deployed.

Axes: o out_features, i in_features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the least positive float16: an all-zero group still has a scale to divide by


@dataclass(frozen=True, slots=True)
class Grid:
    """How finely a weight is stored.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a scale; -1 is the whole row. The last group may be shorter.
        symmetric: zero fixed in the middle of the codes.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def levels(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << (self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns in a full group of a weight with ``columns`` inputs."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        """Number of groups, the short last one included."""
        return -(-columns // self.width(columns))

    def group_index(self, columns: int, device: torch.device | None = None) -> Tensor:
        """Group of each column, int64 [i]."""
        return torch.arange(columns, device=device) // self.width(columns)

    def fit(
        self, w: Tensor, *, importance: Tensor | None = None, clips: tuple[float, ...] = (1.0,)
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero of one group, the clip factor chosen by least weighted squared error.

        Args:
            w: one group of columns, float [o, n].
            importance: weight of each column's error, [n] or [o, n]; all ones if None.
            clips: factors of the group's range to try; ``(1.0,)`` is plain min-max.

        Returns:
            scale [o] (float32 holding float16 values) and zero [o] (float32 holding codes).
        """
        best_error = best_scale = best_zero = None
        for clip in clips:
            scale, zero = self._range(w, clip)
            error = (self.round_trip(w, scale[:, None], zero[:, None]) - w).square()
            error = (error if importance is None else error * importance).sum(1)
            if best_error is None or best_scale is None or best_zero is None:
                best_error, best_scale, best_zero = error, scale, zero
                continue
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        assert best_scale is not None
        assert best_zero is not None
        return best_scale, best_zero

    def _range(self, w: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            scale = as_half(2 * clip * w.abs().amax(1) / self.levels)
            return scale, torch.full_like(scale, float(self.middle))
        low, high = clip * w.amin(1).clamp(max=0), clip * w.amax(1).clamp(min=0)
        scale = as_half((high - low) / self.levels)
        return scale, torch.round(-low / scale).clamp(0, self.levels)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, as float; all arguments broadcast."""
        return torch.round(w / scale + zero).clamp(0, self.levels)

    def round_trip(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """``decode(encode(w))``."""
        return scale * (self.encode(w, scale, zero) - zero)


def as_half(scale: Tensor) -> Tensor:
    """The scale rounded to a positive float16 value, kept in its own dtype."""
    return scale.clamp(min=SMALLEST_SCALE, max=65504.0).half().to(scale.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A quantized matrix, one code a byte: packing bytes is the exporters' business.

    Attributes:
        codes: uint8 [o, i].
        scale: float16 [o, G].
        zero: uint8 [o, G].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    @property
    def shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * (code - zero)``, [o, i]."""
        group = self.grid.group_index(self.codes.shape[1], self.codes.device)
        centred = self.codes.to(torch.int16) - self.zero.to(torch.int16)[:, group]
        return (centred.float() * self.scale.float()[:, group]).to(dtype)


def round_to_nearest(w: Tensor, grid: Grid, *, clips: tuple[float, ...] = (1.0,)) -> QuantizedWeight:
    """Quantize each weight by itself, [o, i]; the baseline that GPTQ has to beat, and the rule for embeddings."""
    w = w.float()
    width = grid.width(w.shape[1])
    fitted = [grid.fit(part, clips=clips) for part in w.split(width, dim=1)]
    scale = torch.stack([scale for scale, _ in fitted], 1)
    zero = torch.stack([zero for _, zero in fitted], 1)
    group = grid.group_index(w.shape[1], w.device)
    codes = grid.encode(w, scale[:, group], zero[:, group])
    return QuantizedWeight(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), grid)
