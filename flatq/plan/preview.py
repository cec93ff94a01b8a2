"""The commands ``check`` and ``plan``: what can be said of a recipe before any weight is read.

They are not among the other commands, so that nothing is imported that only a run needs: most of the time of a plan is
the import of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flatq.budget.bought import bought
from flatq.budget.joint import plan_jointly, plan_of_loss
from flatq.budget.measure import keys_of, known
from flatq.budget.problem import problem_of
from flatq.budget.speeds import predicted_speeds
from flatq.calibration.self_text import SelfText
from flatq.calibration.tokens import SELF_TEXT, self_tokens, token_batches
from flatq.compress.plan import RankPlan
from flatq.export.planned import PlannedExport, needs_cache_ranges, planned_exports
from flatq.machine.device import resolve_device
from flatq.model.grid import Grid
from flatq.plan.decide import drafted
from flatq.plan.describe import described, explanation, forecast, of_experts
from flatq.plan.forecast import forecasts
from flatq.plan.objections import absent_packages, raise_early_objections, raise_objections, tokenizer_cautions
from flatq.quantize.grids import planned_grids
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source, open_named


def check(recipe: Recipe) -> list[str]:
    """A description of the recipe, and warnings about packages that its exports need.

    For a model in a local folder, config.json and the tokenizer are read as well, to describe and check the model.

    Raises:
        RecipeError: an exporter is missing, its options are invalid, or it does not support the model.
    """
    exports, lines = planned_exports(recipe), explanation(recipe)
    if (Path(recipe.model.path) / "config.json").is_file():
        source, _, _ = _from_shapes(recipe, exports)
        lines.insert(1, f"             {described(source.config)}")
        lines += of_experts(recipe, source.config)
        lines += [f"! {caution}" for caution in tokenizer_cautions(source)]
    return lines + _warnings(recipe, exports)


def _from_shapes(recipe: Recipe, exports: list[PlannedExport]) -> tuple[Source, RankPlan, Mapping[str, Grid] | None]:
    """The model without its weights, and the plan that needs no measurements, see ``plan.decide.drafted``.

    Raises:
        RecipeError: the budget cannot be reached, or GPTQ or an exporter does not support the planned model.
    """
    source = open_named(recipe.model, need_weights=False)
    raise_early_objections(recipe, source, exports)
    planned, grids = drafted(recipe, source, exports)
    raise_objections(recipe, source.config.with_layers(planned.layers), exports, grids)
    return source, planned, grids


def _bought(recipe: Recipe, exports: list[PlannedExport], measurements: Path, device: str) -> list[str]:
    """What the budget buys, from the measurements of earlier runs with this model, text and choices."""
    source, text = open_named(recipe.model), recipe.calibration
    none = [f"{measurements}: holds no measurements of this model, text and choices; `flatq run` makes them"]
    place = measurements / SELF_TEXT
    if self_tokens(text, recipe.evaluation) and not place.is_dir():
        return none
    writer = SelfText(source, place, device, text.precision)
    tokens = token_batches(text, recipe.evaluation, source.tokenizer(), writer)
    problem = problem_of(recipe, source.config, exports, source.dtype.itemsize)
    found = known(measurements, keys_of(recipe, source, tokens.calibration, problem))
    if found is None:
        return none
    limit = None if recipe.budget is None else recipe.budget.max_damage
    if limit is None:
        return bought(problem, plan_jointly(problem, found))
    return ["the first of a few walks for max_damage:", *bought(problem, plan_of_loss(problem, found, limit))]


def _warnings(recipe: Recipe, exports: list[PlannedExport]) -> list[str]:
    """Missing packages, as warnings: the recipe may be meant for another machine."""
    return [f"! {problem}" for problem in absent_packages(exports, recipe)]


def plan(recipe: Recipe, *, device: str = "auto", speed: bool = False, measurements: Path | None = None) -> str:
    """Predicted parameters, sizes, memory and time, from the model's shapes alone.

    Args:
        recipe: to plan.
        device: of the computation.
        speed: predict the speed of the exports too, from this machine's kernels, which may have to be measured.
        measurements: folder of earlier runs; if it has what a budget is planned from, the text is also what the budget
            buys, in words.

    Raises:
        RecipeError: an exporter does not support the planned model.
    """
    exports = planned_exports(recipe)
    source, planned, grids = _from_shapes(recipe, exports)
    config = source.config
    ranges = needs_cache_ranges(exports)
    there = resolve_device(device)
    phases = forecasts(recipe, config, planned.layers, device=there, ranges=ranges)
    text = forecast(recipe, config, planned, exports, source.dtype.itemsize, phases, grids)
    if speed:
        narrowed = config.with_layers(planned.layers)
        chosen = planned_grids(narrowed, recipe.gptq) if grids is None else grids
        text += "".join(f"{line}\n" for line in predicted_speeds(recipe, config, narrowed, chosen, exports))
    said = [*tokenizer_cautions(source), *_warnings(recipe, exports)]
    if measurements is not None and recipe.budget is not None:
        said = [*_bought(recipe, exports, measurements, there), *said]
    return text + "".join(f"{warning}\n" for warning in said)
