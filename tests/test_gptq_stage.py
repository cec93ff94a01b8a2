"""GPTQ on the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flatq.errors import NumericsError
from flatq.quantize.grid import QuantizedWeight
from flatq.quantize.stage import GptqStage, planned_grids
from flatq.specs import GptqSpec
from flatq.walk import Block, walk
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

    for block in walk(weights, TOKENS, work, save, sweep=EXACT):
        stage.apply(block)
    return found


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("overrides", [{}, {"*.v": {"bits": 8}, "*.up": {"bits": 3}}], ids=["one grid", "several"])
def test_two_problems_at_a_time_give_the_codes_of_one(
    tmp_path: Path, threads: int, overrides: dict[str, dict[str, int]]
) -> None:
    weights = RandomWeights(tiny_config())
    torch.set_num_threads(1)
    alone = quantized(tmp_path / "alone", weights, overrides=overrides)
    torch.set_num_threads(threads)
    together = quantized(tmp_path / "together", weights, overrides=overrides)
    assert torch.get_num_threads() == threads
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
