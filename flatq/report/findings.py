"""The report in sentences: what is better than the baseline, what is worse, and what to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from flatq.export.baseline import BASELINE
from flatq.export.bench import BenchResult
from flatq.report.schema import Report
from flatq.units import size, speed, times

NOTICEABLE = 0.02  # speeds closer than this are called equal


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
            found.costs.append(
                f"{export.name}: not verified: {export.unverified or 'its runtime is not part of flatq'}."
            )
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
