"""The table of contents: a recipe in, a verified and measured model out.

    load -> baseline -> importance -> rank plan -> walk (FLAT, GPTQ) -> artifact -> exports -> verify -> bench -> report

Each step is one call below; each is a phase of the run folder, so that a killed run goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from flatq.artifact import Artifact
from flatq.calibration.cache_ranges import note_cache_ranges
from flatq.calibration.divergence import DenseStates
from flatq.calibration.states import Execution
from flatq.compress.plan import RankPlan
from flatq.errors import ArtifactError, ExportError
from flatq.export.deliver import deliver, measured
from flatq.export.folder import description_of
from flatq.export.planned import PlannedExport, needs_cache_ranges, planned_exports
from flatq.integrity import refuse_damage
from flatq.job import Job
from flatq.machine import distributed
from flatq.machine.device import resolve_device
from flatq.model.grid import Grid
from flatq.pipeline.build import build
from flatq.pipeline.judge import dense_quality, export_quality, model_quality, stop_if_ruined, told
from flatq.pipeline.rivals import judged_rivals
from flatq.pipeline.texts import run_tokens
from flatq.plan import sizes
from flatq.plan.decide import bit_plan, draft, rank_plan
from flatq.plan.forecast import forecasts, working_set
from flatq.plan.objections import raise_absent_packages, raise_early_objections, raise_objections
from flatq.recipe.grammar import Recipe
from flatq.report.render import write_report
from flatq.report.summary import card_quality, provenance, summarize
from flatq.run_folder import RunFolder, require_space
from flatq.sources.source import Source, open_model

log = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    out: Path | None,
    *,
    device: str = "auto",
    fresh: bool = False,
    memory: int | None = None,
    predict: bool = False,
    verify: bool = True,
    check: bool = True,
) -> Path | None:
    """Do everything that the recipe says; returns the run folder (None in all but the first of several processes).

    Args:
        recipe: what to do.
        out: run folder; None is ``runs/NAME-DIGEST``. A finished one is left alone, an unfinished one is resumed.
        device: where to compute.
        fresh: remove what an earlier run left in the folder.
        memory: bytes of RAM to stay below; None takes what the default batch sizes need.
        predict: forecast time and memory first, and report them beside what was measured.
        verify: False writes exports without opening them, which the report says.
        check: False does not compare the files of a finished run with their digests.

    Raises:
        FlatqError: with ``exit_code`` 2 where the recipe or what it names is wrong, 3 where a stage failed.
    """
    with distributed.joined():
        exports, device = planned_exports(recipe, verify=verify), resolve_device(device)
        folder = RunFolder.open(out, recipe, fresh=fresh)
        if folder.finished:
            if check and distributed.first():
                refuse_damage(folder.root)
            log.warning("%s: already finished, nothing to do (--fresh starts over)", folder.root)
            return folder.root if distributed.part() else None
        return _run(recipe, exports, folder, device, memory, predict)


def _run(
    recipe: Recipe,
    exports: list[PlannedExport],
    folder: RunFolder,
    device: str,
    memory: int | None,
    predict: bool,
) -> Path | None:
    raise_absent_packages(exports)
    source = open_source(recipe)
    working_set_bytes = working_set(source.config, recipe, memory, needs_cache_ranges(exports))
    raise_objections(recipe, source.config, [])  # groups wider than the dense model's weights fit no narrower one
    raise_early_objections(recipe, source, exports)
    draft(recipe, source)  # refuses a budget that no plan can meet, before anything is measured
    for caution in sizes.cautions(recipe, source.config):
        log.warning(caution)
    with folder.working():
        tokens = run_tokens(recipe, source, folder, device)
        origins = distributed.on_first(lambda: provenance(recipe, source, tokens))
        fixed = {name: origins[name] for name in ("source", "tokens", "versions")}
        distributed.on_first(lambda: folder.depend_on(fixed))
        job = Job(recipe, source, tokens, folder, Execution.of(recipe.calibration, device, working_set_bytes))
        expected: dict[str, Any] = {}
        if predict:
            expected = folder.phase("forecast", lambda: expectations(job, exports), dict[str, Any])
        dense = DenseStates(source, folder.work / "dense-states", device=device)
        folder.phase("baseline", lambda: dense_quality(dense, tokens.judged), dict[str, float])
        plan = rank_plan(job)
        grids = bit_plan(job, plan)
        raise_objections(recipe, source.config.with_layers(plan.layers), exports, grids)
        artifact = compressed(job, plan, grids, origins)
        quality = folder.phase("evaluate", lambda: model_quality(dense, artifact, tokens.judged), list[dict[str, Any]])
        told(quality, "artifact")
        stop_if_ruined(recipe, quality)
        rivals = judged_rivals(job, dense, artifact.bytes(), origins)
        if not distributed.part():
            return None
        artifact.note_quality(card_quality(quality))
        if needs_cache_ranges(exports):
            measure_cache_ranges(job, artifact)
        finish(job, exports, artifact, dense, quality, rivals, expected)
    return folder.root


def finish(
    job: Job,
    exports: Sequence[PlannedExport],
    artifact: Artifact,
    dense: DenseStates,
    quality: Sequence[Mapping[str, Any]],
    rivals: Sequence[Mapping[str, Any]],
    expected: Mapping[str, Any],
) -> None:
    """Exports, bench, report.

    Args:
        quality: JSON-ready ``TextQuality`` of each text.
        rivals: JSON-ready ``BaselineReport`` of each.
        expected: forecast of each phase, JSON-ready.

    Raises:
        ExportError: one or more exports failed; the report is written all the same, with what failed in it.
    """
    folder = job.folder
    written = [exported(job, item, artifact, dense) for item in exports]
    failed = [f"exports.{export['name']}: {export['error']}" for export in written if export.get("error")]
    opened = [item for item, export in zip(exports, written, strict=True) if not export.get("error")]
    bench = benched(job, opened, complete=not failed)
    report = summarize(
        job.recipe,
        job.source,
        artifact,
        quality=quality,
        baselines=rivals,
        exports=written,
        bench=bench,
        timing=folder.timing(),
        peak_rss_bytes=folder.peak_rss_bytes(),
        memory=folder.memory(),
        device_memory=folder.device_memory(),
        forecast=expected,
        notes=sizes.cautions(job.recipe, job.source.config),
    )
    write_report(report, folder.root)
    folder.seal()
    if failed:
        raise ExportError("\n".join([*failed, f"what was done all the same is in {folder.root}/report.md"]))


def expectations(job: Job, exports: Sequence[PlannedExport]) -> dict[str, Any]:
    """Forecast of every phase, JSON-ready."""
    recipe, source, execution = job.recipe, job.source, job.execution
    layers, ranges = draft(recipe, source).layers, needs_cache_ranges(exports)
    device, working_set_bytes = execution.device, execution.working_set_bytes
    found = forecasts(recipe, source.config, layers, device=device, working_set_bytes=working_set_bytes, ranges=ranges)
    return {phase: asdict(said) for phase, said in found.items()}


def open_source(recipe: Recipe, *, need_weights: bool = True) -> Source:
    """The model that the recipe names, checked for completeness (its weights are not yet read)."""
    model = recipe.model
    source = open_model(model.path, revision=model.revision, dtype=model.dtype, need_weights=need_weights)
    if need_weights:
        source.validate()
    return source


def compressed(job: Job, plan: RankPlan, grids: Mapping[str, Grid], origins: Mapping[str, Any]) -> Artifact:
    """The artifact, made by one walk over the blocks, or finished by an earlier run."""
    folder = job.folder

    def make() -> None:
        if distributed.broadcast(folder.artifact.exists()):
            return
        needed = sizes.disk_bytes(job.source.config.with_layers(plan.layers), job.recipe, job.itemsize)
        if distributed.first():
            require_space(folder.root, needed, "the artifact and the hidden states")
        build(job, plan, grids, origins)

    folder.phase("compress", make, NoneType)
    return Artifact.open(folder.artifact, check=distributed.first())


def measure_cache_ranges(job: Job, artifact: Artifact) -> None:
    """Ranges of keys and values, for exports that keep them in 8 bits."""
    precision, device = job.recipe.calibration.precision, job.execution.device

    def measure() -> None:
        note_cache_ranges(artifact, job.tokens, precision=precision, device=device)

    job.folder.phase("cache-ranges", measure, NoneType)


def exported(job: Job, item: PlannedExport, artifact: Artifact, dense: DenseStates) -> dict[str, Any]:
    """One export, written, verified and judged on every text, or done by an earlier run; JSON-ready ``ExportReport``.

    One that fails is reported with its error, and the others are still written.
    """
    folder, tokens, out = job.folder, job.tokens, job.folder.exports / item.name
    if out.exists() and not _whole(out):
        folder.forget(f"export-{item.name}", f"quality-{item.name}")
    try:
        done = folder.phase(f"export-{item.name}", lambda: deliver(item, artifact, out, tokens.heldout), dict[str, Any])
        quality = folder.phase(
            f"quality-{item.name}", lambda: export_quality(dense, item, out, tokens.judged), list[dict[str, Any]]
        )
    except ExportError as error:
        log.error("%s: %s", item.name, error)
        return {"name": item.name, "files": [], "bytes": 0, "sha256": {}, "verify": None, "error": str(error)}
    told(quality, f"export {item.name}")
    return {**done, "quality": quality}


def _whole(out: Path) -> bool:
    """Whether an export that an earlier run wrote is as it was written; if not, a warning says so."""
    try:
        description_of(out)
    except ArtifactError as damaged:
        log.warning("%s; it is written again", damaged)
        return False
    return True


def benched(job: Job, exports: list[PlannedExport], *, complete: bool) -> list[dict[str, Any]]:
    """Speed of the exports that are there; kept as a phase only if none failed, for one may succeed next time."""

    def measure() -> list[dict[str, Any]]:
        return measured(job.recipe, job.source, job.folder, exports)

    return job.folder.phase("bench", measure, list[dict[str, Any]]) if complete else measure()
