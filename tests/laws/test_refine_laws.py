"""Fitting codes and scales to each other: it can only help, and it finds what is there to be found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatq.model.grid import Grid, round_to_nearest
from flatq.quantize.gptq import gptq
from flatq.quantize.refine import descend, fit_scales
from tests.laws.test_gptq_laws import GRIDS, correlated_gram, lost, random


def start(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    nearest = round_to_nearest(w, grid)
    return nearest.codes.float(), nearest.scale.float(), nearest.zero.float()


def error(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> float:
    group = grid.group_index(w.shape[1])
    d = (w - scale[:, group] * (codes - zero[:, group])).double()
    return float(((d @ h.double()) * d).sum())


@given(grid=GRIDS, columns=st.sampled_from([4, 19, 40]), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_neither_step_raises_the_error(grid: Grid, columns: int, seed: int) -> None:
    w, h = random(6, columns, seed=seed), correlated_gram(columns, seed) + 1e-3 * torch.eye(columns)
    codes, scale, zero = start(w, grid)
    before = error(w, h, codes, scale, zero, grid)
    scale = fit_scales(w, h, codes, scale, zero, grid)
    between = error(w, h, codes, scale, zero, grid)
    after = error(w, h, descend(w, h, codes, scale, zero, grid, 128), scale, zero, grid)
    slack = 1 + 1e-4
    assert after <= between * slack + 1e-9
    assert between <= before * slack + 1e-9


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(3, -1), Grid(4, 16, symmetric=False), Grid(2, 7)])
def test_the_scales_behind_the_codes_are_found_again(grid: Grid) -> None:
    codes, scale, zero = start(random(5, 32), grid)
    group = grid.group_index(32)
    w = scale[:, group] * (codes - zero[:, group])
    wrong = (scale * 1.3).half().float()
    assert torch.allclose(fit_scales(w, correlated_gram(32), codes, wrong, zero, grid), scale, rtol=2e-3)


def test_a_group_of_zeros_and_a_row_of_zeros_keep_their_scales() -> None:
    grid, w = Grid(4, 8), random(3, 16)
    w[0] = 0
    w[1, :8] = 0
    codes, scale, zero = start(w, grid)
    found = fit_scales(w, correlated_gram(16), codes, scale, zero, grid)
    assert torch.equal(found[0], scale[0])
    assert found[1, 0] == scale[1, 0]
    assert found.isfinite().all()


@pytest.mark.parametrize("block_size", [1, 5, 40, 128])
def test_the_block_size_of_the_descent_changes_nothing(block_size: int) -> None:
    w, h, grid = random(6, 40), correlated_gram(40).double(), Grid(4, 8)
    codes, scale, zero = (part.double() for part in start(w, grid))
    found = descend(w.double(), h, codes, scale, zero, grid, block_size)
    assert torch.equal(found, descend(w.double(), h, codes, scale, zero, grid, 16))
    assert not torch.equal(found, codes)


def test_columns_that_do_not_know_of_each_other_are_rounded_to_nearest() -> None:
    w, h, grid = random(6, 32), torch.diag(random(32, seed=1).square() + 0.1), Grid(4, 8)
    codes, scale, zero = start(w, grid)
    messed = (codes + 3).clamp(0, grid.levels)
    assert torch.equal(descend(w, h, messed, scale, zero, grid, 8), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_with_refinements_loses_less_and_more_of_them_never_hurt(bits: int, symmetric: bool) -> None:
    w, gram, grid = random(24, 48), correlated_gram(48), Grid(bits, 16, symmetric)
    losses = [lost(w, gptq(w, gram, grid, damping=1e-6, refinements=rounds).weight, gram) for rounds in range(4)]
    assert losses[1] < 0.97 * losses[0]
    assert losses[3] <= losses[2] * 1.001 <= losses[1] * 1.002
