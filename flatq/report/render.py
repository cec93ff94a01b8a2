"""What a run found out, for programs (``report.json``), for terminals (``report.md``) and for people (``report.html``).

The JSON is the truth and the two others are drawn from it alone, so any of them can be made again later. The page is
one file that opens from disk: figures are inline SVG, there is no script and nothing is fetched.

A report that only shows gains is advertising. ``findings`` sorts every comparison with the baseline by its sign, and
the page puts "what it costs" beside "what it gains", in the same size of type.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import psutil
import yaml
from pydantic import BaseModel, ConfigDict

import flatq
from flatq.artifact import write_atomically, write_json
from flatq.export.bench import BenchResult
from flatq.export.verify import Verification
from flatq.machine.device import gpu_names
from flatq.model.decoder import LayerDims
from flatq.report import figures

BASELINE = "baseline"  # name of the dense model's entry in ``Report.bench``
NOTICEABLE = 0.02  # speeds closer than this are called equal


class Section(BaseModel):
    """Base of all parts: unknown keys, NaN and infinity are refused, and nothing changes after it was built."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelInfo(Section):
    """What was compressed."""

    name: str
    family: str
    d_model: int
    vocab: int
    layers: int


class Environment(Section):
    """Where it ran; a version is None where the package is not installed."""

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
        """This machine, now."""
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
        bytes: of the weights as they are stored.
        decode_bytes: read per decoded token, with ``decode_context`` tokens in the cache.
        perplexity: on ``perplexity_tokens`` held-out tokens; None if it was not measured.
    """

    parameters: int
    decoder_parameters: int
    bytes: int
    decode_bytes: int | None = None
    decode_context: int | None = None
    perplexity: float | None = None
    perplexity_tokens: int | None = None


class LayerReport(Section):
    """One layer: widths before and after, and relative errors by name (``value``, ``mlp``, ``q`` ... ``down``)."""

    index: int
    dims: LayerDims
    dense: LayerDims
    errors: dict[str, float]
    notes: list[str] = []


class HeadReport(Section):
    """The quantized head: the share of its logits' energy that its codes lose on the calibration tokens."""

    error: float
    notes: list[str] = []


class ExportReport(Section):
    """One export; ``sha256`` by file, ``verify`` None if the format has no runtime here."""

    name: str
    files: list[str]
    bytes: int
    sha256: dict[str, str]
    verify: Verification | None
    notes: list[str] = []


class Forecast(Section):
    """What a phase was expected to take, measured before it began."""

    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int = 0


class Report(Section):
    """Everything; the schema is a contract, ``schema_version`` changes with it.

    ``timing`` (seconds), ``memory`` (peak bytes), ``device_memory`` (the same on GPUs) and ``forecast`` are by phase;
    ``notes`` is what to know of the run as a whole.
    """

    schema_version: Literal[1] = 1
    model: ModelInfo
    recipe: dict[str, Any]
    environment: Environment
    baseline: Measure | None
    result: Measure
    layers: list[LayerReport]
    head: HeadReport | None = None
    exports: list[ExportReport]
    bench: list[BenchResult]
    timing: dict[str, float]
    memory: dict[str, int] = {}
    device_memory: dict[str, int] = {}
    forecast: dict[str, Forecast] = {}
    peak_rss_bytes: int
    notes: list[str] = []

    @property
    def damage(self) -> float | None:
        """``ln(perplexity / baseline perplexity)``: nats lost per token."""
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
        """The entry of that name."""
        return next((entry for entry in self.bench if entry.name == name), None)


@dataclass(slots=True)
class Findings:
    """Sentences: what is better than the baseline, what is worse, and what to know."""

    gains: list[str] = field(default_factory=list)
    costs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sort(self, ratio: float, sentence: str, *, more_is_better: bool) -> None:
        """File a ratio result / baseline under its sign."""
        if abs(ratio - 1) < NOTICEABLE:
            self.notes.append(f"{sentence} (about the same)")
        else:
            (self.gains if (ratio > 1) == more_is_better else self.costs).append(sentence)


def findings(report: Report) -> Findings:
    """Compare with the baseline, in words."""
    found = Findings()
    _compare_model(report, found)
    dense = report.bench_of(BASELINE)
    for entry in report.bench:
        if dense is not None and entry is not dense:
            _compare_speed(entry, dense, found)
    if report.bench and dense is None:
        found.notes.append("The baseline's speed was not measured, so nothing is said about speed-up.")
    for export in report.exports:
        if export.verify is None:
            found.costs.append(f"{export.name}: not verified, because its runtime is not part of flatq.")
        found.notes += [f"{export.name}: {note}" for note in export.notes]
    found.notes += report.notes
    found.notes += [f"Layer {layer.index}: {note}" for layer in report.layers for note in layer.notes]
    found.notes += report.head.notes if report.head else []
    return found


def _compare_model(report: Report, found: Findings) -> None:
    before, after = report.baseline, report.result
    if before is None:
        found.notes.append("The baseline was not measured, so the loss of quality is not known.")
    else:
        ratio = after.bytes / before.bytes
        grew = times(ratio, "larger", "smaller")
        found.sort(ratio, f"Weights: {size(before.bytes)} → {size(after.bytes)}, {grew}", more_is_better=False)
        if before.decode_bytes and after.decode_bytes:
            ratio = after.decode_bytes / before.decode_bytes
            words = f"{size(before.decode_bytes)} → {size(after.decode_bytes)}, {times(ratio, 'more', 'less')}"
            where = f"Read per decoded token at a context of {after.decode_context:,} (weights, float16 cache)"
            found.sort(ratio, f"{where}: {words}", more_is_better=False)
        kept = after.decoder_parameters / before.decoder_parameters
        if kept < 1:
            found.gains.append(f"Decoder parameters: {1 - kept:.1%} removed")
        if report.damage is None:
            found.notes.append("Perplexity was not measured on both models, so the loss of quality is not known.")
        else:
            assert before.perplexity is not None
            assert after.perplexity is not None
            (found.costs if report.damage > 0 else found.gains).append(  # any loss is a loss, however small
                f"Perplexity: {before.perplexity:.2f} → {after.perplexity:.2f} "
                f"({after.perplexity / before.perplexity - 1:+.1%}, {report.damage:+.3f} nats per token)"
            )
    dense, kept_values = report.value_cache
    if kept_values < dense:
        found.gains.append(f"Value cache: {1 - kept_values / dense:.1%} fewer numbers per token of context")


def _compare_speed(entry: BenchResult, dense: BenchResult, found: Findings) -> None:
    for what, after, before in (
        ("decode", entry.decode_tokens_per_second.median, dense.decode_tokens_per_second.median),
        ("prefill", entry.prefill_tokens_per_second.median, dense.prefill_tokens_per_second.median),
    ):
        words = f"{entry.name} {what}: {before:.4g} → {speed(after)}, {times(after / before, 'faster', 'slower')}"
        found.sort(after / before, words, more_is_better=True)
    ratio = entry.peak_rss_bytes / dense.peak_rss_bytes
    words = f"{size(dense.peak_rss_bytes)} → {size(entry.peak_rss_bytes)}, {times(ratio, 'more', 'less')}"
    found.sort(ratio, f"{entry.name} peak memory: {words}", more_is_better=False)


def write_report(report: Report, out_dir: Path) -> None:
    """Write ``report.md``, ``report.html`` and last ``report.json``, which marks a finished run; each appears whole."""
    write_atomically(out_dir / "report.md", render(report, "report.md.j2").encode())
    write_atomically(out_dir / "report.html", render(report, "report.html.j2").encode())
    write_json(out_dir / "report.json", report.model_dump(mode="json"))


def read_report(path: Path) -> Report:
    """Inverse of ``write_report``'s JSON."""
    return Report.model_validate_json(path.read_bytes())


def render(report: Report, template: str) -> str:
    """Fill one of the templates beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "speed": speed, "seconds": seconds, "number": number, "times": times}
    return environment.get_template(template).render(
        report=report,
        findings=findings(report),
        dense=report.bench_of(BASELINE),
        error_names=list(dict.fromkeys(name for layer in report.layers for name in layer.errors)),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True).rstrip(),
        ranks=lambda: figures.rank_profile(report),
        errors=lambda: figures.layer_errors(report),
        bars=lambda: figures.size_and_speed(report),
    )


def size(count: float) -> str:
    """Bytes for people, decimal units, three digits: ``135 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def speed(rate: float) -> str:
    """``72.4 tokens/s``."""
    return f"{rate:,.0f} tokens/s" if rate >= 100 else f"{rate:.3g} tokens/s"


def seconds(duration: float) -> str:
    """``340 ms``, ``12.1 s``, ``7 min 12 s``."""
    if duration < 1:
        return f"{duration * 1000:.3g} ms"
    return f"{duration:.1f} s" if duration < 99.95 else f"{int(duration) // 60} min {int(duration) % 60} s"


def number(value: float) -> str:
    """Four digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def times(ratio: float, up: str, down: str) -> str:
    """A ratio result / baseline in words: ``3.10 x faster``, or below one ``3.10 x slower``."""
    return f"{ratio:.2f} x {up}" if ratio >= 1 else f"{1 / ratio:.2f} x {down}"


def version_of(package: str) -> str | None:
    """Installed version, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
