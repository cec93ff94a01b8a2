"""What a budget is spent on: the model's units with the choices that the exports can store, and their prices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatq.budget.limits import Prices, prices_of
from flatq.budget.speed_limits import speed_prices
from flatq.errors import RecipeError
from flatq.export.planned import PlannedExport
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.quantize.choices import ChoiceUnit, candidates, layer_units, table_units
from flatq.recipe.blocks import FlatSpec
from flatq.recipe.budget import SPEEDS, BudgetSpec
from flatq.recipe.grammar import Recipe

UNQUANTIZED: dict[str, list[Grid | None]] = {"embed": [None], "head": [None]}


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that is fixed before anything is measured.

    Attributes:
        config: of the dense model.
        flat: the stage that narrows, or None.
        prices: the limit, and what a model costs in its unit.
        layers: (layer, number in ``quantize.bits.UNITS``, unit).
        tables: embedding and head.
    """

    config: DecoderConfig
    flat: FlatSpec | None
    prices: Prices
    layers: tuple[tuple[int, int, ChoiceUnit], ...]
    tables: tuple[ChoiceUnit, ...]

    @property
    def units(self) -> list[ChoiceUnit]:
        """All units."""
        return [*(unit for _, _, unit in self.layers), *self.tables]


def problem_of(
    recipe: Recipe, config: DecoderConfig, exports: Sequence[PlannedExport], itemsize: int, prices: Prices | None = None
) -> Problem:
    """The problem of a recipe with the block ``budget``.

    Args:
        recipe: with the block.
        config: of the dense model.
        exports: of the recipe; only what all of them can store is chosen from.
        itemsize: bytes of an unquantized number.
        prices: another limit than the recipe's.

    Raises:
        RecipeError: the exports cannot store any of the choices; with their objections.
    """
    budget, spec = recipe.budget, recipe.gptq
    if budget is None:
        raise ValueError("the recipe has no budget")
    if prices is None and budget.key in SPEEDS:
        prices = speed_prices(budget, config, exports, itemsize)
    prices = prices or prices_of(budget, exports, itemsize)
    linears, tables = list[Grid](), UNQUANTIZED
    if spec is not None:
        linears = _stored(budget, config, exports, prices, "layers.0.gate")
        if not linears:
            raise RecipeError(_why(budget, config, exports))
        tables = {stem: _table(_stored(budget, config, exports, prices, stem), config, prices, stem) for stem in tables}
    layers, ends = layer_units(config, spec, linears), table_units(config, spec, tables)
    return Problem(config, recipe.flat, prices, tuple(layers), tuple(ends))


def _stored(
    budget: BudgetSpec, config: DecoderConfig, exports: Sequence[PlannedExport], prices: Prices, stem: str
) -> list[Grid]:
    """What all exports can store, priced as this matrix."""

    def stored(grid: Grid) -> bool:
        return all(item.exporter.stores(config, grid, item.options) for item in exports)

    return candidates(budget.bits, budget.group_sizes, stored, lambda grid: prices.stored(config, stem, grid))


def _table(grids: Sequence[Grid], config: DecoderConfig, prices: Prices, stem: str) -> list[Grid | None]:
    """Grids of a table; none if the format stores it unquantized anyway."""
    plain = prices.stored(config, stem, None)
    return [grid for grid in grids if prices.stored(config, stem, grid) < plain] or [None]


def _why(budget: BudgetSpec, config: DecoderConfig, exports: Sequence[PlannedExport]) -> list[str]:
    """The exporters' objections to the first choice."""
    grid = Grid(budget.bits[0], budget.group_sizes[0])
    said = [
        f"exports.{item.name}: {words}"
        for item in exports
        for words in item.exporter.check(config, {"layers.0.q": grid}, item.options)
    ]
    return said or ["budget.bits: the exports can store none of these with the given group_sizes; give others"]
