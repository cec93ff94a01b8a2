"""Limits of speed: what an exporter predicts for its files on this machine, in seconds, as prices of a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flatq.errors import ExportError, RecipeError
from flatq.export.planned import PlannedExport
from flatq.export.speed import SpeedLoad
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.model.names import Stem
from flatq.plan.limits import Prices
from flatq.quantize.bits import UNITS
from flatq.recipe.budget import BudgetSpec

FIRST = {unit[0]: unit for unit in UNITS}  # units by their first linear, which carries the price of all


@dataclass(frozen=True, slots=True)
class SpeedPrices(Prices):
    """A limit in seconds, which the recipe gives as tokens per second or as milliseconds."""

    def shown(self, cost: float) -> str:
        """See ``Prices.shown``."""
        return f"{1 / cost:.4g} tokens/s" if self.key == "decode_tokens_per_second" else f"{1000 * cost:.4g} ms"

    def refusal(self, least: float) -> RecipeError:
        """The error for a speed that no plan reaches, with that of the fastest plan; ``least`` is its time."""
        decodes = self.key == "decode_tokens_per_second"
        fastest = f"{math.floor(10 / least) / 10} tokens/s" if decodes else f"{math.ceil(10_000 * least) / 10} ms"
        return RecipeError(
            f"budget.{self.key}: {self.given} cannot be reached: the fastest model that the stages can make is "
            f"predicted at {fastest} ({self.where}); choose {fastest.split()[0]} or {'less' if decodes else 'more'}"
        )


def speed_prices(
    budget: BudgetSpec, dense: DecoderConfig, exports: Sequence[PlannedExport], itemsize: int
) -> SpeedPrices:
    """The limit of a recipe in seconds, and what the parts of a model take.

    A unit of linears (q, k, v, which are one product if they have one grid) is priced at its first linear, the rest of
    an MLP at ``down``.

    Args:
        budget: with one of the limits ``SPEEDS``.
        dense: the widths before compression.
        exports: of the recipe; ``budget.export`` is one of them.
        itemsize: bytes of an unquantized number.

    Raises:
        RecipeError: the exporter cannot predict speed.
    """
    item = next(item for item in exports if budget.export in (None, item.name))
    decodes, usual = budget.key == "decode_tokens_per_second", SpeedLoad()
    load = SpeedLoad(budget.context or usual.context, budget.prompt or usual.prompt, budget.threads or usual.threads)
    try:
        model = item.exporter.speed_model(dense, item.options, load)
    except ExportError as refused:
        raise RecipeError(f"budget.{budget.key}: exports.{item.name}: {refused}") from refused
    part, given = "decode" if decodes else "prefill", getattr(budget, budget.key)

    def matrix(config: DecoderConfig, stem: str, grid: Grid | None) -> float:
        if "." not in stem:
            return 0.0 if stem == "embed" and not config.tied_head else ends(grid)
        place = Stem.of(stem)
        if place.linear not in FIRST:
            return 0.0
        dims = config.layers[place.layer]
        found = model.linears(dims, dict.fromkeys(FIRST[place.linear], grid))
        if place.linear == "down":
            found = found + model.rest("mlp", dims)
        return float(getattr(found, part))

    def ends(grid: Grid | None) -> float:
        return float(getattr(model.ends({"embed": grid, "head": grid}), part))

    def half(config: DecoderConfig, index: int, width: str) -> float:
        return float(getattr(model.rest("attention", config.layers[index]), part)) if width == "d_v" else 0.0

    def exact(config: DecoderConfig, grids: Mapping[str, Grid]) -> float:
        return float(getattr(model.predict(config, grids), part))

    def stored(config: DecoderConfig, stem: str, grid: Grid | None) -> float:
        return item.exporter.matrix_bytes(config, stem, grid, item.options, itemsize=itemsize)

    where = f"export {item.name} at a context of {load.context:,}" if decodes else f"export {item.name}"
    where += "" if decodes else f", {load.prompt:,} tokens"
    limit = 1 / given if decodes else given / 1000
    return SpeedPrices(budget.key, f"{given:g}", limit, matrix, half, exact, stored, where)
