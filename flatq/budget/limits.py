"""What a model costs in the unit of a budget: exact for a finished plan, and additive over matrices for the search.

An exporter states the bytes of each matrix as it stores it (``Exporter.matrix_bytes``), so that nothing is bought that
its files or its runtime do not save. A further limit is a further ``Prices``: any cost that is a sum over units of
linears, half layers and tables, in bytes or in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flatq.errors import RecipeError
from flatq.export.planned import PlannedExport
from flatq.model import footprint
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.model.names import Stem, matrix_shape, stems_of
from flatq.quantize.bits import UNITS
from flatq.recipe.budget import BudgetSpec
from flatq.units import parse_size, size, size_at_least

MatrixPrice = Callable[[DecoderConfig, str, Grid | None], float]
UnitPrice = Callable[[DecoderConfig, Mapping[str, Grid | None]], float]
HalfPrice = Callable[[DecoderConfig, int, str], float]
Exact = Callable[[DecoderConfig, Mapping[str, Grid]], float]


@dataclass(frozen=True, slots=True)
class Prices:
    """A limit, and what a model costs in its unit.

    Attributes:
        key: of the limit in the block ``budget``.
        given: the limit as written in the recipe.
        limit: largest allowed cost; infinite for a limit that is no cost (``max_damage``).
        unit: cost of linears that share a choice, or of a table (planned widths of all layers, grids by stem).
        half: cost of a half layer besides its matrices, such as the KV cache (config, layer, ``d_v`` or ``d_ff``).
        exact: cost of a whole model.
        stored: bytes of one matrix in the files, by which the choices worth measuring are selected whatever the limit.
        where: what is counted, in words.
    """

    key: str
    given: str
    limit: float
    unit: UnitPrice
    half: HalfPrice
    exact: Exact
    stored: MatrixPrice
    where: str

    def rest(self, config: DecoderConfig, grids: Mapping[str, Grid]) -> float:
        """Cost of everything that the search does not price, for a model."""
        units = sum(self.unit(config, {stem: grids.get(stem) for stem in stems}) for stems in units_of(config))
        halves = sum(self.half(config, index, part) for index in range(len(config.layers)) for part in ("d_v", "d_ff"))
        return self.exact(config, grids) - units - halves

    def shown(self, cost: float) -> str:
        """A cost in words."""
        return size(cost)

    def refusal(self, least: float) -> RecipeError:
        """The error for a limit below ``least``, the smallest possible cost."""
        return RecipeError(
            f"budget.{self.key}: {self.given} cannot be reached: the smallest model that the stages can make takes "
            f"{size_at_least(least)} ({self.where}); choose {size_at_least(least)} or more"
        )


def matrices_of(config: DecoderConfig) -> list[str]:
    """Stems of all matrices; a tied head is the embedding."""
    return [*stems_of(config), "embed", *(() if config.tied_head else ("head",))]


def units_of(config: DecoderConfig) -> list[tuple[str, ...]]:
    """Stems of the units of linears, and of the tables."""
    layers = [tuple(str(Stem(i, name)) for name in names) for i in range(len(config.layers)) for names in UNITS]
    return [*layers, ("embed",), *(() if config.tied_head else (("head",),))]


def summed(price: MatrixPrice) -> UnitPrice:
    """The price of a unit whose matrices are paid for one by one."""
    return lambda config, grids: sum(price(config, stem, grid) for stem, grid in grids.items())


def prices_of(budget: BudgetSpec, exports: Sequence[PlannedExport], itemsize: int) -> Prices:
    """The limit of a recipe and its prices.

    Args:
        budget: the block of the recipe.
        exports: of the recipe; ``budget.export`` is one of them.
        itemsize: bytes of an unquantized number.
    """
    item = next((item for item in exports if budget.export in (None, item.name)), None)
    matrix, cache, whole = _artifact(itemsize) if item is None else export_prices(item, itemsize)
    named = "artifact" if item is None else f"export {item.name}"
    context, given = budget.cache_context, getattr(budget, budget.key)
    limit = math.inf if budget.key == "max_damage" else float(parse_size(given))

    def free(config: DecoderConfig, index: int, part: str) -> float:
        return 0.0

    def cached(config: DecoderConfig, index: int, part: str) -> float:
        return cache(config, index, context) if part == "d_v" else 0.0

    def caches(config: DecoderConfig) -> float:
        return sum(cache(config, index, context) for index in range(len(config.layers)))

    def held(config: DecoderConfig, grids: Mapping[str, Grid]) -> float:
        return whole(config, grids) + caches(config)

    def read(config: DecoderConfig, stem: str, grid: Grid | None) -> float:
        return 0.0 if stem == "embed" and not config.tied_head else matrix(config, stem, grid)

    def decoded(config: DecoderConfig, grids: Mapping[str, Grid]) -> float:
        weights = sum(read(config, stem, grids.get(stem)) for stem in matrices_of(config))
        return weights + caches(config) + footprint.norm_bytes(config, itemsize)

    if budget.key == "decode_bytes":
        return Prices(budget.key, given, limit, summed(read), cached, decoded, matrix, f"read by {named} per token")
    if budget.key == "memory":
        return Prices(budget.key, given, limit, summed(matrix), cached, held, matrix, f"{named} and cache")
    return Prices(budget.key, f"{given}", limit, summed(matrix), free, whole, matrix, named)


CachePrice = Callable[[DecoderConfig, int, int], float]


def _artifact(itemsize: int) -> tuple[MatrixPrice, CachePrice, Exact]:
    def matrix(config: DecoderConfig, stem: str, grid: Grid | None) -> float:
        return footprint.matrix_bytes(matrix_shape(config, stem), grid, itemsize)

    def cache(config: DecoderConfig, index: int, context: int) -> float:
        return footprint.cache_bytes(config, index, config.layers[index], context)

    def whole(config: DecoderConfig, grids: Mapping[str, Grid]) -> float:
        return footprint.weight_bytes(config, grids, itemsize)

    return matrix, cache, whole


def export_prices(item: PlannedExport, itemsize: int) -> tuple[MatrixPrice, CachePrice, Exact]:
    """Bytes of a matrix, of the cache and of all of an export."""
    exporter, options = item.exporter, item.options

    def matrix(config: DecoderConfig, stem: str, grid: Grid | None) -> float:
        return exporter.matrix_bytes(config, stem, grid, options, itemsize=itemsize)

    def cache(config: DecoderConfig, index: int, context: int) -> float:
        return exporter.cache_bytes(config, index, context, options)

    def whole(config: DecoderConfig, grids: Mapping[str, Grid]) -> float:
        return exporter.bytes(config, grids, options, itemsize=itemsize)

    return matrix, cache, whole
