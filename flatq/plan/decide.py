"""Decide the plan before the walk: widths for FLAT, bits for GPTQ.

Depending on the recipe a plan needs measurements. Each measurement is a phase of the run folder, so that an interrupted
run does not repeat it.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from flatq.calibration.importance import layer_importance
from flatq.calibration.sensitivity import Sensitivity, output_sensitivity
from flatq.compress.allocate import Curves
from flatq.compress.error_curves import error_curves
from flatq.compress.plan import RankPlan, plan_ranks
from flatq.job import Job
from flatq.model.grid import Grid
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.bits import choose
from flatq.quantize.grids import planned_grids
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source


def measurements(recipe: Recipe, *, narrows: bool = True) -> list[str]:
    """Names of the measurement phases before the walk, in order.

    Args:
        narrows: whether the plan reduces any width; if not, there is nothing to allocate.
    """
    flat = recipe.flat if narrows else None
    allocation = None if flat is None else flat.parts.allocation
    chooses = recipe.gptq is not None and recipe.gptq.average_bits is not None
    wanted = {
        "sensitivity": chooses or (flat is not None and flat.sensitive),
        "curves": allocation == "curves",
        "importance": allocation == "iprs",
        "bits": chooses,
    }
    return [phase for phase, asked in wanted.items() if asked]


def draft(recipe: Recipe, source: Source) -> RankPlan:
    """The plan with equal fractions for all layers, from shapes alone; the final plan may need measurements.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    if recipe.flat is None:
        return RankPlan(source.config.layers, 1.0, 1.0)
    return plan_ranks(source.config, recipe.flat, gptq=recipe.gptq, itemsize=source.dtype.itemsize)


def rank_plan(job: Job) -> RankPlan:
    """Widths of the compressed model, after the measurements that the allocation needs."""
    recipe, source, folder, execution = job.recipe, job.source, job.folder, job.execution
    spec, config, first = recipe.flat, source.config, draft(recipe, source)
    if spec is None or first.layers == config.layers:
        return first

    def importance() -> list[float]:
        return layer_importance(source, job.tokens.calibration, folder.work, execution=execution)

    def curves() -> list[Curves]:
        fisher = Sensitivity(config, folder.work)
        return error_curves(source, job.tokens.calibration, fisher, folder.work, ridge=spec.ridge, execution=execution)

    if spec.sensitive:
        _measure_sensitivity(job)
    measured: dict[str, Any] = {}
    if spec.parts.allocation == "curves":
        measured["curves"] = folder.phase("curves", curves, list[Curves])
    elif spec.parts.allocation == "iprs":
        measured["importance"] = folder.phase("importance", importance, list[float])
    return plan_ranks(config, spec, **measured, gptq=recipe.gptq, itemsize=job.itemsize)


def bit_plan(job: Job, plan: RankPlan) -> dict[str, Grid]:
    """Grid of every weight that will be quantized; for ``average_bits`` after measuring quantization errors."""
    source, folder = job.source, job.folder
    spec, config = job.recipe.gptq, source.config.with_layers(plan.layers)
    if spec is None or spec.average_bits is None:
        return planned_grids(config, spec)

    def errors() -> dict[str, dict[str, float]]:
        fisher = Sensitivity(source.config, folder.work)
        return bit_errors(source, job.tokens.calibration, spec, fisher, folder.work, execution=job.execution)

    _measure_sensitivity(job)
    return planned_grids(config, spec, choose(config, spec, folder.phase("bits", errors, dict[str, dict[str, float]])))


def _measure_sensitivity(job: Job) -> None:
    """Measure the Fisher information of the residual stream, unless an earlier plan or run did."""

    def measure() -> None:
        output_sensitivity(job.source, job.tokens.calibration, job.folder.work, execution=job.execution)

    job.folder.phase("sensitivity", measure, NoneType)
