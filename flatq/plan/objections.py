"""Pre-flight checks: every reason why an exporter or GPTQ cannot handle the planned model, before hours of work.

Widths may depend on measurements, so some objections are known only after these. Objections that are independent of the
widths are raised first: an unsupported tokenizer, options that contradict each other or the stages, different widths
per layer in a format that needs equal widths.
"""

from __future__ import annotations

from collections.abc import Mapping

from flatq.compress.plan import shifted, uneven, uneven_mlps
from flatq.errors import RecipeError
from flatq.evaluate.tasks import absent_for_tasks
from flatq.export.planned import PlannedExport, absent_packages_of
from flatq.export.protocols import Exporter
from flatq.files import from_json
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.plan.decide import draft, drafted
from flatq.plan.positions import rows_that_do_not_fit
from flatq.plan.sizes import too_few_tokens
from flatq.quantize.grids import objections, possible_grids
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source
from flatq.tokenizer import beyond


def raise_objections(
    recipe: Recipe, config: DecoderConfig, exports: list[PlannedExport], grids: Mapping[str, Grid] | None = None
) -> None:
    """Raise all objections of exporters and GPTQ to the planned model.

    Args:
        grids: from ``plan.decide.bit_plan``; None checks all grids that the recipe can lead to.

    Raises:
        RecipeError: lists all objections.
    """
    unknown = recipe.budget is not None and grids is None
    if problems := objections(config, recipe.gptq, {} if unknown else grids) + exporter_objections(
        recipe, config, exports, grids
    ):
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


def absent_packages(exports: list[PlannedExport], recipe: Recipe | None = None) -> list[str]:
    """What the exports, and the tasks of a recipe, need and this machine lacks; with the command that installs it."""
    return absent_packages_of(exports) + (absent_for_tasks(recipe) if recipe is not None else [])


def raise_absent_packages(exports: list[PlannedExport], recipe: Recipe | None = None) -> None:
    """Raise an error for exports or tasks that need packages that are not installed, before the run starts.

    Raises:
        RecipeError: lists the missing packages, with the command that installs each.
    """
    if problems := absent_packages(exports, recipe):
        raise RecipeError(problems)


def tokenizer_objections(source: Source, exports: list[PlannedExport]) -> list[str]:
    """Objections to the model's tokenizer: a token without a row in the embedding, or those of the exporters.

    Raises:
        RecipeError: it cannot be opened.
    """
    tokenizer, rows = source.tokenizer(), source.config.vocab
    stray = beyond(tokenizer, rows)
    found = [
        f"model: the tokenizer adds {stray[number]!r} (id {number}) to every text, and the embedding has {rows} "
        "rows; get a tokenizer and weights that belong together"
        for number in sorted(set(tokenizer("a")["input_ids"]) & set(stray))
    ]
    carriers = [item for item in exports if type(item.exporter).check_tokenizer is not Exporter.check_tokenizer]
    if carriers:
        described = from_json(tokenizer.backend_tokenizer.to_str())
        for item in carriers:
            said = item.exporter.check_tokenizer(described, source.config, item.options)
            found += [f"exports.{item.name}: {words}" for words in said]
    return found


def tokenizer_cautions(source: Source) -> list[str]:
    """What is odd about the tokenizer and does not stop a run: tokens without an embedding, code that is not run."""
    if not source.has_tokenizer:
        return []
    found, stray = source.tokenizer_notes(), beyond(source.tokenizer(), source.config.vocab)
    if stray:
        shown = ", ".join(f"{token!r} (id {number})" for number, token in list(stray.items())[:3])
        more = f" and {len(stray) - 3} more" if len(stray) > 3 else ""
        found.append(
            f"tokenizer: the embedding has {source.config.vocab} rows, too few for {shown}{more}; texts and prompts "
            "with such a token are refused"
        )
    return found


def raise_early_objections(recipe: Recipe, source: Source, exports: list[PlannedExport]) -> None:
    """Raise the objections that no measurement can remove: tokenizer, sequence lengths, and ``certain_objections``.

    Raises:
        RecipeError: lists all objections, or the budget cannot be reached.
    """
    problems = too_few_tokens(recipe, source.config) + rows_that_do_not_fit(recipe, source.config, exports)
    if source.config.experts and recipe.budget is not None:
        raise RecipeError(
            [
                *problems,
                f"budget: bits and widths of the experts of {source.config.family} are not measured together; give "
                "keep_ratio, size or decode_bytes in a flat stage, and bits in a gptq stage",
            ]
        )
    if source.has_tokenizer or source.has_weights:
        problems += tokenizer_objections(source, exports)
    problems += certain_objections(recipe, source, exports)
    if problems:
        raise RecipeError(problems)


def certain_objections(recipe: Recipe, source: Source, exports: list[PlannedExport]) -> list[str]:
    """The exporters' objections that are independent of the widths that a measurement finds.

    These are the objections to a plan with equal shares that another plan gets in the same words (each exporter names
    the widths that it objects to), and those to layers of different widths. If nothing is measured, the plan is final,
    so all objections are certain.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    if recipe.budget is not None:
        ranks, grids = drafted(recipe, source, exports)
        even = exporter_objections(recipe, source.config, exports, grids)
        found = exporter_objections(recipe, source.config.with_layers(ranks.layers), exports, grids)
        return [words for words in found if words in even]
    flat, dense, planned = recipe.flat, source.config, draft(recipe, source).layers
    found = exporter_objections(recipe, dense.with_layers(planned), exports)
    if flat is None or flat.parts.allocation == "uniform" or planned == dense.layers:
        return found
    others = exporter_objections(recipe, shifted(dense, flat, planned), exports)
    even = exporter_objections(recipe, dense, exports)
    differing = exporter_objections(recipe, uneven(dense, flat), exports)
    once, twice = (exporter_objections(recipe, uneven_mlps(dense, flat, steps), exports) for steps in (1, 2))
    differing += [words for words in once if words in twice]
    certain = [words for words in found if words in others] + [words for words in differing if words not in even]
    return list(dict.fromkeys(certain))
