"""The report in sentences: what is better than the baseline, what is worse, and what to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from flatq.export.baseline import BASELINE
from flatq.export.bench import BenchResult
from flatq.report.schema import BaselineReport, Report, TextQuality
from flatq.units import size, speed, times, with_error

NOTICEABLE = 0.02  # speeds closer than this are called equal
APART = 2.0  # damage on other text beyond this multiple of the damage on the calibration's kind is warned of
MEASURABLE = 0.02  # nats; a ratio of smaller damages says nothing


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
    _compare_texts(report, found)
    for rival in report.baselines:
        _compare_rival(rival, report, found)
    dense = report.bench_of(BASELINE)
    rivals = {rival.name: rival for rival in report.baselines}
    for entry in report.bench:
        if dense is not None and entry is not dense and entry.name not in rivals:
            _compare_speed(entry, dense, found)
    ours = next((entry for entry in report.bench if entry is not dense and entry.name not in rivals), None)
    for entry in report.bench:
        if ours is not None and entry.name in rivals:
            beside = f"Narrowing, beside quantization alone ({rivals[entry.name].description}): {ours.name}"
            _compare_speed(ours, entry, found, beside)
    if report.bench and dense is None:
        found.notes.append("The baseline's speed was not measured, so nothing is said about speed-up.")
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
            where = f" on {_kind(report.headline)}" if report.headline else ""
            (found.costs if report.damage > 0 else found.gains).append(  # any loss is a loss, however small
                f"Perplexity{where}: {before.perplexity:.2f} → {after.perplexity:.2f} "
                f"({after.perplexity / before.perplexity - 1:+.1%}, {report.damage:+.3f} nats per token)"
            )
    dense, kept_values = report.value_cache
    if kept_values < dense:
        found.gains.append(f"Value cache: {1 - kept_values / dense:.1%} fewer numbers per token of context")


def _kind(text: TextQuality) -> str:
    return f"{text.text} ({'kind calibrated on' if text.calibrated else 'not calibrated on'})"


def _compare_texts(report: Report, found: Findings) -> None:
    """What the headline leaves out: divergence, the other texts, and whether the calibration generalises."""
    first = report.headline
    if first is None:
        return
    divergence = with_error(first.kl, first.kl_stderr, ".3f")
    found.costs.append(
        f"On {_kind(first)} another token is likeliest than in the dense model at {1 - first.top1:.1%} of the "
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
            "Judged only on text of the kind that was calibrated on: what other text lost is not known; add a text of "
            "another kind to `evaluation`."
        )
    inside = [text for text in report.quality if text.calibrated]
    for seen in inside:
        for other in (text for text in report.quality if not text.calibrated):
            _warn_where_apart(seen, other, found)


def _compare_rival(rival: BaselineReport, report: Report, found: Findings) -> None:
    """What narrowing bought and what it cost, beside quantization alone; also when the answer is nothing."""
    ours = report.headline
    theirs = next((text for text in rival.quality if ours is not None and text.text == ours.text), None)
    if ours is None or theirs is None:
        return
    alone, where = f"quantization alone ({rival.description})", f"on {_kind(ours)}"
    ratio = report.result.bytes / rival.bytes
    sizes = f"{size(rival.bytes)} → {size(report.result.bytes)}"
    if rival.name == "quantized":
        cost = f"{theirs.damage:+.3f} → {ours.damage:+.3f} nats {where}"
        (found.gains if ratio < 1 else found.costs).append(
            f"Narrowing, beside {alone}: weights {sizes}, {1 - ratio:.1%} smaller, for a damage of {cost}"
        )
    elif theirs.damage <= ours.damage:
        found.costs.append(
            f"Narrowing bought nothing: {alone} loses {theirs.damage:+.3f} nats {where} in {size(rival.bytes)}, this "
            f"model {ours.damage:+.3f} in {size(report.result.bytes)}; quantization alone is better at this size"
        )
    else:
        found.gains.append(
            f"Narrowing pays at this size: {alone} loses {theirs.damage:+.3f} nats {where} in {size(rival.bytes)}, "
            f"this model {ours.damage:+.3f} in {size(report.result.bytes)}"
        )


def _warn_where_apart(seen: TextQuality, other: TextQuality, found: Findings) -> None:
    low, high = sorted((seen.damage, other.damage))
    if high > MEASURABLE and high > APART * max(low, 0):
        found.costs.append(
            f"WARNING: {seen.damage:+.3f} nats on {_kind(seen)}, but {other.damage:+.3f} on {_kind(other)}: the "
            "calibration does not stand for other text; calibrate on text of more kinds, or on more tokens"
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
