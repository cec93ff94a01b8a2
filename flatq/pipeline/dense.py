"""The dense model in the bench: measured beside the first run's exports, and only once for several runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flatq.export.baseline import BASELINE
from flatq.export.planned import PlannedExport
from flatq.job import Job
from flatq.kept import keep, key_of, read
from flatq.recipe.grammar import Recipe


def dense_once(
    job: Job, exports: Sequence[PlannedExport], measure: Callable[[Recipe], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Results of the bench, JSON-ready; the dense model's may be of an earlier run.

    The first run measures it in turn with its exports. Later runs of ``job.measurements`` neither write nor measure it.

    Args:
        job: the run.
        exports: those that were written.
        measure: the bench of a recipe, see ``export.deliver.measured``.
    """
    recipe, root = job.recipe, job.measurements
    if root is None or recipe.bench is None or not recipe.bench.baseline:
        return measure(recipe)
    formats = [(item.format, item.exporter.dense(item.options)) for item in exports]
    written = [(name, None if options is None else options.model_dump(mode="json")) for name, options in formats]
    load = recipe.bench.model_dump(mode="json")
    entry = root / f"dense-bench-{key_of(job.dense | {'bench': load, 'formats': written})}.json"
    known = read(entry, dict[str, Any])
    if known is not None:
        alone = recipe.model_copy(update={"bench": recipe.bench.model_copy(update={"baseline": False})})
        return [*known, *measure(alone)]
    results = measure(recipe)
    for result in results:
        if result["name"] == BASELINE:
            keep(entry, result, dict[str, Any])
    return results
