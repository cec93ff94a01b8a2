"""FLAT's identities: what is exact must be exact, on tensors and through the real walk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatq.calibration.block import Block
from flatq.calibration.walk import walk
from flatq.compress.heads import HeadWeights, head_basis, project_heads, spread_over_queries
from flatq.compress.mlp import leading_channels, nystroem, output_error, ridge_leverage
from flatq.compress.plan import RankPlan
from flatq.compress.stage import FlatStage
from flatq.model.decoder import Decoder, DecoderConfig, LayerDims
from flatq.model.weights import load_decoder
from flatq.recipe.grammar import FlatSpec
from tests.models import EXACT, SWITCHES, RandomWeights, tiny_config

SHAPES = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(1, 12))
BIASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"qkv_bias": True, "o_bias": True},
    **{family: {"d_v": (16,) * 4, "d_ff": (96,) * 4, **switches} for family, switches in SWITCHES.items()},
}


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Float64 samples whose columns depend on each other, [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0, -2, columns, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread @ mixing


def head_grams(values: Tensor) -> Tensor:
    """[tokens, k, d] -> [k, d, d]."""
    return torch.einsum("tkd,tke->kde", values, values) / len(values)


@given(SHAPES, st.data())
@settings(max_examples=40, deadline=None)
def test_discarded_eigenvalues_are_the_squared_value_error(
    shape: tuple[int, int, int, int], data: st.DataObject
) -> None:
    k, _, d, tokens = shape
    rank = data.draw(st.sampled_from(sorted({1, d // 2 or 1, d})))
    values = correlated(tokens, k * d, seed=d).view(tokens, k, d)
    gram = head_grams(values)
    basis = head_basis(gram, rank)
    rebuilt = torch.einsum("tkd,kdr,ker->tke", values, basis.encode, basis.decode)
    energy = values.square().sum() / tokens
    measured = (values - rebuilt).square().sum() / tokens
    eigenvalues = torch.linalg.eigvalsh(gram)[:, : d - rank].sum()
    torch.testing.assert_close(measured, eigenvalues, rtol=1e-6, atol=1e-9 * float(energy))
    assert basis.discarded == pytest.approx(float(measured / energy), rel=1e-6, abs=1e-9)


@given(SHAPES, st.data())
@settings(max_examples=40, deadline=None)
def test_a_basis_is_orthonormal(shape: tuple[int, int, int, int], data: st.DataObject) -> None:
    k, _, d, tokens = shape
    rank = data.draw(st.integers(1, d))
    basis = head_basis(head_grams(correlated(tokens, k * d).view(tokens, k, d)), rank)
    identity = torch.eye(rank, dtype=torch.float64).expand(k, rank, rank)
    torch.testing.assert_close(basis.decode.mT @ basis.encode, identity)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_a_full_rotation_passes_through_attention(shape: tuple[int, int, int, int]) -> None:
    k, group, d, m = shape
    generator = torch.Generator().manual_seed(m)
    w_v, w_o = torch.randn(k * d, m, generator=generator), torch.randn(m, k * group * d, generator=generator)
    bias = torch.randn(k * d, generator=generator)
    narrowed = project_heads(w_v, bias, w_o, head_basis(head_grams(correlated(50, k * d).view(50, k, d)), d))

    def through(v: Tensor, v_bias: Tensor, o: Tensor) -> Tensor:
        """o reads for every query head what its group's value head gives: one matrix and one offset."""
        spread = torch.cat([v, v_bias[:, None]], 1).view(k, d, m + 1).repeat_interleave(group, 0).flatten(0, 1)
        return o @ spread

    assert narrowed.v_bias is not None
    torch.testing.assert_close(through(narrowed.v, narrowed.v_bias, narrowed.o), through(w_v, bias, w_o))


def test_a_value_that_never_moves_loses_nothing() -> None:
    assert head_basis(torch.zeros(2, 4, 4), 1).discarded == 0


def test_only_directions_that_carry_nothing_are_free() -> None:
    values = correlated(100, 6).view(100, 1, 6)
    values[..., 4:] = 0
    assert head_basis(head_grams(values), 4).discarded == pytest.approx(0, abs=1e-12)
    assert head_basis(head_grams(values), 3).discarded > 1e-6


def narrowed_by_walk(weights: RandomWeights, layers: tuple[LayerDims, ...], work: Path) -> tuple[Decoder, list[Block]]:
    """The decoder that FLAT leaves, and its blocks, by the real stage in the real walk."""
    stage = FlatStage(FlatSpec(keep_ratio=0.5, method="paper"), RankPlan(layers, 0.5, 0.5))
    state, blocks = dict(weights.tensors), []

    def save(block: Block) -> None:
        state.update({f"layers.{block.index}.{name}": t for name, t in block.layer.state_dict().items()})

    tokens = torch.arange(6 * 20).remainder(weights.config.vocab).view(6, 20)
    for block in walk(weights, tokens, work, save, execution=EXACT):
        stage.apply(block)
        blocks.append(block)
    decoder = Decoder(weights.config.with_layers(layers))
    decoder.load_state_dict(state)
    return decoder.requires_grad_(False), blocks


def plan(config: DecoderConfig, d_v: int, d_ff: int) -> tuple[LayerDims, ...]:
    return tuple(replace(dims, d_v=d_v, d_ff=d_ff) for dims in config.layers)


@pytest.mark.parametrize("switches", BIASES.values(), ids=BIASES)
def test_full_rank_leaves_logits_unchanged(switches: dict[str, Any], tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config(**switches))
    tokens = torch.arange(60).view(3, 20)
    expected = load_decoder(weights)(tokens)
    kept, blocks = narrowed_by_walk(weights, weights.config.layers, tmp_path)
    torch.testing.assert_close(kept(tokens), expected, rtol=0, atol=0)

    rotated = RandomWeights(weights.config)
    for block in blocks[::2]:
        block.grams.clear()
        gram = block.observe()["values"]
        basis = head_basis(gram.total / gram.count, block.dims.d_v)
        prefix = f"layers.{block.index}"
        turned: HeadWeights = project_heads(
            weights.tensors[f"{prefix}.v.weight"],
            weights.tensors.get(f"{prefix}.v.bias"),
            weights.tensors[f"{prefix}.o.weight"],
            basis,
        )
        rotated.tensors[f"{prefix}.v.weight"], rotated.tensors[f"{prefix}.o.weight"] = turned.v, turned.o
        if turned.v_bias is not None:
            rotated.tensors[f"{prefix}.v.bias"] = turned.v_bias
        assert not torch.allclose(turned.v, weights.tensors[f"{prefix}.v.weight"])
    torch.testing.assert_close(load_decoder(rotated)(tokens), expected, rtol=1e-4, atol=1e-4)


def with_repeated_heads(grouped: RandomWeights) -> RandomWeights:
    """The multi-head model that computes what a grouped-query model computes."""
    config = grouped.config
    layers = tuple(replace(dims, kv_heads=dims.heads) for dims in config.layers)
    repeated = RandomWeights(config.with_layers(layers))
    repeated.tensors = dict(grouped.tensors)
    for index, dims in enumerate(config.layers):
        for name in ("k.weight", "v.weight", "k.bias", "v.bias"):
            full = f"layers.{index}.{name}"
            if full in grouped.tensors:
                tensor = grouped.tensors[full]
                heads = tensor.view(dims.kv_heads, -1, *tensor.shape[1:])
                repeated.tensors[full] = heads.repeat_interleave(dims.group, 0).flatten(0, 1)
    return repeated


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("switches", [BIASES["plain"], BIASES["biases"]], ids=["plain", "biases"])
def test_grouped_queries_equal_multi_head_with_repeated_heads(
    kv_heads: int, switches: dict[str, bool], tmp_path: Path
) -> None:
    grouped = RandomWeights(tiny_config(kv_heads=kv_heads, **switches))  # type: ignore[arg-type]
    multi = with_repeated_heads(grouped)
    tokens = torch.arange(60).view(3, 20)
    torch.testing.assert_close(load_decoder(multi)(tokens), load_decoder(grouped)(tokens))
    few, few_blocks = narrowed_by_walk(grouped, plan(grouped.config, 8, 48), tmp_path / "grouped")
    many, many_blocks = narrowed_by_walk(multi, plan(multi.config, 8, 48), tmp_path / "multi")
    torch.testing.assert_close(many(tokens), few(tokens), rtol=1e-3, atol=1e-3)
    for one, other in zip(few_blocks, many_blocks, strict=True):
        assert one.errors == pytest.approx(other.errors, rel=1e-4)


@pytest.mark.parametrize(("kv_heads", "heads"), [(1, 4), (2, 4), (4, 4)], ids=["mqa", "gqa", "mha"])
@pytest.mark.parametrize(("d_v", "d_ff"), [(8, 48), (1, 1), (15, 95)], ids=["half", "one", "all but one"])
@pytest.mark.parametrize("method", ["paper", "default"])
def test_narrowed_grams_equal_grams_of_the_narrowed_block(
    kv_heads: int, heads: int, d_v: int, d_ff: int, method: Literal["paper", "default"], tmp_path: Path
) -> None:
    weights = RandomWeights(tiny_config(kv_heads=kv_heads, heads=heads))
    stage = FlatStage(FlatSpec(keep_ratio=0.5, method=method), RankPlan(plan(weights.config, d_v, d_ff), 0.5, 0.5))
    tokens = torch.arange(6 * 20).view(6, 20).remainder(128)
    for block in walk(weights, tokens, tmp_path, lambda _: None, execution=EXACT, reference=stage.corrects):
        stage.apply(block)
        carried = {name: gram.mean() for name, gram in block.grams.items()}
        block.grams.clear()
        for name, gram in block.observe().items():
            measured = gram.mean()
            energy = float(measured.diagonal(dim1=-2, dim2=-1).mean())
            torch.testing.assert_close(carried[name], measured, rtol=1e-4, atol=1e-5 * energy)


@given(st.integers(2, 12), st.data())
@settings(max_examples=30, deadline=None)
def test_no_other_output_projection_is_better_than_nystroem(f: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, f))
    a = correlated(200, f, seed=f)
    gram, w = a.T @ a / 200, torch.randn(5, f, generator=torch.Generator().manual_seed(f), dtype=torch.float64)
    keep = torch.randperm(f, generator=torch.Generator().manual_seed(width))[:width].sort().values
    best = nystroem(w, gram, keep, ridge=1e-12)
    error = output_error(w, gram, best, keep)
    assert error <= output_error(w, gram, w[:, keep], keep) + 1e-9, "plain selection is one of the others"
    for seed in range(10):
        noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for size in (1e-3, 1e-1):
            assert error <= output_error(w, gram, best + size * noise, keep) + 1e-9


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
def test_keeping_every_channel_changes_nothing(ridge: float) -> None:
    a = correlated(50, 8)
    gram, w = a.T @ a / 50, torch.randn(3, 8, dtype=torch.float64)
    keep = leading_channels(ridge_leverage(gram, ridge), 8)
    assert keep.tolist() == list(range(8))
    torch.testing.assert_close(nystroem(w, gram, keep, ridge), w)


def test_channels_that_others_can_speak_for_are_the_first_to_go() -> None:
    a = correlated(100, 5)
    gram_of_copies = torch.cat([a, a[:, :1]], 1)
    gram = gram_of_copies.T @ gram_of_copies / 100
    scores = ridge_leverage(gram, 1e-3)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores[0] == pytest.approx(float(scores[5]))
    w = torch.randn(3, 6, dtype=torch.float64)
    keep = torch.arange(5)
    assert output_error(w, gram, nystroem(w, gram, keep, ridge=1e-12), keep) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dead", [[0], [1, 4], list(range(6))], ids=["one", "some", "all"])
def test_channels_that_never_fire_break_nothing(dead: list[int]) -> None:
    a = correlated(100, 6)
    a[:, dead] = 0
    gram, w = a.T @ a / 100, torch.randn(3, 6)
    scores = ridge_leverage(gram, 0.01)
    assert torch.isfinite(scores).all()
    keep = leading_channels(scores, 3)
    corrected = nystroem(w, gram, keep)
    assert torch.isfinite(corrected).all()
    if len(dead) < 4:
        assert not set(keep.tolist()) & set(dead)


def test_the_map_of_all_query_heads_is_block_diagonal() -> None:
    basis = torch.arange(2 * 3 * 2.0).view(2, 3, 2) + 1
    spread = spread_over_queries(basis, 2)
    assert spread.shape == (12, 8)
    torch.testing.assert_close(spread[3:6, 2:4], basis[0])
    torch.testing.assert_close(spread[6:9, 4:6], basis[1])
    assert torch.count_nonzero(spread) == 24
