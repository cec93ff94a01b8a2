"""One budget for widths and bits: optimal on small problems, never over the limit, never worse than either alone."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatq.budget.allocation import Option, Point, Variant, frontier, points_of, spend, total, vertices
from flatq.budget.joint import JointPlan, Measured, guessed, items_of, plan_jointly, widths_of
from flatq.budget.limits import matrices_of, prices_of
from flatq.budget.problem import Problem, problem_of
from flatq.compress.allocate import Curves
from flatq.errors import RecipeError
from flatq.export.planned import PlannedExport, planned_exports
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.quantize.choices import candidates, named
from flatq.recipe.grammar import Recipe
from tests.models import tiny_artifact, tiny_config

HEAD = "version: 1\nmodel: some/model\n"
STAGES = "stages: [flat: {rank_multiple: 4, width_multiple: 16}, gptq: {}]\n"
EXPORTS = ("onnx: {}", "onnx: {attention: gqa}", "gguf: {}", "safetensors: {}", "safetensors: {format: gptq_v2}")
CONFIG = tiny_config(d_v=(16, 16), d_ff=(96, 96))
WIDE = tiny_config(
    heads=8, kv_heads=4, d_qk=32, d_v=(32, 32), d_ff=(768, 768), d_model=256, vocab=2048, tied_head=False
)


def options(draw: st.DrawFn, most: int) -> tuple[Option, ...]:
    pairs = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=most))
    return tuple(Option(float(cost), float(loss), n) for n, (cost, loss) in enumerate(pairs))


@st.composite
def variants(draw: st.DrawFn) -> list[Variant]:
    """One or two widths with one or two parts each."""
    return [
        Variant(width, options(draw, 1)[0], tuple(options(draw, 3) for _ in range(draw(st.integers(1, 2)))))
        for width in range(draw(st.integers(1, 2)))
    ]


def every_point(some: list[Variant]) -> list[Point]:
    return [
        Point(v.fixed.cost + sum(o.cost for o in chosen), v.fixed.loss + sum(o.loss for o in chosen), v.width, chosen)
        for v in some
        for chosen in itertools.product(*v.parts)
    ]


@given(st.lists(variants(), min_size=1, max_size=3), st.floats(0, 1))
def test_a_plan_is_the_optimum_up_to_one_step(drawn: list[list[Variant]], share: float) -> None:
    items = [frontier(some) for some in drawn]
    every = [total(points) for points in itertools.product(*map(every_point, drawn))]
    least, most = min(cost for cost, _ in every), max(cost for cost, _ in every)
    limit = least + share * (most - least)
    found = spend(items, limit)
    assert found is not None
    cost, loss = total(found)
    assert cost <= limit * (1 + 1e-9) + 1e-9
    best = min(loss for cost, loss in every if cost <= limit)
    steps = [points[a].loss - points[b].loss for points in items for a, b in itertools.pairwise(vertices(points))]
    assert best - 1e-9 <= loss <= best + max(steps, default=0.0) + 1e-9


@given(st.lists(variants(), min_size=1, max_size=3))
def test_a_limit_at_a_step_is_spent_exactly_and_best(drawn: list[list[Variant]]) -> None:
    """Where the greedy path stops at a vertex of all items together, no plan of that cost loses less."""
    items = [frontier(some) for some in drawn]
    every = [total(points) for points in itertools.product(*map(every_point, drawn))]
    hulls = [[points[i] for i in vertices(points)] for points in items]
    gains = sorted(
        ((b.loss - a.loss) / (b.cost - a.cost), n, i)
        for n, hull in enumerate(hulls)
        for i, (a, b) in enumerate(itertools.pairwise(hull))
    )
    at = [0] * len(hulls)
    for _, number, step in gains:
        at[number] = step + 1
        cost, loss = total([hull[i] for hull, i in zip(hulls, at, strict=True)])
        found = spend(items, cost)
        assert found is not None
        assert total(found)[1] <= loss + 1e-9
        assert loss <= min(other for price, other in every if price <= cost) + 1e-9


def test_a_limit_below_everything_has_no_plan_and_an_infinite_one_takes_the_least_loss() -> None:
    items = [frontier([Variant(8, Option(2.0, 1.0), ((Option(1.0, 5.0, "a"), Option(4.0, 0.0, "b")),))])]
    assert spend(items, 2.9) is None
    assert [point.chosen[0].choice for point in spend(items, math.inf) or []] == ["b"]
    assert [point.chosen[0].choice for point in spend(items, 3.0) or []] == ["a"]


@given(variants())
def test_a_frontier_falls_and_leaves_out_only_what_is_beaten(some: list[Variant]) -> None:
    points = frontier(some)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(points))
    reached = [point for variant in some for point in points_of(variant)]
    assert all(any(p.cost <= q.cost and p.loss <= q.loss for p in points) for q in reached)


def exports_of(*given: str, extra: str = "") -> tuple[Recipe, list[PlannedExport]]:
    recipe = Recipe.parse(
        f"{HEAD}{STAGES}budget: {{size: 1GB, group_sizes: [16, 32, 64]{extra}}}\nexports: {list(given)}".replace(
            "'", ""
        )
    )
    return recipe, planned_exports(recipe)


def problem(*given: str, config: DecoderConfig = CONFIG, extra: str = "") -> Problem:
    recipe, exports = exports_of(*given, extra=extra)
    return problem_of(recipe, config, exports, 4)


def measured(seed: int, of: Problem) -> Measured:
    """Guessed errors, each times a random factor."""
    import random

    rng, plain = random.Random(seed), guessed(of)
    curves = []
    for each in plain.curves:
        factors = 10 ** rng.uniform(-2, 1), 10 ** rng.uniform(-2, 1)
        value, mlp = (
            [factor * cost for cost in curve] for factor, curve in zip(factors, (each.value, each.mlp), strict=True)
        )
        curves.append(Curves(tuple(value), tuple(mlp)))
    errors = {
        unit: {name: error * 10 ** rng.uniform(-0.5, 0.5) for name, error in costs.items()}
        for unit, costs in plain.errors.items()
    }
    return Measured(curves, errors)


def ends(of: Problem) -> tuple[float, float]:
    """Cost of the smallest plan and of the one without a limit."""
    some = measured(0, of)
    with pytest.raises(RecipeError) as refused:
        plan_jointly(of, some, 1.0)
    assert "choose" in str(refused.value)
    items = items_of(of, some)
    cheapest = sum(frontier(item.variants)[0].cost for item in items)
    return cheapest, plan_jointly(of, some, 1e12).ranks.achieved


@pytest.mark.parametrize("export", EXPORTS)
@settings(max_examples=3)
@given(st.integers(0, 1000), st.floats(0.02, 1))
def test_a_joint_plan_keeps_its_limit_and_is_never_predicted_worse_than_widths_or_bits_alone(
    export: str, seed: int, share: float
) -> None:
    of = PROBLEMS.setdefault(export, problem(export))
    least, most = LIMITS.setdefault(export, ends(of))
    some = measured(seed, of)
    limit = least + of.prices.rest(of.config, plan_jointly(of, some, 1e12).grids) + share * (most - least)
    try:
        joint = plan_jointly(of, some, limit)
    except RecipeError:
        assert share < 0.2, "only sizes that are not sums of matrices are refused that late"
        return
    assert of.prices.exact(of.config.with_layers(joint.ranks.layers), joint.grids) == joint.ranks.achieved <= limit
    for other in alone(of, some, limit):
        assert joint.predicted <= other.predicted + 1e-9


PROBLEMS: dict[str, Problem] = {}
LIMITS: dict[str, tuple[float, float]] = {}


def alone(of: Problem, some: Measured, limit: float) -> list[JointPlan]:
    """The plans that only quantize, and those that give everything one grid, as far as the limit allows them."""
    bits = replace(of, flat=None)
    one = [
        replace(
            of,
            layers=tuple((i, n, replace(u, choices=u.choices[c : c + 1])) for i, n, u in of.layers),
            tables=tuple(replace(u, choices=u.choices[min(c, len(u.choices) - 1) :][:1]) for u in of.tables),
        )
        for c in range(len(of.layers[0][2].choices))
    ]
    found = []
    for each in (bits, *one):
        with contextlib.suppress(RecipeError):  # too small a limit for this kind of plan
            found.append(plan_jointly(each, Measured([], some.errors) if each.flat is None else some, limit))
    return found


@pytest.mark.parametrize("export", ["onnx: {}", "onnx: {attention: gqa, target: genai}", "gguf: {}", "safetensors: {}"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_predicted_size_is_the_file_s(export: str, share: float, tmp_path: Path) -> None:
    of = problem(export, config=WIDE)
    least, most = ends(of)
    plan = plan_jointly(of, measured(3, of), limit := least + share * (most - least))
    _, (item,) = exports_of(export)
    artifact = tiny_artifact(tmp_path / "a", of.config.with_layers(plan.ranks.layers), overrides=plan.grids)
    written = item.exporter.write(artifact, _made(tmp_path / "out"), item.options)
    data = sum(
        path.stat().st_size for path in written.files if path.suffix in (".onnx", ".data", ".gguf", ".safetensors")
    )
    assert data == pytest.approx(plan.ranks.achieved - _tokenizer(export, of), rel=0.01)
    if "onnx" in export:
        assert data <= limit


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _tokenizer(export: str, of: Problem) -> int:
    """Bytes that a GGUF counts for a vocabulary, which a model without a tokenizer does not have."""
    return 36 * of.config.vocab if "gguf" in export else 0


def test_what_a_format_cannot_save_is_not_bought() -> None:
    onnx, gguf = problem("onnx: {}"), problem("gguf: {}")
    choices = [[choice.name for choice in each.layers[0][2].choices] for each in (onnx, gguf)]
    assert not any(name.startswith("3-") for name in choices[0]), "3 bits are stored in 4"
    assert not any(name.startswith(("2-", "3-")) for name in choices[1]), "both are stored in 4"
    some = guessed(gguf)
    plan = plan_jointly(gguf, some, 0.7 * plan_jointly(gguf, some, 1e12).ranks.achieved)
    assert {dims.d_v for dims in plan.ranks.layers} == {16}, "value heads are padded, so narrow ones save nothing"
    lucky = plan_jointly(gguf, measured(1, gguf), plan.ranks.achieved)
    assert {dims.d_v for dims in lucky.ranks.layers} == {16}, "not even where narrow ones round with less error"
    tight = plan_jointly(gguf, some, 1.02 * ends(gguf)[0] + gguf.prices.rest(gguf.config, plan.grids))
    assert max(dims.d_ff for dims in tight.ranks.layers) < 96


def test_two_exports_choose_from_what_both_can_store() -> None:
    both = problem("onnx: {}", "gguf: {}")
    names = {choice.name for choice in both.layers[0][2].choices}
    assert names <= {choice.name for choice in problem("onnx: {}").layers[0][2].choices}
    assert names


def test_a_table_that_a_format_stores_unquantized_is_not_quantized() -> None:
    of = problem("safetensors: {}", config=WIDE)
    assert [choice.name for unit in of.tables for choice in unit.choices] == ["none", "none"]


def test_overrides_fix_a_part_of_every_choice() -> None:
    recipe = Recipe.parse(
        f"{HEAD}budget: {{size: 1GB, group_sizes: [16, 32]}}\n"
        "stages: [gptq: {overrides: {'*.down': {bits: 8}, layers.1.o: {quantize: false}, '*.k': {symmetric: true}}}]"
    )
    plan = plan_jointly(of := problem_of(recipe, CONFIG, [], 4), guessed(of), 70_000)
    assert {grid.bits for stem, grid in plan.grids.items() if stem.endswith("down")} == {8}
    assert {grid.symmetric for stem, grid in plan.grids.items() if stem.endswith(".k")} == {True}
    assert "layers.1.o" not in plan.grids
    assert {grid.bits for stem, grid in plan.grids.items()} != {8}


@pytest.mark.parametrize("budget", ["decode_bytes: 90kB", "memory: 100kB"])
def test_a_cache_counts_where_it_is_read_or_held(budget: str) -> None:
    def ranks(context: int) -> tuple[int, float]:
        recipe = Recipe.parse(f"{HEAD}{STAGES}budget: {{{budget}, context: {context}, group_sizes: [16, 32]}}")
        plan = plan_jointly(of := problem_of(recipe, CONFIG, [], 4), guessed(of))
        assert plan.ranks.achieved <= of.prices.limit
        return sum(dims.d_v for dims in plan.ranks.layers), plan.ranks.achieved

    short, long = ranks(16), ranks(128)
    assert long[0] < short[0]


def test_the_price_of_a_limit_is_that_of_the_export_it_names() -> None:
    recipe, exports = exports_of("onnx: {name: a}", "safetensors: {name: b}", extra=", export: b")
    assert recipe.budget is not None
    found = prices_of(recipe.budget, exports, 4)
    grid = Grid(4, 32, True)
    assert found.where == "export b"
    assert found.unit(WIDE, {"embed": grid}) == 4 * WIDE.vocab * WIDE.d_model
    first = prices_of(recipe.budget.model_copy(update={"export": None}), exports, 4)
    assert first.unit(WIDE, {"embed": grid}) < found.unit(WIDE, {"embed": grid})
    assert {"embed", "head", "layers.1.down"} <= set(matrices_of(WIDE))


def test_one_width_for_all_layers_is_one_width() -> None:
    recipe = Recipe.parse(
        f"{HEAD}stages: [flat: {{uniform: true, rank_multiple: 4, width_multiple: 8}}, gptq: {{}}]\n"
        "budget: {size: 33kB, group_sizes: [16, 32]}"
    )
    of = problem_of(recipe, CONFIG, [], 4)
    plan = plan_jointly(of, measured(2, of))
    assert len(set(plan.ranks.layers)) == 1
    assert plan.ranks.layers != CONFIG.layers
    with pytest.raises(RecipeError, match="different widths already"):
        plan_jointly(problem_of(recipe, tiny_config(d_ff=(96, 64)), [], 4), guessed(of))


@pytest.mark.parametrize(
    ("flat", "widths"), [(None, [16]), ("values: whole", [16]), ("rank_multiple: 4", [4, 8, 12, 16])]
)
def test_widths_that_are_tried(flat: str | None, widths: list[int]) -> None:
    stages = "" if flat is None else f"flat: {{{flat}}}, "
    recipe = Recipe.parse(f"{HEAD}stages: [{stages}gptq: {{}}]\nbudget: {{size: 1GB, group_sizes: [16]}}")
    of = problem_of(recipe, CONFIG, [], 4)
    assert widths_of(of, guessed(of).curves, "d_v", [0]) == widths


def test_candidates_leave_out_what_never_pays() -> None:
    def price(grid: Grid) -> float:
        return grid.stored_bytes(64, 256)

    every = [named(grid) for grid in candidates((2, 3, 4, 8), (32, 64, 128), lambda grid: True, price)]
    assert every[0] == "2-128-zeros"
    assert [name for name in every if name.startswith("8")] == ["8-128"]
    assert not any(name in every for name in ("4-32", "4-64"))
    without = [named(g) for g in candidates((4, 8), (32, 64), lambda grid: grid.symmetric, price)]
    assert without == ["4-64", "4-32", "8-64"]
    padded = candidates((4,), (32, 64, 128), lambda grid: True, lambda grid: 1.0)
    assert [named(grid) for grid in padded] == ["4-32-zeros"], "at one price the finest"


def test_a_limit_that_nothing_meets_names_the_least_that_can_be_met() -> None:
    recipe = Recipe.parse(f"{HEAD}{STAGES}budget: {{size: 10kB, group_sizes: [16, 32]}}")
    of = problem_of(recipe, CONFIG, [], 4)
    with pytest.raises(RecipeError, match=r"budget.size: 10kB cannot be reached.*choose (\S+)kB or more") as refused:
        plan_jointly(of, guessed(of))
    least = float(str(refused.value).rsplit("choose ", 1)[1].split("kB")[0])
    assert plan_jointly(of, guessed(of), 1000 * least).ranks.achieved <= 1000 * least


def test_groups_wider_than_every_row_are_refused() -> None:
    recipe = Recipe.parse(f"{HEAD}{STAGES}budget: {{size: 1GB, group_sizes: [128]}}")
    with pytest.raises(RecipeError, match="wider than a row of some linear"):
        plan_jointly(of := problem_of(recipe, CONFIG, [], 4), guessed(of))


def test_a_choice_that_no_export_can_store_is_refused_in_the_exporter_s_words() -> None:
    any_: Any = exports_of("gguf: {precision: q4_0}")
    recipe, exports = any_
    with pytest.raises(RecipeError, match=r"exports.gguf: .*would round the weights a second time"):
        problem_of(recipe, CONFIG, exports, 4)


def test_another_cost_is_another_price_of_units_and_halves() -> None:
    """As seconds are: what is bought then is what this cost asks for."""
    of = problem("onnx: {}")
    prices = replace(
        of.prices,
        limit=100.0,
        half=lambda config, index, part: config.layers[index].d_ff / 96 if part == "d_ff" else 0.0,
        unit=lambda config, grids: sum(10.0 for grid in grids.values() if grid is None or grid.bits != 4),
        exact=lambda config, grids: (
            sum(10.0 for grid in grids.values() if grid.bits != 4) + sum(dims.d_ff / 96 for dims in config.layers)
        ),
    )
    plan = plan_jointly(replace(of, prices=prices), guessed(of), 2.0)
    assert {grid.bits for grid in plan.grids.values()} == {4}
    assert plan.ranks.achieved == 2.0
    narrower = plan_jointly(replace(of, prices=prices), guessed(of), 1.5)
    assert sum(dims.d_ff for dims in narrower.ranks.layers) <= 1.5 * 96
    assert prices.rest(of.config, plan.grids) == pytest.approx(0.0)
