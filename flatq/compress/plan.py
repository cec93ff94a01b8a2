"""The rank plan: widths of every layer for a budget, decided before the walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flatq.compress.allocate import Curves, Multiples, iprs, share_of_the_rest, spend, summed, uniform, widths
from flatq.compress.budget import budget_of, together
from flatq.model.decoder import DecoderConfig, LayerDims
from flatq.recipe.blocks import FlatSpec, GptqSpec


@dataclass(frozen=True, slots=True)
class RankPlan:
    """The widths of the compressed model.

    ``requested`` and ``achieved`` are in the unit of ``budget``: a fraction of the decoder's parameters
    (``keep_ratio``), or bytes (``size``, ``decode_bytes``).
    """

    layers: tuple[LayerDims, ...]
    requested: float
    achieved: float
    budget: str = "keep_ratio"
    importance: tuple[float, ...] = ()


def plan_ranks(
    config: DecoderConfig,
    spec: FlatSpec,
    importance: Sequence[float] = (),
    curves: Sequence[Curves] = (),
    *,
    gptq: GptqSpec | None = None,
    itemsize: int = 4,
) -> RankPlan:
    """Widths of every layer for the budget of a ``flat`` stage.

    Args:
        importance: one number per layer, for ``allocation: iprs``.
        curves: one per layer, for ``allocation: curves``. Without the measurement that its allocation needs, a plan
            has equal fractions for all layers.
        gptq: the stage that follows, for budgets in bytes.
        itemsize: bytes of an unquantized number.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    layers, allocation = config.layers, spec.parts.allocation
    wanted = budget = budget_of(config, spec, gptq, itemsize)
    whole = max(dims.d_v for dims in layers)
    rank = whole if spec.parts.values == "whole" else spec.rank_multiple
    multiples = Multiples(rank, spec.width_multiple * config.mlp_parts)
    if spec.uniform:
        layers, budget = together(layers, budget)
        curves = [summed(curves)] if curves else ()
    share = share_of_the_rest(layers, budget, multiples)
    if allocation == "curves" and curves:
        planned = spend(layers, budget, curves, multiples)
    else:
        shares = iprs(importance, share) if allocation == "iprs" and importance else uniform(len(layers), share)
        planned = widths(layers, budget, shares, multiples)
    layers = planned * len(config.layers) if spec.uniform else planned
    requested, achieved = wanted.limit / wanted.unit, wanted.total(layers) / wanted.unit
    return RankPlan(layers, requested, achieved, wanted.key, tuple(importance))


def shifted(config: DecoderConfig, spec: FlatSpec, planned: Sequence[LayerDims]) -> DecoderConfig:
    """Another model that the same recipe could lead to: every narrowed width of a plan by one multiple smaller.

    What is too narrow for that gets one multiple wider instead, up to the dense width. Widths that the plan leaves as
    they are stay.
    """

    def other(dense: int, width: int, multiple: int) -> int:
        return width if width == dense else width - multiple if width > multiple else min(width + multiple, dense)

    layers = [
        replace(
            narrow,
            d_v=other(dense.d_v, narrow.d_v, spec.rank_multiple),
            d_ff=other(dense.d_ff, narrow.d_ff, spec.width_multiple * config.mlp_parts),
        )
        for dense, narrow in zip(config.layers, planned, strict=True)
    ]
    return config.with_layers(layers)


def uneven(config: DecoderConfig, spec: FlatSpec) -> DecoderConfig:
    """A configuration whose value ranks differ between layers, if the allocation may produce such; else ``config``.

    The ranks are known only after measurement; that they will differ is known before.
    """
    same = spec.uniform or spec.parts.allocation == "uniform" or spec.parts.values == "whole" or spec.keep_ratio == 1
    first, *others = config.layers
    if same or first.d_v <= spec.rank_multiple:
        return config
    lower = (first.d_v - 1) // spec.rank_multiple * spec.rank_multiple
    return config.with_layers([replace(first, d_v=lower), *others])


def uneven_mlps(config: DecoderConfig, spec: FlatSpec, steps: int = 1) -> DecoderConfig:
    """A configuration whose MLP widths differ between layers, if the allocation may produce such; else ``config``.

    Args:
        config: of the dense model.
        spec: the stage.
        steps: how many multiples the first layer is narrower than the others. What is said of every number of steps
            depends on the difference alone.
    """
    same = spec.uniform or spec.parts.allocation == "uniform" or spec.keep_ratio == 1
    first, *others = config.layers
    multiple = spec.width_multiple * config.mlp_parts
    lower = (first.d_ff - 1) // multiple * multiple - (steps - 1) * multiple
    if same or lower <= 0:
        return config
    return config.with_layers([replace(first, d_ff=lower), *others])
