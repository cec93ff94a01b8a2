"""What a sweep found: ``sweep.json``, a point for each export of each run. Keys are added, never renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flatq.export.baseline import BASELINE
from flatq.export.bench import BenchResult
from flatq.report.schema import Environment, ExportReport, Report, Section, TextQuality
from flatq.sweep.grid import Combination

ARTIFACT = "artifact"  # name of the export of a run that has none


class Point(Section):
    """One model: a run's export, or its artifact if the run has no export.

    Attributes:
        name: of the run's folder.
        changed: values of the grid by key.
        added: whether this is a quantization alone that the grid does not contain.
        export: name of the export; ``artifact`` if the run has none.
        narrowed, quantized: what was done to the model.
        bytes: of the export's files; of the artifact's weights without an export.
        judged: texts of which ``kl`` and ``damage`` are the means: those of other kinds than the calibration text, or
            all if there is no such text.
        kl, damage: nats per token, in the export's runtime, or of the artifact where the export was not run.
        kl_stderr, damage_stderr: standard errors; None if one is not known.
        quality: every text, as measured for ``kl``.
        decode, prefill: tokens per second of the bench; None if not measured.
        error: why there is no result; the other measures are then None.
    """

    name: str
    changed: dict[str, Any]
    added: bool = False
    export: str = ARTIFACT
    narrowed: bool | None = None
    quantized: bool | None = None
    bytes: int | None = None
    judged: tuple[str, ...] = ()
    kl: float | None = None
    kl_stderr: float | None = None
    damage: float | None = None
    damage_stderr: float | None = None
    quality: tuple[TextQuality, ...] = ()
    decode: float | None = None
    prefill: float | None = None
    error: str | None = None

    @property
    def kind(self) -> str:
        """What was done: ``stacked`` (narrowed and quantized), ``quantized``, ``narrowed`` or ``dense``."""
        if self.narrowed:
            return "stacked" if self.quantized else "narrowed"
        return "quantized" if self.quantized else "dense"

    @property
    def label(self) -> str:
        """Name of the run, and of the export."""
        return f"{self.name} ({self.export})"


class Sweep(Section):
    """The whole result.

    Attributes:
        model: its name.
        recipe_text: the base recipe.
        grid: values by key.
        dense_bytes: bytes of the dense model's weights.
        dense_decode, dense_prefill: tokens per second of the dense model by format of the bench's first run.
        points: of all runs that ended; in the order of the grid.
        runs: number of runs, the pending ones included.
    """

    schema_version: Literal[1] = 1
    model: str
    recipe_text: str
    grid: dict[str, list[Any]]
    dense_bytes: int | None = None
    dense_decode: float | None = None
    dense_prefill: float | None = None
    environment: Environment
    points: list[Point]
    runs: int
    seconds: float = 0.0

    @property
    def done(self) -> list[Point]:
        """The points with a result."""
        return [point for point in self.points if point.error is None]


def points_of(combination: Combination, report: Report | None, error: str | None) -> list[Point]:
    """The points of a run.

    Args:
        combination: its recipe.
        report: of the run; None if it failed before that.
        error: of the run, if it failed.
    """
    about: dict[str, Any] = {
        "name": combination.name, "changed": dict(combination.changed), "added": combination.added,
    }  # fmt: skip
    if report is None:
        return [Point(**about, error=error or "it has no report")]
    assert report.baseline is not None
    about["narrowed"] = report.result.decoder_parameters < report.baseline.decoder_parameters
    about["quantized"] = bool(combination.recipe.gptq)
    if not report.exports:
        return [Point(**about, bytes=report.result.bytes, **_judged(report.quality))]
    return [_exported(about, report, export) for export in report.exports]


def _exported(about: Mapping[str, Any], report: Report, export: ExportReport) -> Point:
    if export.error is not None:
        return Point(**about, export=export.name, error=export.error)
    bench = report.bench_of(export.name)
    speeds = {} if bench is None else _speeds(bench)
    judged = _judged(export.quality or report.quality)
    return Point(**about, export=export.name, bytes=export.bytes, **judged, **speeds)


def _speeds(bench: BenchResult) -> dict[str, float]:
    return {"decode": bench.decode_tokens_per_second.median, "prefill": bench.prefill_tokens_per_second.median}


def dense_of(reports: Sequence[Report]) -> dict[str, Any]:
    """The fields of ``Sweep`` about the dense model, from the first runs that measured them."""
    found: dict[str, Any] = {}
    for report in reports:
        bench = report.bench_of(BASELINE)
        if report.baseline is not None:
            found.setdefault("dense_bytes", report.baseline.bytes)
        if bench is not None:
            for name, value in _speeds(bench).items():
                found.setdefault(f"dense_{name}", value)
    return found


def _judged(quality: Sequence[TextQuality]) -> dict[str, Any]:
    """Quality on texts that were not calibrated on, or on all if there are none."""
    texts = [text for text in quality if not text.calibrated] or list(quality)
    found: dict[str, Any] = {"quality": tuple(quality), "judged": tuple(text.text for text in texts)}
    for name in ("kl", "damage") if texts else ():
        errors = [getattr(text, f"{name}_stderr") for text in texts]
        found[name] = sum(getattr(text, name) for text in texts) / len(texts)
        known = [error**2 for error in errors if error is not None]
        found[f"{name}_stderr"] = sum(known) ** 0.5 / len(texts) if len(known) == len(texts) else None
    return found
