"""Codes become ggml's blocks without being rounded, wherever their rows and columns go."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq.model.grid import Grid, round_to_nearest
from flatq_gguf.blocks import carried, carrier, fits
from flatq_gguf.placement import Placement
from tests.models import tiny_config


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 32, symmetric=False), Grid(8, 32)], ids=str)
def test_every_group_size_is_carried_with_a_short_last_group_too(grid: Grid, group_size: int) -> None:
    weight = round_to_nearest(torch.randn(8, 224), replace(grid, group_size=group_size))
    kind = carrier(grid)
    assert kind is not None
    place = Placement.whole(8, 224)
    assert fits(weight.grid, 224, place.columns)
    found = gguf.quants.dequantize(carried(weight, place, kind), gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(found, weight.dequantize().numpy())


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 5),
    d_v=st.integers(1, 4).map(lambda n: 16 * n),
    group_size=st.sampled_from([-1, 32, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
)
def test_padded_heads_are_carried_exactly_when_no_block_spans_two_groups(
    heads: int, d_v: int, group_size: int, bits: int
) -> None:
    dims = replace(tiny_config(heads=heads, kv_heads=heads, d_qk=64).layers[0], d_v=d_v)
    place = Placement.of("o", dims, replace(dims, d_v=64), 8, paired=True)
    grid = Grid(bits, group_size)
    groups = [
        {head * d_v + column for column in range(start, min(start + 32, d_v))}
        for head in range(heads)
        for start in (0, 32)
    ]
    width = grid.width(heads * d_v)
    assert fits(grid, heads * d_v, place.columns) == all(len({column // width for column in g}) <= 1 for g in groups)
    if fits(grid, heads * d_v, place.columns):
        weight = round_to_nearest(torch.randn(8, heads * d_v), grid)
        kind = carrier(grid)
        assert kind is not None
        found = gguf.quants.dequantize(carried(weight, place, kind), gguf.GGMLQuantizationType[kind.name])
        expected = np.pad(weight.dequantize().numpy().reshape(8, heads, d_v), ((0, 0), (0, 0), (0, 64 - d_v)))
        np.testing.assert_array_equal(found, expected.reshape(8, -1))


def test_rows_beyond_one_chunk_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, kind = round_to_nearest(torch.randn(10, 64), Grid(4, 32)), carrier(Grid(4, 32))
    assert kind is not None
    at_once = carried(weight, Placement.whole(10, 64), kind)
    monkeypatch.setattr("flatq_gguf.blocks.ROWS_AT_ONCE", 3)
    np.testing.assert_array_equal(carried(weight, Placement.whole(10, 64), kind), at_once)
