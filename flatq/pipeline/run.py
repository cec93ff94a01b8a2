"""``flatq run``: from a recipe to a verified and measured model.

    load -> baseline -> importance -> rank plan -> walk (FLAT, GPTQ) -> recover -> artifact -> exports -> verify
    -> bench -> report

Each step is one call below and a phase of the run folder, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from flatq.artifact import RANGES, Artifact
from flatq.calibration.cache_ranges import note_cache_ranges
from flatq.calibration.divergence import DenseStates
from flatq.calibration.states import Execution
from flatq.compress.allocate import Curves
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
from flatq.pipeline.baselines import baseline_artifacts, quantized_baselines
from flatq.pipeline.build import build
from flatq.pipeline.dense import dense_once
from flatq.pipeline.fit import fitted
from flatq.pipeline.quality import dense_quality, export_quality, log_quality, model_quality, stop_if_ruined
from flatq.pipeline.recover import recovered
from flatq.pipeline.tasks import require_tasks, task_results
from flatq.pipeline.texts import run_tokens
from flatq.plan import sizes
from flatq.plan.decide import decided, drafted
from flatq.plan.forecast import Forecast, forecasts, working_set
from flatq.plan.objections import raise_absent_packages, raise_early_objections, raise_objections, tokenizer_cautions
from flatq.recipe.grammar import Recipe
from flatq.report.render import write_report
from flatq.report.summary import card_quality, provenance, summarize
from flatq.run_folder import RunFolder, require_space
from flatq.sources.source import Source, open_named

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
    measurements: Path | None = None,
) -> Path | None:
    """Execute a recipe; returns the run folder (with several processes only in rank 0, None in the others).

    Args:
        recipe: of the run.
        out: run folder; None is ``runs/NAME-DIGEST``. A finished run is not repeated, an unfinished one is resumed.
        device: device for computation.
        fresh: remove the results of an earlier run from the folder.
        memory: limit of RAM in bytes; None is no limit, with the default batch sizes.
        predict: forecast time and memory first, and report the forecast together with the measurements.
        verify: False writes exports without verification, which the report states.
        check: False does not compare the files of a finished run with their digests.
        measurements: folder that keeps the measurements of the dense model, for other runs of the same model.

    Raises:
        FlatqError: ``exit_code`` is 2 if the recipe or something that it refers to is wrong, 3 if a stage failed.
    """
    with distributed.joined():
        exports, device = planned_exports(recipe, verify=verify), resolve_device(device)
        folder = RunFolder.open(out, recipe, fresh=fresh)
        if folder.finished:
            if check and distributed.first():
                refuse_damage(folder.root)
            folder.tidy()
            log.warning("%s: already finished, nothing to do (--fresh starts over)", folder.root)
            return folder.root if distributed.part() else None
        return _run(recipe, exports, folder, device, memory, predict, measurements)


def _run(
    recipe: Recipe,
    exports: list[PlannedExport],
    folder: RunFolder,
    device: str,
    memory: int | None,
    predict: bool,
    measurements: Path | None,
) -> Path | None:
    raise_absent_packages(exports, recipe)
    require_tasks(recipe, folder)
    source = open_source(recipe)
    working_set_bytes = working_set(source.config, recipe, memory, needs_cache_ranges(exports))
    raise_objections(recipe, source.config, [])  # groups wider than the dense weights are also too wide after narrowing
    raise_early_objections(recipe, source, exports)
    cautions = [*sizes.cautions(recipe, source.config), *tokenizer_cautions(source)]
    for caution in cautions:
        log.warning(caution)
    with folder.working():
        tokens = run_tokens(recipe, source, folder, device, measurements or folder.work)
        origins = distributed.on_first(lambda: provenance(recipe, source, tokens))
        fixed = {name: origins[name] for name in ("source", "tokens", "versions")}
        distributed.on_first(lambda: folder.depend_on(fixed))
        execution = Execution.of(recipe.calibration, device, working_set_bytes)
        job = Job(recipe, source, tokens, folder, execution, measurements)
        expected: dict[str, Any] = {}
        if predict:
            expected = folder.phase("forecast", lambda: expectations(job, exports), dict[str, Any])
        dense = DenseStates(source, job.dense_states, device=device)
        job.measured("baseline", lambda: dense_quality(dense, tokens.evaluation), dict[str, float])
        fits = recipe.budget is not None and recipe.budget.max_damage is not None
        plan, grids, spent = fitted(job, exports, dense, origins) if fits else decided(job, exports)
        for line in spent:
            log.info(line)
        raise_objections(recipe, source.config.with_layers(plan.layers), exports, grids)
        artifact = compressed(job, plan, grids, origins)
        if recipe.recover is not None:
            artifact = recovered(job, recipe.recover, dense, artifact)
        quality = folder.phase(
            "evaluate", lambda: model_quality(dense, artifact, tokens.evaluation), list[dict[str, Any]]
        )
        log_quality(quality, "artifact")
        stop_if_ruined(recipe, quality)
        baselines = quantized_baselines(job, dense, artifact.bytes(), origins)
        if not distributed.part():
            return None
        artifact.note_origin(origins)
        artifact.note_quality(card_quality(quality))
        if needs_cache_ranges(exports):
            measure_cache_ranges(job, artifact)
        else:
            folder.forget("cache-ranges")
            artifact.remove(RANGES)
        finish(job, exports, artifact, dense, quality, baselines, expected, [*cautions, *spent])
    return folder.root


def finish(
    job: Job,
    exports: Sequence[PlannedExport],
    artifact: Artifact,
    dense: DenseStates,
    quality: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]],
    expected: Mapping[str, Any],
    cautions: Sequence[str],
) -> None:
    """Exports, bench, report.

    Args:
        quality: JSON-ready ``TextQuality`` of each text.
        baselines: JSON-ready ``BaselineReport`` of each quantized baseline.
        expected: forecast of each phase, JSON-ready.
        cautions: warnings about the recipe and the tokenizer, and what a budget was spent on, for the report.

    Raises:
        ExportError: one or more exports failed; raised after the report, which includes the errors, is written.
    """
    folder = job.folder
    written = [exported(job, item, artifact, dense) for item in exports]
    failed = [f"exports.{export['name']}: {export['error']}" for export in written if export.get("error")]
    opened = [item for item, export in zip(exports, written, strict=True) if not export.get("error")]
    bench = benched(job, opened, artifact, complete=not failed)
    tasks = task_results(job, artifact, opened, complete=not failed)
    report = summarize(
        job.recipe,
        job.source,
        artifact,
        quality=quality,
        baselines=baselines,
        exports=written,
        bench=bench,
        tasks=tasks,
        before_recovery=folder.known("recover", list[dict[str, Any]]) or (),
        curves=(folder.known("curves", list[Curves]) or ()) if "curves" in folder.timing() else (),
        timing=folder.timing(),
        peak_rss_bytes=folder.peak_rss_bytes(),
        memory=folder.memory(),
        device_memory=folder.device_memory(),
        forecast=expected,
        notes=cautions,
    )
    write_report(report, folder.root)
    folder.seal()
    if failed:
        raise ExportError("\n".join([*failed, f"all other results are in {folder.root}/report.md"]))


def expectations(job: Job, exports: Sequence[PlannedExport]) -> dict[str, Forecast]:
    """Forecast of every phase."""
    recipe, source, execution = job.recipe, job.source, job.execution
    layers, ranges = drafted(recipe, source, exports)[0].layers, needs_cache_ranges(exports)
    device, working_set_bytes = execution.device, execution.working_set_bytes
    return forecasts(recipe, source.config, layers, device=device, working_set_bytes=working_set_bytes, ranges=ranges)


def open_source(recipe: Recipe) -> Source:
    """Open the model of a recipe and check that all tensors exist (weights are not read)."""
    source = open_named(recipe.model)
    source.validate()
    return source


def compressed(job: Job, plan: RankPlan, grids: Mapping[str, Grid], origins: Mapping[str, Any]) -> Artifact:
    """The artifact of one walk over the blocks, built now or finished by an earlier process."""
    folder = job.folder

    def make() -> None:
        if folder.has_artifact():
            return
        needed = sizes.disk_bytes(job.source.config.with_layers(plan.layers), job.recipe, job.itemsize)
        if distributed.first():
            require_space(folder.root, needed, "the artifact and the hidden states")
        build(job, plan, grids, origins)

    folder.phase("compress", make, NoneType)
    return Artifact.open(folder.walked, check=distributed.first())


def measure_cache_ranges(job: Job, artifact: Artifact) -> None:
    """Measure the ranges of keys and values, for exports with an 8-bit KV cache."""
    precision, device = job.recipe.calibration.precision, job.execution.device

    def measure() -> None:
        note_cache_ranges(artifact, job.tokens, precision=precision, device=device)

    job.folder.phase("cache-ranges", measure, NoneType)


def exported(job: Job, item: PlannedExport, artifact: Artifact, dense: DenseStates) -> dict[str, Any]:
    """Write, verify and evaluate one export, unless an earlier run did; JSON-ready ``ExportReport``.

    An export that fails is reported with its error and does not stop the others.
    """
    folder, tokens, out = job.folder, job.tokens, job.folder.exports / item.name
    if out.exists() and not _whole(out):
        folder.forget(f"export-{item.name}", f"quality-{item.name}")
    try:
        done = folder.phase(f"export-{item.name}", lambda: deliver(item, artifact, out, tokens.heldout), dict[str, Any])
        quality = folder.phase(
            f"quality-{item.name}", lambda: export_quality(dense, item, out, tokens.evaluation), list[dict[str, Any]]
        )
    except ExportError as error:
        log.error("%s: %s", item.name, error)
        return {"name": item.name, "files": [], "bytes": 0, "sha256": {}, "verify": None, "error": str(error)}
    log_quality(quality, f"export {item.name}")
    return {**done, "quality": quality}


def _whole(out: Path) -> bool:
    """Whether the files of an export from an earlier run are unchanged; logs a warning if not."""
    try:
        description_of(out)
    except ArtifactError as damaged:
        log.warning("%s; it is written again", damaged)
        return False
    return True


def benched(job: Job, exports: list[PlannedExport], artifact: Artifact, *, complete: bool) -> list[dict[str, Any]]:
    """Speed of the finished exports; saved as a phase only if none failed, because a failed one may be retried."""
    if job.recipe.bench is None:
        return []

    def beside(recipe: Recipe) -> list[dict[str, Any]]:
        return measured(recipe, job.source, job.folder, exports, baseline_artifacts(job, artifact.bytes()))

    def measure() -> list[dict[str, Any]]:
        return dense_once(job, exports, beside)

    return job.folder.phase("bench", measure, list[dict[str, Any]]) if complete else measure()
