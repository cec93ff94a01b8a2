"""What a model may cost, and what a layer of given widths costs: all that an allocation asks of a budget.

Allocations compare prices and never look at their unit, so every budget is one function from a layer's widths to a
number, plus a limit. A price is taken of whole layers and not "per rank" and "per channel": rows of groups, scales and
a cache make it a staircase, and the difference of two prices is exact where a rate would be an average.

    keep_ratio     parameters of the decoder's linears, as in the FLAT-LLM paper
    size           bytes of all weights as the artifact stores them, at the bits of the stage that follows
    decode_bytes   bytes read per decoded token: those weights, and keys and values of a context
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flatq.errors import RecipeError
from flatq.model import footprint
from flatq.model.decoder import DecoderConfig
from flatq.model.dims import LayerDims
from flatq.quantize.grids import planned_grids
from flatq.recipe.blocks import FlatSpec, GptqSpec
from flatq.units import parse_size, size_at_least

Price = Callable[[int, LayerDims], float]  # (layer number, its widths) -> cost; widths may be 0


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit and the prices to meet it with.

    Attributes:
        key: the recipe's key below ``stages.flat``.
        given: the value as the recipe states it, for messages.
        limit: what the model may cost, in parameters or bytes.
        price: what one layer of some widths costs.
        rest: what the model costs beside its layers, whatever their widths.
        unit: what a value of 1 in the recipe costs: all parameters for a share, 1 for bytes.
    """

    key: str
    given: str
    limit: float
    price: Price
    rest: float = 0
    unit: float = 1

    def total(self, layers: Sequence[LayerDims]) -> float:
        """Cost of a model with these layers."""
        return self.rest + sum(self.price(index, dims) for index, dims in enumerate(layers))

    def written(self, cost: float) -> str:
        """A cost as the recipe would state it, rounded up."""
        return f"{math.ceil(1000 * cost / self.unit) / 1000}" if self.key == "keep_ratio" else size_at_least(cost)

    def refusal(self, least: float, reason: str) -> RecipeError:
        """The error of a limit below ``least``."""
        return RecipeError(
            f"stages.flat.{self.key}: {self.given} cannot be reached: {reason}; choose {self.written(least)} or more"
        )


def budget_of(config: DecoderConfig, flat: FlatSpec, gptq: GptqSpec | None, itemsize: int) -> Budget:
    """The budget that a ``flat`` stage names, for a dense model.

    Args:
        gptq: the stage that follows; it decides in how many bits the weights are stored.
        itemsize: bytes of a number that is not quantized.
    """
    if flat.keep_ratio is not None:
        return parameter_budget(config.layers, config.d_model, flat.keep_ratio)
    grids = planned_grids(config, gptq)
    given = flat.size or flat.decode_bytes or ""
    whole_cache = flat.cache_context if flat.decode_bytes else 0

    @functools.cache
    def price(index: int, dims: LayerDims) -> float:
        weights = footprint.layer_bytes(config, grids, itemsize, index, dims)
        return weights + footprint.cache_bytes(config, dims, whole_cache)

    rest = (footprint.ends_bytes if flat.size else footprint.decode_ends_bytes)(config, grids, itemsize)
    return Budget("size" if flat.size else "decode_bytes", given, parse_size(given), price, rest)


def parameter_budget(layers: Sequence[LayerDims], d_model: int, keep_ratio: float) -> Budget:
    """A share of the decoder's parameters."""
    whole = sum(dims.parameters(d_model) for dims in layers)
    limit = keep_ratio * whole * (1 + 1e-12)  # 0.7 * 10 is 7, not a hair less
    return Budget("keep_ratio", f"{keep_ratio}", limit, lambda _, dims: dims.parameters(d_model), unit=whole)


def together(layers: Sequence[LayerDims], budget: Budget) -> tuple[tuple[LayerDims, ...], Budget]:
    """All layers as one that stands for them, at the price of all: its plan gives every layer the same widths.

    Raises:
        RecipeError: the layers differ before anything is narrowed.
    """
    if len(set(layers)) != 1:
        raise RecipeError("stages.flat.uniform: the model's layers have different widths already; remove `uniform`")
    numbers = range(len(layers))
    return tuple(layers[:1]), replace(budget, price=lambda _, dims: sum(budget.price(i, dims) for i in numbers))
