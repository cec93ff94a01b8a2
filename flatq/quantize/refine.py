"""Codes and scales fitted to each other once GPTQ is done: the same error, measured on the Gram, made smaller.

GPTQ fixes the scales before it rounds and never looks back at a code. Both can be mended in closed form, in turns:

- with the codes fixed, the error is a quadratic of the scales of a row, so the best ones solve G equations;
- with the scales fixed, the error is a quadratic of each code, so each column is rounded anew to what is best for it
  given all other columns (coordinate descent).

No step can raise the error. It is measured on the damped Gram that GPTQ itself solved with: the damping is what
keeps a few thousand calibration tokens from being fitted too well.

Axes: o out_features, i in_features, G groups, n columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flatq.model.grid import Grid, as_half


@torch.inference_mode()
def refine(
    w: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, rounds: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Better codes [o, i] and scales [o, G], float32 like all arguments.

    Args:
        w: the weight, [o, i].
        h: damped second moment of the inputs, [i, i].
        codes, scale, zero: where to begin.
        rounds: turns of scales, then codes.
        block_size: columns whose moves are applied one by one; the rest follows in one product.
    """
    for _ in range(rounds):
        scale = fit_scales(w, h, codes, scale, zero, grid)
        codes = descend(w, h, codes, scale, zero, grid, block_size)
    return codes, scale


def fit_scales(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Scales of least error for these codes (float16 values in float32); rows that this makes no better keep theirs."""
    columns, groups, width = w.shape[1], scale.shape[1], grid.width(w.shape[1])
    centred = codes - zero[:, grid.group_index(columns, w.device)]

    def by_group(x: Tensor) -> Tensor:
        return F.pad(x, (0, groups * width - columns)).view(len(x), groups, width).sum(-1)

    target = by_group(w @ h * centred)  # [o, G]
    system = torch.empty(len(w), groups, groups, device=w.device)
    for group in range(groups):
        inside = slice(group * width, (group + 1) * width)
        system[:, group] = by_group(centred[:, inside] @ h[inside] * centred)
    silent = system.diagonal(dim1=1, dim2=2) <= 0  # a group of zeros has no best scale: it keeps its own
    system.diagonal(dim1=1, dim2=2).add_(silent)
    solved = torch.linalg.solve(system.double(), torch.where(silent, scale, target).double().unsqueeze(-1)).squeeze(-1)
    wanted = as_half(torch.where(solved.isfinite() & (solved > 0), solved.float(), scale))

    def error(s: Tensor) -> Tensor:
        return ((system @ s.unsqueeze(-1)).squeeze(-1) * s - 2 * target * s).sum(-1, keepdim=True)

    return torch.where(error(wanted) < error(scale), wanted, scale)


def descend(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, block_size: int) -> Tensor:
    """Every column once, in stored order, rounded to what is best given the others; float32 [o, i]."""
    group = grid.group_index(w.shape[1], w.device)
    steps, middle = scale[:, group].T.contiguous(), zero[:, group].T.contiguous()  # [i, o]: a column is contiguous
    found = codes.T.contiguous()
    value = steps * (found - middle)
    pull = h @ (w.T - value)  # [i, o], minus half the error's slope
    for start in range(0, len(found), block_size):
        block = slice(start, min(start + block_size, len(found)))
        near, moves = pull[block].clone(), torch.empty_like(pull[block])
        for column in range(start, block.stop):
            here = column - start
            code = grid.encode(value[column] + near[here] / h[column, column], steps[column], middle[column])
            moves[here] = steps[column] * (code - found[column])
            found[column] = code
            near[here + 1 :].addr_(h[column, column + 1 : block.stop], moves[here], alpha=-1)
        value[block] += moves
        pull -= h[:, block] @ moves
    return found.T.contiguous()
