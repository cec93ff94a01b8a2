"""Limits of speed: what an exporter predicts for its files on this machine, in seconds, as prices of a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flatq.budget.limits import Prices, export_prices
from flatq.errors import ExportError, RecipeError
from flatq.export.planned import PlannedExport
from flatq.export.speed import Seconds, SpeedLoad
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.model.names import Stem
from flatq.recipe.budget import BudgetSpec

ENDS = ("embed", "head")


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
    given, (stored, _, _) = getattr(budget, budget.key), export_prices(item, itemsize)

    def of(found: Seconds) -> float:
        return found.decode if decodes else found.prefill

    def unit(config: DecoderConfig, grids: Mapping[str, Grid | None]) -> float:
        ((first, grid), *_) = grids.items()
        if first in ENDS:
            looked_up = first == "embed" and not config.tied_head
            return 0.0 if looked_up else of(model.ends(dict.fromkeys(ENDS, grid)))
        dims = config.layers[Stem.of(first).layer]
        return of(model.linears(dims, {Stem.of(stem).linear: grid for stem, grid in grids.items()}))

    def half(config: DecoderConfig, index: int, width: str) -> float:
        return of(model.rest("attention" if width == "d_v" else "mlp", config.layers[index]))

    def exact(config: DecoderConfig, grids: Mapping[str, Grid]) -> float:
        return of(model.predict(config, grids))

    where = f"export {item.name} at a context of {load.context:,}" if decodes else f"export {item.name}"
    where += "" if decodes else f", {load.prompt:,} tokens"
    limit = 1 / given if decodes else given / 1000
    return SpeedPrices(budget.key, f"{given:g}", limit, unit, half, exact, stored, where)
