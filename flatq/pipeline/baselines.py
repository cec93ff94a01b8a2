"""Quantized baselines: the same model quantized without narrowing, built and evaluated in the same run.

There are two: ``quantized`` has the recipe's bits and is therefore larger than the result; ``same_bytes`` has fewer
bits or larger groups, so that it is about as large as the result. Both are calibrated on the same tokens and evaluated
on the same texts. Their artifacts are in the work folder and are removed with it; only their measures are reported.

Each baseline needs another walk over the model, which takes about as long as the compression, so they are optional.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flatq.artifact import Artifact
from flatq.calibration.divergence import DenseStates
from flatq.compress.plan import RankPlan
from flatq.job import Job
from flatq.machine import distributed
from flatq.model.decoder import DecoderConfig
from flatq.model.footprint import decode_bytes, weight_bytes
from flatq.pipeline.build import build
from flatq.pipeline.quality import log_quality, model_quality
from flatq.plan.decide import bit_plan, draft
from flatq.quantize.grids import objections, planned_grids
from flatq.recipe.blocks import GptqSpec
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder

BITS, GROUPS = (2, 3, 4, 8), (16, 32, 64, 128, 256, -1)


@dataclass(frozen=True, slots=True)
class QuantizedBaseline:
    """A quantized baseline: ``quantized`` or ``same_bytes``, its stage, and the context of its decode bytes."""

    name: str
    spec: GptqSpec
    context: int

    @property
    def words(self) -> str:
        """``4 bit, groups of 32``."""
        bits = f"{self.spec.bits}" if self.spec.average_bits is None else f"{self.spec.average_bits:g} (on average)"
        group = "one group per row" if self.spec.group_size == -1 else f"groups of {self.spec.group_size}"
        return f"{bits} bit, {group}"

    def recipe(self, recipe: Recipe) -> Recipe:
        """The run's recipe with only this stage."""
        return recipe.model_copy(update={"stages": (self.spec,), "exports": (), "bench": None, "budget": None})


def baselines_of(recipe: Recipe, dense: DecoderConfig, target: int, itemsize: int) -> list[QuantizedBaseline]:
    """The quantized baselines of a recipe; none unless it both narrows and quantizes.

    Args:
        target: bytes of the result's weights, for ``same_bytes``.
        itemsize: bytes of an unquantized number.
    """
    spec, flat = recipe.gptq, recipe.flat
    if spec is None or flat is None:
        return []
    found = {"quantized": spec}
    if "same_bytes" in recipe.baselines:
        found["same_bytes"] = nearest_in_bytes(spec, dense, target, itemsize)
    wanted = [(name, stage) for name, stage in found.items() if name in recipe.baselines]
    return [QuantizedBaseline(name, stage, flat.cache_context) for name, stage in wanted]


def nearest_in_bytes(spec: GptqSpec, dense: DecoderConfig, target: int, itemsize: int) -> GptqSpec:
    """The bits and group size whose size is nearest to ``target`` bytes, as a ratio; ties go to more bits."""

    def distance(stage: GptqSpec) -> tuple[float, int]:
        size = weight_bytes(dense, planned_grids(dense, stage), itemsize)
        return abs(math.log(size / target)), -stage.bits

    stages = [
        spec.model_copy(update={"bits": bits, "group_size": group, "average_bits": None})
        for bits in BITS
        for group in GROUPS
    ]
    return min((stage for stage in stages if not objections(dense, stage)), key=distance)


def quantized_baselines(
    job: Job, dense: DenseStates, target: int, provenance: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Build and evaluate the quantized baselines of a recipe; JSON-ready ``BaselineReport`` of each.

    Args:
        target: bytes of the result's weights.
        provenance: as for ``build``.
    """

    def evaluated(baseline: QuantizedBaseline) -> dict[str, Any]:
        artifact = _built(job, baseline, provenance)
        quality = model_quality(dense, artifact, job.tokens.evaluation, baseline.name)
        log_quality(quality, f"{baseline.name} ({baseline.words})")
        return measure(baseline, artifact, job, quality)

    found = baselines_of(job.recipe, job.source.config, target, job.itemsize)
    return [
        job.folder.phase(f"baseline-{baseline.name}", partial(evaluated, baseline), dict[str, Any])
        for baseline in found
    ]


def baseline_artifacts(job: Job, target: int) -> dict[str, Artifact]:
    """The models that ``quantized_baselines`` built, by name."""
    found = baselines_of(job.recipe, job.source.config, target, job.itemsize)
    return {baseline.name: Artifact.open(_folder(job, baseline).artifact) for baseline in found}


def measure(baseline: QuantizedBaseline, artifact: Artifact, job: Job, quality: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON-ready ``BaselineReport``."""
    config = artifact.config
    return {
        "name": baseline.name,
        "description": baseline.words,
        "parameters": config.parameters(),
        "bytes": artifact.bytes(),
        "decode_bytes": decode_bytes(config, artifact.grids, job.itemsize, baseline.context),
        "quality": quality,
    }


def _folder(job: Job, baseline: QuantizedBaseline) -> RunFolder:
    recipe = baseline.recipe(job.recipe)
    return RunFolder(job.folder.work / "baselines" / baseline.name, recipe, job.folder.inputs)


def _built(job: Job, baseline: QuantizedBaseline, provenance: Mapping[str, Any]) -> Artifact:
    recipe = baseline.recipe(job.recipe)
    folder = _folder(job, baseline)
    if not folder.has_artifact():
        alone = replace(job, recipe=recipe, folder=folder)
        plan: RankPlan = draft(recipe, job.source)
        build(alone, plan, bit_plan(alone, plan), provenance)
    return Artifact.open(folder.artifact, check=distributed.first())
