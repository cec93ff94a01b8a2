"""Embedding and head: the head is solved on what it reads, and the folder holds what the model runs with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flatq.artifact import Artifact, save_shard
from flatq.calibration.grams import Gram
from flatq.calibration.walk import last_states, walk
from flatq.model.grid import Grid, QuantizedWeight, round_to_nearest
from flatq.model.weights import load_decoder
from flatq.quantize.embedding_and_head import (
    ENDS,
    first_table,
    head_moment,
    quantized_head,
    save_first,
    save_last,
    saved_first,
)
from flatq.recipe.blocks import GptqSpec
from tests.conftest import FLAT, GPTQ, MakeRecipe, digests, flatq
from tests.models import EXACT, RandomWeights, tiny_config

TOKENS = torch.randint(0, 128, (12, 40), generator=torch.Generator().manual_seed(0))
GRID = Grid(4, 32)
TIED, UNTIED = (RandomWeights(tiny_config(tied_head=tied)) for tied in (True, False))
SPEC = GptqSpec(group_size=16)


def walked_to_the_end(weights: RandomWeights, work: Path) -> Gram:
    for _ in walk(weights, TOKENS, work, lambda _: None, execution=EXACT):
        pass
    return head_moment(weights, last_states(weights, TOKENS, work, EXACT), EXACT)


def grids_of(weights: RandomWeights) -> dict[str, Grid]:
    return {"embed": GRID} if weights.config.tied_head else {"embed": GRID, "head": GRID}


@pytest.mark.parametrize("weights", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_head_loses_less_than_the_nearest_codes_on_what_it_reads(weights: RandomWeights, tmp_path: Path) -> None:
    moment, read = walked_to_the_end(weights, tmp_path), load_decoder(weights).hidden(TOKENS).detach()
    torch.testing.assert_close(
        moment.mean(), torch.einsum("nsi,nsj->ij", read, read) / TOKENS.numel(), rtol=1e-4, atol=1e-4
    )
    table = weights.tensor("embed.weight" if weights.config.tied_head else "head.weight")
    found = quantized_head(weights, GRID, moment, SPEC)

    def lost(codes: QuantizedWeight) -> Tensor:
        return (read @ (codes.dequantize() - table).T).square().sum()

    assert lost(found.weight) < 0.9 * lost(round_to_nearest(table, GRID, search=True))
    assert found.error_of() == pytest.approx(float(lost(found.weight) / (read @ table.T).square().sum()), rel=1e-3)


def test_a_table_that_is_both_begins_as_it_was_and_ends_in_codes(tmp_path: Path) -> None:
    save_first(TIED, grids_of(TIED), tmp_path)
    assert torch.equal(saved_first(TIED, grids_of(TIED), tmp_path), TIED.tensor("embed.weight"))
    said = save_last(TIED, grids_of(TIED), walked_to_the_end(TIED, tmp_path / "work"), SPEC, tmp_path)
    assert 0 < said["error"] < 0.1
    assert said["notes"] == []
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [ENDS]


def test_an_embedding_of_its_own_is_rounded_to_nearest_before_the_walk(tmp_path: Path) -> None:
    nearest = round_to_nearest(UNTIED.tensor("embed.weight"), GRID, search=True)
    save_first(UNTIED, grids_of(UNTIED), tmp_path)
    for table in (first_table(UNTIED, grids_of(UNTIED)), saved_first(UNTIED, grids_of(UNTIED), tmp_path)):
        assert isinstance(table, QuantizedWeight)
        assert torch.equal(table.codes, nearest.codes)
        assert torch.equal(table.scale, nearest.scale)


def test_a_solve_that_breaks_down_is_told(tmp_path: Path) -> None:
    moment = Gram(64)
    moment.update(torch.eye(64))
    with torch.inference_mode():
        moment.total[0, 0, 1] = moment.total[0, 1, 0] = 10  # no second moment
    said = save_last(TIED, grids_of(TIED), moment, SPEC, tmp_path)
    assert said["notes"] == ["head: GPTQ failed with every damping, rounded to nearest"]


def test_a_run_killed_before_the_head_ends_with_the_same_bytes(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(stages=[FLAT, {"gptq": {**GPTQ["gptq"], "embedding": {"bits": 4, "group_size": 16}}}])

    def save_or_die(path: Path, tensors: Mapping[str, Tensor | QuantizedWeight]) -> None:
        if path.name != ENDS:
            return save_shard(path, tensors)
        path.with_name(path.name + ".partial").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flatq.quantize.embedding_and_head.save_shard", save_or_die)
        assert flatq("run", recipe, "--out", tmp_path / "killed").exit_code == 130
    assert flatq("run", recipe, "--out", tmp_path / "killed").exit_code == 0
    assert flatq("run", recipe, "--out", tmp_path / "whole").exit_code == 0
    assert digests(tmp_path / "killed" / "artifact") == digests(tmp_path / "whole" / "artifact")
    head = Artifact.open(tmp_path / "whole").manifest["head"]
    assert 0 < head["error"] < 0.1
