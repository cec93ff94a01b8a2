"""Budgets: a limit for the whole model, and the cost of a layer as a function of its widths.

Allocations compare costs and do not depend on the unit, so every budget is one function from a layer's widths to a
number, plus a limit. The cost is computed for whole layers, not per rank or per channel: group rows, scales and the
cache make it a step function, for which the difference of two costs is exact and a rate would be an average.

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

Price = Callable[[int, LayerDims], float]  # (layer index, widths) -> cost; widths may be 0


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit, and the function that gives the cost of a layer.

    Attributes:
        key: the recipe's key below ``stages.flat``.
        given: the value as written in the recipe, for messages.
        limit: largest allowed cost of the model, in parameters or bytes.
        price: cost of one layer with given widths.
        rest: cost of everything outside the layers, independent of their widths.
        unit: cost of the value 1 in the recipe: all parameters for a fraction, 1 for bytes.
    """

    key: str
    given: str
    limit: float
    price: Price
    rest: float = 0
    unit: float = 1

    def total(self, layers: Sequence[LayerDims]) -> float:
        """Cost of the model with these layers."""
        return self.rest + sum(self.price(index, dims) for index, dims in enumerate(layers))

    def written(self, cost: float) -> str:
        """A cost in the notation of the recipe, rounded up."""
        return f"{math.ceil(1000 * cost / self.unit) / 1000}" if self.key == "keep_ratio" else size_at_least(cost)

    def refusal(self, least: float, reason: str) -> RecipeError:
        """The error for a limit below ``least``, the smallest possible cost."""
        return RecipeError(
            f"stages.flat.{self.key}: {self.given} cannot be reached: {reason}; choose {self.written(least)} or more"
        )


def budget_of(config: DecoderConfig, flat: FlatSpec, gptq: GptqSpec | None, itemsize: int) -> Budget:
    """The budget of a ``flat`` stage, for a dense model.

    Args:
        gptq: the stage that follows; it sets the bits per weight.
        itemsize: bytes of an unquantized number.
    """
    if flat.keep_ratio is not None:
        return parameter_budget(config.layers, config.d_model, flat.keep_ratio)
    grids = planned_grids(config, gptq)
    given = flat.size or flat.decode_bytes or ""
    whole_cache = flat.cache_context if flat.decode_bytes else 0

    @functools.cache
    def price(index: int, dims: LayerDims) -> float:
        weights = footprint.layer_bytes(config, grids, itemsize, index, dims)
        return weights + footprint.cache_bytes(config, index, dims, whole_cache)

    rest = (footprint.ends_bytes if flat.size else footprint.decode_ends_bytes)(config, grids, itemsize)
    return Budget("size" if flat.size else "decode_bytes", given, parse_size(given), price, rest)


def parameter_budget(layers: Sequence[LayerDims], d_model: int, keep_ratio: float) -> Budget:
    """Budget that is a fraction of the decoder's parameters."""
    whole = sum(dims.parameters(d_model) for dims in layers)
    limit = keep_ratio * whole * (1 + 1e-12)  # so that 0.7 * 10 is not below 7
    return Budget("keep_ratio", f"{keep_ratio}", limit, lambda _, dims: dims.parameters(d_model), unit=whole)


def together(layers: Sequence[LayerDims], budget: Budget) -> tuple[tuple[LayerDims, ...], Budget]:
    """One layer in place of all, with the summed cost of all, so that every layer gets the same widths.

    Raises:
        RecipeError: the layers differ before anything is narrowed.
    """
    if len(set(layers)) != 1:
        raise RecipeError("stages.flat.uniform: the model's layers have different widths already; remove `uniform`")
    numbers = range(len(layers))
    return tuple(layers[:1]), replace(budget, price=lambda _, dims: sum(budget.price(i, dims) for i in numbers))
