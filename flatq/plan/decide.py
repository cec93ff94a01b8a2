"""What the model will look like, decided before the walk: widths for FLAT, bits for GPTQ.

Each plan is measured where its recipe asks for it. A measurement is a phase of the run folder, so that a killed run
measures nothing twice.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flatq.calibration.importance import layer_importance
from flatq.calibration.sensitivity import Sensitivity, output_sensitivity
from flatq.calibration.states import WORKING_SET, Execution
from flatq.calibration.tokens import Tokens
from flatq.compress.allocate import Curves
from flatq.compress.error_curves import error_curves
from flatq.compress.plan import RankPlan, plan_ranks
from flatq.model.grid import Grid
from flatq.quantize.bit_errors import bit_errors
from flatq.quantize.bits import choose
from flatq.quantize.grids import planned_grids
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder
from flatq.sources.source import Source


def measurements(recipe: Recipe, *, narrows: bool = True) -> list[str]:
    """Names of the phases that come before the walk, in their order.

    Args:
        narrows: whether the plan leaves anything out; if not, there is nothing to allocate.
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
    """The plan with equal shares: from shapes alone, where the real one may follow from the weights.

    Raises:
        RecipeError: the budget cannot be reached.
    """
    if recipe.flat is None:
        return RankPlan(source.config.layers, 1.0, 1.0)
    return plan_ranks(source.config, recipe.flat, gptq=recipe.gptq, itemsize=source.dtype.itemsize)


def rank_plan(
    recipe: Recipe, source: Source, tokens: Tokens, folder: RunFolder, device: str, room: int = WORKING_SET
) -> RankPlan:
    """Widths of the compressed model; measures what the allocation goes by."""
    spec, config, first = recipe.flat, source.config, draft(recipe, source)
    if spec is None or first.layers == config.layers:
        return first
    execution = Execution.of(recipe.calibration, device, room)

    def importance() -> list[float]:
        return layer_importance(source, tokens.calibration, folder.work, execution=execution)

    def curves() -> list[dict[str, Any]]:
        fisher = Sensitivity(config, folder.work)
        found = error_curves(source, tokens.calibration, fisher, folder.work, ridge=spec.ridge, execution=execution)
        return [asdict(curve) for curve in found]

    if spec.sensitive:
        _sense(source, tokens, folder, execution)
    measured: dict[str, Any] = {}
    if spec.parts.allocation == "curves":
        measured["curves"] = [Curves(**curve) for curve in folder.phase("curves", curves)]
    elif spec.parts.allocation == "iprs":
        measured["importance"] = folder.phase("importance", importance)
    return plan_ranks(config, spec, **measured, gptq=recipe.gptq, itemsize=source.dtype.itemsize)


def bit_plan(
    recipe: Recipe,
    source: Source,
    tokens: Tokens,
    plan: RankPlan,
    folder: RunFolder,
    device: str,
    room: int = WORKING_SET,
) -> dict[str, Grid]:
    """Grid of every weight that will be quantized; measures errors if the recipe gives an average to keep to."""
    spec, config = recipe.gptq, source.config.with_layers(plan.layers)
    if spec is None or spec.average_bits is None:
        return planned_grids(config, spec)
    execution = Execution.of(recipe.calibration, device, room)

    def errors() -> dict[str, dict[str, float]]:
        fisher = Sensitivity(source.config, folder.work)
        return bit_errors(source, tokens.calibration, spec, fisher, folder.work, execution=execution)

    _sense(source, tokens, folder, execution)
    return planned_grids(config, spec, choose(config, spec, folder.phase("bits", errors)))


def _sense(source: Source, tokens: Tokens, folder: RunFolder, execution: Execution) -> None:
    """Measure how much the loss minds errors, unless an earlier plan or run did."""

    def measure() -> None:
        output_sensitivity(source, tokens.calibration, folder.work, execution=execution)

    folder.phase("sensitivity", measure)
