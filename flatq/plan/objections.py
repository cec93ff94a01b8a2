"""Pre-flight checks: every reason why an exporter or GPTQ cannot handle the planned model, before hours of work.

Widths may depend on measurements, so some objections are known only after these. Objections that are independent of the
widths are raised first: an unsupported tokenizer, and different widths per layer in a format that needs equal widths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from flatq.compress.plan import uneven
from flatq.errors import RecipeError
from flatq.evaluate.tasks import absent_for_tasks
from flatq.export.planned import PlannedExport, absent_packages_of
from flatq.export.protocols import Exporter
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.plan.sizes import too_few_tokens
from flatq.quantize.grids import objections, possible_grids
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source


def raise_objections(
    recipe: Recipe, config: DecoderConfig, exports: list[PlannedExport], grids: Mapping[str, Grid] | None = None
) -> None:
    """Raise all objections of exporters and GPTQ to the planned model.

    Args:
        grids: from ``plan.decide.bit_plan``; None checks all grids that the recipe can lead to.

    Raises:
        RecipeError: lists all objections.
    """
    if problems := objections(config, recipe.gptq) + exporter_objections(recipe, config, exports, grids):
        raise RecipeError(problems)


def exporter_objections(
    recipe: Recipe, config: DecoderConfig, exports: list[PlannedExport], grids: Mapping[str, Grid] | None = None
) -> list[str]:
    """Objections of the exporters, without duplicates."""
    possible = possible_grids(config, recipe.gptq) if grids is None else [grids]
    words = [
        f"exports.{item.name}: {words}"
        for some in possible
        for item in exports
        for words in item.exporter.check(config, some, item.options)
    ]
    return list(dict.fromkeys(words))


def raise_absent_packages(exports: list[PlannedExport], recipe: Recipe | None = None) -> None:
    """Raise an error for exports or tasks that need packages that are not installed, before the run starts.

    Raises:
        RecipeError: lists the missing packages, with the command that installs each.
    """
    if problems := absent_packages_of(exports) + (absent_for_tasks(recipe) if recipe is not None else []):
        raise RecipeError(problems)


def raise_early_objections(recipe: Recipe, source: Source, exports: list[PlannedExport]) -> None:
    """Raise the objections that are independent of the ranks: to the tokenizer, and to different widths per layer.

    Without a flat stage the ranks are known, so all objections are raised.

    Raises:
        RecipeError: lists all objections.
    """
    problems = too_few_tokens(recipe, source.config)
    carriers = [item for item in exports if type(item.exporter).check_tokenizer is not Exporter.check_tokenizer]
    if carriers and source.has_tokenizer:  # loading a tokenizer is slow, so only if an exporter checks it
        described = json.loads(source.tokenizer().backend_tokenizer.to_str())
        for item in carriers:
            found = item.exporter.check_tokenizer(described, source.config, item.options)
            problems += [f"exports.{item.name}: {words}" for words in found]
    if recipe.flat is None:
        problems += exporter_objections(recipe, source.config, exports)
    else:
        even = exporter_objections(recipe, source.config, exports)
        differing = exporter_objections(recipe, uneven(source.config, recipe.flat), exports)
        problems += [words for words in differing if words not in even]
    if problems:
        raise RecipeError(problems)
