"""GPTQ on the blocks of a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from flatq.calibration.block import Block
from flatq.calibration.walk import walk
from flatq.errors import NumericsError
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.quantize.grids import planned_grids
from flatq.quantize.stage import READERS, GptqStage, corrected, quantized_together
from flatq.recipe.blocks import GptqSpec
from tests.models import EXACT, RandomWeights, tiny_config

TOKENS = torch.randint(0, 128, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quantized(work: Path, weights: RandomWeights, **settings: Any) -> dict[str, QuantizedWeight]:
    spec = GptqSpec.model_validate({"group_size": 16, **settings})
    stage = GptqStage(spec, planned_grids(weights.config, spec))
    found: dict[str, QuantizedWeight] = {}

    def save(block: Block) -> None:
        found.update({f"{block.index}.{name}": weight for name, weight in block.quantized.items()})

    for block in walk(weights, TOKENS, work, save, execution=EXACT, lag=spec.corrects):
        stage.apply(block)
    return found


def disturbed(work: Path, weights: RandomWeights) -> Iterator[Block]:
    """Observed blocks whose inputs have come through blocks of half the strength."""
    for block in walk(weights, TOKENS, work, lambda _: None, execution=EXACT, lag=True):
        block.observe()
        yield block
        name = "o" if block.half == "attention" else "down"
        block.narrow(name, getattr(block.layer, name).weight / 2, getattr(block.layer, name).bias)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_corrected_weights_are_nearer_to_what_the_dense_model_gives(tmp_path: Path, share: float, biases: bool) -> None:
    weights = RandomWeights(tiny_config(qkv_bias=biases, o_bias=biases, mlp_bias=biases))
    for number, block in enumerate(disturbed(tmp_path, weights)):
        assert block.reference is not None
        x, dense = block.feed.states[:], block.reference.before.states[:]
        seen, wanted = block.activations(x), block.activations(dense)
        for gram, names in READERS[block.half]:
            linears: list[nn.Linear] = [getattr(block.layer, name) for name in names]
            moved = corrected(block, gram, [linear.weight for linear in linears], share)
            for linear, weight in zip(linears, moved, strict=True):
                here, there = (dense, x) if gram == "inner" else (0, 0)  # o and down answer for the stream
                target = linear(wanted[gram]) + here
                before = (target - linear(seen[gram]) - there).square().sum()
                after = (target - functional.linear(seen[gram], weight, linear.bias) - there).square().sum()
                if number == 0:  # nothing was changed before it
                    torch.testing.assert_close(weight, linear.weight, rtol=1e-4, atol=1e-5)
                else:
                    assert after < before


def test_a_correction_changes_the_codes_behind_the_first_block_only(tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config())
    plain = quantized(tmp_path / "plain", weights, bits=3)
    moved = quantized(tmp_path / "moved", weights, bits=3, correction=0.5)
    same = {name for name, weight in plain.items() if torch.equal(weight.codes, moved[name].codes)}
    assert same == {f"0.{name}" for name in "qkvo"}


def test_a_correction_needs_a_walk_that_measures_what_to_correct(tmp_path: Path) -> None:
    weights, spec = RandomWeights(tiny_config()), GptqSpec(group_size=16, correction=0.5)
    block = next(walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT, reference=True))
    with pytest.raises(ValueError, match="not measured the drift to correct"):
        GptqStage(spec, planned_grids(weights.config, spec)).apply(block)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("overrides", [{}, {"*.v": {"bits": 8}, "*.up": {"bits": 3}}], ids=["one grid", "several"])
def test_two_problems_at_a_time_give_the_codes_of_one(
    tmp_path: Path, threads: int, overrides: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, seen, workers = RandomWeights(tiny_config()), set[tuple[bool, int]](), set[str]()

    def noted(*problem: Any) -> Any:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        workers.add(threading.current_thread().name.rpartition("_")[2])
        return quantized_together(*problem)

    monkeypatch.setattr("flatq.quantize.stage.quantized_together", noted)
    torch.set_num_threads(1)
    alone = quantized(tmp_path / "alone", weights, overrides=overrides)
    torch.set_num_threads(threads)
    together = quantized(tmp_path / "together", weights, overrides=overrides)
    assert torch.get_num_threads() == threads
    assert seen == {(True, 1), (False, 1)}, "each has half of the threads, rounded down"
    assert workers <= {"MainThread", "0", "1"}, "two at a time, of however many there are"
    assert alone.keys() == together.keys()
    for name, weight in alone.items():
        assert torch.equal(weight.codes, together[name].codes), name
        assert torch.equal(weight.scale, together[name].scale), name


@pytest.mark.parametrize("threads", [1, 2])
def test_a_weight_that_is_not_finite_is_named_whatever_the_threads(tmp_path: Path, threads: int) -> None:
    weights = RandomWeights(tiny_config())
    weights.tensors["layers.1.o.weight"][3, 3] = float("nan")
    torch.set_num_threads(threads)
    with pytest.raises(NumericsError, match="layer 1 attention o: the weight is not finite"):
        quantized(tmp_path, weights)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("correlation", "words"),
    [
        (0.5, []),
        (1.05, ["o: damping was increased to 0.1"]),
        (1.5, ["o: damping was increased to 1"]),
        (3.0, ["o: GPTQ failed with every damping, rounded to nearest"]),
    ],
)
def test_a_solve_that_breaks_down_is_told_and_only_this_linear_is_rounded_to_nearest(
    tmp_path: Path, correlation: float, words: list[str]
) -> None:
    weights, spec = RandomWeights(tiny_config()), GptqSpec(group_size=16, clip_search=False)
    block = next(walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT))
    gram = block.observe()["inner"]
    with torch.inference_mode():
        gram.total[0] = gram.count * torch.eye(64)
        gram.total[0, 0, 1] = gram.total[0, 1, 0] = gram.count * correlation  # above 1 it is no second moment
    GptqStage(spec, planned_grids(weights.config, spec)).apply(block)
    assert block.notes == words
    nearest = round_to_nearest(weights.tensor("layers.0.o.weight"), Grid(4, 16))
    assert torch.equal(block.quantized["o"].codes, nearest.codes) == (correlation == 3.0)


def test_input_channels_that_never_carried_anything_are_counted_in_the_notes(tmp_path: Path) -> None:
    weights = RandomWeights(tiny_config())
    weights.tensors["layers.0.up.weight"][[3, 7]] = 0
    spec = GptqSpec(group_size=16)
    stage = GptqStage(spec, planned_grids(weights.config, spec))
    notes = []
    for block in walk(weights, TOKENS, tmp_path, lambda _: None, execution=EXACT):
        stage.apply(block)
        notes += block.notes
    assert notes == ["down: 2 input columns were always 0"]
