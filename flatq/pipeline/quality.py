"""Quality of a run's models on every evaluation text; a run stops here if the model is ruined."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flatq.calibration.divergence import DenseStates, dense_perplexity, divergence
from flatq.calibration.tokens import EvaluationText
from flatq.errors import ExportError, NumericsError
from flatq.export.planned import PlannedExport
from flatq.export.quality import first_rows, runner_divergence, runner_perplexity
from flatq.machine.progress import progress
from flatq.model.weights import HALVES, Weights
from flatq.recipe.grammar import Recipe
from flatq.units import with_error

log = logging.getLogger(__name__)


def dense_quality(dense: DenseStates, texts: Sequence[EvaluationText]) -> dict[str, float]:
    """Perplexity of the dense model by text; its hidden states are cached for later comparisons."""
    found = {}
    with progress("baseline", len(texts) * len(dense.weights.config.layers) * len(HALVES)) as advance:
        for text in texts:
            found[text.name] = dense_perplexity(dense, text.tokens, on_half=advance)
    return found


def model_quality(
    dense: DenseStates, weights: Weights, texts: Sequence[EvaluationText], what: str = "evaluate"
) -> list[dict[str, Any]]:
    """JSON-ready ``TextQuality`` of each text."""
    found = []
    with progress(what, len(texts) * len(weights.config.layers) * len(HALVES)) as advance:
        for text in texts:
            measured = divergence(dense, weights, text.tokens, on_half=advance)
            found.append({"text": text.name, "calibrated": text.calibrated, **asdict(measured)})
    return found


def export_quality(
    dense: DenseStates, item: PlannedExport, root: Path, texts: Sequence[EvaluationText]
) -> list[dict[str, Any]]:
    """JSON-ready ``TextQuality`` of each text in the export's runtime; empty if the runtime is not available."""
    if not item.verify:
        return []
    runner = item.exporter.open(root, item.options)
    if runner is None:
        return []
    found = []
    with closing(runner):
        for text in texts:
            measured = runner_divergence(dense, runner, first_rows(text.tokens), name=item.name)
            found.append({"text": text.name, "calibrated": text.calibrated, **asdict(measured)})
    return found


def export_perplexity(item: PlannedExport, root: Path, texts: Sequence[EvaluationText]) -> dict[str, float]:
    """Perplexity of an export in its runtime by text, without a model to compare it with.

    Raises:
        ExportError: the runtime is not available.
    """
    runner = item.exporter.open(root, item.options)
    if runner is None:
        raise ExportError(f"{root}: no runtime for the format {item.format!r} is available")
    with closing(runner):
        return {text.name: runner_perplexity(runner, first_rows(text.tokens)) for text in texts}


def log_quality(quality: Sequence[Mapping[str, Any]], what: str) -> None:
    """Log a line for each text."""
    for text in quality:
        log.info("%s: %s", what, sentence(text))


def sentence(text: Mapping[str, Any]) -> str:
    """``python-docs: perplexity 9.31 -> 10.61, +0.130 ± 0.004 nats, KL 0.118 ± 0.003, top-1 agreement 86.2 %``."""
    kind = " (kind calibrated on)" if text["calibrated"] else ""
    return (
        f"{text['text']}{kind}: perplexity {text['baseline_perplexity']:.4g} -> {text['perplexity']:.4g}, "
        f"{with_error(text['damage'], text['damage_stderr'], '+.3f')} nats, "
        f"KL {with_error(text['kl'], text['kl_stderr'], '.3f')}, top-1 agreement {100 * text['top1']:.1f} %"
    )


def stop_if_ruined(recipe: Recipe, quality: Sequence[Mapping[str, Any]]) -> None:
    """Stop before the exports if the damage on any text is above ``stop_above``; without a limit, warn above 1 nat.

    Raises:
        NumericsError: with the text, the perplexities and what to change.
    """
    worst = max(quality, key=lambda text: text["damage"])
    limit = recipe.stop_above
    if worst["damage"] <= (1.0 if limit is None else limit):
        return
    words = (
        f"the compressed model is ruined: on {worst['text']} its perplexity is {worst['perplexity']:,.4g}, the dense "
        f"model's {worst['baseline_perplexity']:,.4g}, a damage of {worst['damage']:.3f} nats per token"
    )
    if limit is None:
        log.warning("%s; the run continues because the recipe sets stop_above: null", words)
        return
    raise NumericsError(
        f"{words}; stop_above allows {limit:g}. Nothing was exported. Use more calibration tokens or more kinds of "
        "text, a larger keep_ratio or more bits, smaller groups, or more shrinkage; `stop_above: null` in the recipe "
        "exports the model anyway"
    )
