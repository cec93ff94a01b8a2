"""What is measured is what is used: each statistic reaches the decision that it was measured for, and no other.

Beside the keys of the recipe (``test_wiring.py``) these are the connections inside: whose Fisher information weighs
which half of a layer, which curves a plan is made from, what a budget's steps are compared by.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flatq.calibration.sensitivity import Sensitivity, output_sensitivity
from flatq.calibration.walk import walk
from flatq.compress.allocate import Curves, Multiples, spend
from flatq.compress.budget import Budget
from flatq.compress.error_curves import error_curves
from flatq.compress.plan import RankPlan, plan_ranks, shifted
from flatq.compress.stage import FlatStage
from flatq.errors import ArtifactError, RecipeError
from flatq.model.decoder import DecoderConfig, locate
from flatq.model.dims import LayerDims
from flatq.model.footprint import weight_bytes
from flatq.model.grid import Grid, round_to_nearest
from flatq.model.weights import load_decoder
from flatq.pipeline.baselines import baselines_of, nearest_in_bytes
from flatq.pipeline.texts import refuse_beyond
from flatq.plan.decide import draft, measurements
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.bits import choose
from flatq.quantize.stage import GptqStage, quantize_table
from flatq.recipe.blocks import CONTEXT, FlatSpec, GptqSpec
from flatq.recipe.grammar import Recipe
from flatq.stages import dense_states_needed, stages_of
from tests.models import EXACT, RandomWeights, tiny_config
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


# ---- what a recipe asks for: measurements, stages, budgets, baselines

HEAD: dict[str, Any] = {"version": 1, "model": "some/model", "exports": [{"onnx": {}}]}


def recipe_of(*stages: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.model_validate({**HEAD, "stages": list(stages), **more})


PAPER = {"flat": {"keep_ratio": 0.8, "method": "paper"}}
EVEN = {"flat": {"keep_ratio": 0.8, "method": "paper", "allocation": "uniform"}}
DEFAULT, PLAIN, CHOSEN = {"flat": {"keep_ratio": 0.8}}, {"gptq": {}}, {"gptq": {"average_bits": 3.5}}


@pytest.mark.parametrize(
    ("stages", "wide", "narrow"),
    [
        ([], [], []),
        ([PLAIN], [], []),
        ([CHOSEN], ["sensitivity", "bits"], ["sensitivity", "bits"]),
        ([DEFAULT], [], ["sensitivity", "curves"]),
        ([DEFAULT, PLAIN], [], ["sensitivity", "curves"]),
        ([DEFAULT, CHOSEN], ["sensitivity", "bits"], ["sensitivity", "curves", "bits"]),
        ([PAPER], [], ["importance"]),
        ([EVEN], [], []),
    ],
)
def test_a_plan_measures_what_it_is_decided_by(stages: list[Any], wide: list[str], narrow: list[str]) -> None:
    recipe = recipe_of(*stages)
    assert measurements(recipe, narrows=False) == wide
    assert measurements(recipe, narrows=True) == measurements(recipe) == narrow


@pytest.mark.parametrize(
    ("stages", "kinds", "weighted", "tracks"),
    [
        ([], [], [], (False, False)),
        ([DEFAULT], [FlatStage], [True], (True, False)),
        ([PAPER], [FlatStage], [False], (False, False)),
        ([PLAIN], [GptqStage], [False], (False, False)),
        ([{"gptq": {"correction": 0.5}}], [GptqStage], [False], (False, True)),
        ([DEFAULT, PLAIN], [FlatStage, GptqStage], [True, False], (True, False)),
        ([PAPER, {"gptq": {"correction": 0.5}}], [FlatStage, GptqStage], [False, False], (False, True)),
    ],
)
def test_a_recipe_becomes_its_stages_with_the_fisher_information_where_it_is_used(
    stages: list[Any], kinds: list[type], weighted: list[bool], tracks: tuple[bool, bool], tmp_path: Path
) -> None:
    recipe, config = recipe_of(*stages), tiny_config()
    narrower = RankPlan(tiny_config(d_ff=(96, 80)).layers, 0.8, 0.8)
    if any(weighted):
        with pytest.raises(ArtifactError, match="was not measured"):
            stages_of(recipe, narrower, {}, config, tmp_path)
        Sensitivity(config, tmp_path, new=True)
    made = stages_of(recipe, narrower, {}, config, tmp_path)
    assert [type(stage) for stage in made] == kinds
    assert [getattr(stage, "fisher", None) is not None for stage in made] == weighted
    assert dense_states_needed(recipe) == tracks


def test_a_plan_that_narrows_nothing_opens_no_fisher_information(tmp_path: Path) -> None:
    config = tiny_config()
    (stage,) = stages_of(recipe_of(DEFAULT), RankPlan(config.layers, 1.0, 1.0), {}, config, tmp_path)
    assert isinstance(stage, FlatStage)
    assert stage.fisher is None
    assert not list(tmp_path.iterdir())


def test_a_plan_states_its_budget_and_what_it_came_to_in_the_same_unit() -> None:
    config = tiny_config(d_ff=(96, 96))
    share = plan_ranks(config, FlatSpec.model_validate({"keep_ratio": 0.8, "width_multiple": 1}), (0.1, 0.2))
    kept = config.with_layers(share.layers).decoder_parameters() / config.decoder_parameters()
    assert (share.budget, share.importance) == ("keep_ratio", (0.1, 0.2))
    assert share.requested == pytest.approx(0.8)
    assert share.achieved == pytest.approx(kept)
    assert draft(recipe_of(), source_of(config)) == RankPlan(config.layers, 1.0, 1.0)
    for itemsize in (2, 4):
        spec = FlatSpec.model_validate({"size": f"{40 * itemsize}kB", "width_multiple": 1, "rank_multiple": 1})
        bytes_ = plan_ranks(config, spec, itemsize=itemsize)
        assert (bytes_.requested, bytes_.budget) == (40_000 * itemsize, "size")
        assert bytes_.achieved == weight_bytes(config.with_layers(bytes_.layers), {}, itemsize)
        assert 0.9 * bytes_.requested < bytes_.achieved <= bytes_.requested
    assert plan_ranks(config, spec) == bytes_, "a number has four bytes unless another size is given"


def source_of(config: DecoderConfig) -> Any:
    return SimpleNamespace(config=config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("planned", "other"), [((12, 80), (8, 64)), ((16, 80), (16, 64)), ((4, 16), (8, 32)), ((16, 96), (16, 96))]
)
def test_another_plan_of_the_same_recipe_differs_in_every_width_that_is_narrowed(
    planned: tuple[int, int], other: tuple[int, int]
) -> None:
    spec = FlatSpec.model_validate({"keep_ratio": 0.8, "rank_multiple": 4, "width_multiple": 16})
    layers = tiny_config(d_v=planned[:1], d_ff=planned[1:]).layers
    (found,) = shifted(tiny_config(d_v=(16,), d_ff=(96,)), spec, layers).layers
    assert (found.d_v, found.d_ff) == other


def test_a_table_is_rounded_with_a_searched_scale() -> None:
    weights, grid = RandomWeights(tiny_config()), Grid(3, 16)
    found = quantize_table(weights, "embed.weight", grid)
    for search in (True, False):
        rounded = round_to_nearest(weights.tensor("embed.weight"), grid, search=search)
        assert torch.equal(found.scale, rounded.scale) == search


@pytest.mark.parametrize(
    ("stages", "asked", "found"),
    [
        ([DEFAULT, PLAIN], ["dense", "quantized", "same_bytes"], ["quantized", "same_bytes"]),
        ([DEFAULT, PLAIN], ["dense", "same_bytes"], ["same_bytes"]),
        ([DEFAULT, PLAIN], ["dense", "quantized"], ["quantized"]),
        ([DEFAULT, PLAIN], ["dense"], []),
        ([DEFAULT], ["dense", "quantized", "same_bytes"], []),
        ([PLAIN], ["dense", "quantized", "same_bytes"], []),
    ],
)
def test_the_baselines_of_a_recipe_and_their_stages(stages: list[Any], asked: list[str], found: list[str]) -> None:
    dense, recipe = tiny_config(), recipe_of(*stages, baselines=asked)
    made = {each.name: each for each in baselines_of(recipe, dense, 30_000, 4)}
    assert list(made) == found
    if "quantized" in made:
        assert made["quantized"].spec == recipe.gptq
    if "same_bytes" in made:
        assert recipe.gptq is not None
        assert made["same_bytes"].spec == nearest_in_bytes(recipe.gptq, dense, 30_000, 4) != recipe.gptq
    for each in made.values():
        assert each.context == CONTEXT
        alone = each.recipe(recipe)
        assert (alone.stages, alone.exports, alone.bench) == ((each.spec,), (), None)


@pytest.mark.parametrize(("largest", "refused"), [(318, False), (319, False), (320, True), (400, True)])
def test_a_token_needs_a_row_in_the_embedding(largest: int, refused: bool) -> None:
    tokens = torch.tensor([[3, largest, 0]])
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda number: f"<{number + 0}>")
    with pytest.raises(RecipeError, match=f"here holds the token '<{largest}>'") if refused else nullcontext():
        refuse_beyond(tokens, tokenizer, 320, "here")


@pytest.mark.parametrize("biases", [False, True])
def test_a_narrowed_layer_keeps_the_rows_and_the_biases_of_its_channels(biases: bool, tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config(mlp_bias=biases, qkv_bias=biases, o_bias=biases))
    spec = FlatSpec.model_validate({"keep_ratio": 0.8, "allocation": "uniform", "width_multiple": 16, "correction": 0})
    stage = FlatStage(spec, RankPlan(tiny_config(d_v=(16, 16), d_ff=(80, 96)).layers, 0.8, 0.8))
    tokens = torch.randint(0, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    for block in walk(weights, tokens, tmp_path, lambda _: None, execution=EXACT):
        stage.apply(block)
        place = f"layers.{block.index}"
        if (block.index, block.half) == (0, "mlp"):
            rows = torch.cdist(block.layer.gate.weight, weights.tensor(f"{place}.gate.weight")).argmin(1)
            assert len(rows.unique()) == 80
            assert block.errors.keys() == {"mlp"}
        else:
            rows = torch.arange(96)
            assert not block.errors, "nothing is narrowed"
        for name in ("gate", "up") if block.half == "mlp" else ("q", "k", "v", "o"):
            linear, some = getattr(block.layer, name), rows if block.half == "mlp" else slice(None)
            assert torch.equal(linear.weight, weights.tensor(f"{place}.{name}.weight")[some])
            assert (linear.bias is not None) == biases
            if biases:
                assert torch.equal(linear.bias, weights.tensor(f"{place}.{name}.bias")[some])
