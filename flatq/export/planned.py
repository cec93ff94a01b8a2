"""The exports that a recipe plans: exporter and validated options, and what is not installed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

from flatq.errors import RecipeError
from flatq.export.protocols import Exporter, exporter_named
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
    """Find every exporter that the recipe names and validate its options.

    Args:
        recipe: what to do.
        verify: False switches the verification of all exports off, as ``verify: false`` does for one.

    Raises:
        RecipeError: all unknown exporters and wrong options at once.
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


def absent_packages_of(items: Sequence[PlannedExport]) -> list[str]:
    """Packages without which these exports cannot be written or, where that is wanted, verified; with the way out."""
    problems = []
    for item in items:
        writing = item.exporter.missing(item.options, opening=False)
        problems += [f"exports.{item.name}: cannot be written: {absent}" for absent in writing]
        if item.verify:
            problems += [
                f"exports.{item.name}: cannot be verified: {absent}; or write it unverified with `verify: false` in "
                "the recipe or --no-verify on the command line"
                for absent in item.exporter.missing(item.options)
                if absent not in writing
            ]
    return problems


def has_runtime(item: PlannedExport) -> bool:
    """Whether the format has a runtime that is installed here."""
    return bool(item.exporter.providers()) and not item.exporter.missing(item.options)


def absent_providers(recipe: Recipe, planned: Sequence[PlannedExport]) -> list[str]:
    """What ``bench.provider`` asks for and the runtimes that are installed here do not have."""
    wanted = recipe.bench.provider if recipe.bench else "auto"
    lacking = {
        item.format for item in planned if (found := item.exporter.providers()) and wanted not in (*found, "auto")
    }
    return [
        recipe.problem(
            ("bench", "provider"),
            f"{wanted} was asked for, but the runtime of {form} that is installed here does not have it; use auto, or "
            "check the recipe where it will run",
        )
        for form in sorted(lacking)
    ]


def needs_cache_ranges(items: Sequence[PlannedExport]) -> bool:
    """Whether one of them keeps keys and values in few bits."""
    return any(item.exporter.needs_cache_ranges(item.options) for item in items)
