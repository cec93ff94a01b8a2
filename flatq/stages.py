"""The compression stages of a recipe, and what they need from the walk over the model."""

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
    """The stages to apply to each block, in order.

    Args:
        recipe: of the run.
        plan: widths of every layer.
        grids: quantization grid of every weight that is to be quantized, by stem.
        config: of the dense model.
        work: folder with the Fisher information, if the FLAT stage needs it.
    """
    stages: list[FlatStage | GptqStage] = []
    if recipe.flat is not None:
        narrows = plan.layers != config.layers
        fisher = Sensitivity(config, work) if recipe.flat.sensitive and narrows else None
        stages.append(FlatStage(recipe.flat, plan, fisher))
    if recipe.gptq is not None:
        stages.append(GptqStage(recipe.gptq, grids))
    return stages


def dense_states_needed(recipe: Recipe) -> tuple[bool, bool]:
    """Whether the walk must track the dense model for the stages: arguments ``reference`` and ``lag`` of ``walk``."""
    flat, gptq = recipe.flat, recipe.gptq
    return flat is not None and flat.corrects, gptq is not None and gptq.corrects
