"""Who keeps how much: budgets are met, bounds and multiples are kept, importance is respected."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flatq.compress.allocate import Curves, Multiples, iprs, share_of_the_rest, uniform, widths
from flatq.compress.budget import parameter_budget
from flatq.compress.plan import plan_ranks, uneven, uneven_mlps
from flatq.errors import RecipeError
from flatq.model.dims import LINEARS, LayerDims
from flatq.recipe.grammar import FlatSpec
from tests.models import tiny_config

IMPORTANCE = st.lists(st.floats(1e-3, 1), min_size=1, max_size=40)
KEEP = st.floats(0.05, 1)


@given(IMPORTANCE, KEEP)
def test_iprs_keeps_what_was_asked_for_on_average(importance: list[float], keep: float) -> None:
    shares = iprs(importance, keep)
    assert math.fsum(shares) / len(shares) == pytest.approx(keep)
    assert all(0 < share <= 1 for share in shares)


@given(IMPORTANCE, KEEP)
def test_iprs_gives_the_more_important_layer_no_less(importance: list[float], keep: float) -> None:
    ranked = [share for _, share in sorted(zip(importance, iprs(importance, keep), strict=True))]
    assert all(low <= high + 1e-12 for low, high in pairwise(ranked))


@given(IMPORTANCE, KEEP, st.floats(1e-3, 1e3))
def test_iprs_knows_no_unit_of_importance(importance: list[float], keep: float, unit: float) -> None:
    scaled = [unit * value for value in importance]
    assert iprs(scaled, keep) == pytest.approx(iprs(importance, keep))


def test_iprs_by_hand() -> None:
    """Budget 0.7 x 4 = 2.8: shares .28 .56 .84 1.12, so the last is fixed at 1; then 1.8 is shared 1 : 2 : 3."""
    assert iprs([1, 2, 3, 4], 0.7) == pytest.approx([0.3, 0.6, 0.9, 1.0])


def test_iprs_by_hand_in_two_rounds() -> None:
    """Budget 3: 10 takes 2.4 and is fixed; of the 2 left 1.5 : 1 gives 5 / 2.5 x 2, so the next is fixed as well."""
    assert iprs([10, 1.5, 0.5, 0.5], 0.75) == pytest.approx([1, 1, 0.5, 0.5])


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_layers_of_equal_importance_share_equally(keep: float) -> None:
    assert iprs([0.2] * 5, keep) == pytest.approx(uniform(5, keep))
    assert iprs([0.0] * 5, keep) == pytest.approx(uniform(5, keep)), "no importance at all says nothing"


def test_layers_without_importance_get_what_the_others_cannot_take() -> None:
    assert iprs([0, 0, 1], 0.5) == pytest.approx([0.25, 0.25, 1])


@given(IMPORTANCE)
def test_keeping_everything_leaves_every_layer_whole(importance: list[float]) -> None:
    assert iprs(importance, 1.0) == pytest.approx([1.0] * len(importance))


def test_no_layers_have_no_shares() -> None:
    assert iprs([], 0.5) == uniform(0, 0.5) == []


def parameters(layers: tuple[LayerDims, ...], d_model: int) -> int:
    return sum(dims.parameters(d_model) for dims in layers)


@given(
    st.lists(st.floats(0.01, 1), min_size=1, max_size=12),
    st.floats(0.3, 1),
    st.sampled_from([(4, 1), (4, 2), (4, 4), (8, 2)]),
    st.sampled_from([1, 4, 8, 32]),
    st.sampled_from([1, 8, 32, 256]),
    st.sampled_from([96, 100, 256, 1000]),
)
@settings(max_examples=200, deadline=None)
def test_widths_meet_the_budget_within_one_step(
    importance: list[float], keep: float, heads: tuple[int, int], rank_step: int, width_step: int, d_ff: int
) -> None:
    d_model = 64
    layers = (LayerDims(*heads, 16, 16, d_ff),) * len(importance)
    whole = parameters(layers, d_model)
    budget, multiples = parameter_budget(layers, d_model, keep), Multiples(rank_step, width_step)
    try:
        share = share_of_the_rest(layers, budget, multiples)
    except RecipeError:
        assume(False)
    planned = widths(layers, budget, iprs(importance, share), multiples)
    for dims in planned:
        assert 1 <= dims.d_v <= 16
        assert dims.d_v % rank_step == 0 or dims.d_v == 16
        assert 1 <= dims.d_ff <= d_ff
        assert dims.d_ff % width_step == 0 or dims.d_ff == d_ff
        assert (dims.heads, dims.kv_heads, dims.d_qk) == (*heads, 16), "queries and keys stay whole"
    surplus = parameters(planned, d_model) - keep * whole
    step = 3 * d_model * width_step
    ranks_gave_way = all(dims.d_ff == min(width_step, d_ff) or dims.d_ff == d_ff for dims in planned)
    assert surplus <= 1e-6, "never more than was asked for"
    assert -surplus <= step or ranks_gave_way


def test_a_whole_width_that_is_no_multiple_shrinks_to_one() -> None:
    """Coarse ranks leave a surplus that only the MLPs, some of them whole, can make up for."""
    layers = (LayerDims(4, 2, 16, 16, 100),) * 5
    budget, multiples = parameter_budget(layers, 64, 0.6), Multiples(12, 8)
    shares = iprs([0.1, 0.1, 0.9, 0.5, 0.2], share_of_the_rest(layers, budget, multiples))
    planned = widths(layers, budget, shares, multiples)
    assert shares[2] == 1
    assert planned[2].d_ff < 100
    assert all(dims.d_ff % 8 == 0 for dims in planned)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 1.0])
def test_the_share_of_the_rest_makes_up_for_queries_and_keys(keep: float) -> None:
    layers, d_model = (LayerDims(4, 2, 16, 16, 96), LayerDims(4, 2, 16, 12, 64)), 64
    budget, multiples = parameter_budget(layers, d_model, keep), Multiples(1, 1)
    share = share_of_the_rest(layers, budget, multiples)
    kept = 0.0
    for dims in layers:
        fixed = multiples.floor(dims).parameters(d_model)
        kept += fixed + share * (dims.parameters(d_model) - fixed)
    assert kept == pytest.approx(keep * parameters(layers, d_model))


@pytest.mark.parametrize(("values", "words"), [("output", "query and key proj"), ("whole", "`values: output` narrows")])
@pytest.mark.parametrize("uniform_plan", [False, True])
def test_a_budget_that_cannot_be_reached_names_the_least_that_can(values: str, words: str, uniform_plan: bool) -> None:
    config = tiny_config(kv_heads=4)
    given: dict[str, Any] = {"values": values, "uniform": uniform_plan, "rank_multiple": 4, "width_multiple": 8}
    with pytest.raises(RecipeError, match=rf"keep_ratio: 0\.1 cannot be reached.*{words}") as raised:
        plan_ranks(config, FlatSpec.model_validate({"keep_ratio": 0.1, **given}))
    least = float(str(raised.value).split("choose ")[1].split(" or more")[0])
    assert plan_ranks(config, FlatSpec.model_validate({"keep_ratio": least, **given})).achieved <= least
    with pytest.raises(RecipeError):
        plan_ranks(config, FlatSpec.model_validate({"keep_ratio": least - 0.002, **given}))


CURVES = st.integers(0, 9999).map(
    lambda seed: [
        Curves(
            *(
                (0.0, *itertools.accumulate(random.Random(f"{seed} {i} {n}").random() for _ in range(n)))
                for n in (16, 96)
            )
        )
        for i in range(6)
    ]
)


@given(CURVES, st.floats(0.45, 1), st.sampled_from(["curves", "uniform"]), st.sampled_from(["output", "whole"]))
@settings(max_examples=100, deadline=None)
def test_a_uniform_plan_has_one_rank_and_one_width(
    curves: list[Curves], keep: float, allocation: str, values: str
) -> None:
    config = tiny_config(d_v=(16,) * 6, d_ff=(96,) * 6)
    spec = {"keep_ratio": keep, "allocation": allocation, "values": values, "uniform": True}
    plan = plan_ranks(config, FlatSpec.model_validate({**spec, "rank_multiple": 4, "width_multiple": 8}), curves=curves)
    assert len(set(plan.layers)) == 1
    assert len(plan.layers) == 6
    dims = plan.layers[0]
    assert dims.d_v % 4 == dims.d_ff % 8 == 0
    assert plan.achieved <= keep + 1e-9
    wider = replace(dims, d_ff=dims.d_ff + 8)
    assert dims.d_ff == 96 or parameters((wider,) * 6, 64) > keep * parameters(config.layers, 64)
    if values == "whole":
        assert dims.d_v == 16


@given(st.lists(st.floats(0.01, 1), min_size=6, max_size=6), st.sampled_from(["iprs", "uniform"]), CURVES)
@settings(max_examples=50, deadline=None)
def test_whole_values_leave_the_cut_to_the_mlps(importance: list[float], allocation: str, curves: list[Curves]) -> None:
    config = tiny_config(d_v=(16,) * 6, d_ff=(96,) * 6)
    for share_out in (allocation, "curves"):
        spec = FlatSpec(keep_ratio=0.7, values="whole", allocation=share_out, rank_multiple=2, width_multiple=4)  # type: ignore[arg-type]
        plan = plan_ranks(config, spec, importance, curves)
        assert {dims.d_v for dims in plan.layers} == {16}
        assert 0.7 - 3 * 4 * 64 / config.decoder_parameters() <= plan.achieved <= 0.7


def test_a_uniform_plan_takes_the_ranks_that_the_curves_say_cost_less() -> None:
    config = tiny_config(d_v=(16,) * 2, d_ff=(96,) * 2)
    spec = FlatSpec(keep_ratio=0.8, uniform=True, rank_multiple=4, width_multiple=8)
    rising, free = tuple(float(n) for n in range(97)), (0.0,) * 97
    values_free = plan_ranks(config, spec, curves=[Curves(free[:17], rising)] * 2)
    mlps_free = plan_ranks(config, spec, curves=[Curves(rising[:17], free)] * 2)
    assert values_free.layers[0].d_v == 4
    assert mlps_free.layers[0].d_v == 16
    assert mlps_free.layers[0].d_ff < values_free.layers[0].d_ff


def test_layers_that_differ_have_no_uniform_plan() -> None:
    config = tiny_config(d_v=(16, 12))
    with pytest.raises(RecipeError, match="different widths already; remove `uniform`"):
        plan_ranks(config, FlatSpec(keep_ratio=0.8, uniform=True))


@pytest.mark.parametrize("allocation", ["iprs", "uniform"])
def test_a_plan_that_keeps_everything_is_the_model(allocation: str) -> None:
    config = tiny_config()
    spec = FlatSpec.model_validate({"keep_ratio": 1.0, "allocation": allocation})
    assert plan_ranks(config, spec, [0.1, 0.9]).layers == config.layers


@pytest.mark.parametrize("allocation", ["iprs", "uniform"])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_plan_says_what_it_really_keeps(allocation: str, keep: float) -> None:
    config = tiny_config(d_v=(16,) * 6, d_ff=(96,) * 6)
    spec = FlatSpec.model_validate(
        {"keep_ratio": keep, "allocation": allocation, "rank_multiple": 2, "width_multiple": 2}
    )
    plan = plan_ranks(config, spec, [0.3, 0.1, 0.1, 0.1, 0.2, 0.4])
    kept = parameters(plan.layers, 64) / parameters(config.layers, 64)
    assert plan.achieved == pytest.approx(kept)
    assert kept == pytest.approx(keep, abs=2 * 3 * 64 / parameters(config.layers, 64))
    if allocation == "iprs":
        assert plan.layers[5].d_ff > plan.layers[1].d_ff
    else:
        assert max(d.d_ff for d in plan.layers) - min(d.d_ff for d in plan.layers) <= 2


@pytest.mark.parametrize(("multiple", "lower"), [(1, 15), (4, 12), (8, 8), (16, None), (32, None)])
def test_ranks_that_will_differ_are_known_before_anything_is_measured(multiple: int, lower: int | None) -> None:
    config = tiny_config()
    spec = FlatSpec.model_validate({"keep_ratio": 0.8, "rank_multiple": multiple})
    first, *others = uneven(config, spec).layers
    assert first == (config.layers[0] if lower is None else replace(config.layers[0], d_v=lower))
    assert tuple(others) == config.layers[1:]


@pytest.mark.parametrize(
    "alike", [{"uniform": True}, {"allocation": "uniform"}, {"values": "whole"}, {"keep_ratio": 1.0}], ids=str
)
def test_ranks_that_will_be_alike_are_known_before_anything_is_measured(alike: dict[str, Any]) -> None:
    config = tiny_config()
    spec = FlatSpec.model_validate({"keep_ratio": 0.8, "rank_multiple": 4, "width_multiple": 16, **alike})
    assert uneven(config, spec) == config
    assert (uneven_mlps(config, spec) == config) == ("values" not in alike)


@pytest.mark.parametrize(
    ("d_ff", "multiple", "steps", "lower"),
    [(64, 1, 1, 63), (64, 16, 1, 48), (64, 16, 2, 32), (60, 16, 1, 48), (64, 32, 2, None), (64, 64, 1, None)],
)
def test_mlp_widths_that_will_differ_are_known_before_anything_is_measured(
    d_ff: int, multiple: int, steps: int, lower: int | None
) -> None:
    config = tiny_config(d_ff=(d_ff, d_ff))
    spec = FlatSpec.model_validate({"keep_ratio": 0.8, "width_multiple": multiple})
    first, *others = uneven_mlps(config, spec, steps).layers
    assert first == (config.layers[0] if lower is None else replace(config.layers[0], d_ff=lower))
    assert tuple(others) == config.layers[1:]


@given(st.lists(st.integers(1, 60), min_size=6, max_size=6))
def test_the_parameters_of_a_layer_are_those_of_its_linears(widths: list[int]) -> None:
    *dims, d_model = widths
    layer = LayerDims(*dims)
    assert layer.parameters(d_model) == sum(math.prod(layer.shape(linear, d_model)) for linear in LINEARS)
