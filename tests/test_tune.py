"""Rounding that is trained: GPTQ's codes and scales changed together, by the output of half a layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatq.calibration import training
from flatq.calibration.block import Block
from flatq.calibration.training import HeldOut, OutputTraining
from flatq.calibration.walk import blocks_done, walk
from flatq.machine import distributed
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.plan.forecast import working_bytes
from flatq.plan.operations import operations
from flatq.quantize.grids import planned_grids
from flatq.quantize.stage import GptqStage
from flatq.quantize.tuned import TunedCodes
from flatq.recipe.blocks import CalibrationSpec, GptqSpec
from flatq.recipe.grammar import Recipe
from tests.conftest import MakeRecipe, flatq
from tests.models import EXACT, SWITCHES, RandomWeights, tiny_config

TOKENS = torch.randint(0, 128, (40, 32), generator=torch.Generator().manual_seed(0))
STEPS = 40
Codes = dict[str, QuantizedWeight]


class Killed(Exception):
    """Stands for a process that ends in the middle of a step."""


def quantized(
    work: Path, weights: RandomWeights, *, kill_at: tuple[int, int] | None = None, **settings: Any
) -> tuple[Codes, list[HeldOut]]:
    """Codes by name and the errors of each half layer's training; ``kill_at``: (number of the half layer, step)."""
    spec = GptqSpec.model_validate({"group_size": 16, "bits": 3, **settings})
    stage = GptqStage(spec, planned_grids(weights.config, spec))
    found: Codes = {}
    held: list[HeldOut] = []
    run, step, steps = OutputTraining.run, OutputTraining._step, [0]

    def noted(self: OutputTraining, *args: Any, **named: Any) -> HeldOut:
        steps[0] = 0
        held.append(run(self, *args, **named))
        return held[-1]

    def counted(self: OutputTraining, *args: Any) -> None:
        if kill_at == (blocks_done(work), steps[0]):
            raise Killed
        steps[0] += 1
        step(self, *args)

    def save(block: Block) -> None:
        found.update({f"{block.index}.{name}": weight for name, weight in block.quantized.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputTraining, "run", noted)
        patch.setattr(OutputTraining, "_step", counted)
        for block in walk(weights, TOKENS, work, save, execution=EXACT):
            stage.apply(block)
    return found, held


def same(one: Mapping[str, QuantizedWeight], other: Mapping[str, QuantizedWeight]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a.codes, other[name].codes)
        and torch.equal(a.scale, other[name].scale)
        and torch.equal(a.zero, other[name].zero)
        for name, a in one.items()
    )


@pytest.fixture(scope="module")
def weights() -> RandomWeights:
    return RandomWeights(tiny_config())


def test_no_steps_leave_gptqs_solution(tmp_path: Path, weights: RandomWeights) -> None:
    assert quantized(tmp_path / "a", weights, tune_steps=0)[1] == []
    block = next(walk(weights, TOKENS, tmp_path / "b", lambda _: None, execution=EXACT))
    block.observe()
    training = OutputTraining(block)
    floats = {name: getattr(block.layer, name).weight for name in ("q", "o")}
    codes = {name: round_to_nearest(w, Grid(2, 16, False)) for name, w in floats.items()}
    trained = TunedCodes(codes, floats, 0)
    errors = training.run(trained, 0, seed=0)
    assert errors.before == errors.after > 0
    assert same(trained.codes(), codes)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2, "symmetric": False},
        {"bits": 3, "symmetric": True},
        {"bits": 4, "symmetric": False, "group_size": -1},
        {"overrides": {"*.q": {"quantize": False}, "*.down": {"bits": 8}}},
    ],
    ids=str,
)
def test_the_error_on_rows_held_out_falls_and_codes_stay_within_their_grid(
    tmp_path: Path, weights: RandomWeights, settings: dict[str, Any]
) -> None:
    without, _ = quantized(tmp_path / "a", weights, **settings)
    tuned, held = quantized(tmp_path / "b", weights, **settings, tune_steps=STEPS)
    assert all(errors.after <= errors.before for errors in held)
    assert min(errors.after / errors.before for errors in held) < 0.96
    assert not same(without, tuned)
    assert tuned.keys() == without.keys()
    for name, weight in tuned.items():
        assert weight.grid == without[name].grid
        assert int(weight.codes.max()) <= weight.grid.levels
        assert weight.codes.dtype == torch.uint8
        assert weight.scale.dtype == torch.float16
        assert torch.equal(weight.zero, without[name].zero)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_every_kind_of_layer_is_trained(tmp_path: Path, family: str) -> None:
    switches = SWITCHES[family] | {"other_kinds": (), "kind_of": ()}
    _, held = quantized(tmp_path, RandomWeights(tiny_config(**switches)), tune_steps=STEPS)
    assert len(held) == 4
    assert all(errors.after <= errors.before for errors in held)
    assert min(errors.after / errors.before for errors in held) < 1


def test_training_is_the_same_each_time_and_after_a_kill_inside_it(tmp_path: Path, weights: RandomWeights) -> None:
    once, _ = quantized(tmp_path / "a", weights, tune_steps=12)
    again, _ = quantized(tmp_path / "b", weights, tune_steps=12)
    assert same(once, again)
    with pytest.raises(Killed):
        quantized(tmp_path / "c", weights, tune_steps=12, kill_at=(2, 7))
    assert blocks_done(tmp_path / "c") == 2
    rest, _ = quantized(tmp_path / "c", weights, tune_steps=12)
    assert {name.split(".")[0] for name in rest} == {"1"}, "the first layer was finished"
    assert same(rest, {name: once[name] for name in rest})


def test_a_state_that_is_not_better_on_rows_held_out_is_not_kept(
    tmp_path: Path, weights: RandomWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, _ = quantized(tmp_path / "a", weights)
    monkeypatch.setattr("flatq.quantize.tuned.POSITION_RANGE", 400.0)
    monkeypatch.setattr("flatq.quantize.tuned.SCALE_RANGE", 400.0)
    ruined, held = quantized(tmp_path / "b", weights, tune_steps=8)
    assert same(without, ruined)
    assert all(errors.after == errors.before for errors in held)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 40), (4, -1), (8, 16)])
def test_codes_and_their_decoded_weights_agree_wherever_the_positions_are(
    bits: int, group: int, symmetric: bool
) -> None:
    draw = torch.Generator().manual_seed(bits)
    w = torch.randn(6, 100, generator=draw)
    start = round_to_nearest(w, Grid(bits, group, symmetric))
    trained = TunedCodes({"q": start}, {"q": w}, 10)
    assert torch.equal(trained.weights()["q"], start.dequantize())
    assert same(trained.codes(), {"q": start})
    with torch.no_grad():
        for tensor, rate in trained.parameters():
            tensor += torch.randn(tensor.shape, generator=draw) * rate * 100
    found = trained.codes()["q"]
    assert 0 <= int(found.codes.min()) <= int(found.codes.max()) <= found.grid.levels
    assert not torch.equal(found.codes, start.codes)
    assert torch.equal(found.dequantize(), trained.weights()["q"])


def test_gradients_pass_through_the_rounding_and_stop_beyond_the_grid() -> None:
    grid = Grid(2, 4)
    start = QuantizedWeight(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), torch.tensor([[0.5]]).half(), TWO, grid)
    trained = TunedCodes({"q": start}, {"q": torch.tensor([[-1.0, -0.5, 0.0, 0.5]])}, 10)
    (position, _), (factor, _) = trained.parameters()
    with torch.no_grad():
        position += torch.tensor([[-1.0, 0.2, 0.0, 1.0]])
    gradient = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    trained.weights()["q"].backward(gradient)
    assert position.grad is not None
    assert position.grad.tolist() == [[0.0, 1.0, 1.5, 0.0]]
    assert factor.grad is not None
    assert factor.grad.tolist() == [[1.0 * -1 + 2 * -0.5 + 3 * 0 + 4 * 0.5]]


TWO = torch.tensor([[2]], dtype=torch.uint8)


def test_weights_that_are_on_the_grid_are_a_fixed_point(tmp_path: Path, weights: RandomWeights) -> None:
    for block in walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT):
        block.observe()
        linears = {name: module for name, module in block.layer.named_children() if isinstance(module, nn.Linear)}
        codes = {name: round_to_nearest(linear.weight, Grid(3, 16)) for name, linear in linears.items()}
        for name, code in codes.items():
            block.narrow(name, code.dequantize(), None)
        training = OutputTraining(block)
        trained = TunedCodes(codes, {name: code.dequantize() for name, code in codes.items()}, 4)
        assert training.run(trained, 4, seed=0) == HeldOut(0.0, 0.0)
        assert same(trained.codes(), codes)


def test_rank_0_trains_on_the_rows_of_all_processes(
    tmp_path: Path, weights: RandomWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = next(walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT))
    block.answer("wait")
    with pytest.raises(ValueError, match="unknown command 'sleep'"):
        block.answer("sleep")
    assert block.ahead is not None
    assert block.scratch() is block.ahead.states
    monkeypatch.setattr(distributed, "size", lambda: 2)
    alone = block.scratch()
    assert alone is not block.ahead.states, "the file belongs to all"
    assert alone.shape == block.feed.states.shape


def recipe(steps: int, **calibration: Any) -> Recipe:
    stage = GptqSpec(tune_steps=steps)
    text = CalibrationSpec(dataset="self", **{"samples": 8, "seq_len": 64} | calibration)
    return Recipe(version=1, model={"path": "x"}, calibration=text, stages=(stage,))


def test_the_forecast_knows_the_steps() -> None:
    config = tiny_config()
    t = 512
    tokens = {"self-text": 0} | dict.fromkeys(("baseline", "compress", "evaluate"), t)

    def counted(steps: int) -> tuple[float, float]:
        found = operations(recipe(steps), config, config.layers, tokens, ranges=False)["compress"]
        return found.forward, found.moved

    (none, moved), (ten, more), (thirty, most) = counted(0), counted(10), counted(30)
    one_pass = (thirty - ten) / (3 * 20 * training.STEP_TOKENS)
    assert one_pass > 2 * config.decoder_parameters(), "a backward pass costs two forward passes"
    other = t * (1 + training.CHECKS / training.HELD_OUT)
    assert ten - none == pytest.approx((other + 30 * training.STEP_TOKENS) * one_pass)
    assert most - more > 20 * 4 * 40 * config.decoder_parameters()
    assert more > moved
    long = operations(recipe(10, seq_len=2048), config, config.layers, tokens, ranges=False)["compress"].forward
    assert long > 1.9 * ten, "a step is at least one row"
    assert working_bytes(config, recipe(10))["compress"] > working_bytes(config, recipe(0))["compress"]


def test_exports_of_a_tuned_model_hold_its_codes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    stage = {"gptq": {"bits": 4, "group_size": 16, "tune_steps": 4}}
    exports = [{"safetensors": {"format": "gptq"}}]
    shown = flatq("run", make_recipe(stages=[stage], exports=exports), "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    verified = json.loads((tmp_path / "out" / "report.json").read_text())["exports"][0]["verify"]
    assert verified["exact"]["max_abs"] < 1e-4
