"""Pre-flight checks: every reason why an exporter or GPTQ cannot handle the planned model, before hours of work.

The widths of a plan follow from the weights, so some objections are known only when they are measured. Others hold for
any widths and come first: a tokenizer that cannot be carried, and layers that differ where a format wants them alike.
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
    """Raise every objection to the planned model at once, before hours of work.

    Args:
        grids: as ``plan.decide.bit_plan`` decided; None takes every choice that the recipe leaves open.

    Raises:
        RecipeError: all objections at once.
    """
    if problems := objections(config, recipe.gptq) + exporter_objections(recipe, config, exports, grids):
        raise RecipeError(problems)


def exporter_objections(
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


def raise_absent_packages(exports: list[PlannedExport], recipe: Recipe | None = None) -> None:
    """Refuse exports that this machine cannot write or verify, and tasks that it cannot run, before hours of work.

    Raises:
        RecipeError: each package that is not installed, with the command that installs it.
    """
    if problems := absent_packages_of(exports) + (absent_for_tasks(recipe) if recipe is not None else []):
        raise RecipeError(problems)


def raise_early_objections(recipe: Recipe, source: Source, exports: list[PlannedExport]) -> None:
    """Raise what the exporters object to for any ranks: the tokenizer, and layers that differ.

    Without a flat stage the ranks are known, and so is every objection.

    Raises:
        RecipeError: all objections at once.
    """
    problems = too_few_tokens(recipe, source.config)
    carriers = [item for item in exports if type(item.exporter).check_tokenizer is not Exporter.check_tokenizer]
    if carriers and source.has_tokenizer:  # reading a tokenizer takes a while, so only for those who ask
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
