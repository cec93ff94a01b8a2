"""What else the bytes would buy: the same model quantized without narrowing, built and judged in the same run.

Two rivals: ``quantized`` has the recipe's own bits and is therefore larger; ``same_bytes`` has fewer bits or larger
groups, so that it is about as large as the result. Both are calibrated on the same tokens and judged on the same texts.
Their artifacts live in the work folder and go with it; what is kept is their measure in the report.

A rival is one more walk over the model, which takes about as long as the compression itself, so recipes ask for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from flatq.pipeline.judge import model_quality, told
from flatq.plan.decide import bit_plan, draft
from flatq.quantize.grids import objections, planned_grids
from flatq.recipe.blocks import CONTEXT, GptqSpec
from flatq.recipe.grammar import Recipe
from flatq.run_folder import RunFolder

BITS, GROUPS = (2, 3, 4, 8), (16, 32, 64, 128, 256, -1)


@dataclass(frozen=True, slots=True)
class Rival:
    """A recipe without narrowing: ``quantized`` or ``same_bytes``."""

    name: str
    spec: GptqSpec

    @property
    def words(self) -> str:
        """``4 bit, groups of 32``."""
        bits = f"{self.spec.bits}" if self.spec.average_bits is None else f"{self.spec.average_bits:g} (on average)"
        group = "one group per row" if self.spec.group_size == -1 else f"groups of {self.spec.group_size}"
        return f"{bits} bit, {group}"

    def recipe(self, recipe: Recipe) -> Recipe:
        """The run's recipe with this stage alone."""
        return recipe.model_copy(update={"stages": (self.spec,), "exports": (), "bench": None})


def rivals_of(recipe: Recipe, dense: DecoderConfig, target: int, itemsize: int) -> list[Rival]:
    """The rivals that the recipe asks for; none where it narrows nothing or quantizes nothing.

    Args:
        target: bytes of the result's weights, for ``same_bytes``.
        itemsize: bytes of a number that is not quantized.
    """
    spec = recipe.gptq
    if spec is None or recipe.flat is None:
        return []
    found = {"quantized": spec}
    if "same_bytes" in recipe.baselines:
        found["same_bytes"] = nearest_in_bytes(spec, dense, target, itemsize)
    return [Rival(name, stage) for name, stage in found.items() if name in recipe.baselines]


def nearest_in_bytes(spec: GptqSpec, dense: DecoderConfig, target: int, itemsize: int) -> GptqSpec:
    """The bits and groups whose weights come nearest to ``target`` bytes, as a ratio; ties go to more bits."""

    def distance(stage: GptqSpec) -> tuple[float, int]:
        size = weight_bytes(dense, planned_grids(dense, stage), itemsize)
        return abs(math.log(size / target)), -stage.bits

    stages = [
        spec.model_copy(update={"bits": bits, "group_size": group, "average_bits": None})
        for bits in BITS
        for group in GROUPS
    ]
    return min((stage for stage in stages if not objections(dense, stage)), key=distance)


def judged_rivals(job: Job, dense: DenseStates, target: int, provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """JSON-ready ``BaselineReport`` of each rival that the recipe asks for.

    Args:
        target: bytes of the result's weights.
        provenance: as for ``build``.
    """

    def judged(rival: Rival) -> dict[str, Any]:
        artifact = _built(job, rival, provenance)
        quality = model_quality(dense, artifact, job.tokens.judged, rival.name)
        told(quality, f"{rival.name} ({rival.words})")
        return measure(rival, artifact, job, quality)

    found = rivals_of(job.recipe, job.source.config, target, job.itemsize)
    return [job.folder.phase(f"rival-{rival.name}", partial(judged, rival), dict[str, Any]) for rival in found]


def measure(rival: Rival, artifact: Artifact, job: Job, quality: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON-ready ``BaselineReport``."""
    config, context = artifact.config, job.recipe.flat.cache_context if job.recipe.flat else CONTEXT
    return {
        "name": rival.name,
        "description": rival.words,
        "parameters": config.parameters(),
        "bytes": artifact.bytes(),
        "decode_bytes": decode_bytes(config, artifact.grids, job.itemsize, context),
        "quality": list(quality),
    }


def _built(job: Job, rival: Rival, provenance: Mapping[str, Any]) -> Artifact:
    recipe = rival.recipe(job.recipe)
    folder = RunFolder(job.folder.work / "rivals" / rival.name, recipe)
    if not distributed.broadcast(folder.artifact.exists()):
        if distributed.first():
            folder.work.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        alone = replace(job, recipe=recipe, folder=folder)
        plan: RankPlan = draft(recipe, job.source)
        build(alone, plan, bit_plan(alone, plan), provenance)
    return Artifact.open(folder.artifact, check=distributed.first())
