"""One limit spent on many items: choose an option of each for the least total loss (multiple-choice knapsack).

An item is a half layer, or the tables. Its options are all combinations of a width and of the choices of its parts
(matrices that share bits). Loss and cost add up over items, so for a price ``p`` of the limit each item takes the
option with the least ``loss + p * cost`` on its own; these options are the vertices of the lower convex hull of loss
over cost. All items move along their hulls by descending gain per cost until the limit is reached, which is the
solution of the Lagrangian for one common ``p``. What is left is spent on the options between the vertices.

The result is the optimum wherever the limit is spent exactly at a step, and elsewhere at most one step above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

EXACT = 1e-9  # relative tolerance of sums of costs


@dataclass(frozen=True, slots=True)
class Option:
    """A choice for one part.

    Attributes:
        cost: in the unit of the limit.
        loss: predicted loss increase.
        choice: what is chosen, any value; None for nothing.
    """

    cost: float
    loss: float
    choice: object = None


@dataclass(frozen=True, slots=True)
class Variant:
    """An item at one width: fixed cost and loss, and the parts whose options are chosen independently."""

    width: int
    fixed: Option
    parts: tuple[tuple[Option, ...], ...]


@dataclass(frozen=True, slots=True)
class Point:
    """An item with everything chosen: the width, and the option of every part."""

    cost: float
    loss: float
    width: int
    chosen: tuple[Option, ...]


def front(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over cost, ascending in cost, loss falling with every step."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(cheap: Option | Point, dear: Option | Point) -> float:
    """Change of the loss per cost, negative; a step without cost comes first."""
    gained = dear.loss - cheap.loss
    return gained / (dear.cost - cheap.cost) if dear.cost > cheap.cost else -float("inf")


def points_of(variant: Variant) -> list[Point]:
    """The item at this width along the hulls of its parts, cheapest first."""
    hulls = [front(part) for part in variant.parts]
    at = [0] * len(hulls)
    steps = [
        (_slope(hull[step], hull[step + 1]), part, step)
        for part, hull in enumerate(hulls)
        for step in range(len(hull) - 1)
    ]

    def here() -> Point:
        chosen = tuple(hull[step] for hull, step in zip(hulls, at, strict=True))
        cost = variant.fixed.cost + sum(option.cost for option in chosen)
        return Point(cost, variant.fixed.loss + sum(option.loss for option in chosen), variant.width, chosen)

    found = [here()]
    for _, part, step in sorted(steps):
        at[part] = step + 1
        found.append(here())
    return found


def frontier(variants: Sequence[Variant]) -> list[Point]:
    """All points of an item that no other point of it beats in both cost and loss, ascending in cost."""
    best: list[Point] = []
    every = [point for variant in variants for point in points_of(variant)]
    for point in sorted(every, key=lambda point: (point.cost, point.loss, -point.width)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def vertices(points: Sequence[Point]) -> list[int]:
    """Indices of the points of a frontier that are on its lower convex hull."""
    hull: list[int] = []
    for index, point in enumerate(points):
        while len(hull) > 1 and _slope(points[hull[-2]], points[hull[-1]]) >= _slope(points[hull[-1]], point):
            hull.pop()
        hull.append(index)
    return hull


def spend(items: Sequence[Sequence[Point]], limit: float) -> list[Point] | None:
    """The point of each item for the least total loss at a total cost of at most ``limit``; None if there is none.

    Args:
        items: the frontier of each item.
        limit: in the unit of the costs; infinity takes the least loss.
    """
    chosen = [0] * len(items)
    spare = limit - sum(points[0].cost for points in items)
    allowed = EXACT * abs(limit) if abs(limit) < float("inf") else 0.0
    if spare < -allowed:
        return None
    steps = []
    for number, points in enumerate(items):
        hull = vertices(points)
        steps += [(_slope(points[a], points[b]), number, a, b) for a, b in pairwise(hull)]
    for _, number, before, after in sorted(steps):
        cost = items[number][after].cost - items[number][before].cost
        if chosen[number] == before and cost <= spare + allowed:
            chosen[number] = after
            spare -= cost
    _spend_rest(items, chosen, spare + allowed)
    return [points[at] for points, at in zip(items, chosen, strict=True)]


def _spend_rest(items: Sequence[Sequence[Point]], chosen: list[int], spare: float) -> None:
    """Repeat the move of one item that gains most and still fits, until none does; changes ``chosen``."""
    while True:
        best, gain, dearer = -1, 0.0, 0
        for number, points in enumerate(items):
            now, reach = points[chosen[number]], chosen[number]
            while reach + 1 < len(points) and points[reach + 1].cost - now.cost <= spare:
                reach += 1
            if now.loss - points[reach].loss > gain:
                best, gain, dearer = number, now.loss - points[reach].loss, reach
        if best < 0:
            return
        spare -= items[best][dearer].cost - items[best][chosen[best]].cost
        chosen[best] = dearer


def total(points: Sequence[Point]) -> tuple[float, float]:
    """Cost and loss of all items."""
    return sum(point.cost for point in points), sum(point.loss for point in points)
