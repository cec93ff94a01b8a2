"""Sums over tokens: they do not care how the tokens were split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatq.calibration.grams import PANEL, Angle, Gram


def samples(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens * 31 + width))


def gram_of(*parts: Tensor, blocks: int = 1) -> Gram:
    gram = Gram(parts[0].shape[-1] // blocks, blocks)
    for part in parts:
        gram.update(part)
    return gram


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_gram_of_parts_is_the_gram_of_the_whole(sizes: list[int], features: int, blocks: int) -> None:
    x = samples(sum(sizes), blocks * features)
    parts = gram_of(*x.split(sizes), blocks=blocks)
    merged = gram_of(x[:0], blocks=blocks)
    for part in x.split(sizes):
        merged = merged.merge(gram_of(part, blocks=blocks))
    whole = gram_of(x, blocks=blocks)
    for gram in (parts, merged):
        assert gram.count == whole.count == len(x)
        torch.testing.assert_close(gram.mean(), whole.mean())


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_gram_is_the_mean_outer_product_of_each_block(tokens: int, features: int, blocks: int) -> None:
    x = samples(tokens, blocks * features)
    heads = x.double().view(tokens, blocks, features)
    expected = (torch.einsum("tkd,tke->kde", heads, heads) / tokens).float()
    gram = gram_of(x, blocks=blocks)
    torch.testing.assert_close(gram.mean(), expected[0] if blocks == 1 else expected)
    torch.testing.assert_close(gram.energy(), x.square().mean(0))


def test_leading_axes_are_all_tokens() -> None:
    x = samples(24, 4)
    torch.testing.assert_close(gram_of(x.view(2, 3, 4, 4)).mean(), gram_of(x).mean())


def test_no_tokens_have_a_gram_of_zeros() -> None:
    assert torch.equal(Gram(3).mean(), torch.zeros(3, 3))


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_congruence_is_the_gram_of_what_was_mapped(tokens: int, features: int, narrow: int) -> None:
    x, decode = samples(tokens, features), samples(features, narrow)
    torch.testing.assert_close(gram_of(x).congruence(decode).mean(), gram_of(x @ decode).mean(), rtol=1e-4, atol=1e-4)


def test_a_congruence_maps_each_block_by_its_own_matrix() -> None:
    x, decode = samples(30, 3 * 4), samples(3 * 4, 2).view(3, 4, 2)
    mapped = torch.einsum("tkd,kdr->tkr", x.view(30, 3, 4), decode).flatten(1)
    narrowed = gram_of(x, blocks=3).congruence(decode)
    torch.testing.assert_close(narrowed.mean(), gram_of(mapped, blocks=3).mean(), rtol=1e-4, atol=1e-4)
    assert narrowed.count == 30


@pytest.mark.parametrize("index", [[2], [4, 0], [0, 1, 2, 3, 4]], ids=["one", "reordered", "all"])
def test_a_selection_is_the_gram_of_the_selected_features(index: list[int]) -> None:
    x, chosen = samples(30, 5), torch.tensor(index, dtype=torch.int64)
    torch.testing.assert_close(gram_of(x).select(chosen).mean(), gram_of(x[:, chosen]).mean())


def test_a_float32_gram_of_many_batches_stays_near_float64() -> None:
    batches = [samples(512, 16) * 1.5**i + 1 for i in range(20)]
    exact = sum((batch.double().T @ batch.double() for batch in batches), torch.zeros(16, 16, dtype=torch.float64))
    worst = (gram_of(*batches).total[0].double() - exact).abs().max() / exact.abs().max()
    assert worst < 1e-6


@pytest.mark.parametrize(("turn", "share"), [(0.0, 0), (0.25, 0.25), (0.5, 0.5), (1.0, 1)])
def test_an_angle_is_a_share_of_a_half_turn(turn: float, share: float) -> None:
    angle = Angle()
    before = torch.tensor([[2.0, 0.0]]).repeat(7, 1)
    after = 3 * torch.tensor([[math.cos(turn * math.pi), math.sin(turn * math.pi)]]).repeat(7, 1)
    angle.update(before[:3], after[:3])
    angle.update(before[3:], after[3:])
    assert angle.mean() == pytest.approx(share, abs=1e-6)
    assert angle.count == 7


def test_no_tokens_have_no_angle() -> None:
    assert Angle().mean() == 0


@pytest.mark.parametrize("features", [PANEL, PANEL + 1, 2 * PANEL + 7])
def test_a_gram_of_several_panels_is_symmetric_and_whole(features: int) -> None:
    x = torch.randn(5, features, generator=torch.Generator().manual_seed(0))
    gram = Gram(features)
    gram.update(x[:2])
    gram.update(x[2:])
    assert gram.finite
    torch.testing.assert_close(gram.total[0], x.T @ x, rtol=1e-5, atol=1e-5)
    gram.update(x)
    torch.testing.assert_close(gram.total[0], 2 * x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(gram.total[0], gram.total[0].T)
