"""Which layer keeps how much: from importance and a budget to the widths of every layer.

Query and key projections stay whole in the paper's method, so the values, outputs and MLPs carry the whole cut.
A plan is the configuration that the model will have: a tuple of ``LayerDims``.

Axes: L layers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flatq.dims import LayerDims
from flatq.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Costs:
    """Parameters per unit of width, in one layer."""

    fixed: int  # q and k
    per_rank: int  # one more direction in every value head: rows of v, columns of o
    per_channel: int  # one more MLP channel: rows of gate and up, a column of down

    @classmethod
    def of(cls, dims: LayerDims, d_model: int) -> Costs:
        """From a layer's shape."""
        heads = dims.heads + dims.kv_heads
        return cls(heads * dims.d_qk * d_model, heads * d_model, 3 * d_model)

    def total(self, rank: float, width: float) -> float:
        """Parameters of a layer of these widths."""
        return self.fixed + rank * self.per_rank + width * self.per_channel


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


def share_of_the_rest(layers: Sequence[LayerDims], d_model: int, keep_ratio: float) -> float:
    """Share that values, outputs and MLPs keep, so that all decoder parameters together keep ``keep_ratio``.

    Raises:
        RecipeError: q and k alone are more than the budget.
    """
    costs = [Costs.of(dims, d_model) for dims in layers]
    whole = sum(cost.total(dims.d_v, dims.d_ff) for cost, dims in zip(costs, layers, strict=True))
    fixed = sum(cost.fixed for cost in costs)
    share = (keep_ratio * whole - fixed) / (whole - fixed)
    if share <= 0:
        raise RecipeError(
            f"stages.flat.keep_ratio: {keep_ratio} cannot be reached: the query and key projections, which stay whole, "
            f"are {fixed / whole:.1%} of the decoder; choose more than {math.ceil(1000 * fixed / whole) / 1000}"
        )
    return share


def widths(
    layers: Sequence[LayerDims],
    d_model: int,
    shares: Sequence[float],
    keep_ratio: float,
    *,
    rank_multiple: int,
    width_multiple: int,
) -> tuple[LayerDims, ...]:
    """Round each layer's share of value rank and MLP width to what the later stages and runtimes like.

    Ranks are rounded first; the MLP, whose steps are finer, then makes up for what rounding took or gave in its layer,
    and last the layers with the largest rest get or lose one step until the model meets its budget within one step.
    Multiples that exceed a width fall back to the width itself (a layer of 8 channels with ``width_multiple`` 32).
    """
    planned = []
    for dims, share in zip(layers, shares, strict=True):
        cost = Costs.of(dims, d_model)
        rank = _rounded(share * dims.d_v, rank_multiple, dims.d_v)
        wanted = cost.fixed + share * (cost.total(dims.d_v, dims.d_ff) - cost.fixed)
        exact = (wanted - cost.total(rank, 0)) / cost.per_channel
        width = _rounded(exact, width_multiple, dims.d_ff)
        planned.append((dims, cost, rank, width, exact - width))
    whole = sum(cost.total(dims.d_v, dims.d_ff) for dims, cost, *_ in planned)
    surplus = sum(cost.total(rank, width) for _, cost, rank, width, _ in planned) - keep_ratio * whole
    return _settle(planned, surplus, width_multiple)


def _rounded(value: float, multiple: int, whole: int) -> int:
    """Nearest multiple in [one multiple, whole]; the whole width is always allowed."""
    if value >= whole:
        return whole
    return min(max(multiple, round(value / multiple) * multiple), whole)


def _settle(
    planned: list[tuple[LayerDims, Costs, int, int, float]], surplus: float, multiple: int
) -> tuple[LayerDims, ...]:
    """Take or give MLP steps, the worst rounded layer first, while that brings the total closer to the budget."""
    result = [(dims, rank, width) for dims, _, rank, width, _ in planned]
    step = multiple * planned[0][1].per_channel
    rests = {i: rest for i, (*_, rest) in enumerate(planned)}
    while abs(surplus) > step / 2:
        sign = -1 if surplus > 0 else 1
        moved = {i: _next_width(width, sign, multiple, dims.d_ff) for i, (dims, _, width) in enumerate(result)}
        movable = [i for i, width in moved.items() if width != result[i][2]]
        if not movable:
            break
        best = max(movable, key=lambda i: sign * rests[i])
        dims, rank, width = result[best]
        result[best] = (dims, rank, moved[best])
        rests[best] -= moved[best] - width
        surplus += (moved[best] - width) * step / multiple
    return tuple(replace(dims, d_v=rank, d_ff=width) for dims, rank, width in result)


def _next_width(width: int, sign: int, multiple: int, whole: int) -> int:
    """The neighbouring multiple in [one multiple, whole]; the width itself where there is none."""
    if sign > 0:
        return min((width // multiple + 1) * multiple, whole)
    return max((width - 1) // multiple * multiple, min(multiple, width))


@dataclass(frozen=True, slots=True)
class Curves:
    """What narrowing one layer costs, in units that are the same for all layers.

    Attributes:
        value: cost of value heads that are n directions narrower, n = 0 .. d_v; ascending from 0.
        mlp: cost of an MLP that is n channels narrower, n = 0 .. d_ff or less; ascending from 0.
    """

    value: tuple[float, ...]
    mlp: tuple[float, ...]


def spend(
    layers: Sequence[LayerDims],
    d_model: int,
    curves: Sequence[Curves],
    keep_ratio: float,
    *,
    rank_multiple: int,
    width_multiple: int,
) -> tuple[LayerDims, ...]:
    """One budget over all layers and both halves: take away, step by step, what costs least per parameter.

    A step is one multiple of ranks or channels. Nothing is narrowed below one multiple. The last step is taken if it
    brings the total closer to the budget.
    """
    costs = [Costs.of(dims, d_model) for dims in layers]
    widths = [[dims.d_v, dims.d_ff] for dims in layers]
    whole = sum(cost.total(dims.d_v, dims.d_ff) for cost, dims in zip(costs, layers, strict=True))
    surplus = (1 - keep_ratio) * whole
    queue: list[tuple[float, int, int, int, int]] = []

    def offer(layer: int, part: int, least: float) -> None:
        multiple = (rank_multiple, width_multiple)[part]
        width, top = widths[layer][part], (layers[layer].d_v, layers[layer].d_ff)[part]
        lower = (width - 1) // multiple * multiple
        curve = (curves[layer].value, curves[layer].mlp)[part]
        if lower < multiple or top - lower >= len(curve):
            return
        parameters = (width - lower) * (costs[layer].per_rank, costs[layer].per_channel)[part]
        price = (curve[top - lower] - curve[top - width]) / parameters
        # A curve that bends down would hide cheap steps behind a dear one; prices are kept from falling.
        heapq.heappush(queue, (max(price, least), layer, part, lower, parameters))

    for layer in range(len(layers)):
        for part in (0, 1):
            offer(layer, part, 0.0)
    while queue and surplus > 0:
        price, layer, part, lower, parameters = heapq.heappop(queue)
        if parameters > 2 * surplus:
            break
        widths[layer][part] = lower
        surplus -= parameters
        offer(layer, part, price)
    return tuple(replace(dims, d_v=rank, d_ff=width) for dims, (rank, width) in zip(layers, widths, strict=True))
