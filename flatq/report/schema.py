"""Schema of ``report.json``, the measurements of a run. Keys are added, never renamed."""

from __future__ import annotations

import math
import os
import platform
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict

import flatq
from flatq.evaluate.tasks import TaskResult
from flatq.export.bench import BenchResult
from flatq.export.verify import Verification
from flatq.machine.device import gpu_names
from flatq.machine.environment import cpu_name, version_of
from flatq.model.decoder import LayerDims


class Section(BaseModel):
    """Base of all parts: immutable; unknown keys, NaN and infinity are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelInfo(Section):
    """The model before compression."""

    name: str
    family: str
    d_model: int
    vocab: int
    layers: int


class Environment(Section):
    """The machine and the versions; None for a package that is not installed."""

    python: str
    flatq: str
    torch: str
    onnxruntime: str | None
    platform: str
    cpu: str
    cores: int
    memory_bytes: int
    gpus: list[str] = []

    @classmethod
    def collect(cls) -> Environment:
        """Describe this machine."""
        ort = next(filter(None, map(version_of, ("onnxruntime", "onnxruntime-gpu"))), None)
        return cls(
            python=platform.python_version(),
            flatq=flatq.__version__,
            torch=version_of("torch") or "none",
            onnxruntime=ort,
            platform=platform.platform(),
            cpu=cpu_name(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            memory_bytes=psutil.virtual_memory().total,
            gpus=gpu_names(),
        )


class Measure(Section):
    """Size and quality of a model.

    Attributes:
        bytes: size of the stored weights.
        decode_bytes: bytes read per decoded token, with ``decode_context`` tokens in the cache.
        perplexity: on ``perplexity_tokens`` held-out tokens; None if it was not measured.
    """

    parameters: int
    decoder_parameters: int
    bytes: int
    decode_bytes: int | None = None
    decode_context: int | None = None
    perplexity: float | None = None
    perplexity_tokens: int | None = None


class TextQuality(Section):
    """Quality of the result on one text, compared with the dense model.

    Attributes:
        text: name of the text.
        calibrated: whether the model was calibrated on text of this kind (never on the same tokens).
        rows, tokens: number of windows, and of predicted positions in them.
        damage: ``ln(perplexity / baseline_perplexity)``, nats per token.
        kl: mean KL divergence from the dense model, nats per token.
        top1: fraction of positions where the dense model has the same most likely token.
        damage_stderr, kl_stderr, top1_stderr: standard errors over rows; None for a single row.
        kl_by_position: mean KL of consecutive parts of the rows, first part first.
    """

    text: str
    calibrated: bool
    rows: int
    tokens: int
    baseline_perplexity: float
    perplexity: float
    damage: float
    damage_stderr: float | None
    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    kl_by_position: list[float] = []


class BaselineReport(Section):
    """The same model quantized without narrowing, built and evaluated in the same run.

    Attributes:
        name: ``quantized`` (the recipe's bits) or ``same_bytes`` (about as large as the result).
        description: bits and group size, as text.
    """

    name: str
    description: str
    parameters: int
    bytes: int
    decode_bytes: int
    quality: list[TextQuality]


class LayerReport(Section):
    """One layer: widths before and after, and relative errors by name (``value``, ``mlp``, ``q`` ... ``down``).

    ``curves`` is what narrowing was estimated to cost, as far as it was measured: ``value`` for the dimensions of a
    value head (sums of discarded eigenvalues), ``mlp`` for MLP channels. Pairs of (fraction removed, cost).
    """

    index: int
    dims: LayerDims
    dense: LayerDims
    errors: dict[str, float]
    notes: list[str] = []
    curves: dict[str, list[tuple[float, float]]] = {}


class HeadReport(Section):
    """The quantized LM head: relative squared error of its logits on the calibration tokens."""

    error: float
    notes: list[str] = []


class RecoveryReport(Section):
    """The stage ``recover``: mean KL divergence from the dense model on the calibration rows held out, nats per token.

    Attributes:
        before, after: of the start, and of the state that was kept.
        step: steps of that state; 0 is the start.
        quality: of the model before the training, on each text.
    """

    before: float
    after: float
    step: int
    quality: list[TextQuality]


class ExportReport(Section):
    """One export; ``sha256`` by file; ``verify`` is None if it was not verified, with the reason in ``unverified``.

    ``quality`` is measured in the export's runtime with default settings, on the first rows of each text. ``error`` is
    the reason of a failed export, which has no files.
    """

    name: str
    files: list[str]
    bytes: int
    sha256: dict[str, str]
    verify: Verification | None
    unverified: str = ""
    notes: list[str] = []
    quality: list[TextQuality] = []
    error: str | None = None


class Forecast(Section):
    """Time and memory predicted for a phase before it started."""

    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int = 0


class Report(Section):
    """The whole report; ``schema_version`` changes with incompatible changes of the schema.

    ``timing`` (seconds), ``memory`` (peak bytes), ``device_memory`` (the same on GPUs) and ``forecast`` are by phase;
    ``notes`` are warnings about the whole run. ``quality`` has an entry for each text; the perplexities of ``baseline``
    and ``result`` are those of the headline.
    """

    schema_version: Literal[1] = 1
    model: ModelInfo
    recipe: dict[str, Any]
    environment: Environment
    baseline: Measure | None
    result: Measure
    quality: list[TextQuality] = []
    baselines: list[BaselineReport] = []
    recipe_text: str = ""
    layers: list[LayerReport]
    head: HeadReport | None = None
    recovery: RecoveryReport | None = None
    exports: list[ExportReport]
    bench: list[BenchResult]
    tasks: list[TaskResult] = []
    timing: dict[str, float]
    memory: dict[str, int] = {}
    device_memory: dict[str, int] = {}
    forecast: dict[str, Forecast] = {}
    peak_rss_bytes: int
    notes: list[str] = []

    @property
    def headline(self) -> TextQuality | None:
        """The first text of another kind than the calibration text; if there is none, the first text."""
        return next((text for text in self.quality if not text.calibrated), next(iter(self.quality), None))

    @property
    def damage(self) -> float | None:
        """``ln(perplexity / baseline perplexity)``, nats per token."""
        if self.baseline is None or self.baseline.perplexity is None or self.result.perplexity is None:
            return None
        return math.log(self.result.perplexity / self.baseline.perplexity)

    @property
    def value_cache(self) -> tuple[int, int]:
        """Numbers per token in the value cache, (dense, result)."""
        return (
            sum(layer.dense.kv_heads * layer.dense.d_v for layer in self.layers),
            sum(layer.dims.kv_heads * layer.dims.d_v for layer in self.layers),
        )

    def bench_of(self, name: str) -> BenchResult | None:
        """The bench result with this name, or None."""
        return next((entry for entry in self.bench if entry.name == name), None)
