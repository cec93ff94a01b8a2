"""What the command line does besides ``run``: check, plan, export, bench, eval, generate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flatq.artifact import MANIFEST, RANGES, Artifact, tokenizer_in
from flatq.calibration.cache_ranges import note_cache_ranges
from flatq.calibration.tokens import token_batches
from flatq.errors import ArtifactError, RecipeError
from flatq.export.bench import bench_table
from flatq.export.deliver import (
    PlannedExport,
    deliver,
    foreign,
    needs_cache_ranges,
    opened,
    planned_exports,
    reopened,
    side_by_side,
)
from flatq.export.generate import DecoderRunner, stream
from flatq.export.protocols import Exporter, Runner, exporter_named
from flatq.machine.device import resolve_device
from flatq.pipeline.run import open_source, score
from flatq.plan.decide import draft
from flatq.plan.describe import explanation, forecast
from flatq.plan.forecast import forecasts
from flatq.plan.objections import raise_early_objections, raise_objections
from flatq.recipe.blocks import BenchSpec, CalibrationSpec, EvaluationSpec
from flatq.recipe.grammar import Recipe
from flatq.sources.source import Source, open_model


def check(recipe: Recipe) -> list[str]:
    """The recipe in words; the model is not opened.

    Raises:
        RecipeError: an exporter is missing or refuses its options.
    """
    planned_exports(recipe)
    return explanation(recipe)


def plan(recipe: Recipe, *, device: str = "auto") -> str:
    """Parameters, sizes, memory and time to expect, from the model's shapes alone.

    Raises:
        RecipeError: an exporter objects to the planned model.
    """
    exports = planned_exports(recipe)
    source = open_source(recipe, need_weights=False)
    raise_early_objections(recipe, source, exports)
    config, planned = source.config, draft(recipe, source)
    raise_objections(recipe, config.with_layers(planned.layers), exports)
    weights = source if source.has_weights else None
    ranges = needs_cache_ranges(exports)
    phases = forecasts(recipe, config, planned.layers, weights, device=resolve_device(device), ranges=ranges)
    return forecast(recipe, config, planned, exports, source.dtype.itemsize, phases)


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
    item = PlannedExport(out.name, format, exporter, checked_options(exporter, options))
    problems = exporter.check(model.config, model.grids, item.options)
    if problems:
        raise RecipeError(problems)
    if needs_cache_ranges([item]) and not (model.root / RANGES).exists():
        text = recipe_of(model)
        tokens = token_batches(text.calibration, text.evaluation, tokenizer_in(model.root))
        note_cache_ranges(model, tokens, precision=text.calibration.precision)
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
        tables.append(f"{title}\n{bench_table(side_by_side(entries, spec, vocab))}")
    return "\n".join(tables)


def evaluate(model: str, *, dataset: str, path: Path | None, tokens: int, seq_len: int) -> float:
    """Perplexity of an artifact or of a pretrained model on held-out text.

    Raises:
        RecipeError: there is no such text or model.
    """
    text = {"dataset": dataset, "path": str(path) if path else None, "samples": 1, "seq_len": 16}
    try:
        calibration = CalibrationSpec.model_validate(text)
    except ValidationError as error:
        raise RecipeError([f"--{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]) from error
    evaluation = EvaluationSpec(tokens=tokens, seq_len=seq_len)
    weights: Artifact | Source
    try:
        artifact = Artifact.open(model)
        weights, tokenizer = artifact, tokenizer_in(artifact.root)
    except ArtifactError:
        source = open_model(model)
        source.validate()
        weights, tokenizer = source, source.tokenizer()
    return score(weights, token_batches(calibration, evaluation, tokenizer), "cpu", "evaluate")


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
    tokenizer = tokenizer_in(artifact.root)
    return stream(
        runner, tokenizer, prompt, new_tokens=new_tokens, temperature=temperature, seed=seed, eos=eos, chat=chat
    )


def checked_options(exporter: Exporter, options: dict[str, Any]) -> BaseModel:
    """An exporter's options from the command line.

    Raises:
        RecipeError: names each option that is refused.
    """
    try:
        return exporter.Options(**options)
    except ValidationError as error:
        raise RecipeError(
            [f"--option {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        ) from error
