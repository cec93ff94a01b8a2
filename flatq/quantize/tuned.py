"""Rounding that is trained: codes and scales of GPTQ's solution are changed together, by the output of the half layer.

GPTQ solves each linear for itself. Here all linears of an attention or MLP are trained together towards the output that
the half layer had before it was quantized. Trained are, for each weight, its position on the grid before rounding, and,
for each group, a factor of its scale, which moves both ends of the range. The zero points stay.

The start is GPTQ's solution: the position of a weight is its code, plus what remains of the weight inside the rounding
interval of that code, so that rounding gives GPTQ's codes. Rounding has no gradient; it is passed through unchanged
(straight-through). The results are codes and float16 scales on the same grid, so every format stores them as before.

Axes: o out_features, i in_features, G groups.
Source: SignRound (arXiv 2309.05516), equations 3 to 5.
Differs from it: the start (there: the weight itself and its range), one factor for both ends of the range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.model.grid import Grid, QuantizedWeight, as_half

INSIDE = 0.49  # largest distance of a starting position from its code
POSITION_RANGE = 0.3  # sum of the rates of a position over all steps, if none fell, in steps of the grid
SCALE_RANGE = 0.03  # the same for the logarithm of a scale's factor


class TunedCodes:
    """Positions on the grid and scale factors of the quantized linears of a half layer; a ``Trainable``.

    Args:
        codes: GPTQ's solution, by name of the linear.
        weights: what was quantized, [o, i], by the same names.
        steps: number of steps of the training, which the rates depend on.
    """

    def __init__(self, codes: Mapping[str, QuantizedWeight], weights: Mapping[str, Tensor], steps: int) -> None:
        self.start, self.steps = dict(codes), steps
        self._position: dict[str, Tensor] = {}
        self._factor: dict[str, Tensor] = {}
        for name, code in self.start.items():
            scale, zero = (code.grid.spread(part.float(), code.shape[1]) for part in (code.scale, code.zero))
            chosen = code.codes - zero
            rest = (weights[name].float() / scale - chosen).clamp_(-INSIDE, INSIDE)
            self._position[name] = (chosen + rest).requires_grad_()
            self._factor[name] = torch.zeros_like(code.scale, dtype=torch.float32).requires_grad_()

    def parameters(self) -> Sequence[tuple[Tensor, float]]:
        """See ``Trainable``."""
        steps = max(self.steps, 1)
        positions = [(tensor, POSITION_RANGE / steps) for tensor in self._position.values()]
        return positions + [(tensor, SCALE_RANGE / steps) for tensor in self._factor.values()]

    def weights(self) -> Mapping[str, Tensor]:
        """See ``Trainable``; the weights that the present codes decode to."""
        return {name: _Decoded.apply(*self._parts(name)) for name in self.start}  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def codes(self) -> dict[str, QuantizedWeight]:
        """The present codes and scales."""
        found = {}
        for name, start in self.start.items():
            position, factor, scale, zero, grid = self._parts(name)
            codes = _rounded(position, zero, grid) + grid.spread(zero, position.shape[1])
            found[name] = QuantizedWeight(codes.to(torch.uint8), _scaled(scale, factor).half(), start.zero, grid)
        return found

    def _parts(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Grid]:
        start = self.start[name]
        return self._position[name], self._factor[name], start.scale.float(), start.zero.float(), start.grid


def _rounded(position: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Nearest codes minus their zero points, inside the grid, [o, i]."""
    zeros = grid.spread(zero, position.shape[1])
    return torch.minimum(torch.maximum(position.round(), -zeros), grid.levels - zeros)


def _scaled(scale: Tensor, factor: Tensor) -> Tensor:
    """Scales times ``exp(factor)``, as float16 holds them, [o, G]."""
    return as_half(scale * factor.exp())


class _Decoded(torch.autograd.Function):
    """Positions [o, i] and scale factors [o, G] to weights [o, i]; rounding is passed through in the backward pass."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        """Decode."""
        code = _rounded(position, zero, grid)
        spread = grid.spread(_scaled(scale, factor), position.shape[1])
        ctx.save_for_backward(code, spread, (position - code).abs() <= 0.5)
        ctx.grid = grid
        return code * spread

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of the positions (0 for those beyond the grid) and of the logarithms of the scales."""
        code, spread, inside = ctx.saved_tensors
        columns = code.shape[1]
        along = gradient * spread
        width, groups = ctx.grid.width(columns), ctx.grid.groups(columns)
        products = F.pad(along * code, (0, groups * width - columns))
        return along * inside, products.view(len(code), groups, width).sum(-1), None, None, None
