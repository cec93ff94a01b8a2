"""The table of contents: a recipe in, a verified and measured model out.

    load -> baseline -> importance -> rank plan -> walk (FLAT, GPTQ) -> artifact -> exports -> verify -> bench -> report

Each step is one call below; each is a phase of the run folder, so that a killed run goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import flatq.doctor
from flatq.artifact import MANIFEST, RANGES, Artifact
from flatq.calibration.cache_ranges import note_cache_ranges
from flatq.calibration.perplexity import perplexity
from flatq.calibration.states import WORKING_SET
from flatq.calibration.tokens import Tokens, token_batches
from flatq.compress.stage import RankPlan
from flatq.errors import ArtifactError, RecipeError
from flatq.export.deliver import (
    PlannedExport,
    deliver,
    foreign,
    measured,
    needs_cache_ranges,
    opened,
    planned_exports,
    reopened,
    side_by_side,
)
from flatq.export.generate import DecoderRunner, stream
from flatq.export.protocols import Runner, exporter_named
from flatq.machine import distributed
from flatq.machine.device import resolve_device
from flatq.machine.progress import progress
from flatq.model.grid import Grid
from flatq.model.weights import HALVES, Weights
from flatq.pipeline.build import build
from flatq.pipeline.texts import run_tokens, tokens_of
from flatq.plan import describe as planning
from flatq.plan.decide import bit_plan, draft, rank_plan
from flatq.plan.forecast import forecasts, working_set
from flatq.plan.objections import refuse, refuse_early
from flatq.recipe.blocks import BenchSpec, CalibrationSpec, EvaluationSpec
from flatq.recipe.grammar import Recipe
from flatq.report.render import write_report
from flatq.report.summary import provenance, quality, summarize
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
) -> Path | None:
    """Do everything that the recipe says; returns the run folder (None in all but the first of several processes).

    Args:
        recipe: what to do.
        out: run folder; None is ``runs/NAME-DIGEST``. A finished one is left alone, an unfinished one is resumed.
        device: where to compute.
        fresh: remove what an earlier run left in the folder.
        memory: bytes of RAM to stay below; None takes what the default batch sizes need.
        predict: forecast time and memory first, and report them beside what was measured.

    Raises:
        FlatqError: with ``exit_code`` 2 where the recipe or what it names is wrong, 3 where a stage failed.
    """
    with distributed.joined():
        return _run(recipe, out, device, fresh, memory, predict)


def _run(recipe: Recipe, out: Path | None, device: str, fresh: bool, memory: int | None, predict: bool) -> Path | None:
    exports = planned_exports(recipe)
    device = resolve_device(device)
    folder = RunFolder.open(out, recipe, fresh=fresh)
    if folder.finished:
        log.warning("%s: already finished, nothing to do (--fresh starts over)", folder.root)
        return folder.root if distributed.part() else None
    source = open_source(recipe)
    room = working_set(source.config, recipe, memory, needs_cache_ranges(exports))
    refuse(recipe, source.config, [])  # groups wider than the dense model's weights fit no narrower one either
    refuse_early(recipe, source, exports)
    draft(recipe, source)  # a budget that no plan can meet is heard before anything is measured
    for caution in planning.cautions(recipe, source.config):
        log.warning(caution)
    with folder.working():
        tokens = run_tokens(recipe, source, folder, device)
        origins = distributed.on_first(lambda: provenance(recipe, source, tokens))
        fixed = {name: origins[name] for name in ("source", "tokens", "versions")}
        distributed.on_first(lambda: folder.depend_on(fixed))
        expected: dict[str, Any] = {}
        if predict:
            expected = folder.phase("forecast", lambda: expectations(recipe, source, exports, device, room))
        baseline = folder.phase("baseline", lambda: score(source, tokens, device, "baseline"))
        plan = rank_plan(recipe, source, tokens, folder, device, room)
        grids = bit_plan(recipe, source, tokens, plan, folder, device, room)
        refuse(recipe, source.config.with_layers(plan.layers), exports, grids)
        artifact = compressed(recipe, source, tokens, plan, grids, folder, origins, device, room)
        result = folder.phase("evaluate", lambda: score(artifact, tokens, device, "evaluate"))
        if not distributed.part():
            return None
        artifact.note_quality(quality(tokens, baseline=baseline, result=result))
        if needs_cache_ranges(exports):
            precision = recipe.calibration.precision
            folder.phase(
                "cache-ranges", lambda: note_cache_ranges(artifact, tokens, precision=precision, device=device)
            )
        written = [exported(item, artifact, tokens, folder) for item in exports]
        bench = folder.phase("bench", lambda: measured(recipe, source, folder, exports))
        report = summarize(
            recipe,
            source,
            tokens,
            artifact,
            baseline=baseline,
            result=result,
            exports=written,
            bench=bench,
            timing=folder.timing(),
            peak_rss_bytes=folder.peak_rss_bytes(),
            memory=folder.memory(),
            device_memory=folder.device_memory(),
            forecast=expected,
        )
        write_report(report, folder.root)
    return folder.root


def expectations(
    recipe: Recipe, source: Source, exports: Sequence[PlannedExport], device: str, room: int
) -> dict[str, Any]:
    """Forecast of every phase, JSON-ready."""
    layers, ranges = draft(recipe, source).layers, needs_cache_ranges(exports)
    found = forecasts(recipe, source.config, layers, source, device=device, room=room, ranges=ranges)
    return {phase: asdict(said) for phase, said in found.items()}


def open_source(recipe: Recipe, *, need_weights: bool = True) -> Source:
    """The model that the recipe names, checked for completeness (its weights are not yet read)."""
    model = recipe.model
    source = open_model(model.path, revision=model.revision, dtype=model.dtype, need_weights=need_weights)
    if need_weights:
        source.validate()
    return source


def score(weights: Weights, tokens: Tokens, device: str, what: str) -> float:
    """Perplexity on the held-out tokens."""
    with progress(what, len(weights.config.layers) * len(HALVES)) as advance:
        return perplexity(weights, tokens.heldout, device=device, on_half=advance).value


def compressed(
    recipe: Recipe,
    source: Source,
    tokens: Tokens,
    plan: RankPlan,
    grids: Mapping[str, Grid],
    folder: RunFolder,
    origins: dict[str, Any],
    device: str,
    room: int = WORKING_SET,
) -> Artifact:
    """The artifact, made by one walk over the blocks, or finished by an earlier run."""

    def make() -> None:
        if distributed.broadcast(folder.artifact.exists()):
            return
        needed = planning.disk_bytes(source.config.with_layers(plan.layers), recipe, source.dtype.itemsize)
        if distributed.first():
            require_space(folder.root, needed, "the artifact and the hidden states")
        build(
            source,
            tokens.calibration,
            plan,
            recipe,
            grids,
            partial=folder.partial,
            root=folder.artifact,
            work=folder.work,
            provenance=origins,
            device=device,
            working_set=room,
        )

    folder.phase("compress", make)
    artifact = Artifact.open(folder.artifact)
    if distributed.first():
        artifact.verify()
    return artifact


def exported(item: PlannedExport, artifact: Artifact, tokens: Tokens, folder: RunFolder) -> Any:
    """One export, written and verified, or done by an earlier run."""
    return folder.phase(
        f"export-{item.name}", lambda: deliver(item, artifact, folder.exports / item.name, tokens.heldout)
    )


# The other verbs of the command line.


def check(recipe: Recipe) -> list[str]:
    """The recipe in words; the model is not opened.

    Raises:
        RecipeError: an exporter is missing or refuses its options.
    """
    planned_exports(recipe)
    return planning.explanation(recipe)


def plan(recipe: Recipe, *, device: str = "auto") -> str:
    """Parameters, sizes, memory and time to expect, from the model's shapes alone.

    Raises:
        RecipeError: an exporter objects to the planned model.
    """
    exports = planned_exports(recipe)
    source = open_source(recipe, need_weights=False)
    refuse_early(recipe, source, exports)
    config, planned = source.config, draft(recipe, source)
    refuse(recipe, config.with_layers(planned.layers), exports)
    weights = source if source.has_weights else None
    ranges = needs_cache_ranges(exports)
    phases = forecasts(recipe, config, planned.layers, weights, device=resolve_device(device), ranges=ranges)
    return planning.forecast(recipe, config, planned, exports, source.dtype.itemsize, phases)


def recipe_of(artifact: Artifact) -> Recipe:
    """The recipe that made an artifact.

    Raises:
        RecipeError: it was made without a recipe file.
    """
    text = artifact.manifest["recipe"]
    if not text:
        raise RecipeError(f"{artifact.root}: keeps no recipe, so its calibration text is unknown; run a recipe again")
    return Recipe.parse(text, str(artifact.root / MANIFEST))


def export(artifact: Path, out: Path, format: str, options: dict[str, Any]) -> list[Path]:
    """Write one more format of a finished artifact and verify it; returns its files.

    Raises:
        RecipeError: unknown exporter or options, or ``out`` exists.
        ExportError: it cannot be written, or its runtime disagrees.
    """
    if out.exists():
        raise RecipeError(f"--out {out}: exists; choose another place")
    model = Artifact.open(artifact)
    exporter = exporter_named(format)
    item = PlannedExport(out.name, format, exporter, planning.checked_options(exporter, options))
    problems = exporter.check(model.config, model.grids, item.options)
    if problems:
        raise RecipeError(problems)
    if needs_cache_ranges([item]) and not (model.root / RANGES).exists():
        text = recipe_of(model)
        note_cache_ranges(model, tokens_of(text, model), precision=text.calibration.precision)
    return [out / file for file in deliver(item, model, out, None)["files"]]


def bench_exports(paths: list[Path], against: list[Path], loads: list[dict[str, int]], **settings: Any) -> str:
    """Measure export folders in turns, and graphs of other programs beside them; a table for each load.

    Args:
        paths: folders that flatq wrote.
        against: folders with someone else's decoder graph.
        loads: ``prompt``, ``new_tokens`` and ``batch`` of each table.
        settings: the other keys of a recipe's ``bench``.
    """
    entries = {}
    for path in paths:
        item, artifact = reopened(path)
        entries[str(path)] = (item, path)
    entries |= {str(path): (foreign(path), path) for path in against}
    vocab = Artifact.open(artifact).config.vocab
    tables = []
    for load in loads:
        spec = BenchSpec.model_validate({**settings, **load})
        title = ", ".join(f"{name} {value}" for name, value in load.items())
        tables.append(f"{title}\n{planning.bench_table(side_by_side(entries, spec, vocab))}")
    return "\n".join(tables)


def evaluate(model: str, *, dataset: str, path: Path | None, tokens: int, seq_len: int) -> float:
    """Perplexity of an artifact or of a pretrained model on held-out text."""
    calibration = CalibrationSpec.model_validate(
        {"dataset": dataset, "path": str(path) if path else None, "samples": 1, "seq_len": 16}
    )
    evaluation = EvaluationSpec(dataset="held-out", tokens=tokens, seq_len=seq_len)
    weights: Artifact | Source
    try:
        artifact = Artifact.open(model)
        weights, tokenizer = artifact, planning.tokenizer_in(artifact.root)
    except ArtifactError:
        source = open_model(model)
        source.validate()
        weights, tokenizer = source, source.tokenizer()
    return score(weights, token_batches(calibration, [evaluation], tokenizer), "cpu", "evaluate")


def generate(
    path: Path, prompt: str, *, new_tokens: int, temperature: float, seed: int, chat: bool, provider: str
) -> Iterator[str]:
    """Text from an export in its runtime, or from an artifact in torch."""
    runner: Runner
    if (path / "export.json").exists():
        runner = opened(path, provider)
        artifact = Artifact.open(reopened(path)[1])
    else:
        artifact = Artifact.open(path)
        runner = DecoderRunner(artifact)
    ends = artifact.settings.get("eos_token_id")
    eos = set(ends) if isinstance(ends, list) else {int(ends)} if ends is not None else set[int]()
    tokenizer = planning.tokenizer_in(artifact.root)
    return stream(
        runner, tokenizer, prompt, new_tokens=new_tokens, temperature=temperature, seed=seed, eos=eos, chat=chat
    )


def doctor() -> list[str]:
    """What this machine has."""
    return flatq.doctor.doctor()
