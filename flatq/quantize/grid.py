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

WEIGHTS_AT_ONCE = 1 << 20  # weights in the working set of a clip search: small enough to stay in the processor's cache
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

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of an [o, i] matrix as it is deployed: codes at their bits, float16 scales, packed zeros."""
        cells = rows * self.groups(columns)
        zeros = 0 if self.symmetric else -(-cells * self.bits // 8)
        return -(-rows * columns * self.bits // 8) + 2 * cells + zeros

    def group_index(self, columns: int, device: torch.device | None = None) -> Tensor:
        """Group of each column, int64 [i]."""
        return torch.arange(columns, device=device) // self.width(columns)

    def fit(
        self, w: Tensor, *, importance: Tensor | None = None, clips: tuple[float, ...] = (1.0,)
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero of every group, the clip factor chosen by least weighted squared error.

        Args:
            w: float32 [o, i].
            importance: weight of each column's error, [i]; all ones if None.
            clips: factors of the group's range to try, the first one preferred; ``(1.0,)`` is plain min-max.

        Returns:
            scale (float32 holding float16 values) and zero (float32 holding codes), both [o, G].
        """
        columns, width = w.shape[1], self.width(w.shape[1])
        missing = self.groups(columns) * width - columns  # a short last group is filled up with columns that weigh 0
        weight = torch.ones(columns, device=w.device) if importance is None else importance.float()
        weight = torch.nn.functional.pad(weight, (0, missing)).view(-1, width)  # [G, n]
        rows = max(1, WEIGHTS_AT_ONCE // columns)
        parts = [
            self._fit_rows(torch.nn.functional.pad(part, (0, missing)).view(len(part), -1, width), weight, clips)
            for part in w.split(rows)
        ]
        return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])

    def _fit_rows(self, w: Tensor, weight: Tensor, clips: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Search over ``clips`` for groups [o, G, n] with column weights [G, n]."""
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        best_scale, best_zero = self._range(low, high, clips[0])
        if len(clips) == 1:
            return best_scale, best_zero
        best_error = self._error(w, best_scale, best_zero, weight)
        for clip in clips[1:]:
            scale, zero = self._range(low, high, clip)
            error = self._error(w, scale, zero, weight)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale, best_zero

    def _range(self, low: Tensor, high: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            scale = as_half(2 * clip * torch.maximum(-low, high) / self.levels)
            return scale, torch.full_like(scale, float(self.middle))
        scale = as_half(clip * (high - low) / self.levels)
        return scale, torch.round(-clip * low / scale).clamp_(0, self.levels)

    def _error(self, w: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> Tensor:
        """Weighted squared rounding error of each group, [o, G]; in place, for this is where the time goes."""
        centre = zero[..., None]
        rounded = (w / scale[..., None]).add_(centre).round_().clamp_(0, self.levels).sub_(centre)
        return rounded.mul_(scale[..., None]).sub_(w).square_().mul_(weight).sum(-1)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, as float; all arguments broadcast."""
        return torch.round(w / scale + zero).clamp(0, self.levels)


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
    scale, zero = grid.fit(w, clips=clips)
    group = grid.group_index(w.shape[1], w.device)
    rows = max(1, WEIGHTS_AT_ONCE // w.shape[1])
    codes = [
        grid.encode(part, s[:, group], z[:, group]).to(torch.uint8)
        for part, s, z in zip(w.split(rows), scale.split(rows), zero.split(rows), strict=True)
    ]
    return QuantizedWeight(torch.cat(codes), scale.half(), zero.to(torch.uint8), grid)
