"""Bits by rule and by budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatq.artifact import Artifact
from flatq.model.decoder import LINEARS
from flatq.model.grid import Grid
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.bits import Unit, choose, expected, free_units, spend
from flatq.quantize.grids import objections, planned_grids, possible_grids
from flatq.recipe.blocks import GptqSpec
from tests.conftest import FLAT, MakeRecipe, flatq
from tests.models import EXACT, RandomWeights, tiny_config

CONFIG = tiny_config()


def spec(**settings: Any) -> GptqSpec:
    return GptqSpec.model_validate({"group_size": 16, **settings})


def test_without_rules_every_linear_has_the_same_grid() -> None:
    grids = planned_grids(CONFIG, spec(bits=3))
    assert set(grids) == {f"layers.{i}.{name}" for i in range(2) for name in LINEARS}
    assert set(grids.values()) == {Grid(3, 16)}


def test_a_pattern_changes_only_what_it_names_and_only_where_it_matches() -> None:
    grids = planned_grids(CONFIG, spec(overrides={"*.down": {"bits": 8}, "layers.1.q": {"symmetric": False}}))
    assert grids["layers.0.down"] == grids["layers.1.down"] == Grid(8, 16)
    assert grids["layers.1.q"] == Grid(4, 16, symmetric=False)
    assert grids["layers.0.q"] == Grid(4, 16)


def test_a_pattern_can_leave_linears_as_they_are() -> None:
    grids = planned_grids(CONFIG, spec(overrides={"layers.0.*": {"quantize": False}}))
    assert {stem.split(".")[1] for stem in grids} == {"1"}


@pytest.mark.parametrize("turned", [False, True])
def test_the_longest_pattern_wins_in_any_order(turned: bool) -> None:
    rules = [("*.down", {"bits": 8}), ("layers.0.down", {"bits": 2}), ("*", {"bits": 3, "group_size": 32})]
    grids = planned_grids(CONFIG, spec(overrides=dict(reversed(rules) if turned else rules)))
    assert (grids["layers.0.down"], grids["layers.1.down"], grids["layers.1.q"]) == (
        Grid(2, 32),
        Grid(8, 32),
        Grid(3, 32),
    )


def test_a_pattern_that_matches_nothing_is_objected_to() -> None:
    (problem,) = objections(CONFIG, spec(overrides={"*.down_proj": {"bits": 8}}))
    assert "'*.down_proj' matches no linear" in problem
    assert "layers.1.down" in problem


def weighted_bits(chosen: dict[str, int]) -> float:
    weights = {
        f"layers.{i}.{n}": r * c for i, d in enumerate(CONFIG.layers) for n in LINEARS for r, c in [d.shape(n, 64)]
    }
    return sum(weights[stem] * bits for stem, bits in chosen.items()) / sum(weights[stem] for stem in chosen)


@pytest.mark.parametrize("average", [3, 3.5, 4, 5.25, 8])
def test_the_average_is_kept_and_nearly_reached_before_anything_is_measured(average: float) -> None:
    chosen = expected(CONFIG, spec(average_bits=average))
    assert set(chosen) == {f"layers.{i}.{name}" for i in range(2) for name in LINEARS}
    assert average - 0.6 < weighted_bits(chosen) <= average


def test_what_reads_one_activation_gets_the_same_bits_and_errors_decide() -> None:
    rule = spec(average_bits=4, bit_choices=(2, 4, 8))
    errors = {unit.stems[0]: {"2": 1.0, "4": 0.1, "8": 0.001} for unit in free_units(CONFIG, rule)[1]}
    errors["layers.1.gate"] = {"2": 1000.0, "4": 100.0, "8": 1.0}
    chosen = choose(CONFIG, rule, errors)
    assert chosen["layers.1.gate"] == chosen["layers.1.up"] == 8
    assert max(bits for stem, bits in chosen.items() if stem not in ("layers.1.gate", "layers.1.up")) < 8
    assert len({chosen[f"layers.0.{name}"] for name in "qkv"}) == 1


def test_overrides_stay_out_of_the_choice_and_count_in_the_average() -> None:
    rule = spec(average_bits=5, overrides={"*.down": {"bits": 8}, "*.gate": {"quantize": False}})
    chosen = expected(CONFIG, rule)
    assert not any(stem.endswith((".down", ".gate")) for stem in chosen)
    grids = planned_grids(CONFIG, rule)
    assert grids["layers.0.down"].bits == 8
    assert weighted_bits({stem: grid.bits for stem, grid in grids.items()}) <= 5


@pytest.mark.parametrize(
    "settings", [{"average_bits": 2.5}, {"average_bits": 3.1, "overrides": {"*.down": {"bits": 8}}}]
)
def test_an_average_below_what_the_choices_give_is_objected_to(settings: dict[str, Any]) -> None:
    (problem,) = objections(CONFIG, spec(**settings))
    assert "cannot be reached" in problem
    assert "choose a higher average" in problem


def test_exporters_hear_of_every_choice_before_anything_is_measured() -> None:
    found = [{grid.bits for grid in grids.values()} for grids in possible_grids(CONFIG, spec(average_bits=3.5))]
    assert found == [{3}, {4}, {8}]
    assert possible_grids(CONFIG, None) == [{}]


UNITS = st.lists(
    st.tuples(st.integers(1, 50), st.lists(st.floats(0, 100), min_size=3, max_size=3)), min_size=1, max_size=6
)


@given(UNITS, st.floats(0, 1))
def test_the_budget_is_kept_and_more_budget_never_costs_more(
    drawn: list[tuple[int, list[float]]], share: float
) -> None:
    units = [
        Unit((f"u{i}",), weights, dict(zip((2, 4, 8), errors, strict=True)))
        for i, (weights, errors) in enumerate(drawn)
    ]
    total = sum(unit.weights for unit in units)
    budget = total * (2 + 6 * share)
    bits = spend(units, budget)
    assert sum(unit.weights * b for unit, b in zip(units, bits, strict=True)) <= budget + 1e-6 * budget
    assert all(b in (2, 4, 8) for b in bits)
    best = [min(unit.errors.values()) for unit in units]
    assert [u.errors[b] for u, b in zip(units, spend(units, 8.0 * total), strict=True)] == best


def test_few_tokens_do_not_make_an_error_look_small(tmp_path: Path) -> None:
    """GPTQ loses next to nothing on tokens that are fewer than the channels it can move; on others it does."""
    weights, rule = RandomWeights(tiny_config(d_ff=(160, 160))), spec(average_bits=4)
    tokens = torch.randint(0, 128, (60, 48), generator=torch.Generator().manual_seed(0))
    many = bit_errors(weights, tokens, rule, None, tmp_path / "many", execution=EXACT)
    few = bit_errors(weights, tokens[:2], rule, None, tmp_path / "few", execution=EXACT)
    assert {bits for costs in many.values() for bits in costs} == {"3", "4", "8"}
    for stem, costs in many.items():
        for bits, cost in costs.items():
            assert few[stem][bits] > 0.9 * cost, (stem, bits)
            assert cost > 0


@pytest.mark.parametrize("stages", [[], [FLAT]])
def test_a_run_with_an_average_chooses_measured_bits_and_runs_on_them(
    make_recipe: MakeRecipe, tmp_path: Path, stages: list[dict[str, Any]]
) -> None:
    settings = {"average_bits": 3.6, "group_size": 16, "overrides": {"layers.0.q": {"bits": 8}}}
    exports = [{"safetensors": {"name": form, "format": form}} for form in ("compressed-tensors", "gptq")]
    recipe = make_recipe(stages=[*stages, {"gptq": settings}], exports=exports if not stages else exports[:1])
    shown = flatq("run", recipe, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    artifact = Artifact.open(tmp_path / "out")
    grids = artifact.grids
    assert grids["layers.0.q"].bits == 8
    assert {3, 4} <= {grid.bits for grid in grids.values()}
    sizes = {stem: artifact.tensor(f"{stem}.weight").shape.numel() for stem in grids}  # type: ignore[union-attr]
    average = sum(sizes[stem] * grid.bits for stem, grid in grids.items()) / sum(sizes.values())
    assert 3.2 < average <= 3.6
    described = json.loads((tmp_path / "out" / "exports" / "compressed-tensors" / "config.json").read_text())
    groups = described["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {grid.bits for grid in grids.values()}
