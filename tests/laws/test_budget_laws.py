"""What a plan costs is what its files weigh, and no plan costs more than its budget."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq.artifact import Artifact
from flatq.compress.allocate import Curves
from flatq.compress.budget import budget_of
from flatq.compress.plan import plan_ranks
from flatq.errors import RecipeError
from flatq.model.decoder import DecoderConfig
from flatq.model.footprint import CACHE_ITEM, cache_bytes, decode_bytes, layer_bytes, weight_bytes
from flatq.model.grid import Grid
from flatq.quantize.grids import planned_grids
from flatq.recipe.blocks import FlatSpec, GptqSpec
from flatq.recipe.grammar import Recipe
from tests.conftest import MakeRecipe, flatq
from tests.models import tiny_artifact, tiny_config

GPTQ = GptqSpec.model_validate({"group_size": 16, "embedding": {"bits": 8}})
WHOLE_ROWS = GptqSpec.model_validate({"group_size": -1})
BIG = tiny_config(d_v=(16,) * 6, d_ff=(96,) * 6)


def curves(seed: int, layers: int = 6) -> list[Curves]:
    def rising(name: str, steps: int) -> tuple[float, ...]:
        generator = random.Random(f"{seed} {name}")
        return (0.0, *itertools.accumulate(generator.random() for _ in range(steps)))

    return [Curves(rising(f"{i} values", 16), rising(f"{i} mlp", 96)) for i in range(layers)]


@pytest.mark.parametrize("switches", [{}, {"tied_head": False}, {"qkv_bias": True, "mlp_bias": True, "qk_norm": True}])
@pytest.mark.parametrize("grid", [None, Grid(4, 16), Grid(3, 32, False), Grid(4, -1, False)])
def test_bytes_from_shapes_are_the_artifact_s_bytes(grid: Grid | None, switches: Any, tmp_path: Path) -> None:
    config = tiny_config(d_v=(6, 16), d_ff=(40, 33), **switches)
    artifact = tiny_artifact(tmp_path / "a", config, grid=grid, embed_grid=grid and Grid(8, 32))
    assert weight_bytes(config, artifact.grids, 4) == artifact.bytes()


@given(
    st.integers(0, 999),
    st.floats(0.3, 1.1),
    st.sampled_from(["size", "decode_bytes"]),
    st.sampled_from([{}, {"values": "whole"}, {"uniform": True}, {"method": "paper"}, {"allocation": "uniform"}]),
    st.sampled_from([None, GPTQ, WHOLE_ROWS]),
)
@settings(max_examples=100, deadline=None)
def test_a_plan_never_costs_more_than_its_bytes(
    seed: int, share: float, key: str, options: dict[str, Any], gptq: GptqSpec | None
) -> None:
    def cost(config: DecoderConfig) -> int:
        grids = planned_grids(config, gptq)
        return weight_bytes(config, grids, 4) if key == "size" else decode_bytes(config, grids, 4, 100)

    given_bytes = f"{share * cost(BIG) / 1000:.3f}kB"
    budget: dict[str, Any] = {key: given_bytes} | ({"context": 100} if key == "decode_bytes" else {})
    spec = FlatSpec.model_validate({**budget, "rank_multiple": 4, "width_multiple": 8, **options})
    try:
        plan = plan_ranks(BIG, spec, [0.2, 0.1, 0.3, 0.1, 0.1, 0.4], curves(seed), gptq=gptq, itemsize=4)
    except RecipeError as refused:
        least = str(refused).split("choose ")[1].split(" or more")[0]
        again = spec.model_copy(update={key: least})
        assert plan_ranks(BIG, again, gptq=gptq, itemsize=4).achieved <= plan_ranks(BIG, again, gptq=gptq).requested
        return
    planned = BIG.with_layers(plan.layers)
    assert cost(planned) == plan.achieved <= plan.requested
    if share >= 1:
        assert plan.layers == BIG.layers, "nothing needs to go"
    elif not spec.uniform:
        step = layer_bytes(BIG, planned_grids(BIG, gptq), 4, 0, BIG.layers[0]) / 4
        assert plan.achieved > plan.requested - step, "and little less than that"


def test_under_a_long_context_narrower_values_are_worth_their_price() -> None:
    """A parameter of the values costs the loss three times as much, but its cache is read with every token."""
    per_rank = sum(dims.heads + dims.kv_heads for dims in BIG.layers[:1]) * 64
    line = [Curves(tuple(3 * n * per_rank / 1e6 for n in range(17)), tuple(n * 3 * 64 / 1e6 for n in range(97)))] * 6

    def ranks(**budget: Any) -> int:
        spec = FlatSpec.model_validate({**budget, "rank_multiple": 4, "width_multiple": 8})
        plan = plan_ranks(BIG, spec, curves=line, gptq=GPTQ)
        return sum(dims.d_v for dims in plan.layers)

    grids = planned_grids(BIG, GPTQ)
    few, many = (decode_bytes(BIG, grids, 4, context) for context in (1, 10_000))
    short = ranks(decode_bytes=f"{0.8 * few / 1000:.3f}kB", context=1)
    long = ranks(decode_bytes=f"{0.8 * many / 1000:.3f}kB", context=10_000)
    assert long < short == 6 * 16


@pytest.mark.parametrize(("window", "seen"), [(None, 1000), (64, 64), (4096, 1000)])
def test_a_sliding_window_bounds_the_cache(window: int | None, seen: int) -> None:
    config = tiny_config(sliding_window=window)
    dims = config.layers[0]
    assert cache_bytes(config, 0, dims, 1000) == seen * dims.kv_heads * (dims.d_qk + dims.d_v) * CACHE_ITEM


def test_reading_counts_head_and_cache_and_of_an_untied_embedding_nothing() -> None:
    tied, untied = tiny_config(), tiny_config(tied_head=False)
    assert decode_bytes(tied, {}, 4, 100) == decode_bytes(untied, {}, 4, 100)
    cache = sum(cache_bytes(tied, index, dims, 100) for index, dims in enumerate(tied.layers))
    assert decode_bytes(tied, {}, 4, 100) - cache == weight_bytes(tied, {}, 4)


def test_the_artifact_of_a_run_meets_its_size(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    flat = {"size": "60kB", "method": "paper", "rank_multiple": 4, "width_multiple": 16}
    gptq = {"bits": 4, "group_size": 16, "embedding": {"bits": 8, "group_size": 32}}
    recipe = make_recipe(stages=[{"flat": flat}, {"gptq": gptq}])
    shown = flatq("run", recipe, "--out", tmp_path / "out")
    assert shown.exit_code == 0, shown.stderr
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.manifest["plan"]["budget"] == "size"
    assert artifact.bytes() == artifact.manifest["plan"]["achieved"] <= 60_000
    assert artifact.bytes() > 55_000
    assert "per decoded token at a context of 4,096" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"size": "20kB"}, ["size: 20kB cannot be reached: embedding, head and norms", "or more"]),
        ({"decode_bytes": "20kB", "context": 64}, ["decode_bytes: 20kB cannot be reached", "cached keys", "or more"]),
    ],
)
def test_a_plan_refuses_what_no_widths_can_meet(
    budget: dict[str, Any], words: list[str], make_recipe: MakeRecipe
) -> None:
    shown = flatq("plan", make_recipe(stages=[{"flat": budget}]))
    assert shown.exit_code == 2
    assert all(word in shown.stderr for word in words)


def test_a_budget_knows_itself_in_the_recipe_s_words() -> None:
    budget = budget_of(BIG, FlatSpec(size="1.5MB"), None, 4)
    assert [budget.written(cost) for cost in (999, 12_345_678, 2e9, 1e9 + 1)] == [
        "0.999kB",
        "12.346MB",
        "2GB",
        "1.001GB",
    ]
    assert Recipe.parse("version: 1\nmodel: m\nstages: [{flat: {decode_bytes: 9MB}}]").flat == FlatSpec(
        decode_bytes="9MB"
    )
