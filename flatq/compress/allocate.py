"""Which layer keeps how much: from importance and a budget to the widths of every layer.

Query and key projections stay whole in the paper's method, so the values, outputs and MLPs carry the whole cut.
A plan is the configuration that the model will have: a tuple of ``LayerDims``. It never costs more than the budget:
rounding ends below it, by less than a step.

Widths are rounded to multiples. A multiple as wide as the width itself leaves it whole; that is how ``values: whole``
is said here.

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
    """What value ranks and MLP widths are rounded to."""

    rank: int
    width: int

    def floor(self, dims: LayerDims) -> LayerDims:
        """The widths below which there is no choice: 0, or the whole of what stays whole."""
        return replace(
            dims, d_v=dims.d_v if self.rank >= dims.d_v else 0, d_ff=dims.d_ff if self.width >= dims.d_ff else 0
        )

    def least(self, dims: LayerDims) -> LayerDims:
        """The smallest widths that a plan may give."""
        return replace(dims, d_v=min(self.rank, dims.d_v), d_ff=min(self.width, dims.d_ff))

    def narrower(self, dims: LayerDims) -> LayerDims:
        """One step less: of the MLP, or of the values where the MLP has none left, or nothing."""
        if dims.d_ff > self.width:
            return replace(dims, d_ff=(dims.d_ff - 1) // self.width * self.width)
        return replace(dims, d_v=(dims.d_v - 1) // self.rank * self.rank) if dims.d_v > self.rank else dims

    def wider(self, dims: LayerDims, whole: LayerDims) -> LayerDims:
        """One step of the MLP more, or nothing."""
        return replace(dims, d_ff=min((dims.d_ff // self.width + 1) * self.width, whole.d_ff))


def iprs(importance: Sequence[float], keep: float) -> list[float]:
    """Kept share of each layer in proportion to its importance, none above 1, ``keep`` on average.

    Source: FLAT-LLM (arXiv 2505.23966), importance-preserving rank selection, Algorithm 1: layers whose share would
    exceed 1 are fixed at 1 and leave the pool with their part of the budget, until none is left.
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
    """The same share for every layer: what IPRS is compared with."""
    return [keep] * layers


def share_of_the_rest(layers: Sequence[LayerDims], budget: Budget, multiples: Multiples) -> float:
    """Share that what can be narrowed keeps, so that all of it together meets the budget; at most 1.

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
    """Round each layer's share of value rank and MLP width to what the later stages and runtimes like.

    Ranks are rounded first; the MLP, whose steps are finer, then makes up for what rounding took or gave in its layer,
    and last the layers with the largest rest lose or get steps until no step more fits into the budget.
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
    """Nearest multiple in [one multiple, whole]; the whole width is always allowed."""
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
    """Take steps, the worst rounded layer first, until the budget is met; then give those that still fit."""
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
    """What narrowing one layer costs, in units that are the same for all layers.

    Attributes:
        value: cost of value heads that are n directions narrower, n = 0 .. d_v; ascending from 0.
        mlp: cost of an MLP that is n channels narrower, n = 0 .. d_ff or less; ascending from 0.
    """

    value: tuple[float, ...]
    mlp: tuple[float, ...]


def summed(curves: Sequence[Curves]) -> Curves:
    """The curves of all layers narrowed alike."""
    return Curves(
        *(tuple(map(sum, zip(*part, strict=True))) for part in ([c.value for c in curves], [c.mlp for c in curves]))
    )


def spend(
    layers: Sequence[LayerDims], budget: Budget, curves: Sequence[Curves], multiples: Multiples
) -> tuple[LayerDims, ...]:
    """One budget over all layers and both halves: take away, step by step, what costs least per unit of the budget.

    A step is one multiple of ranks or channels. Nothing is narrowed below one multiple. Steps are taken until the
    budget is met; what the last ones took too much is given back, dearest step first, where it fits.

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
        # A curve that bends down would hide cheap steps behind a dear one; prices are kept from falling.
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
    """``dims`` with one multiple less of ``d_v`` or ``d_ff``; unchanged where that would leave less than one."""
    multiple, width = (multiples.rank if part == "d_v" else multiples.width), getattr(dims, part)
    below = (width - 1) // multiple * multiple
    return replace(dims, **{part: below}) if below >= multiple else dims


def _given_back(
    planned: list[LayerDims], taken: Sequence[tuple[int, LayerDims, float]], spare: float
) -> list[LayerDims]:
    """Undo steps, the last first, that cost no more than ``spare``; of each layer only its very last ones."""
    final: set[int] = set()
    for layer, before, saved in reversed(taken):
        if layer in final or saved > spare:
            final.add(layer)
            continue
        planned[layer] = before
        spare -= saved
    return planned
