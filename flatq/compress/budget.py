"""What a model may cost, and what a layer of given widths costs: all that an allocation asks of a budget.

Allocations compare prices and never look at their unit, so every budget is one function from a layer's widths to a
number, plus a limit. A price is taken of whole layers and not "per rank" and "per channel": rows of groups, scales and
a cache make it a staircase, and the difference of two prices is exact where a rate would be an average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flatq.dims import LayerDims
from flatq.errors import RecipeError

Price = Callable[[int, LayerDims], float]  # (layer number, its widths) -> cost; widths may be 0


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit and the prices to meet it with.

    Attributes:
        key: the recipe's key below ``stages.flat``.
        given: the value as the recipe states it, for messages.
        limit: what all layers together may cost.
        price: what one layer of some widths costs.
        written: an amount as a value of ``key``, rounded up to what a recipe would say.
    """

    key: str
    given: str
    limit: float
    price: Price
    written: Callable[[float], str]

    def total(self, layers: Sequence[LayerDims]) -> float:
        """Cost of all layers."""
        return sum(self.price(index, dims) for index, dims in enumerate(layers))

    def refusal(self, least: float, reason: str) -> RecipeError:
        """The error of a budget below ``least``."""
        return RecipeError(
            f"stages.flat.{self.key}: {self.given} cannot be reached: {reason}; choose {self.written(least)} or more"
        )


def parameter_budget(layers: Sequence[LayerDims], d_model: int, keep_ratio: float) -> Budget:
    """A share of the decoder's parameters, as in the FLAT-LLM paper."""
    whole = sum(dims.parameters(d_model) for dims in layers)
    return Budget(
        "keep_ratio",
        f"{keep_ratio}",
        keep_ratio * whole * (1 + 1e-12),  # 0.7 * 10 is 7, not a hair less
        lambda _, dims: dims.parameters(d_model),
        lambda amount: f"{math.ceil(1000 * amount / whole) / 1000}",
    )


def together(layers: Sequence[LayerDims], budget: Budget) -> tuple[tuple[LayerDims, ...], Budget]:
    """All layers as one that stands for them, at the price of all: its plan gives every layer the same widths.

    Raises:
        RecipeError: the layers differ before anything is narrowed.
    """
    if len(set(layers)) != 1:
        raise RecipeError("stages.flat.uniform: the model's layers have different widths already; remove `uniform`")
    numbers = range(len(layers))
    return tuple(layers[:1]), replace(budget, price=lambda _, dims: sum(budget.price(i, dims) for i in numbers))
