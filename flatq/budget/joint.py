"""One plan of widths and bits for one limit.

For every half layer the predicted loss of a width ``k`` and of a grid for each unit of linears in it is

    E(k, grids) = e(k) + sum over units u of rho_u(k) * q_u(grid of u)

with ``e`` the error curve of the width, ``q`` the measured error of quantizing a unit alone, both weighted with the
Fisher information of the loss (both are twice a loss increase in nats), and ``rho`` the fraction of the unit's weights
that is left at this width. Embedding and head have only the second term. The sum of E over the model is minimised under
the limit by ``budget.allocation``. That the terms add up is an assumption.

A plan of widths with one grid for everything and a plan of bits alone are also made, and the plan with the least
predicted loss is taken: what is left of a limit is spent greedily, which could otherwise make the joint plan worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flatq.budget.allocation import Option, Point, Variant, frontier, spend, total
from flatq.budget.problem import Problem
from flatq.compress.allocate import Curves
from flatq.compress.plan import RankPlan
from flatq.errors import RecipeError
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.model.names import matrix_shape
from flatq.quantize.choices import Choice, ChoiceUnit

MOST_WIDTHS = 64  # of one half layer that are tried
BISECTIONS = 30  # of the limit for a predicted loss
ATTEMPTS = 12  # to meet the limit where the size of an export is not the sum of its matrices
HALVES = {"d_v": (0, 1), "d_ff": (2, 3)}  # the width of each half layer, and its units in ``quantize.bits.UNITS``


@dataclass(frozen=True, slots=True)
class Measured:
    """What a plan is made from; it depends on model, text and choices, and not on the limit.

    Attributes:
        curves: of every layer; empty without a flat stage.
        errors: by unit and by the name of a choice; empty without a gptq stage.
    """

    curves: list[Curves]
    errors: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class JointPlan:
    """Widths of every layer, and the grid of every quantized weight.

    Attributes:
        ranks: the widths.
        grids: by stem.
        predicted: loss increase in nats per token, to second order.
        from_widths: the part of ``predicted`` that is due to narrowing.
    """

    ranks: RankPlan
    grids: dict[str, Grid]
    predicted: float
    from_widths: float


@dataclass(frozen=True, slots=True)
class Item:
    """A half layer (of all layers together, if they share their widths), or the tables; with its variants."""

    part: str
    layers: tuple[int, ...]
    variants: tuple[Variant, ...]


def plan_jointly(problem: Problem, measured: Measured, limit: float | None = None) -> JointPlan:
    """The plan with the least predicted loss within the limit.

    Args:
        problem: the model, its units and prices.
        measured: by ``plan.decide``, or guessed.
        limit: another one than that of ``problem.prices``, in the same unit.

    Raises:
        RecipeError: no plan is within the limit.
    """
    wanted = problem.prices.limit if limit is None else limit
    items = items_of(problem, measured)
    searches = [[frontier(item.variants) for item in some] for some in _restricted(items)]
    cheapest = [_made(problem, items, [points[0] for points in search], wanted) for search in searches]
    found = [plan for plan in cheapest if plan.ranks.achieved <= wanted]
    for search, least in zip(searches, cheapest, strict=True):
        found += _within(problem, items, search, wanted, problem.prices.rest(problem.config, least.grids))
    if not found:
        raise problem.prices.refusal(min(plan.ranks.achieved for plan in cheapest))
    return min(found, key=lambda plan: plan.predicted)


def plan_of_loss(problem: Problem, measured: Measured, loss: float) -> JointPlan:
    """The smallest plan whose predicted loss is at most ``loss``, in nats; the best plan if none has so little.

    Args:
        problem: the model, its units and prices.
        measured: by ``budget.measure``.
        loss: predicted.
    """
    items = items_of(problem, measured)
    points = [frontier(item.variants) for item in items]
    low, high = sum(some[0].cost for some in points), sum(some[-1].cost for some in points)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = spend(points, middle)
        if found is not None and total(found)[1] / 2 <= loss:
            high = middle
        else:
            low = middle
    plan = _made(problem, items, spend(points, high) or [some[-1] for some in points], 0.0)
    return replace(plan, ranks=replace(plan.ranks, requested=plan.ranks.achieved))


def _within(
    problem: Problem, items: Sequence[Item], search: Sequence[Sequence[Point]], limit: float, rest: float
) -> list[JointPlan]:
    """The plans of one search, its allowance corrected by what the last plan's exact cost left of the limit.

    Args:
        problem: the model and its prices.
        items: all items.
        search: the frontier of each item.
        limit: of the exact cost.
        rest: cost of what the search does not price, an estimate.
    """
    allowed, found = limit - rest, list[JointPlan]()
    for _ in range(ATTEMPTS):
        points = spend(search, allowed)
        if points is None:
            break
        plan = _made(problem, items, points, limit)
        left = limit - plan.ranks.achieved
        if left >= 0:
            if found and plan.predicted >= found[-1].predicted:
                break
            found.append(plan)
        elif found:
            break
        allowed += left
    return found


def items_of(problem: Problem, measured: Measured) -> list[Item]:
    """All items with every width and choice, their costs and predicted losses.

    Raises:
        RecipeError: the layers differ, and ``uniform`` asks for one width.
    """
    config, flat, numbers = problem.config, problem.flat, tuple(range(len(problem.config.layers)))
    together = flat is not None and flat.uniform
    if together and len(set(config.layers)) != 1:
        raise RecipeError("stages.flat.uniform: the model's layers have different widths already; remove `uniform`")
    groups = [numbers] if together else [(number,) for number in numbers]
    pricing = _Pricing(problem, together)
    items = [
        Item(part, group, _that_save(tuple(_variants(problem, measured, pricing, part, group))))
        for group in groups
        for part in HALVES
    ]
    if not all(item.variants for item in items):
        raise RecipeError(
            f"budget.group_sizes: all are wider than a row of some linear (d_model is {config.d_model}); add a smaller "
            "one"
        )
    ends = tuple(_options(unit, pricing, measured, config, config, None) for unit in problem.tables)
    return [*items, Item("tables", (), (Variant(0, Option(0.0, 0.0), ends),))]


def guessed(problem: Problem) -> Measured:
    """Stand-in for measurements, for what is said before a run: each bit quarters an error, and so does half a width.

    The unit is arbitrary, so predicted losses mean nothing.
    """
    config, errors, curves = problem.config, dict[str, dict[str, float]](), list[Curves]()
    for unit in problem.units:
        weights = _weights(config, unit)
        errors[unit.name] = {
            choice.name: weights * max(map(_coarseness, choice.grids.values())) for choice in unit.choices
        }
    for index, dims in enumerate(config.layers) if problem.flat is not None else ():
        parts = [
            sum(math.prod(matrix_shape(config, f"layers.{index}.{n}")) for n in names)
            for names in ("vo", ("gate", "up", "down"))
        ]
        value, mlp = (
            [weight * (n / width) ** 2 / 16 for n in range(width)]
            for weight, width in zip(parts, (dims.d_v, dims.d_ff), strict=True)
        )
        curves.append(Curves(tuple(value), tuple(mlp)))
    return Measured(curves, errors)


def _coarseness(grid: Grid | None) -> float:
    if grid is None:
        return 0.0
    size = 1024 if grid.group_size == -1 else grid.group_size
    return 4.0**-grid.bits * (size / 32) ** 0.25 * (1.3 if grid.symmetric else 1.0)


class _Pricing:
    """Prices of units, each computed once per shape of a layer."""

    def __init__(self, problem: Problem, together: bool) -> None:
        self.prices, self.together = problem.prices, together
        self._known: dict[object, float] = {}

    def unit(self, planned: DecoderConfig, setting: object, grids: Mapping[str, Grid | None]) -> float:
        """Cost of a unit in a model of the planned widths, which ``setting`` identifies."""
        key = (tuple((stem.rpartition(".")[2], grid) for stem, grid in grids.items()), setting)
        if key not in self._known:
            self._known[key] = self.prices.unit(planned, grids)
        return self._known[key]

    def setting(self, planned: DecoderConfig, index: int) -> object:
        """What the cost of a matrix depends on: widths of its layer, and which others there are."""
        return planned.layers[index], None if self.together else frozenset(planned.layers)


def widths_of(problem: Problem, curves: Sequence[Curves], part: str, layers: Sequence[int]) -> list[int]:
    """The widths that are tried for a half layer, ascending; only the dense width if nothing may be narrowed."""
    flat, dense = problem.flat, getattr(problem.config.layers[layers[0]], part)
    if flat is None or not curves or (part == "d_v" and flat.parts.values == "whole"):
        return [dense]
    multiple = flat.rank_multiple if part == "d_v" else flat.width_multiple
    ends = min(len(_curve(curves[index], part)) for index in layers)
    step = multiple * max(1, math.ceil(dense / multiple / MOST_WIDTHS))
    narrower = [width for width in range(step, dense, step) if dense - width < ends]
    return [*narrower, dense]


def _curve(curves: Curves, part: str) -> Sequence[float]:
    return curves.value if part == "d_v" else curves.mlp


def _variants(
    problem: Problem, measured: Measured, pricing: _Pricing, part: str, layers: tuple[int, ...]
) -> Iterator[Variant]:
    config = problem.config
    units = [(index, unit) for index, number, unit in problem.layers if index in layers and number in HALVES[part]]
    for width in widths_of(problem, measured.curves, part, layers):
        changed = [
            replace(dims, **{part: width}) if index in layers else dims for index, dims in enumerate(config.layers)
        ]
        planned = config.with_layers(changed)
        setting = pricing.setting(planned, layers[0])
        parts = tuple(_options(unit, pricing, measured, config, planned, setting) for _, unit in units)
        if not all(parts):
            continue  # no group is small enough for a row
        loss = sum(
            _curve(measured.curves[index], part)[getattr(config.layers[index], part) - width]
            for index in layers
            if measured.curves
        )
        cost = sum(problem.prices.half(planned, index, part) for index in layers)
        yield Variant(width, Option(cost, loss), parts)


def _that_save(variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
    """Without widths that cost as much as the dense one, which is last: a format may pad what is narrower."""

    def least(variant: Variant) -> float:
        return variant.fixed.cost + sum(min(option.cost for option in part) for part in variant.parts)

    return tuple(variant for variant in variants if variant is variants[-1] or least(variant) < least(variants[-1]))


def _options(
    unit: ChoiceUnit,
    pricing: _Pricing,
    measured: Measured,
    dense: DecoderConfig,
    planned: DecoderConfig,
    setting: object,
) -> tuple[Option, ...]:
    """The choices of a unit in a model of the planned widths."""
    left = _weights(planned, unit) / _weights(dense, unit)
    errors = measured.errors.get(unit.name, {})
    return tuple(
        Option(
            pricing.unit(planned, setting, choice.grids),
            left * errors.get(choice.name, 0.0),
            choice,
        )
        for choice in unit.choices
        if all(grid is None or grid.group_size <= matrix_shape(planned, stem)[1] for stem, grid in choice.grids.items())
    )


def _weights(config: DecoderConfig, unit: ChoiceUnit) -> int:
    return sum(math.prod(matrix_shape(config, stem)) for stem in unit.stems)


def _restricted(items: Sequence[Item]) -> list[list[Item]]:
    """The items as they are; at their dense widths; with each group size for all; and with each choice for all."""
    parts = [part for item in items for variant in item.variants for part in variant.parts]
    by_name = {
        option.choice.name: option.choice for part in parts for option in part if isinstance(option.choice, Choice)
    }
    sizes: dict[int, set[str]] = {}
    for name, choice in by_name.items():
        for grid in choice.grids.values():
            sizes.setdefault(0 if grid is None else grid.group_size, set()).add(name)
    sets = [*sizes.values(), *({name} for name in by_name)]
    whole = [replace(item, variants=item.variants[-1:]) for item in items]
    alike = [
        [replace(item, variants=tuple(_only(variant, names) for variant in item.variants)) for item in items]
        for names in sorted(sets, key=sorted)
    ]
    return [list(items), whole, *alike]


def _only(variant: Variant, names: set[str]) -> Variant:
    """A variant whose parts have only these choices, where they have any of them."""

    def kept(part: tuple[Option, ...]) -> tuple[Option, ...]:
        return tuple(o for o in part if isinstance(o.choice, Choice) and o.choice.name in names) or part

    return replace(variant, parts=tuple(kept(part) for part in variant.parts))


def _made(problem: Problem, items: Sequence[Item], points: Sequence[Point], limit: float) -> JointPlan:
    """The plan of the chosen points, with its exact cost."""
    layers, grids = list(problem.config.layers), dict[str, Grid]()
    narrowing = 0.0
    for item, point in zip(items, points, strict=True):
        for index in item.layers:
            layers[index] = replace(layers[index], **{item.part: point.width})
        narrowing += point.loss - sum(option.loss for option in point.chosen)
        for option in point.chosen:
            if isinstance(option.choice, Choice):
                grids |= {stem: grid for stem, grid in option.choice.grids.items() if grid is not None}
    cost = problem.prices.exact(problem.config.with_layers(layers), grids)
    ranks = RankPlan(tuple(layers), limit, cost, problem.prices.key)
    return JointPlan(ranks, grids, total(points)[1] / 2, narrowing / 2)
