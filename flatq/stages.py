"""Which stages a recipe asks for, and what they need of the walk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flatq.calibration.sensitivity import Sensitivity
from flatq.compress.plan import RankPlan
from flatq.compress.stage import FlatStage
from flatq.model.decoder import DecoderConfig
from flatq.model.grid import Grid
from flatq.quantize.stage import GptqStage
from flatq.recipe.grammar import Recipe


def stages_of(
    recipe: Recipe, plan: RankPlan, grids: Mapping[str, Grid], config: DecoderConfig, work: Path
) -> list[FlatStage | GptqStage]:
    """What is done to each block, in order.

    Args:
        grids: of every weight that is to be quantized, by stem.
        config: the dense model's.
        work: holds the sensitivity, if the FLAT stage asks for one.
    """
    stages: list[FlatStage | GptqStage] = []
    if recipe.flat is not None:
        narrows = plan.layers != config.layers
        fisher = Sensitivity(config, work) if recipe.flat.sensitive and narrows else None
        stages.append(FlatStage(recipe.flat, plan, fisher))
    if recipe.gptq is not None:
        stages.append(GptqStage(recipe.gptq, grids))
    return stages


def walked_along(recipe: Recipe) -> tuple[bool, bool]:
    """What the stages want to know of the dense model on the way: ``reference`` and ``lag`` of ``walk``."""
    flat, gptq = recipe.flat, recipe.gptq
    return flat is not None and flat.corrects, gptq is not None and gptq.corrects
