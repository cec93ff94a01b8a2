"""The quantization grid: weights are ``scale * (code - zero)``, with one scale and zero point per group of columns.

Codes are unsigned, ``0 .. 2**bits - 1``. A symmetric grid has its zero point in the middle, ``2**(bits - 1)``, and
``scale = 2 * absmax / (2**bits - 1)`` for every group, groups of one sign included (other libraries mirror the range
only where a negative weight occurs and then clip half of an all-positive group).

Scales are rounded to float16 before weights are encoded with them, so that all export formats can store them exactly
and the deployed model equals the measured one.

Axes: o out_features, i in_features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.errors import NumericsError

WEIGHTS_AT_ONCE = 1 << 18  # weights in the working set of a clip search: small enough to stay in the processor's cache
CLIPS = (1.0, 1.2, 1.1, 0.9, 0.8, 0.7)  # fractions of a group's range; above 1, because GPTQ changes the weights
LARGEST_SCALE = 65504.0
LOST = 0.01  # share of a weight's energy that may vanish in groups of scales too small for float16
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16, so that an all-zero group has no scale of 0


@dataclass(frozen=True, slots=True)
class Grid:
    """Quantization settings of a weight.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a scale; -1 is the whole row. The last group may be shorter.
        symmetric: the zero point is the middle code.
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
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def width(self, columns: int) -> int:
        """Columns in a full group of a weight with ``columns`` inputs."""
        return columns if self.group_size == -1 else self.group_size

    def groups(self, columns: int) -> int:
        """Number of groups, the short last one included."""
        return -(-columns // self.width(columns)) if columns else 0

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of an [o, i] matrix as it is deployed: codes at their bits, float16 scales, packed zeros."""
        cells = rows * self.groups(columns)
        zeros = 0 if self.symmetric else -(-cells * self.bits // 8)
        return -(-rows * columns * self.bits // 8) + 2 * cells + zeros

    def group_index(self, columns: int, device: torch.device | None = None) -> Tensor:
        """Group of each column, int64 [i]."""
        return torch.arange(columns, device=device) // self.width(columns)

    def spread(self, x: Tensor, columns: int) -> Tensor:
        """Repeat the value of each group for its columns, [o, G] -> [o, i]; several times as fast as indexing."""
        return x.unsqueeze(-1).expand(-1, -1, self.width(columns)).reshape(len(x), -1)[:, :columns]

    def fit(self, w: Tensor, *, importance: Tensor | None = None, search: bool = False) -> tuple[Tensor, Tensor]:
        """Scale and zero of every group.

        Args:
            w: float32 [o, i].
            importance: weight of each column's squared error, [i]; all ones if None.
            search: search a clip factor for each group that minimises the weighted squared error; False is min-max.

        Returns:
            scale (float32, rounded to float16 values) and zero (float32, integer codes), both [o, G].
        """
        columns, width = w.shape[1], self.width(w.shape[1])
        missing = self.groups(columns) * width - columns  # pad a short last group with columns of weight 0
        weight = torch.ones(columns, device=w.device) if importance is None else importance.float()
        weight = F.pad(weight, (0, missing)).view(-1, 1, width)
        found = []
        for part in w.split(max(1, WEIGHTS_AT_ONCE // width)):
            groups = F.pad(part, (0, missing)).T.contiguous().view(-1, width, len(part))
            at_once = max(1, WEIGHTS_AT_ONCE // groups[0].numel())
            some = zip(groups.split(at_once), weight.split(at_once), strict=True)
            scales, zeros = zip(*(self._fit_groups(*group, search) for group in some), strict=True)
            found.append((torch.cat(scales), torch.cat(zeros)))
        scale, zero = (torch.cat(parts, 1).T for parts in zip(*found, strict=True))
        return scale, zero

    def _fit_groups(self, w: Tensor, weight: Tensor, search: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero of groups [G, n, o] with column weights [G, 1, n]; both [G, o].

        Rows of the weight are the innermost axis, so that operations on a group are vectorised over rows. For the codes
        of each clip factor the optimal scale has a closed form, so a few factors are enough.
        """
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        whole, zero = self._range(low, high)
        if not search:
            return whole, zero
        target, rounded, product = w * weight.mT, torch.empty_like(w), torch.empty_like(w)
        scale, most = whole, torch.zeros_like(whole)
        for clip in CLIPS:
            self._round(w, whole * clip, zero, rounded)
            along = torch.mul(target, rounded, out=product).sum(1)
            length = torch.bmm(weight, rounded.square_())[:, 0]
            best = as_half(along / length)
            explained = best * (2 * along - best * length)  # of the weighted square of w
            scale = torch.where(explained > most, best, scale)
            most = torch.maximum(explained, most)
        return scale, zero

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            scale = as_half(2 * torch.maximum(-low, high) / self.levels)
            return scale, torch.full_like(scale, float(self.middle))
        scale = as_half((high - low) / self.levels)
        return scale, torch.round(-low / scale).clamp_(0, self.levels)

    def _round(self, w: Tensor, scale: Tensor, zero: Tensor, rounded: Tensor) -> None:
        """Nearest codes of groups minus their zero point, written to a buffer because this dominates the run time."""
        lowest: Any = -self.middle  # numbers are faster than tensors
        highest: Any = self.levels - self.middle
        if not self.symmetric:
            lowest, highest = -zero[:, None], (self.levels - zero)[:, None]
        torch.mul(w, scale.reciprocal()[:, None], out=rounded).round_().clamp_(lowest, highest)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes, as float; all arguments broadcast."""
        return torch.round(w / scale).clamp(-zero, self.levels - zero) + zero


def unheld(grid: Grid, w: Tensor, scale: Tensor, importance: Tensor) -> str:
    """What float16 scales cannot hold of a weight, in words; empty where they hold it.

    Args:
        grid: of the weight.
        w: float32 [o, i].
        scale: of its groups, [o, G].
        importance: weight of each column's square, [i].
    """
    ends = (scale >= LARGEST_SCALE) | (scale <= SMALLEST_SCALE)
    if not ends.any():
        return ""
    scale = grid.spread(scale, w.shape[1])
    high, low = scale >= LARGEST_SCALE, scale <= SMALLEST_SCALE
    largest = float(w[high].abs().max()) if bool(high.any()) else 0.0
    most = LARGEST_SCALE * grid.levels / 2
    if largest > most:
        return (
            f"a weight of magnitude {largest:.3g} is beyond {most:.3g}, the most that {grid.bits} bits with float16 "
            "scales hold"
        )
    energy = w.double().square() * importance.double()
    share = float(energy[low].sum() / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny))
    if share > LOST:
        return (
            f"{share:.0%} of its energy is in groups whose largest weight is below "
            f"{SMALLEST_SCALE * grid.levels / 2:.2g}, too small for float16 scales"
        )
    return ""


def as_half(scale: Tensor) -> Tensor:
    """The scale rounded to a positive float16 value, kept in its own dtype."""
    return scale.clamp(min=SMALLEST_SCALE, max=LARGEST_SCALE).half().to(scale.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A quantized matrix with one code per byte; exporters pack the codes.

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
        """``scale * (code - zero)``, [o, i]; a few rows at a time, because temporaries of a large table are large."""
        columns = self.codes.shape[1]
        found = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        parts = (part.split(max(1, WEIGHTS_AT_ONCE // columns)) for part in (found, self.codes, self.scale, self.zero))
        for out, codes, scale, zero in zip(*parts, strict=True):
            scale, zero = (self.grid.spread(part.float(), columns) for part in (scale, zero))
            out.copy_((codes - zero).mul_(scale))
        return found


def round_to_nearest(w: Tensor, grid: Grid, *, search: bool = False) -> QuantizedWeight:
    """Round-to-nearest quantization of a weight [o, i]; used for embeddings and as the baseline of GPTQ.

    Raises:
        NumericsError: the weight does not fit float16 scales.
    """
    w = w.float()
    scale, zero = grid.fit(w, search=search)
    lost = unheld(grid, w, scale, torch.ones(w.shape[1], device=w.device))
    if lost:
        raise NumericsError(lost)
    rows = max(1, WEIGHTS_AT_ONCE // w.shape[1])
    codes = [
        grid.encode(part, *(grid.spread(x, w.shape[1]) for x in (s, z))).to(torch.uint8)
        for part, s, z in zip(w.split(rows), scale.split(rows), zero.split(rows), strict=True)
    ]
    return QuantizedWeight(torch.cat(codes), scale.half(), zero.to(torch.uint8), grid)
