"""Provenance for the manifest, and the report assembled from the results of the phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatq.artifact import Artifact
from flatq.calibration.tokens import Tokens
from flatq.compress.allocate import Curves
from flatq.machine.environment import version_of
from flatq.model.decoder import DecoderConfig
from flatq.model.footprint import decode_bytes
from flatq.model.grid import Grid
from flatq.recipe.blocks import CONTEXT
from flatq.recipe.grammar import Recipe
from flatq.report.schema import Environment, LayerReport, Measure, ModelInfo, Report
from flatq.sources.source import Source
from flatq.units import with_error

SCHEMA_VERSION = 1
RUINED = 0.5  # share of an output's energy from which on a linear is named in the report
POINTS = 25  # of a curve in the report


def provenance(recipe: Recipe, source: Source, tokens: Tokens) -> dict[str, Any]:
    """Provenance of an artifact; the same for two runs of one recipe on one machine."""
    origin = {"origin": source.origin, "model_type": source.storage.model_type}
    origin |= {"hub_id": source.hub_id} if source.hub_id else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe.text,
        "recipe_digest": recipe.digest(),
        "source": {**origin, "files": source.digests(), "license": source.license},
        "tokens": tokens.description,
        "versions": {name: version_of(name) for name in ("flatq", "torch", "transformers", "numpy")},
        "seed": recipe.calibration.seed,
    }


def headline(quality: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first text of another kind than the calibration text; if there is none, the first text."""
    return next((text for text in quality if not text["calibrated"]), quality[0])


def card_quality(quality: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Quality for a model card: all measures on the headline text, one line for each other text.

    Args:
        quality: JSON-ready ``TextQuality`` of each text.
    """
    first = headline(quality)
    seen = "" if not first["calibrated"] else ", text of the calibration's kind"
    card = {
        "perplexity": round(first["perplexity"], 4),
        "perplexity of the original": round(first["baseline_perplexity"], 4),
        "measured on": f"{first['tokens']:,} tokens of {first['text']}{seen}",
        "nats lost per token": with_error(first["damage"], first["damage_stderr"], "+.3f"),
        "KL divergence from the original": with_error(first["kl"], first["kl_stderr"], ".3f") + " nats per token",
        "same likeliest token as the original": f"{first['top1']:.1%}",
    }
    for text in quality:
        if text is not first:
            kind = " (text of the calibration's kind)" if text["calibrated"] else ""
            pair = f"{text['perplexity']:.4g}, of the original {text['baseline_perplexity']:.4g}"
            card[f"perplexity on {text['text']}{kind}"] = pair
    return card


def summarize(
    recipe: Recipe,
    source: Source,
    artifact: Artifact,
    *,
    quality: Sequence[Mapping[str, Any]],
    baselines: Sequence[Mapping[str, Any]] = (),
    exports: Sequence[Mapping[str, Any]],
    bench: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]] = (),
    before_recovery: Sequence[Mapping[str, Any]] = (),
    curves: Sequence[Curves] = (),
    timing: Mapping[str, float],
    peak_rss_bytes: int,
    memory: Mapping[str, int] | None = None,
    device_memory: Mapping[str, int] | None = None,
    forecast: Mapping[str, Mapping[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """The report of a finished run.

    Args:
        recipe: of the run.
        source: the dense model.
        artifact: the compressed model.
        quality: JSON-ready ``TextQuality`` of each text.
        baselines: JSON-ready ``BaselineReport`` of each quantized baseline.
        exports: JSON-ready ``ExportReport`` of each export.
        bench: JSON-ready ``BenchResult`` of each runner.
        tasks: JSON-ready ``TaskResult`` of each task and model.
        before_recovery: JSON-ready ``TextQuality`` of each text before the stage ``recover``.
        curves: cost of narrowing of each layer, if it was measured.
        timing: seconds per phase.
        peak_rss_bytes: peak resident memory of this process.
        memory: the same for each phase.
        device_memory: peak GPU memory of each phase.
        forecast: predicted time and memory of each phase, JSON-ready.
        notes: warnings about the whole run.
    """
    first = headline(quality)
    baseline, result, scored = first["baseline_perplexity"], first["perplexity"], first["tokens"]
    config, itemsize = source.config, source.dtype.itemsize
    return Report.model_validate(
        {
            "model": ModelInfo(
                name=source.origin,
                family=config.family,
                d_model=config.d_model,
                vocab=config.vocab,
                layers=len(config.layers),
            ),
            "recipe": recipe.model_dump(mode="json"),
            "environment": Environment.collect(),
            "baseline": _measure(config, config.parameters() * itemsize, baseline, scored, {}, recipe, itemsize),
            "result": _measure(artifact.config, artifact.bytes(), result, scored, artifact.grids, recipe, itemsize),
            "quality": list(quality),
            "baselines": list(baselines),
            "recipe_text": recipe.text,
            "layers": _layers(config, artifact, curves),
            "head": artifact.manifest["head"] or None,
            "recovery": recovery(artifact, before_recovery),
            "exports": list(exports),
            "bench": list(bench),
            "tasks": list(tasks),
            "timing": dict(timing),
            "notes": list(notes),
            "memory": dict(memory or {}),
            "device_memory": dict(device_memory or {}),
            "forecast": dict(forecast or {}),
            "peak_rss_bytes": peak_rss_bytes,
        }
    )


def recovery(artifact: Artifact, quality: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """JSON-ready ``RecoveryReport``; None if the recipe has no stage ``recover``."""
    found = artifact.manifest.get("recover")
    return None if found is None else {**found, "quality": list(quality)}


def _measure(
    config: DecoderConfig,
    size: int,
    perplexity: float,
    tokens: int,
    grids: Mapping[str, Grid],
    recipe: Recipe,
    itemsize: int,
) -> Measure:
    context = recipe.flat.cache_context if recipe.flat else CONTEXT
    return Measure(
        parameters=config.parameters(),
        decoder_parameters=config.decoder_parameters(),
        bytes=size,
        decode_bytes=decode_bytes(config, grids, itemsize, context),
        decode_context=context,
        perplexity=perplexity,
        perplexity_tokens=tokens,
    )


def _points(cost: Sequence[float], width: int) -> list[tuple[float, float]]:
    """A curve at ``POINTS`` places, rounded: (fraction of the width removed, cost)."""
    removed = sorted({round(place * (len(cost) - 1) / (POINTS - 1)) for place in range(POINTS)})
    return [(round(n / width, 4), float(f"{cost[n]:.4g}")) for n in removed]


def _layers(dense: DecoderConfig, artifact: Artifact, curves: Sequence[Curves]) -> list[LayerReport]:
    rows = []
    for index, (before, after) in enumerate(zip(dense.layers, artifact.config.layers, strict=True)):
        blocks = [block for block in artifact.manifest["blocks"] if block["layer"] == index]
        errors = {name: error for block in blocks for name, error in block["errors"].items()}
        notes = [note for block in blocks for note in block["notes"]]
        notes += [
            f"{name}: RUINED: {error:.0%} of its output's energy on the calibration text is lost"
            for name, error in errors.items()
            if error > RUINED
        ]
        costs = {}
        if curves:
            of = curves[index]
            costs = {"value": _points(of.value, before.d_v), "mlp": _points(of.mlp, before.d_ff)}
        rows.append(LayerReport(index=index, dims=after, dense=before, errors=errors, notes=notes, curves=costs))
    return rows
