"""What goes beyond the paper: each lever does what its formula promises."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatq.calibration.sensitivity import LONGEST, output_sensitivity, unsure, weighted
from flatq.calibration.walk import dense_blocks
from flatq.compress.allocate import Curves, Multiples, spend
from flatq.compress.budget import parameter_budget
from flatq.compress.error_curves import error_curves
from flatq.compress.heads import head_basis, output_basis, project_heads, refit_output, spread_over_queries
from flatq.compress.mlp import closed_up, eliminate, nystroem, output_error
from flatq.linalg import drift_correction, shrunk
from flatq.model.decoder import locate
from flatq.model.dims import LayerDims
from flatq.model.weights import load_decoder
from tests.models import EXACT, SWITCHES, RandomWeights, tiny_config


def activations(features: int, seed: int, tokens: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, features, dtype=torch.float64)
    return torch.randn(tokens, features, generator=generator, dtype=torch.float64) * scales @ mixing


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_eliminating_one_channel_equals_trying_each() -> None:
    x, w = activations(9, 0), matrix(5, 9, 1)
    gram = x.T @ x / len(x)
    everything = torch.arange(9)
    losses = []
    for channel in range(9):
        keep = everything[everything != channel]
        losses.append(output_error(w, gram, nystroem(w, gram, keep, 1e-12), keep))
    assert int(eliminate(w, gram, 8, 1e-12).order) == losses.index(min(losses))


@settings(deadline=None, max_examples=20)
@given(features=st.integers(4, 24), share=st.floats(0, 1), step=st.integers(1, 5), seed=st.integers(0, 99))
def test_elimination_cost_is_the_error_of_the_least_squares_refit(
    features: int, share: float, step: int, seed: int
) -> None:
    width = max(1, round(share * features))
    x, w = activations(features, seed), matrix(6, features, seed + 1)
    gram = x.T @ x / len(x)
    found = eliminate(w, gram, width, 1e-10, step=step)
    keep = found.kept(features)
    assert len(keep) == width
    total = float(((w @ gram) * w).sum())
    cost = float(found.cost[-1]) if len(found.cost) else 0.0
    assert cost / total == pytest.approx(output_error(w, gram, nystroem(w, gram, keep, 1e-10), keep), abs=1e-6)


def test_elimination_costs_never_fall() -> None:
    x, w = activations(30, 3), matrix(7, 30, 4)
    cost = eliminate(w, x.T @ x, 1, 1e-3, step=3).cost
    assert (cost.diff() >= 0).all()


@settings(deadline=None, max_examples=20)
@given(d=st.integers(2, 12), seed=st.integers(0, 99), data=st.data())
def test_output_basis_is_never_worse_than_pca_for_one_head(d: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, d))
    z, w = activations(d, seed), matrix(5, d, seed + 1)
    gram = z.T @ z / len(z)

    def loss(encode: Tensor) -> float:
        o = refit_output(w, gram, encode, 1, ridge=1e-12)
        return float((z @ w.T - z @ encode[0] @ o.T).square().sum())

    encode, _ = output_basis(gram, w, 1, 1)
    assert loss(encode[..., :rank]) <= loss(head_basis(gram[None], rank).encode) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_refit_is_never_worse_than_no_refit(kv_heads: int, group: int) -> None:
    d, rank, heads = 6, 3, kv_heads * group
    z, w_o = activations(heads * d, 5), matrix(8, heads * d, 6)
    gram = z.T @ z / len(z)
    basis = head_basis(torch.stack([gram[:d, :d]] * kv_heads), rank)
    narrow = z @ spread_over_queries(basis.encode, group)
    plain = project_heads(matrix(kv_heads * d, 8, 7), None, w_o, basis).o
    refitted = refit_output(w_o, gram, basis.encode, group)
    wanted = z @ w_o.T
    # For a single head the two are the same numbers, rounded differently.
    assert (wanted - narrow @ refitted.T).norm() <= (1 + 1e-12) * (wanted - narrow @ plain.T).norm()


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (2, 3)])
def test_full_rank_output_basis_with_refit_changes_nothing(kv_heads: int, group: int) -> None:
    d, heads = 5, kv_heads * group
    z, w_o = activations(heads * d, 8), matrix(7, heads * d, 9)
    gram = z.T @ z / len(z)
    encode, carried = output_basis(gram, w_o, kv_heads, group)
    assert torch.allclose(encode.mT @ encode, torch.eye(d, dtype=torch.float64).expand(kv_heads, d, d), atol=1e-8)
    assert (carried.diff(dim=-1) <= 1e-9).all()
    refitted = refit_output(w_o, gram, encode, group, ridge=1e-12)
    assert torch.allclose(z @ spread_over_queries(encode, group) @ refitted.T, z @ w_o.T, atol=1e-6)


@given(size=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_noise_at_the_logits_has_the_fisher_information_as_its_covariance(size: int, seed: int) -> None:
    chances = matrix(1, size, seed).softmax(-1)[0]
    drawn = unsure(chances.repeat(size, 1), torch.eye(size, dtype=torch.float64))  # of every direction, one
    assert torch.allclose(drawn.T @ drawn, chances.diag() - torch.outer(chances, chances), atol=1e-12)
    assert torch.allclose(drawn.sum(-1), torch.zeros(size, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("family", [None, "gemma2", "olmo3"])
def test_sensitivity_is_the_second_moment_of_noise_sent_back_through_the_whole_model(
    family: str | None, tmp_path: Path
) -> None:
    widths = {"d_v": (16,) * 4, "d_ff": (96,) * 4, **SWITCHES[family]} if family else {}
    weights = RandomWeights(tiny_config(**widths))
    tokens = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(1))
    found = output_sensitivity(weights, tokens, tmp_path, execution=EXACT)
    decoder = load_decoder(weights)
    x = decoder.embed(tokens).requires_grad_()
    positions, points = locate(weights.config, *tokens.shape), []
    for layer in decoder.layers:
        for half in ("attention", "mlp"):
            points.append(layer.output(half, x, positions))  # in front of a norm, if there is one
            x = layer.leave(half, x, points[-1])
    logits = decoder.logits(decoder.norm(x))
    noise = torch.stack([torch.randn(20, 128, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    pull = unsure(logits.detach().softmax(-1), noise)
    for number, gradient in enumerate(torch.autograd.grad(logits, points, pull)):
        rows = gradient.flatten(0, 1)
        longest = LONGEST * rows.norm(dim=1).median()
        rows = rows * (longest / rows.norm(dim=1).clamp(min=1e-30)).clamp(max=1)[:, None]
        assert torch.allclose(found[number], rows.T @ rows / len(rows), rtol=1e-3, atol=1e-6)


def test_weighting_by_a_multiple_of_the_identity_only_scales() -> None:
    w = matrix(4, 6, 0)
    assert torch.allclose(weighted(w, 4 * torch.eye(4)).square().sum(0), 4 * w.square().sum(0))
    assert torch.equal(weighted(w, None), w)


def test_curves_start_at_zero_rise_and_end_at_all_ranks(tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config())
    tokens = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    for curve in error_curves(weights, tokens, None, tmp_path, ridge=0.01):
        assert len(curve.value) == 17
        for line in (curve.value, curve.mlp):
            assert line[0] == 0
            assert list(line) == sorted(line)
    assert not (tmp_path / "curves").exists()


def held_out_errors(weights: RandomWeights, rows: Tensor, work: Path) -> list[float]:
    """For every block the error of half the value ranks, or of the deepest cut of the MLP.

    Fitted on all rows but the last quarter, and judged on that.
    """
    found, held = [], len(rows) // 4
    for block in dense_blocks(weights, rows, work, name="by-hand", execution=EXACT):
        block.observe()
        inner = block.activations(block.inputs().float())["inner"].double()
        fit, judge = (part.flatten(0, 1) for part in (inner[:-held], inner[-held:]))
        gram, dims = shrunk(fit.T @ fit / len(fit), 0.1), block.dims
        if block.half == "mlp":
            w = block.layer.down.weight.double()
            keep = eliminate(w, gram, int(0.1 * len(gram)), 0.01).kept(len(gram))
            error = judge @ w.T - judge[:, keep] @ nystroem(w, gram, keep).T
        else:
            w = block.layer.o.weight.double()
            encode = output_basis(gram, w, dims.kv_heads, dims.group)[0][..., : dims.d_v // 2]
            spread = spread_over_queries(encode, dims.group)
            error = judge @ w.T - judge @ spread @ refit_output(w, gram, encode, dims.group).T
        found.append(float(error.square().sum(1).mean()))
    return found


def test_held_out_curves_are_the_errors_on_rows_that_were_not_fitted(tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config())
    tokens = torch.randint(0, 128, (8, 24), generator=torch.Generator().manual_seed(1))
    settings: Any = {"ridge": 0.01, "execution": EXACT}
    plain = error_curves(weights, tokens, None, tmp_path, **settings)
    found = error_curves(weights, tokens, None, tmp_path, held_out=True, **settings)
    errors = held_out_errors(weights, tokens, tmp_path)
    for curve, seen, values, mlp in zip(found, plain, errors[::2], errors[1::2], strict=True):
        assert curve.value[8] == pytest.approx(values, rel=1e-3)
        assert curve.mlp[-1] == pytest.approx(mlp, rel=1e-3)
        assert curve.mlp[-1] > seen.mlp[-1], "a fit loses more on other tokens than on its own"
        for line, other in ((curve.value, seen.value), (curve.mlp, seen.mlp)):
            assert len(line) == len(other)
            assert line[0] == 0
            assert list(line) == sorted(line)
    few = error_curves(weights, tokens[:1], None, tmp_path, held_out=True, **settings)
    assert all(curve.mlp[-1] > 0 for curve in few), "a single row is cut into four"


DIMS = LayerDims(heads=2, kv_heads=2, d_qk=4, d_v=4, d_ff=8)


def total(layers: tuple[LayerDims, ...]) -> int:
    return sum(dims.parameters(8) for dims in layers)


@settings(deadline=None, max_examples=30)
@given(keep=st.floats(0.5, 1), seed=st.integers(0, 99))
def test_spending_meets_the_budget_within_one_step_and_the_multiples(keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = (DIMS,) * 3
    curves = [
        Curves(*(tuple(torch.rand(n + 1, generator=generator).cumsum(0).tolist()) for n in (4, 8))) for _ in layers
    ]
    kept = spend(layers, parameter_budget(layers, 8, keep), curves, Multiples(1, 2))
    steps = (4 * 8, 2 * 3 * 8)  # parameters of one rank, of one MLP step
    assert -max(steps) <= total(kept) - keep * total(layers) <= 1e-6
    assert all(dims.d_ff % 2 == 0 and 1 <= dims.d_v <= 4 for dims in kept)


def test_spending_takes_the_cheapest_steps_of_convex_curves() -> None:
    layers = (DIMS, DIMS)
    curves = [Curves((0, 1, 4, 9, 16), tuple(n**2 for n in range(9))), Curves((0, 2, 8, 18, 32), (0, *[99.0] * 8))]
    keep = 1 - 3 * 32 / total(layers)  # three ranks
    kept = spend(layers, parameter_budget(layers, 8, keep), curves, Multiples(1, 4))
    best = min(
        (sum(curve.value[n] for curve, n in zip(curves, removed, strict=True)), removed)
        for removed in set(combinations([0, 1, 2, 3] * 2, 2))
        if sum(removed) == 3
    )
    assert tuple(4 - dims.d_v for dims in kept) == best[1]


def test_everything_kept_is_everything() -> None:
    curves = [Curves((0.0,) * 5, (0.0,) * 9)]
    assert spend((DIMS,), parameter_budget((DIMS,), 8, 1.0), curves, Multiples(1, 1)) == (DIMS,)


@settings(deadline=None, max_examples=20)
@given(features=st.integers(2, 16), seed=st.integers(0, 99), share=st.floats(0, 1), shrinkage=st.floats(0, 2))
def test_correcting_towards_the_dense_stream_never_leaves_the_output_further_from_it(
    features: int, seed: int, share: float, shrinkage: float
) -> None:
    x, w = activations(features, seed), matrix(5, features, seed)
    dense = x @ matrix(features, 5, seed + 1) + matrix(len(x), 5, seed + 2)
    away = dense - x @ w.T
    correction = drift_correction(x.T @ x / len(x), x.T @ away / len(x), shrinkage)
    assert correction.shape == w.shape
    assert (away - share * (x @ correction.T)).square().sum() <= away.square().sum() * (1 + 1e-9)


def test_without_shrinkage_the_correction_is_least_squares() -> None:
    x, away = activations(6, 0), matrix(400, 3, 1)
    found = drift_correction(x.T @ x / len(x), x.T @ away / len(x), 0)
    torch.testing.assert_close(found.T, torch.linalg.lstsq(x, away).solution, rtol=1e-2, atol=1e-3)


def test_full_distrust_of_the_tokens_is_plain_selection() -> None:
    x, w = activations(8, 0), matrix(5, 8, 1)
    keep = torch.tensor([0, 2, 3, 7])
    gram = x.T @ x / len(x)
    torch.testing.assert_close(nystroem(w, shrunk(gram, 1e9), keep), w[:, keep], rtol=1e-5, atol=1e-6)
    assert shrunk(gram, 0) is gram


@pytest.mark.parametrize("kept", [0, 1, 255, 256, 257, 600])
def test_gaps_close_up_in_the_memory_of_the_matrix(kept: int) -> None:
    matrix = torch.randn(600, 600)
    index = torch.randperm(600)[:kept].sort().values
    wanted = matrix[index][:, index]
    found = closed_up(matrix, index)
    assert torch.equal(found, wanted)
    assert found.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
