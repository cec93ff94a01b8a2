"""GPTQ and its grid: exact identities at the edges, and the order of errors in between."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatq.errors import NumericsError
from flatq.model.grid import SMALLEST_SCALE, Grid, QuantizedWeight, round_to_nearest
from flatq.quantize.gptq import DAMPING_LADDER, gptq

BITS = [2, 3, 4, 8]
GRIDS = st.builds(Grid, st.sampled_from(BITS), st.sampled_from([-1, 4, 16]), st.booleans())
SHAPES = st.tuples(st.integers(1, 6), st.sampled_from([1, 3, 4, 16, 19, 40]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(width: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """Second moment of activations that depend on each other, of very different energies."""
    spread = torch.logspace(0, -2, width)[torch.randperm(width, generator=torch.Generator().manual_seed(seed))]
    x = random(tokens, width // 4 + 1, seed=seed) @ random(width // 4 + 1, width, seed=seed + 1) * spread
    x = x + 0.1 * spread * random(tokens, width, seed=seed + 2)
    return x.T @ x / tokens


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("codes", "scale", "zero"))


def lost(w: Tensor, quantized: QuantizedWeight, gram: Tensor) -> float:
    """Energy of the output's change."""
    d = (w - quantized.dequantize()).double()
    return float(((d @ gram.double()) * d).sum())


# The grid.


@given(GRIDS, SHAPES)
@settings(max_examples=80, deadline=None)
def test_what_is_on_the_grid_stays_where_it_is(grid: Grid, shape: tuple[int, int]) -> None:
    once = round_to_nearest(random(*shape, seed=shape[1]), grid)
    group = grid.group_index(shape[1])
    scale, zero = once.scale.float()[:, group], once.zero.float()[:, group]
    assert torch.equal(grid.encode(once.dequantize(), scale, zero), once.codes.float())


@given(GRIDS, SHAPES)
@settings(max_examples=80, deadline=None)
def test_rounding_errs_by_half_a_step_at_most(grid: Grid, shape: tuple[int, int]) -> None:
    w = random(*shape, seed=shape[0])
    quantized = round_to_nearest(w, grid)
    assert quantized.codes.max() <= grid.levels
    assert quantized.scale.shape == quantized.zero.shape == (shape[0], grid.groups(shape[1]))
    step = quantized.scale.float()[:, grid.group_index(shape[1])]
    inside = 1.0 if grid.symmetric or grid.bits > 2 else 1.5  # a zero point is rounded too, and moves the range
    slack = grid.levels * step * 2**-11  # the scale itself is rounded to float16
    assert ((w - quantized.dequantize()).abs() <= inside * step + slack).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_symmetric_scale_covers_groups_of_one_sign(bits: int, sign: int) -> None:
    grid = Grid(bits, 4)
    w = sign * torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    quantized = round_to_nearest(w, grid)
    assert quantized.zero.item() == grid.middle
    assert quantized.scale.item() == pytest.approx(2 / grid.levels, rel=1e-3)
    assert ((w - quantized.dequantize()).abs() <= quantized.scale.float() / 2 * 1.01).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(bits: int, symmetric: bool) -> None:
    w = random(2, 8)
    w[:, 4:] = 0
    quantized = round_to_nearest(w, Grid(bits, 4, symmetric))
    assert torch.equal(quantized.dequantize()[:, 4:], torch.zeros(2, 4))
    assert (quantized.scale.float()[:, 1] == SMALLEST_SCALE).all()


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 33])
def test_a_short_last_group_is_a_group_of_its_own(columns: int) -> None:
    grid, w = Grid(4, 16), random(3, columns)
    whole = round_to_nearest(w, grid)
    start = (grid.groups(columns) - 1) * 16
    alone = round_to_nearest(w[:, start:], grid)
    assert torch.equal(whole.codes[:, start:], alone.codes)
    assert torch.equal(whole.scale[:, -1:], alone.scale)


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(4, 8, False), Grid(2, -1)])
def test_searching_the_clip_factor_never_hurts(grid: Grid) -> None:
    w = random(32, 24)
    plain = (w - round_to_nearest(w, grid).dequantize()).square()
    searched = (w - round_to_nearest(w, grid, search=True).dequantize()).square()
    for old, new in zip(plain.split(grid.width(24), 1), searched.split(grid.width(24), 1), strict=True):
        assert (new.sum(1) <= old.sum(1) * (1 + 1e-6)).all(), "in no group"
    assert searched.sum() < plain.sum()


# GPTQ.


def as_published(w: Tensor, gram: Tensor, grid: Grid, damping: float) -> Tensor:
    """Algorithm 1 of the GPTQ paper, a column at a time, in float64: codes on the scales of round-to-nearest."""
    columns = w.shape[1]
    group = grid.group_index(columns)
    scale, zero = (part.double()[:, group] for part in grid.fit(w))
    h = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(columns, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rest, codes = w.double().clone(), torch.empty(w.shape, dtype=torch.float64)
    for j in range(columns):
        codes[:, j] = grid.encode(rest[:, j], scale[:, j], zero[:, j])
        error = (rest[:, j] - scale[:, j] * (codes[:, j] - zero[:, j])) / factor[j, j]
        rest[:, j:] -= error[:, None] * factor[j, j:]
    return codes


@given(grid=GRIDS, shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_passing_errors_on_by_the_gram_s_own_factors_gives_the_paper_s_codes(
    grid: Grid, shape: tuple[int, int]
) -> None:
    w, gram = random(*shape), correlated_gram(shape[1])
    result = gptq(w, gram, grid, act_order=False, clip_search=False, damping=0.02)
    assert torch.equal(result.weight.codes.double(), as_published(w, gram, grid, 0.02))


@pytest.mark.parametrize("act_order", [True, False])
@given(grid=GRIDS, shape=SHAPES)
@settings(max_examples=40, deadline=None)
def test_a_diagonal_gram_makes_it_round_to_nearest(act_order: bool, grid: Grid, shape: tuple[int, int]) -> None:
    w, gram = random(*shape), torch.diag(random(shape[1], seed=1).square() + 0.01)
    result = gptq(w, gram, grid, act_order=act_order, clip_search=False)
    assert same(result.weight, round_to_nearest(w, grid))


@pytest.mark.parametrize("act_order", [True, False])
def test_a_diagonal_gram_with_searched_scales_is_round_to_nearest_on_these_scales(act_order: bool) -> None:
    grid, w, gram = Grid(4, 8), random(5, 32), torch.diag(random(32, seed=1).square() + 0.01)
    result = gptq(w, gram, grid, act_order=act_order, clip_search=True).weight
    group = grid.group_index(32)
    nearest = grid.encode(w, result.scale.float()[:, group], result.zero.float()[:, group])
    assert torch.equal(result.codes.float(), nearest)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("seed", range(3))
def test_it_loses_less_than_round_to_nearest_on_equal_scales(
    act_order: bool, bits: int, group_size: int, seed: int
) -> None:
    grid, w, gram = Grid(bits, group_size), random(24, 48, seed=seed), correlated_gram(48, seed)
    result = gptq(w, gram, grid, act_order=act_order, clip_search=False)
    nearest = round_to_nearest(w, grid)
    assert torch.equal(result.weight.scale, nearest.scale)
    assert lost(w, result.weight, gram) < 0.8 * lost(w, nearest, gram)


@pytest.mark.parametrize("act_order", [True, False])
def test_columns_are_stored_in_their_own_order(act_order: bool) -> None:
    """The first column visited is rounded before any correction, so it tells visiting order from storage order."""
    grid, w, gram = Grid(4, 16), random(8, 48), correlated_gram(48)
    result = gptq(w, gram, grid, act_order=act_order, clip_search=False).weight
    first = int(gram.diagonal().argmax()) if act_order else 0
    nearest = round_to_nearest(w, grid).codes
    assert torch.equal(result.codes[:, first], nearest[:, first])
    assert not torch.equal(result.codes, nearest)


def test_in_activation_order_shuffled_columns_are_quantized_as_before() -> None:
    grid, w, gram = Grid(4, -1), random(8, 40), correlated_gram(40)
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    straight = gptq(w, gram, grid).weight
    shuffled = gptq(w[:, shuffle], gram[shuffle][:, shuffle], grid).weight
    assert torch.equal(shuffled.codes, straight.codes[:, shuffle])


@pytest.mark.parametrize("block_size", [1, 7, 48, 128])
def test_the_block_size_changes_no_result_beyond_rounding(block_size: int) -> None:
    grid, w, gram = Grid(4, 16), random(16, 48), correlated_gram(48)
    result, reference = gptq(w, gram, grid, block_size=block_size), gptq(w, gram, grid, block_size=16)
    assert (result.weight.codes == reference.weight.codes).float().mean() > 0.99
    assert float(result.lost.sum()) == pytest.approx(float(reference.lost.sum()), rel=0.02)


def test_rows_do_not_know_of_each_other() -> None:
    grid, w, gram = Grid(4, 16), random(12, 32), correlated_gram(32)
    together = gptq(w, gram, grid)
    for rows in (slice(0, 5), slice(5, 12)):
        alone = gptq(w[rows], gram, grid)
        assert torch.equal(together.weight.codes[rows], alone.weight.codes)
        assert together.error_of(rows) == pytest.approx(alone.error_of(), rel=1e-5)


@pytest.mark.parametrize("at_once", [1, 32 * 5, 1 << 20])
def test_how_many_rows_are_solved_together_does_not_matter(at_once: int) -> None:
    grid, w, gram = Grid(4, 16), random(12, 32), correlated_gram(32)
    together, some = gptq(w, gram, grid), gptq(w, gram, grid, at_once=at_once)
    assert same(some.weight, together.weight)
    assert some.error_of() == pytest.approx(together.error_of(), rel=1e-5)


@pytest.mark.parametrize("dead", [[0], [3, 17, 31], list(range(32))], ids=["one", "some", "all"])
@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns_keep_their_nearest_codes_and_are_counted(dead: list[int], act_order: bool) -> None:
    grid, w, gram = Grid(4, 16), random(8, 32), correlated_gram(32)
    gram[dead, :] = 0
    gram[:, dead] = 0
    result = gptq(w, gram, grid, act_order=act_order, clip_search=False)
    assert result.dead == len(dead)
    assert torch.equal(result.weight.codes[:, dead], round_to_nearest(w, grid).codes[:, dead])
    assert torch.isfinite(result.weight.dequantize()).all()
    live = [column for column in range(32) if column not in dead]
    if live:
        alone = gptq(w[:, live], gram[live][:, live], Grid(4, -1), act_order=act_order, clip_search=False)
        assert alone.dead == 0


def test_dead_columns_do_not_touch_the_others() -> None:
    w, gram = random(8, 33), correlated_gram(32)
    w[:, 32] = 0  # does not change the row's scale either
    padded = torch.zeros(33, 33)
    padded[:32, :32] = gram
    grid = Grid(4, -1)
    assert torch.equal(gptq(w, padded, grid).weight.codes[:, :32], gptq(w[:, :32], gram, grid).weight.codes)


@pytest.mark.parametrize(("correlation", "rung"), [(0.5, 0), (1.05, 1), (1.5, 2), (3.0, None)])
def test_the_damping_that_was_needed_is_reported(correlation: float, rung: int | None) -> None:
    """A Gram that is not quite positive definite: rounding errors make such of nearly dependent inputs."""
    gram, w = torch.tensor([[1.0, correlation], [correlation, 1.0]]), random(4, 2)
    result = gptq(w, gram, Grid(4, -1), damping=0.01, clip_search=False)
    if rung is None:
        assert result.damping is None
        assert same(result.weight, round_to_nearest(w, Grid(4, -1)))
    else:
        assert result.damping == pytest.approx(0.01 * DAMPING_LADDER[rung])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "gram"])
def test_what_is_not_finite_is_refused(value: float, where: str) -> None:
    w, gram = random(4, 8), correlated_gram(8)
    (w if where == "weight" else gram)[2, 3] = value
    with pytest.raises(NumericsError, match="not finite"):
        gptq(w, gram, Grid(4, -1))


@given(grid=GRIDS, shape=SHAPES, dead=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_reported_error_is_the_measured_one(grid: Grid, shape: tuple[int, int], dead: bool) -> None:
    """It is never measured: it is the price of the roundings less that of the damping.

    Both in float32: at 8 bits, where 1e-7 of the energy is lost, the two differ by 2e-4 of that at worst.
    """
    w, gram = random(*shape), correlated_gram(shape[1])
    if dead and shape[1] > 1:
        gram[0, :] = gram[:, 0] = 0
    result = gptq(w, gram, grid)
    total = float(((w.double() @ gram.double()) * w).sum())
    assert result.error_of() == pytest.approx(lost(w, result.weight, gram) / total, rel=1e-3, abs=1e-12)


def test_a_weight_of_zeros_loses_nothing() -> None:
    result = gptq(torch.zeros(3, 8), correlated_gram(8), Grid(4, -1))
    assert result.error_of() == 0
    assert torch.equal(result.weight.dequantize(), torch.zeros(3, 8))
