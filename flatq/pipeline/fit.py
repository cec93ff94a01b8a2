"""``budget: {max_damage}``: the smallest model that keeps a damage, found by a few walks.

Predicted losses rank plans well, but their scale is only right for small ones. So a plan is made by prediction, built
and evaluated; the next one aims at the predicted loss at which the measured damage would be the limit (by the power law
of the last two walks, or between the nearest plans on both sides). Each walk is a phase of the run folder, so that an
interrupted run repeats none. The artifact of the smallest model that keeps the limit becomes the artifact of the run.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flatq.artifact import Artifact
from flatq.budget.bought import bought
from flatq.budget.joint import JointPlan, plan_of_loss
from flatq.budget.measure import measure, measure_sensitivity
from flatq.budget.problem import problem_of
from flatq.calibration.divergence import DenseStates
from flatq.calibration.sensitivity import FILE
from flatq.compress.plan import RankPlan
from flatq.errors import RecipeError
from flatq.export.planned import PlannedExport
from flatq.files import link_or_copy
from flatq.job import Job
from flatq.machine import distributed
from flatq.model.grid import Grid
from flatq.pipeline.build import build
from flatq.pipeline.quality import log_quality, model_quality
from flatq.plan.objections import raise_objections
from flatq.run_folder import RunFolder
from flatq.units import size

log = logging.getLogger(__name__)
WALKS = 5  # at most
CLOSE = 0.85  # of the limit: a damage above it ends the search
LEAP = 6.0  # largest factor from the first walk's predicted loss to the second's; its square to the third's, and so on
MARGIN = 0.95  # aimed below the limit by this factor


@dataclass(frozen=True, slots=True)
class Walk:
    """One plan that was built and evaluated."""

    number: int
    plan: JointPlan
    damage: float


def search(wanted: float, make: Callable[[float], JointPlan], judge: Callable[[int, JointPlan], float]) -> list[Walk]:
    """Plans and their measured damages, until one is close below the limit, nothing changes, or ``WALKS`` are made.

    Args:
        wanted: the limit, in nats.
        make: the smallest plan of a predicted loss.
        judge: the measured damage of a plan, given its number.
    """
    walks: list[Walk] = []
    target = wanted
    while len(walks) < WALKS:
        plan = make(target)
        if any(plan.ranks.layers == walk.plan.ranks.layers and plan.grids == walk.plan.grids for walk in walks):
            break
        walks.append(Walk(len(walks), plan, judge(len(walks), plan)))
        if CLOSE * wanted <= walks[-1].damage <= wanted:
            break
        target = next_target(wanted, walks)
    return walks


def next_target(wanted: float, walks: Sequence[Walk]) -> float:
    """The predicted loss to try next."""
    below = max((walk for walk in walks if walk.damage <= wanted), key=lambda walk: walk.plan.predicted, default=None)
    above = min((walk for walk in walks if walk.damage > wanted), key=lambda walk: walk.plan.predicted, default=None)
    if below is None or above is None or below.plan.predicted >= above.plan.predicted:
        last = walks[-1]
        ratio = (MARGIN * wanted / max(last.damage, 1e-6)) ** (1 / _power(walks))
        leap = LEAP ** len(walks)
        return last.plan.predicted * min(max(ratio, 1 / leap), leap)
    low, high = max(below.damage, 0.01 * wanted), above.damage
    share = math.log(MARGIN * wanted / low) / math.log(high / low)
    ends = below.plan.predicted, above.plan.predicted
    return ends[0] * (ends[1] / ends[0]) ** min(max(share, 0.1), 0.9)


def _power(walks: Sequence[Walk]) -> float:
    """By which power of the prediction the damage grew between the last two walks; 1 with a single walk."""
    if len(walks) < 2:
        return 1.0
    before, last = walks[-2:]
    grown = math.log(max(last.damage, 1e-6) / max(before.damage, 1e-6))
    step = math.log(last.plan.predicted / before.plan.predicted)
    return min(max(grown / step, 0.4), 2.5) if step else 1.0


def fitted(
    job: Job, exports: Sequence[PlannedExport], dense: DenseStates, origins: Mapping[str, Any]
) -> tuple[RankPlan, dict[str, Grid], list[str]]:
    """The smallest model that keeps the limit: widths, grids, and in words how it was found; its artifact is built.

    Raises:
        RecipeError: no walk kept the limit; with the damage that one kept.
    """
    recipe, budget = job.recipe, job.recipe.budget
    if budget is None or budget.max_damage is None:
        raise ValueError("the recipe has no max_damage")
    problem = problem_of(recipe, job.source.config, exports, job.itemsize)
    errors = measure(job, problem)
    if recipe.flat is not None and recipe.flat.sensitive:
        measure_sensitivity(job, problem)

    def judge(number: int, plan: JointPlan) -> float:
        raise_objections(recipe, job.source.config.with_layers(plan.ranks.layers), list(exports), plan.grids)
        return job.folder.phase(f"fit-{number}", partial(_damage, job, number, plan, dense, origins), float)

    wanted = budget.max_damage
    walks = search(wanted, partial(plan_of_loss, problem, errors), judge)
    kept = [walk for walk in walks if walk.damage <= wanted]
    if not kept:
        best = min(walks, key=lambda walk: walk.damage)
        raise RecipeError(
            f"budget.max_damage: {wanted:g} was kept by none of {len(walks)} walks; the best lost {best.damage:.3f} "
            f"nats at {size(best.plan.ranks.achieved)}; choose {math.ceil(1000 * best.damage) / 1000:g} or more, or "
            "give more calibration text"
        )
    found = min(kept, key=lambda walk: walk.plan.ranks.achieved)
    _take(job, found)
    tried = "; ".join(f"{size(walk.plan.ranks.achieved)} lost {walk.damage:.3f}" for walk in walks)
    said = f"max_damage {wanted:g}: {found.damage:.3f} nats lost on the worst text; walks: {tried}"
    return found.plan.ranks, found.plan.grids, [said, *bought(problem, found.plan)]


def _folder(job: Job, number: int) -> RunFolder:
    return RunFolder(job.folder.work / "fits" / f"{number}", job.recipe, job.folder.inputs)


def _damage(job: Job, number: int, plan: JointPlan, dense: DenseStates, origins: Mapping[str, Any]) -> float:
    """Build a plan in a folder below the work folder; its largest damage on the texts of the evaluation."""
    folder = _folder(job, number)
    if not folder.has_artifact():
        if distributed.first() and (job.folder.work / FILE).exists():
            link_or_copy(job.folder.work / FILE, folder.work / FILE)
        distributed.barrier()
        build(replace(job, folder=folder), plan.ranks, plan.grids, origins)
    artifact = Artifact.open(folder.artifact, check=distributed.first())
    quality = model_quality(dense, artifact, job.tokens.evaluation, f"fit {number}")
    log_quality(quality, f"{size(plan.ranks.achieved)}")
    return max(float(text["damage"]) for text in quality)


def _take(job: Job, walk: Walk) -> None:
    """Make the artifact of a walk that of the run, unless an earlier process did."""
    if not job.folder.has_artifact() and distributed.first():
        built = _folder(job, walk.number)
        if built.artifact.exists():
            built.artifact.rename(job.folder.artifact)
    if distributed.first():
        shutil.rmtree(job.folder.work / "fits", ignore_errors=True)
    distributed.barrier()
