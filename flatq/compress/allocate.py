"""Allocation of a budget over layers: value rank and MLP width of every layer.

FLAT does not narrow query and key projections, so the whole reduction comes from values, outputs and MLPs.
A plan is the configuration of the compressed model: a tuple of ``LayerDims``. It never costs more than the budget;
after rounding it is below the budget by less than one step.

Widths are rounded to multiples. A multiple equal to the full width leaves that width unchanged; ``values: whole`` is
implemented this way.

Axes: L layers.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flatq.compress.budget import Budget
from flatq.model.dims import LayerDims


@dataclass(frozen=True, slots=True)
class Multiples:
    """Multiples that value ranks and MLP widths are rounded to."""

    rank: int
    width: int

    def floor(self, dims: LayerDims) -> LayerDims:
        """Lower bound of each width: 0, or the full width where it is not narrowed."""
        return replace(
            dims, d_v=dims.d_v if self.rank >= dims.d_v else 0, d_ff=dims.d_ff if self.width >= dims.d_ff else 0
        )

    def least(self, dims: LayerDims) -> LayerDims:
        """The smallest widths that a plan may give."""
        return replace(dims, d_v=min(self.rank, dims.d_v), d_ff=min(self.width, dims.d_ff))

    def narrower(self, dims: LayerDims) -> LayerDims:
        """One step narrower: the MLP if possible, else the values; unchanged if both are at their minimum."""
        if dims.d_ff > self.width:
            return replace(dims, d_ff=(dims.d_ff - 1) // self.width * self.width)
        return replace(dims, d_v=(dims.d_v - 1) // self.rank * self.rank) if dims.d_v > self.rank else dims

    def wider(self, dims: LayerDims, whole: LayerDims) -> LayerDims:
        """One MLP step wider; unchanged at full width."""
        return replace(dims, d_ff=min((dims.d_ff // self.width + 1) * self.width, whole.d_ff))


def iprs(importance: Sequence[float], keep: float) -> list[float]:
    """Kept fraction of each layer, proportional to its importance, at most 1, with mean ``keep``.

    Source: FLAT-LLM (arXiv 2505.23966), importance-preserving rank selection, Algorithm 1: layers whose fraction would
    exceed 1 are fixed at 1 and removed from the pool with their part of the budget, until no such layer is left.
    """
    shares = [1.0] * len(importance)
    pool, budget = set(range(len(importance))), keep * len(importance)
    while pool:
        mass = sum(importance[i] for i in pool)
        wanted = {i: budget * (importance[i] / mass if mass > 0 else 1 / len(pool)) for i in pool}
        full = {i for i in pool if wanted[i] > 1}
        if not full:
            for i in pool:
                shares[i] = wanted[i]
            break
        pool -= full
        budget -= len(full)
    return shares


def uniform(layers: int, keep: float) -> list[float]:
    """The same fraction for every layer, the reference that IPRS is compared with."""
    return [keep] * layers


def share_of_the_rest(layers: Sequence[LayerDims], budget: Budget, multiples: Multiples) -> float:
    """Fraction of the narrowable widths to keep so that the model meets the budget; at most 1.

    Raises:
        RecipeError: the smallest plan costs more than the budget.
    """
    least = budget.total([multiples.least(dims) for dims in layers])
    fixed = budget.total([multiples.floor(dims) for dims in layers])
    whole = budget.total(layers)
    if least > budget.limit:
        raise budget.refusal(least, _least_in_words(layers, multiples, budget, fixed))
    return min(1.0, (budget.limit - fixed) / (whole - fixed)) if whole > fixed else 1.0


def _least_in_words(layers: Sequence[LayerDims], multiples: Multiples, budget: Budget, fixed: float) -> str:
    stay = ["embedding, head and norms"] if budget.key == "size" else []
    stay += ["head and norms", "cached keys"] if budget.key == "decode_bytes" else []
    stay += ["query and key projections"]
    stay += ["whole value heads (`values: output` narrows them)"] if _values_stay(layers, multiples) else []
    return f"{', '.join(stay)} alone are {budget.written(fixed)}, and no width goes below one multiple"


def _values_stay(layers: Sequence[LayerDims], multiples: Multiples) -> bool:
    return all(multiples.rank >= dims.d_v for dims in layers)


def widths(
    layers: Sequence[LayerDims], budget: Budget, shares: Sequence[float], multiples: Multiples
) -> tuple[LayerDims, ...]:
    """Round each layer's value rank and MLP width to the multiples that later stages and runtimes support.

    Ranks are rounded first. The MLP width, which has finer steps, then compensates for the rounding error of the rank
    in the same layer. Finally single steps are removed or added where the rounding error is largest, until no further
    step fits into the budget.
    """
    planned, exact = [], []
    for index, (dims, share) in enumerate(zip(layers, shares, strict=True)):
        rank = _rounded(share * dims.d_v, multiples.rank, dims.d_v)
        narrow, full = (budget.price(index, replace(dims, d_v=rank, d_ff=width)) for width in (0, dims.d_ff))
        fixed, whole = (budget.price(index, at) for at in (multiples.floor(dims), dims))
        wanted = (fixed + share * (whole - fixed) - narrow) / (full - narrow) * dims.d_ff
        exact.append(wanted)
        planned.append(replace(dims, d_v=rank, d_ff=_rounded(wanted, multiples.width, dims.d_ff)))
    return _settle(layers, planned, exact, budget, multiples)


def _rounded(value: float, multiple: int, whole: int) -> int:
    """Nearest multiple in [one multiple, full width]; the full width is always allowed."""
    if value >= whole:
        return whole
    return min(max(multiple, round(value / multiple) * multiple), whole)


def _settle(
    layers: Sequence[LayerDims],
    planned: list[LayerDims],
    exact: Sequence[float],
    budget: Budget,
    multiples: Multiples,
) -> tuple[LayerDims, ...]:
    """Remove steps, largest rounding error first, until the budget is met; then add steps that still fit."""
    spare = budget.limit - budget.total(planned)

    def move(index: int, to: LayerDims) -> float:
        change = budget.price(index, to) - budget.price(index, planned[index])
        planned[index] = to
        return change

    while spare < 0:
        smaller = {i: multiples.narrower(dims) for i, dims in enumerate(planned) if multiples.narrower(dims) != dims}
        mlps = [i for i, dims in smaller.items() if dims.d_v == planned[i].d_v]
        worst = max(mlps or smaller, key=lambda i: planned[i].d_ff - exact[i])
        spare -= move(worst, smaller[worst])
    while True:
        larger = {i: multiples.wider(dims, layers[i]) for i, dims in enumerate(planned)}
        gains = {i: budget.price(i, to) - budget.price(i, planned[i]) for i, to in larger.items() if to != planned[i]}
        fitting = [i for i, gain in gains.items() if gain <= spare]
        if not fitting:
            return tuple(planned)
        worst = max(fitting, key=lambda i: exact[i] - planned[i].d_ff)
        spare -= move(worst, larger[worst])


@dataclass(frozen=True, slots=True)
class Curves:
    """Estimated loss increase from narrowing one layer, in a unit that is the same for all layers.

    Attributes:
        value: cost of removing n directions of each value head, n = 0 .. d_v; ascending from 0.
        mlp: cost of removing n MLP channels, n = 0 .. d_ff or less; ascending from 0.
    """

    value: tuple[float, ...]
    mlp: tuple[float, ...]


def summed(curves: Sequence[Curves]) -> Curves:
    """Sum of the curves of several layers that get the same widths."""
    return Curves(
        *(tuple(map(sum, zip(*part, strict=True))) for part in ([c.value for c in curves], [c.mlp for c in curves]))
    )


def spend(
    layers: Sequence[LayerDims], budget: Budget, curves: Sequence[Curves], multiples: Multiples
) -> tuple[LayerDims, ...]:
    """Greedy allocation of one budget over all layers: repeat the step with the lowest cost per unit of the budget.

    A step removes one multiple of ranks or channels. No width becomes smaller than one multiple. Steps are taken until
    the budget is met; the most expensive steps are then undone where they still fit.

    Raises:
        RecipeError: the curves end before the budget is met.
    """
    planned = list(layers)
    spare = budget.limit - budget.total(layers)
    queue: list[tuple[float, int, str]] = []
    taken: list[tuple[int, LayerDims, float]] = []

    def offer(layer: int, part: str, least: float) -> None:
        lower = _lower(planned[layer], part, multiples)
        curve = curves[layer].value if part == "d_v" else curves[layer].mlp
        gone = getattr(layers[layer], part) - getattr(lower, part)
        if lower == planned[layer] or gone >= len(curve):
            return
        cost = curve[gone] - curve[getattr(layers[layer], part) - getattr(planned[layer], part)]
        saved = budget.price(layer, planned[layer]) - budget.price(layer, lower)
        # Where a curve is not convex, a cheap step could follow an expensive one; prices are made non-decreasing.
        heapq.heappush(queue, (max(cost / saved, least), layer, part))

    for layer in range(len(layers)):
        for part in ("d_v", "d_ff"):
            offer(layer, part, 0.0)
    while spare < 0:
        if not queue:
            raise budget.refusal(budget.total(planned), "the error curves end above it")
        price, layer, part = heapq.heappop(queue)
        lower = _lower(planned[layer], part, multiples)
        saved = budget.price(layer, planned[layer]) - budget.price(layer, lower)
        taken.append((layer, planned[layer], saved))
        planned[layer] = lower
        spare += saved
        offer(layer, part, price)
    return tuple(_given_back(planned, taken, spare))


def _lower(dims: LayerDims, part: str, multiples: Multiples) -> LayerDims:
    """``dims`` with ``d_v`` or ``d_ff`` reduced by one multiple; unchanged if less than one multiple would remain."""
    multiple, width = (multiples.rank if part == "d_v" else multiples.width), getattr(dims, part)
    below = (width - 1) // multiple * multiple
    return replace(dims, **{part: below}) if below >= multiple else dims


def _given_back(
    planned: list[LayerDims], taken: Sequence[tuple[int, LayerDims, float]], spare: float
) -> list[LayerDims]:
    """Undo steps in reverse order that need at most ``spare``; in each layer only the most recent ones."""
    final: set[int] = set()
    for layer, before, saved in reversed(taken):
        if layer in final or saved > spare:
            final.add(layer)
            continue
        planned[layer] = before
        spare -= saved
    return planned
