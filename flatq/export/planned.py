"""The exports of a recipe with their exporters and validated options; checks for missing packages and providers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from flatq.errors import RecipeError
from flatq.export.protocols import Exporter, exporter_named
from flatq.model.config import DecoderConfig
from flatq.recipe.blocks import ExportSpec
from flatq.recipe.grammar import Recipe, explain_options


@dataclass(frozen=True, slots=True)
class PlannedExport:
    """One entry of the recipe's ``exports`` with its exporter and validated options."""

    name: str
    format: str
    exporter: Exporter
    options: BaseModel
    verify: bool = True


def planned_exports(recipe: Recipe, *, verify: bool = True) -> list[PlannedExport]:
    """Find the exporters of a recipe and validate their options.

    Args:
        recipe: of the run.
        verify: False disables the verification of all exports, as ``verify: false`` does for one.

    Raises:
        RecipeError: lists all unknown exporters and wrong options.
    """
    planned, problems = [], list[str]()
    for index, spec in enumerate(recipe.exports):
        try:
            exporter = exporter_named(spec.format)
            planned.append(_planned(spec, exporter, verify))
        except RecipeError as error:
            problems += error.problems
        except ValidationError as error:
            problems += explain_options(recipe, index, exporter.Options, error)
    problems += absent_providers(recipe, planned)
    if problems:
        raise RecipeError(problems)
    return planned


def _planned(spec: ExportSpec, exporter: Exporter, verify: bool) -> PlannedExport:
    return PlannedExport(spec.name, spec.format, exporter, exporter.Options(**spec.options), spec.verify and verify)


def context_length(options: BaseModel, config: DecoderConfig) -> int:
    """Maximum number of positions of an export: its option of that name, else the model's."""
    return getattr(options, "context_length", None) or config.max_positions


def absent_packages_of(items: Sequence[PlannedExport]) -> list[str]:
    """Messages about packages that are needed to write or verify these exports and are not installed."""
    problems = []
    for item in items:
        writing = item.exporter.missing(item.options, opening=False)
        problems += [f"exports.{item.name}: cannot be written: {absent}" for absent in writing]
        if item.verify:
            problems += [
                f"exports.{item.name}: cannot be verified: {absent}; or disable verification with `verify: false` in "
                "the recipe or --no-verify on the command line"
                for absent in item.exporter.missing(item.options)
                if absent not in writing
            ]
    return problems


def has_runtime(item: PlannedExport) -> bool:
    """Whether a runtime of the format is installed."""
    return bool(item.exporter.providers()) and not item.exporter.missing(item.options)


def absent_providers(recipe: Recipe, planned: Sequence[PlannedExport]) -> list[str]:
    """Messages about exports whose installed runtime does not support ``bench.provider``."""
    wanted = recipe.bench.provider if recipe.bench else "auto"
    if wanted == "auto":
        return []  # no runtime is imported
    lacking = {item.format for item in planned if (found := item.exporter.providers()) and wanted not in found}
    return [
        recipe.problem(
            ("bench", "provider"),
            f"{wanted} is not available in the installed runtime of {form}; use auto, or check the recipe on the "
            "machine where it will run",
        )
        for form in sorted(lacking)
    ]


def needs_cache_ranges(items: Sequence[PlannedExport]) -> bool:
    """Whether one of the exports has a quantized KV cache."""
    return any(item.exporter.needs_cache_ranges(item.options) for item in items)
