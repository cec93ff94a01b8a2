"""The report in sentences: gains over the baseline, costs, and notes."""

from __future__ import annotations

from dataclasses import dataclass, field

from flatq.export.baseline import BASELINE
from flatq.export.bench import BenchResult
from flatq.report.schema import BaselineReport, Report, TextQuality
from flatq.units import size, speed, times, with_error

NOTICEABLE = 0.02  # smaller relative differences of speed are reported as equal
APART = 2.0  # warn if damage on other text exceeds this multiple of the damage on the calibration's kind of text
MEASURABLE = 0.02  # nats; the ratio of smaller damages is not significant


@dataclass(slots=True)
class Findings:
    """Sentences: gains over the baseline, costs, and notes."""

    gains: list[str] = field(default_factory=list)
    costs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sort(self, ratio: float, sentence: str, *, more_is_better: bool) -> None:
        """Add a sentence about a ratio result / baseline to gains, costs or (about 1) notes."""
        if abs(ratio - 1) < NOTICEABLE:
            self.notes.append(f"{sentence} (about the same)")
        else:
            (self.gains if (ratio > 1) == more_is_better else self.costs).append(sentence)


def findings(report: Report) -> Findings:
    """Compare the result with the baseline."""
    found = Findings()
    _compare_model(report, found)
    _compare_texts(report, found)
    _compare_recovery(report, found)
    for other in report.baselines:
        _compare_baseline(other, report, found)
    dense = report.bench_of(BASELINE)
    quantized = {baseline.name: baseline for baseline in report.baselines}
    for entry in report.bench:
        if dense is not None and entry is not dense and entry.name not in quantized:
            _compare_speed(entry, dense, found)
    ours = next((entry for entry in report.bench if entry is not dense and entry.name not in quantized), None)
    for entry in report.bench:
        if ours is not None and entry.name in quantized:
            alone = f"Narrowing, compared with quantization alone ({quantized[entry.name].description}): {ours.name}"
            _compare_speed(ours, entry, found, alone)
    if report.bench and dense is None:
        found.notes.append("The baseline's speed was not measured, so the speed-up is not known.")
    for export in report.exports:
        if export.error is not None:
            found.costs.append(f"{export.name}: FAILED, nothing was exported: {export.error}")
            continue
        if export.verify is None:
            found.costs.append(
                f"{export.name}: not verified: {export.unverified or 'its runtime is not part of flatq'}."
            )
        found.notes += [f"{export.name}: {note}" for note in export.notes]
    found.notes += report.notes
    _sort_layers(report, found)
    found.notes += report.head.notes if report.head else []
    return found


def _sort_layers(report: Report, found: Findings) -> None:
    """Notes on layers; a dead or ruined one is a cost."""
    for layer in report.layers:
        for note in layer.notes:
            grave = ": DEAD:" in note or ": RUINED:" in note
            (found.costs if grave else found.notes).append(f"Layer {layer.index}: {note}")


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
            where = f" on {_kind(report.headline)}" if report.headline else ""
            (found.costs if report.damage > 0 else found.gains).append(  # also below NOTICEABLE
                f"Perplexity{where}: {before.perplexity:.2f} → {after.perplexity:.2f} "
                f"({after.perplexity / before.perplexity - 1:+.1%}, {report.damage:+.3f} nats per token)"
            )
    dense, kept_values = report.value_cache
    if kept_values < dense:
        found.gains.append(f"Value cache: {1 - kept_values / dense:.1%} fewer numbers per token of context")


def _kind(text: TextQuality) -> str:
    return f"{text.text} ({'kind calibrated on' if text.calibrated else 'not calibrated on'})"


def _compare_texts(report: Report, found: Findings) -> None:
    """Divergence, quality on the other texts, and whether the calibration generalises."""
    first = report.headline
    if first is None:
        return
    divergence = with_error(first.kl, first.kl_stderr, ".3f")
    found.costs.append(
        f"On {_kind(first)} the most likely token differs from that of the dense model at {1 - first.top1:.1%} of the "
        f"positions; KL divergence {divergence} nats"
    )
    for text in report.quality:
        if text is not first:
            (found.costs if text.damage > 0 else found.gains).append(
                f"Perplexity on {_kind(text)}: {text.baseline_perplexity:.2f} → {text.perplexity:.2f} "
                f"({with_error(text.damage, text.damage_stderr, '+.3f')} nats per token)"
            )
    if all(text.calibrated for text in report.quality):
        found.notes.append(
            "Evaluated only on text of the calibration's kind, so the damage on other text is not known; add a text "
            "of another kind to `evaluation`."
        )
    inside = [text for text in report.quality if text.calibrated]
    for seen in inside:
        for other in (text for text in report.quality if not text.calibrated):
            _warn_where_apart(seen, other, found)


def _compare_recovery(report: Report, found: Findings) -> None:
    """What the stage ``recover`` gained on each text."""
    if report.recovery is None:
        return
    if report.recovery.step == 0:
        found.notes.append("recover: no step lowered the divergence on the rows held out, so nothing was changed")
        return
    after = {text.text: text for text in report.quality}
    for text in report.recovery.quality:
        damage = after[text.text].damage
        (found.gains if damage < text.damage else found.costs).append(
            f"recover (distillation, a kind of training) on {_kind(text)}: {text.damage:+.3f} → {damage:+.3f} nats per "
            "token"
        )


def _compare_baseline(other: BaselineReport, report: Report, found: Findings) -> None:
    """Compare the result with quantization without narrowing."""
    ours = report.headline
    theirs = next((text for text in other.quality if ours is not None and text.text == ours.text), None)
    if ours is None or theirs is None:
        return
    alone, where = f"quantization alone ({other.description})", f"on {_kind(ours)}"
    ratio = report.result.bytes / other.bytes
    sizes = f"{size(other.bytes)} → {size(report.result.bytes)}"
    if other.name == "quantized":
        cost = f"{theirs.damage:+.3f} → {ours.damage:+.3f} nats {where}"
        (found.gains if ratio < 1 else found.costs).append(
            f"Narrowing, compared with {alone}: weights {sizes}, {1 - ratio:.1%} smaller, for a damage of {cost}"
        )
    elif theirs.damage <= ours.damage:
        found.costs.append(
            f"Narrowing is worse at this size: {alone} loses {theirs.damage:+.3f} nats {where} in {size(other.bytes)}, "
            f"this model {ours.damage:+.3f} in {size(report.result.bytes)}"
        )
    else:
        found.gains.append(
            f"Narrowing is better at this size: {alone} loses {theirs.damage:+.3f} nats {where} in "
            f"{size(other.bytes)}, this model {ours.damage:+.3f} in {size(report.result.bytes)}"
        )


def _warn_where_apart(seen: TextQuality, other: TextQuality, found: Findings) -> None:
    low, high = sorted((seen.damage, other.damage))
    if high > MEASURABLE and high > APART * max(low, 0):
        found.costs.append(
            f"WARNING: {seen.damage:+.3f} nats on {_kind(seen)}, but {other.damage:+.3f} on {_kind(other)}: the "
            "calibration does not generalise to other text; calibrate on more kinds of text, or on more tokens"
        )


def _compare_speed(entry: BenchResult, dense: BenchResult, found: Findings, name: str = "") -> None:
    name = name or entry.name
    for what, after, before in (
        ("decode", entry.decode_tokens_per_second.median, dense.decode_tokens_per_second.median),
        ("prefill", entry.prefill_tokens_per_second.median, dense.prefill_tokens_per_second.median),
    ):
        words = f"{name} {what}: {before:.4g} → {speed(after)}, {times(after / before, 'faster', 'slower')}"
        found.sort(after / before, words, more_is_better=True)
    ratio = entry.peak_rss_bytes / dense.peak_rss_bytes
    words = f"{size(dense.peak_rss_bytes)} → {size(entry.peak_rss_bytes)}, {times(ratio, 'more', 'less')}"
    found.sort(ratio, f"{name} peak memory: {words}", more_is_better=False)
