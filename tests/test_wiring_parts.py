"""What is measured is what is used: each statistic reaches the decision that it was measured for, and no other.

Beside the keys of the recipe (``test_wiring.py``) these are the connections inside: whose Fisher information weighs
which half of a layer, which curves a plan is made from, what a budget's steps are compared by.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatq.calibration.sensitivity import output_sensitivity
from flatq.calibration.walk import walk
from flatq.compress.allocate import Curves, Multiples, spend
from flatq.compress.budget import Budget
from flatq.compress.error_curves import error_curves
from flatq.compress.plan import plan_ranks
from flatq.compress.stage import FlatStage
from flatq.model.decoder import locate
from flatq.model.dims import LayerDims
from flatq.model.weights import load_decoder
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.bits import choose
from flatq.recipe.blocks import FlatSpec, GptqSpec
from tests.models import EXACT
from tests.structured import LAYERS, Runs

FLAT = {"keep_ratio": 0.75, "rank_multiple": 2, "width_multiple": 8}
BITS = {"average_bits": 3.0, "group_size": 16, "bit_choices": [2, 3, 4, 8]}


def some(runs: Runs) -> Tensor:
    return runs.tokens().calibration[:8]


def test_a_long_gradient_counts_as_three_median_ones(runs: Runs, tmp_path: Path) -> None:
    source, tokens = runs.source(), some(runs)
    found = output_sensitivity(source, tokens, tmp_path, execution=EXACT)
    decoder = load_decoder(source)
    x = decoder.embed(tokens).requires_grad_()
    positions, points = locate(source.config, *tokens.shape), []
    for layer in decoder.layers:
        for half in ("attention", "mlp"):
            x = layer.run(half, x, positions)
            points.append(x)
    logits = decoder.logits(decoder.norm(x))
    noise = torch.stack(
        [torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(row)) for row in range(len(tokens))]
    )
    chances = logits.detach().softmax(-1)
    pull = chances.sqrt() * noise
    pull = pull - chances * (chances.sqrt() * noise).sum(-1, keepdim=True)
    long = 0
    for number, gradient in enumerate(torch.autograd.grad(logits, points, pull)):
        rows = gradient.flatten(0, 1)
        lengths = rows.norm(dim=1)
        limit = 3 * lengths.median()
        long += int((lengths > limit).sum())
        cut = rows * (limit / lengths).clamp(max=1)[:, None]
        torch.testing.assert_close(found[number], cut.T @ cut / len(rows), rtol=2e-3, atol=1e-7)
    assert long > 0, "this model has tokens whose gradients are long"


def test_a_curve_is_weighed_with_the_fisher_information_of_its_own_half(runs: Runs, tmp_path: Path) -> None:
    source, tokens = runs.source(), some(runs)
    fisher = torch.eye(64).repeat(2 * LAYERS, 1, 1)
    plain = error_curves(source, tokens, fisher, tmp_path, ridge=0.01, execution=EXACT)
    scaled = fisher * torch.arange(1.0, 2 * LAYERS + 1)[:, None, None]
    found = error_curves(source, tokens, scaled, tmp_path, ridge=0.01, execution=EXACT)
    for index, (before, after) in enumerate(zip(plain, found, strict=True)):
        assert after.value[-1] == pytest.approx((2 * index + 1) * before.value[-1], rel=1e-3)
        assert after.mlp[-1] == pytest.approx((2 * index + 2) * before.mlp[-1], rel=1e-3)


def test_a_plan_is_spent_on_curves_weighed_with_the_measured_fisher_information(runs: Runs, tmp_path: Path) -> None:
    source, tokens, spec = runs.source(), runs.tokens().calibration, FlatSpec.model_validate(FLAT)
    fisher = output_sensitivity(source, tokens, tmp_path, execution=EXACT)
    plans = []
    for weight in (fisher, None):
        curves = error_curves(source, tokens, weight, tmp_path, ridge=spec.ridge, execution=EXACT)
        plans.append(plan_ranks(source.config, spec, curves=curves).layers)
    assert runs(stages=[{"flat": FLAT}]).dims == plans[0]
    assert plans[0] != plans[1], "otherwise this test would not see whether the Fisher information is used"


def test_bits_are_chosen_by_errors_weighed_with_the_measured_fisher_information(runs: Runs, tmp_path: Path) -> None:
    source, tokens, spec = runs.source(), runs.tokens().calibration, GptqSpec.model_validate(BITS)
    fisher = output_sensitivity(source, tokens, tmp_path, execution=EXACT)
    chosen = [
        choose(source.config, spec, bit_errors(source, tokens, spec, weight, tmp_path, execution=EXACT))
        for weight in (fisher, None)
    ]
    made = runs(stages=[{"gptq": BITS}])
    assert {stem: grid.bits for stem, grid in made.artifact.grids.items()} == chosen[0]
    assert chosen[0] != chosen[1]


def first_layer(runs: Runs, work: Path, fisher: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What FLAT makes of attention and MLP of the first layer."""
    source, halves = runs.source(), dict[str, dict[str, Tensor]]()
    spec = FlatSpec.model_validate({**FLAT, "allocation": "uniform", "correction": 0, "refit": False})
    stage = FlatStage(spec, plan_ranks(source.config, spec), fisher)
    for block in walk(source, some(runs), work, lambda _: None, execution=EXACT):
        stage.apply(block)
        names = ("v", "o") if block.half == "attention" else ("gate", "up", "down")
        halves[block.half] = {name: getattr(block.layer, name).weight.clone() for name in names}
        if block.half == "mlp":
            break
    return halves["attention"], halves["mlp"]


def test_each_half_is_narrowed_by_its_own_fisher_information(runs: Runs, tmp_path: Path) -> None:
    """Only four features of the stream matter, at one point of it after another."""
    plain, few = torch.eye(64).repeat(2 * LAYERS, 1, 1), torch.zeros(64, 64)
    few[:4, :4] = torch.eye(4)
    usual, found = first_layer(runs, tmp_path / "usual", plain), []
    for number in range(2 * LAYERS):
        fisher = plain.clone()
        fisher[number] = few
        found.append(first_layer(runs, tmp_path / str(number), fisher))
    changed = [
        [not torch.equal(now[half][name], usual[half][name]) for half, name in ((0, "v"), (1, "gate"))] for now in found
    ]
    assert [attention for attention, _ in changed] == [True] + [False] * (2 * LAYERS - 1)
    assert [mlp for _, mlp in changed][1:] == [True] + [False] * (2 * LAYERS - 2)


def test_attention_s_fisher_information_does_not_choose_channels(runs: Runs, tmp_path: Path) -> None:
    """With whole values attention stays as it is, so the MLP may see its Fisher information only by mistake."""
    source = runs.source()
    spec = FlatSpec.model_validate({**FLAT, "allocation": "uniform", "correction": 0, "values": "whole"})
    plan, few = plan_ranks(source.config, spec), torch.zeros(64, 64)
    few[:4, :4] = torch.eye(4)
    gates = []
    for changed in (None, 0, 1):
        fisher = torch.eye(64).repeat(2 * LAYERS, 1, 1)
        if changed is not None:
            fisher[changed] = few
        stage = FlatStage(spec, plan, fisher)
        for block in walk(source, some(runs), tmp_path / str(changed), lambda _: None, execution=EXACT):
            stage.apply(block)
            if block.half == "mlp":
                gates.append(block.layer.gate.weight.clone())
                break
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


def test_steps_are_bought_by_cost_per_saving(tmp_path: Path) -> None:
    """A step that costs 3 and saves 10 comes before one that costs 2 and saves 1."""
    dims = LayerDims(heads=1, kv_heads=1, d_qk=4, d_v=4, d_ff=8)
    price = {0: 1.0, 1: 10.0}  # of one channel, by layer

    def cost(index: int, layer: LayerDims) -> float:
        return price[index] * layer.d_ff

    never = (0.0, *[1e9] * 4)
    curves = [
        Curves(never, tuple(2.0 * n for n in range(9))),
        Curves(never, tuple(3.0 * n for n in range(9))),
    ]
    budget = Budget("size", "", cost(0, dims) + cost(1, dims) - 7, cost)
    assert [layer.d_ff for layer in spend((dims, dims), budget, curves, Multiples(4, 1))] == [8, 7]


def test_a_correction_needs_a_walk_that_goes_along_with_the_dense_model(runs: Runs, tmp_path: Path) -> None:
    source, spec = runs.source(), FlatSpec.model_validate({**FLAT, "allocation": "uniform"})
    stage = FlatStage(spec, plan_ranks(source.config, spec))
    blocks = walk(source, some(runs), tmp_path, lambda _: None, execution=EXACT)
    stage.apply(next(blocks))  # attention: nothing is corrected there
    with pytest.raises(ValueError, match="no reference to correct towards"):
        stage.apply(next(blocks))
