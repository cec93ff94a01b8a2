"""What the exporters and the quantizer would object to, asked for before hours of work.

The widths of a plan follow from the weights, so some objections can only be heard once they are measured. Others hold
whatever the widths will be, and are heard first: that the tokenizer cannot be carried, and that layers will differ
where a format wants them alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from flatq.compress.stage import uneven
from flatq.errors import RecipeError
from flatq.export.deliver import PlannedExport
from flatq.export.protocols import TokenizerCarrier
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.quantize.stage import objections, possible_grids
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source


def refuse(
    recipe: Recipe, config: DecoderConfig, exports: list[PlannedExport], grids: Mapping[str, Grid] | None = None
) -> None:
    """Hear every objection to the planned model now, before hours of work.

    Args:
        grids: as ``plans.bit_plan`` decided; None takes what is known without measuring, and all that could be chosen.

    Raises:
        RecipeError: all objections at once.
    """
    if problems := objections(config, recipe.gptq) + heard(recipe, config, exports, grids):
        raise RecipeError(problems)


def heard(
    recipe: Recipe, config: DecoderConfig, exports: list[PlannedExport], grids: Mapping[str, Grid] | None = None
) -> list[str]:
    """What the exporters object to, each objection once."""
    possible = possible_grids(config, recipe.gptq) if grids is None else [grids]
    words = [
        f"exports.{item.name}: {words}"
        for some in possible
        for item in exports
        for words in item.exporter.check(config, some, item.options)
    ]
    return list(dict.fromkeys(words))


def refuse_early(recipe: Recipe, source: Source, exports: list[PlannedExport]) -> None:
    """Hear what the exporters object to whatever the ranks will be: the tokenizer, and layers that differ.

    Without a flat stage the ranks are known, and so is every objection.

    Raises:
        RecipeError: all objections at once.
    """
    problems: list[str] = []
    carriers = [item for item in exports if isinstance(item.exporter, TokenizerCarrier)]
    if carriers and source.has_tokenizer:
        described = json.loads(source.tokenizer().backend_tokenizer.to_str())
        for item in carriers:
            assert isinstance(item.exporter, TokenizerCarrier)
            found = item.exporter.check_tokenizer(described, source.config, item.options)
            problems += [f"exports.{item.name}: {words}" for words in found]
    if recipe.flat is None:
        problems += heard(recipe, source.config, exports)
    else:
        even = heard(recipe, source.config, exports)
        differing = heard(recipe, uneven(source.config, recipe.flat), exports)
        problems += [words for words in differing if words not in even]
    if problems:
        raise RecipeError(problems)
