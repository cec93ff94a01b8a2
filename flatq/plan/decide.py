"""Decide the plan before the walk: widths for FLAT, bits for GPTQ.

Depending on the recipe a plan needs measurements. Each measurement is a phase of the run folder, so that an interrupted
run does not repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flatq.budget.bought import bought
from flatq.budget.joint import JointPlan, guessed, plan_jointly
from flatq.budget.measure import measure, measure_sensitivity
from flatq.budget.problem import Problem, problem_of
from flatq.calibration.importance import layer_importance
from flatq.calibration.sensitivity import Sensitivity
from flatq.compress.allocate import Curves
from flatq.compress.error_curves import error_curves
from flatq.compress.plan import RankPlan, plan_ranks
from flatq.export.planned import PlannedExport
from flatq.job import Job
from flatq.model.grid import Grid
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.bits import choose
from flatq.quantize.grids import planned_grids
from flatq.recipe.budget import SPEEDS
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source


def decided(job: Job, exports: Sequence[PlannedExport]) -> tuple[RankPlan, dict[str, Grid], list[str]]:
    """Widths, the grid of every weight to quantize, and for a budget what it was spent on, in words."""
    if job.recipe.budget is None:
        plan = rank_plan(job)
        return plan, bit_plan(job, plan), []
    problem = problem_of(job.recipe, job.source.config, exports, job.itemsize)
    planned = _planned(job, problem)
    if planned.ranks.layers != job.source.config.layers and job.recipe.flat is not None and job.recipe.flat.sensitive:
        measure_sensitivity(job, problem)
    return planned.ranks, planned.grids, bought(problem, planned)


def _planned(job: Job, problem: Problem) -> JointPlan:
    """The plan for a budget; with a limit of speed kept in the run folder, because kernels measured again differ."""

    def plan() -> JointPlan:
        return plan_jointly(problem, measured)

    measured = measure(job, problem)
    return job.folder.phase("plan", plan, JointPlan) if problem.prices.key in SPEEDS else plan()


def drafted(
    recipe: Recipe, source: Source, exports: Sequence[PlannedExport]
) -> tuple[RankPlan, dict[str, Grid] | None]:
    """The plan from shapes alone: with equal fractions for all layers, or for a budget from guessed errors.

    Returns:
        Widths; and grids, None if they follow from the gptq stage.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    if recipe.budget is None:
        return draft(recipe, source), None
    problem = problem_of(recipe, source.config, exports, source.dtype.itemsize)
    planned = plan_jointly(problem, guessed(problem))
    return planned.ranks, planned.grids


def measurements(recipe: Recipe, *, narrows: bool = True) -> list[str]:
    """Names of the measurement phases before the walk, in order.

    Args:
        narrows: whether the plan reduces any width; if not, there is nothing to allocate.
    """
    flat = recipe.flat if narrows else None
    allocation = None if flat is None else flat.parts.allocation
    chooses = recipe.gptq is not None and recipe.gptq.average_bits is not None
    if recipe.budget is not None:
        asked = {"sensitivity": True, "curves": recipe.flat is not None, "choices": recipe.gptq is not None}
        return [phase for phase, is_asked in asked.items() if is_asked]
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
        measure_sensitivity(job)
    measured: dict[str, Any] = {}
    if spec.parts.allocation == "curves":
        measured["curves"] = job.measured("curves", curves, list[Curves])
    elif spec.parts.allocation == "iprs":
        measured["importance"] = job.measured("importance", importance, list[float])
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

    measure_sensitivity(job)
    return planned_grids(config, spec, choose(config, spec, job.measured("bits", errors, dict[str, dict[str, float]])))
